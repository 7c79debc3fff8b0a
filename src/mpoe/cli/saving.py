"""Write a model into a new folder, which appears under its name only when it is complete."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Args:
        folder: For a result.

    Raises:
        ValueError: A file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output_dir must be a new or empty folder; {folder} is not: name another")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write into a folder beside, which takes the name when it is complete.

    Args:
        model: Any of Transformers.
        tokenizer: None is none.
        folder: New or empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        unfinished = Path(beside) / "model"
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        unfinished.replace(folder)
