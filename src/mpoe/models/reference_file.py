"""The file of a reference checkpoint: its tensors by name, without ever executing what a pickle may ask for."""

from __future__ import annotations

import pickle  # nosec B403  # for its error alone
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mpoe.models.pickles import REASON

SITE_KEY = re.compile(r"(?P<matrix>.+)_mpo\.(?:tensor_set\.)?(?P<site>\d+)")
"""The name of a site tensor."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a reference checkpoint; tied ones once, and none that the reference itself does not use.

    Args:
        path: A `.safetensors` file, or what torch.save wrote: a `state_dict` as it is or under "state_dict" or "model".
            The prefix that DDP puts before the names is taken off.

    Returns:
        The tensors by the reference's names, on the CPU.

    Raises:
        ValueError: A file that is not there, damaged or no checkpoint, a pickle that needs code, a tensor that is not
            finite, tied tensors that differ.
    """
    path = Path(path)
    found = _load_file(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())
    ):
        raise ValueError(f"{path} must hold a state_dict, tensors by name; it holds something else")
    prefix = "module." if all(key.startswith("module.") for key in found) else ""
    tensors: dict[str, Tensor] = {}
    for key, tensor in found.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
        if not is_plain or not torch.isfinite(tensor).all():
            raise ValueError(f"the tensors of a checkpoint must be finite floating-point numbers; {key} is not")
        name = re.sub(r"\.DenseReluDense\.(?=sffn\.|moe_layer\.)", ".", key.removeprefix(prefix))
        name = re.sub(r"^(encoder|decoder)\.embed_tokens(?=[._])", "shared", name)
        if name in tensors and not torch.equal(tensors[name], tensor):
            raise ValueError(f"{key} must equal {name}, to which it is tied; it differs")
        tensors[name] = tensor
    # The reference decomposes a matrix and goes on carrying the dense one in some places.
    decomposed = {match["matrix"] for match in map(SITE_KEY.fullmatch, tensors) if match}
    tensors = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in decomposed}
    head = {name: name.replace("lm_head", "shared", 1) for name in tensors if name.startswith("lm_head")}
    if all(twin in tensors and torch.equal(tensors[name], tensors[twin]) for name, twin in head.items()):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in head}
    return tensors


def _load_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises can be anything
        reason = REASON
        if not isinstance(error, pickle.UnpicklingError):
            reason = f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"
        raise ValueError(
            f"{path} must be a complete .safetensors file, or a file of torch.save with tensors only; {reason}"
        ) from error
