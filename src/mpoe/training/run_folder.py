"""The output folder of a run: claimed by one command, resumed by the same command, never overwritten by another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mpoe.files import is_full_disk, read_json, write_json
from mpoe.training.checkpoint_files import finished_checkpoints, last_checkpoint, unfinished_checkpoints

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
LOG_FILE = "log.jsonl"
_UNFINISHED = ".saving"
_LOCK = ".lock"
UNSET = "the default"  # run.json holds what was asked for


@dataclass(frozen=True)
class RunFolder:
    """An output folder, free or with a run of the same command.

    Attributes:
        path: The folder.
        arguments: What the user asked for, JSON-ready; it is what "the same command" means.
        checkpoint: The last complete checkpoint of an interrupted run of the same command; None for a new run.
        results: What a finished run of the same command wrote; None if it has not finished.
    """

    path: Path
    arguments: dict[str, Any]
    checkpoint: Path | None = None
    results: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: str | Path, arguments: dict[str, Any]) -> RunFolder:
        """Look at a folder; writes nothing.

        Args:
            path: New, empty, or with a run of the same arguments.
            arguments: What the user asked for, JSON-ready.

        Raises:
            ValueError: A file, another run, a folder of something else, or a last checkpoint that is damaged.
        """
        path = Path(path)
        arguments = json.loads(json.dumps(arguments))
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir must be a folder; {path} is a file; name another")
        if not path.is_dir() or not any(path.iterdir()):
            return cls(path, arguments)
        if not (path / RUN_FILE).is_file():
            raise ValueError(
                f"output_dir must be new, empty or hold a run of this command; {path} holds other files and no "
                f"{RUN_FILE}; name another{_way_on(path)}"
            )
        earlier = _read_run(path)
        if earlier != arguments:
            different = sorted(k for k in {*earlier, *arguments} if earlier.get(k) != arguments.get(k))
            changes = ", ".join(f"{k}: {earlier.get(k, UNSET)} there, {arguments.get(k, UNSET)} now" for k in different)
            rows = (
                "; rows_a_step is per_device_train_batch_size times processes times gradient_accumulation_steps"
                if "rows_a_step" in different
                else ""
            )
            raise ValueError(
                f"output_dir {path} holds another run ({changes}){rows}; repeat that run, or name another folder, into "
                f"which --load_experiment {path} takes its weights"
            )
        if (path / RESULTS_FILE).is_file():
            return cls(path, arguments, results=read_json(path / RESULTS_FILE))
        return cls(path, arguments, last_checkpoint(path))

    def claim(self) -> None:
        """Take the folder for this run, once everything that can be wrong about a command has been looked at.

        Raises:
            ValueError: It cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / RUN_FILE).is_file():
                write_json(self.path / RUN_FILE, self.arguments)
        except OSError as error:
            raise ValueError(f"output_dir must be writable; {self.path}: {error.strerror}") from error

    @contextmanager
    def guard(self, is_main: bool = True) -> Iterator[None]:
        """Within it nobody else trains here; a full disk is one clear error, and what was written in part is deleted.

        A run that fails before its first checkpoint gives the folder free again, for the mended command.

        Args:
            is_main: Whether this process holds the folder; of a distributed run, one does.

        Raises:
            ValueError: Another process trains in the folder, or the disk is full.
        """
        try:
            held = self._held() if is_main else nullcontext()
            with self._freed_if_nothing_was_written() if is_main else nullcontext(), held:
                yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_full_disk(error, self.path):
                raise
            for part in (*unfinished_checkpoints(self.path), self.path / _UNFINISHED):
                shutil.rmtree(part, ignore_errors=True)
            kept = finished_checkpoints(self.path)
            then = f"goes on from {kept[0].name}, which is kept" if kept else "starts anew: there was no checkpoint yet"
            raise ValueError(
                f"output_dir must have room for checkpoints and the model; the disk of {self.path} is full. Make room, "
                f"and the same command {then}"
            ) from error

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The folder as this process's own, until it ends in whatever way."""
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"output_dir must be no run's that is going on; another process trains in {self.path}. Wait for it, or "
                "stop it: then the same command goes on from its last checkpoint"
            ) from error
        except (NotImplementedError, OSError):  # a file system without locks
            yield
            return
        try:
            yield
        finally:
            lock.release()
            (self.path / _LOCK).unlink(missing_ok=True)

    @contextmanager
    def _freed_if_nothing_was_written(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            written = list(self.path.iterdir())
            if {file.name for file in written} <= {RUN_FILE, LOG_FILE}:  # a log without a checkpoint begins anew
                for file in written:
                    file.unlink(missing_ok=True)
            raise

    def save(self, write_model: Callable[[str], None], results: dict[str, Any], is_main: bool = True) -> None:
        """Write the model's files, then the results; every file appears under its name only when it is complete.

        Args:
            write_model: Writes the files of the model into the folder that it is given.
            results: JSON-ready.
            is_main: Whether this process writes them; of a distributed run, one does. All of them have to call this.
        """
        unfinished = self.path / _UNFINISHED
        if is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        write_model(str(unfinished))
        if not is_main:
            return
        for file in unfinished.iterdir():
            file.replace(self.path / file.name)
        unfinished.rmdir()
        write_json(self.path / RESULTS_FILE, results)


def _read_run(path: Path) -> dict[str, Any]:
    try:
        return read_json(path / RUN_FILE)
    except ValueError as error:
        raise ValueError(f"{error}. Write it anew, or name another folder{_way_on(path)}") from error


def _way_on(path: Path) -> str:
    """What can be done with the checkpoints of a run that is not known any more."""
    kept = finished_checkpoints(path)
    return f", into which --load_experiment {kept[0]} takes the weights that are there" if kept else ""
