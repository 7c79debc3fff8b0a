"""The output folder of a run: claimed by one command, resumed by the same command, never overwritten by another."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.files import read_json, write_json

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
# The Trainer writes this file last, so a checkpoint that has it was written to its end.
CHECKPOINT_MARK = "trainer_state.json"


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
            ValueError: A file, another run, or a folder of something else.
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
                f"{RUN_FILE}; name another"
            )
        earlier = read_json(path / RUN_FILE)
        if earlier != arguments:
            different = sorted(k for k in {*earlier, *arguments} if earlier.get(k) != arguments.get(k))
            changes = ", ".join(f"{k}: {earlier.get(k, '-')} there, {arguments.get(k, '-')} now" for k in different)
            raise ValueError(
                f"output_dir {path} holds another run ({changes}); name another folder, or repeat that run"
            )
        results = read_json(path / RESULTS_FILE) if (path / RESULTS_FILE).is_file() else None
        return cls(path, arguments, last_checkpoint(path), results)

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

    def save(self, write_model: Callable[[str], None], results: dict[str, Any]) -> None:
        """Write the model's files, then the results; every file appears under its name only when it is complete.

        Args:
            write_model: Writes the files of the model into the folder that it is given.
            results: JSON-ready.
        """
        unfinished = self.path / ".saving"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_model(str(unfinished))
        for file in unfinished.iterdir():
            file.replace(self.path / file.name)
        unfinished.rmdir()
        write_json(self.path / RESULTS_FILE, results)


def last_checkpoint(path: Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder; None if there is none."""
    steps = {
        int(match[1]): folder
        for folder in path.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / CHECKPOINT_MARK).is_file()
    }
    return steps[max(steps)] if steps else None
