"""A training checkpoint's files: sealed with checksums once all are written, examined before a run goes on from them.

The Trainer writes a checkpoint file by file, so a process that dies leaves a part of one; a disk that loses a bit
leaves one that loads and is wrong. The checksums tell both from a good one.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from mpoe.files import is_file_name, load_json, read_json, sha256_of, write_json
from mpoe.models.pickles import SUFFIXES

CHECKSUMS_FILE = "checksums.json"
LAST_FILE = "trainer_state.json"  # that the Trainer writes


def finished_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, the last one first.

    Args:
        folder: The run's output folder.
    """
    return [path for path in _checkpoints(folder) if _is_finished(path)]


def unfinished_checkpoints(folder: Path) -> list[Path]:
    """The others, which a process that died was writing.

    Args:
        folder: The run's output folder.
    """
    return [path for path in _checkpoints(folder) if not _is_finished(path)]


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end; None if there is none.

    Args:
        folder: The run's output folder.

    Raises:
        ValueError: Its files are not what was written. The message names the file, and the checkpoint before it.
    """
    found = finished_checkpoints(folder)
    if not found:
        return None
    if damage := _find_damage(found[0]):
        then = f"goes on from {found[1].name}" if len(found) > 1 else "starts anew"
        raise ValueError(
            f"{found[0]} must hold what this run wrote; {damage}. Delete this checkpoint (rm -r {found[0]}), and the "
            f"same command {then}"
        )
    return found[0]


def seal(checkpoint: Path) -> None:
    """Note the size and checksum of every file of a checkpoint, once all of them are on the disk.

    Args:
        checkpoint: With all its files.
    """
    sums = {}
    for file in _files(checkpoint):
        with file.open("rb") as data:
            os.fsync(data.fileno())
        sums[str(file.relative_to(checkpoint))] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    write_json(checkpoint / CHECKSUMS_FILE, sums)


class NothingLeft(Exception):  # noqa: N818  # no error
    """The checkpoint that a run goes on from is that of its last step."""


class CheckpointCallback(TrainerCallback):
    """Seals every checkpoint, and logs the loss before it, which a run that goes on from there would not know.

    Raises:
        NothingLeft: When training would begin after its last step, of which the Trainer makes one step more.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, before the first step too."""
        if state.global_step >= state.max_steps:
            raise NothingLeft

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if control.should_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer once a checkpoint is written; every process has a file of its own in it."""
        PartialState().wait_for_everyone()
        if args.should_save:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _checkpoints(folder: Path) -> list[Path]:
    named = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in folder.glob("checkpoint-*"))
    steps = {int(match[1]): path for path, match in named if match}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _is_finished(checkpoint: Path) -> bool:
    """Sealed; or all there, if the process died before it was sealed."""
    if (checkpoint / CHECKSUMS_FILE).is_file():
        return True
    return (checkpoint / LAST_FILE).is_file() and all(map(_is_whole, _files(checkpoint)))


def _is_whole(file: Path) -> bool:
    """Whether a file ends where its own format says."""
    try:
        if file.suffix == ".json":
            load_json(file.read_bytes())
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return True
        elif file.suffix in SUFFIXES:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
    # the last two: a compression that is not known, a password
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False
    return True


def _find_damage(checkpoint: Path) -> str | None:
    """The first file of a sealed checkpoint that is not as it was, and how; None if all are."""
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        return None
    damaged = f"{CHECKSUMS_FILE} is damaged"
    try:
        sums = read_json(checkpoint / CHECKSUMS_FILE)
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in sums.items()}
    except (ValueError, TypeError, KeyError, OverflowError):  # an infinite number of bytes
        return damaged
    if not all(is_file_name(name, deep=True) for name in expected):
        return damaged
    for name, (size, checksum) in tqdm(expected.items(), desc=f"Examining {checkpoint.name}", delay=5, leave=False):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
        if sha256_of(file) != checksum:
            return f"{name} has not the checksum that {CHECKSUMS_FILE} has of it"
    return None


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
