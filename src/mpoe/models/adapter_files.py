"""The files of an adapter, read: what it says of itself, and its tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mpoe.config import MPOEConfig
from mpoe.files import brief, read_json

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT = "mpoe-adapter"
VERSION = 1
HEAD_OPTIONS = ("num_labels", "id2label", "problem_type")  # of a classifier, which its base need not be

_KINDS: dict[str, Any] = {
    "mpoe": object, "base_model_name_or_path": str, "architecture": str | None, "head": dict, "base_hash": str,
    "base_dtypes": list, "weights_hash": str,
}  # fmt: skip


@dataclass(frozen=True)
class AdaptedModel:
    """The model that an adapter was saved from, as far as one must know to load its base.

    Attributes:
        base_name: The folder or hub name of the base.
        architecture: The name of the model's class; None in an adapter of the first days of mpoe.
        head: Values of HEAD_OPTIONS in the model's config.
    """

    base_name: str
    architecture: str | None
    head: dict[str, Any]


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder holds beside its tensors.

    Attributes:
        config: Of the mixture.
        model: What was saved.
        base_hash: Of all parameters that the adapter does not hold.
        base_dtypes: Of these.
        weights_hash: Of the file of its tensors.
    """

    config: MPOEConfig
    model: AdaptedModel
    base_hash: str
    base_dtypes: list[str]
    weights_hash: str


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter instead of a model.

    Args:
        folder: Any path or name.
    """
    return (Path(folder) / CONFIG_FILE).is_file()


def adapted_model(folder: str | Path) -> AdaptedModel:
    """What an adapter's base is loaded as.

    Args:
        folder: What `save_adapter` wrote.

    Raises:
        ValueError: A damaged adapter.
    """
    return read_saved(Path(folder)).model


def read_saved(folder: Path) -> SavedAdapter:
    """What an adapter says of itself; its weights, which are much larger, are only looked for.

    Args:
        folder: What `save_adapter` wrote.

    Raises:
        ValueError: A folder without an adapter, or a damaged one.
    """
    file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (file, weights_file):
        if not path.is_file():
            raise ValueError(f"{folder} must be a folder that mpoe.save_adapter wrote; it has no {path.name}")
    values = read_json(file)
    if values.get("format") != FORMAT:
        raise ValueError(f"{file} must have format {FORMAT!r}; got {values.get('format')!r}")
    if values.get("version") != VERSION:
        raise ValueError(f"{file} must have version {VERSION}; got {values.get('version')!r}: update mpoe")
    values = {"architecture": None, "head": {}, **values}
    for name, kind in _KINDS.items():
        if name not in values:
            raise ValueError(f"{file} must be as mpoe.save_adapter writes it; it has no {name!r}")
        if not isinstance(values[name], kind):
            raise ValueError(f"{file} must be as mpoe.save_adapter writes it; its {name} is {brief(values[name])}")
    if not all(isinstance(dtype, str) for dtype in values["base_dtypes"]):
        raise ValueError(f"{file} must have names of dtypes as base_dtypes; got {brief(values['base_dtypes'])}")
    try:
        if not isinstance(values["mpoe"], dict):
            raise ValueError(f"got {brief(values['mpoe'])}")
        config = MPOEConfig.from_dict(values["mpoe"])
    except ValueError as error:
        raise ValueError(f"{file} must hold the config of a mixture under 'mpoe'; {error}") from error
    model = AdaptedModel(values["base_model_name_or_path"], values["architecture"], _head(file, values["head"]))
    return SavedAdapter(config, model, values["base_hash"], values["base_dtypes"], values["weights_hash"])


def read_tensors(folder: Path, saved: SavedAdapter) -> dict[str, Tensor]:
    """An adapter's tensors by name.

    Args:
        folder: The adapter's.
        saved: What `read_saved` found there.

    Raises:
        ValueError: They are not what was saved.
    """
    weights_file = folder / WEIGHTS_FILE
    try:
        weights = weights_file.read_bytes()
        if hashlib.sha256(weights).hexdigest() != saved.weights_hash:
            raise ValueError(f"its sha256 is not the weights_hash of {CONFIG_FILE}")
        return safetensors.torch.load(weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{weights_file} must be complete and unchanged; {error}: copy or save it again") from error


def _head(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Of a config.json, so that the indices of labels are texts."""
    labels = values.get("id2label") or {}
    is_right = (
        isinstance(labels, dict)
        and all(index.isdecimal() and isinstance(label, str) for index, label in labels.items())
        and (len(labels) == values.get("num_labels") if labels else isinstance(values.get("num_labels"), int | None))
        and isinstance(values.get("problem_type"), str | None)
        and values.keys() <= set(HEAD_OPTIONS)
    )
    if not is_right:
        raise ValueError(f"{file} must have a classifier's {', '.join(HEAD_OPTIONS)} as its head; got {brief(values)}")
    return values | ({"id2label": {int(index): label for index, label in labels.items()}} if labels else {})
