"""Runs named on a command line: what they are called in a table, and where what is made of them goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def name_runs(words: Sequence[str]) -> dict[str, Path]:
    """The runs' folders by the names that tell them apart.

    Args:
        words: Folders. Where all of them lie in one folder, its name says nothing and is left out.
    """
    paths = [Path(word) for word in words]
    is_one_folder = len({path.parent for path in paths}) == 1
    return {path.name or str(path) if is_one_folder else str(path): path for path in paths}


def beside(runs: Mapping[str, Path], name: str) -> Path:
    """The file of that name in the folder that all runs lie in, or else in the working directory.

    Args:
        runs: From `name_runs`.
        name: Of the file.
    """
    folders = {path.parent for path in runs.values()}
    return folders.pop() / name if len(folders) == 1 else Path(name)
