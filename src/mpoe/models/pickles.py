"""Files of torch.save are pickles, which may hold code: readers take numbers alone; this names a file with more."""

from __future__ import annotations

import pickle  # nosec B403  # for its error alone
from pathlib import Path

import torch

SUFFIXES = (".bin", ".pt", ".pth")
NOT_READ = ("training_args.bin",)  # the Trainer writes it, and nobody reads it
REASON = "it is damaged, or a pickle that needs code to be executed, which is never done"
"""Instead of torch's own text, which recommends to execute it."""


def find_refused(folder: str | Path) -> Path | None:
    """The first file of a folder that torch does not read as numbers alone; None if there is none.

    Args:
        folder: Of a model or a checkpoint; what is no folder holds no file.
    """
    for file in sorted(Path(folder).glob("*")):
        if file.suffix in SUFFIXES and file.name not in NOT_READ:
            try:
                torch.load(file, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, EOFError, RuntimeError):
                return file
    return None
