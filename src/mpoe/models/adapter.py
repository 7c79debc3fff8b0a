"""Adapters: what fine-tuning changed in a mixture with frozen central tensors, saved and switched without its base.

In the identity gauge without truncation a central tensor is the base model's own weight. If it is frozen, a fine-tuned
mixture differs from its base in the parameters that trained and in nothing else: auxiliary tensors, routers and
whatever else was left to train. An adapter is these: megabytes, and many of them share one base in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mpoe.config import MPOEConfig
from mpoe.files import write_bytes, write_json
from mpoe.models.adapter_files import (
    CONFIG_FILE,
    FORMAT,
    HEAD_OPTIONS,
    VERSION,
    WEIGHTS_FILE,
    SavedAdapter,
    read_saved,
    read_tensors,
)
from mpoe.models.checkpoint import align
from mpoe.models.inspect import sharing_experts
from mpoe.models.quantized_base import plain_tensors
from mpoe.models.router_loss import mpoe_config, routers
from mpoe.models.upcycle import upcycle
from mpoe.nn import MPOExperts

_ATTRIBUTE = "_mpoe_adapters"


@dataclass
class AdapterSet:
    """The adapters that a model has in memory; a plain attribute of the model, outside of its `state_dict`.

    Attributes:
        base: The base model's values of everything that some adapter holds, by parameter name; on the CPU.
        adapters: The values of every adapter, by its name and the parameter's; on the CPU.
        active: The name of the adapter whose values are in the model; None is the base.
    """

    base: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    active: str | None = None

    @property
    def active_values(self) -> dict[str, Tensor]:
        """The active adapter's values when it was last loaded or left, by parameter name; empty for the base."""
        return {} if self.active is None else self.adapters[self.active]


def save_adapter(model: PreTrainedModel, folder: str | Path) -> Path:
    """Write the parameters that require a gradient, and what is needed to find their base again.

    `adapter_model.safetensors` holds these parameters, tied ones once, the scales of the experts' offsets, and the
    biases that balance the experts; `adapter_config.json` the mixture's config, the name of the base and a hash of all
    parameters that stayed behind.

    Args:
        model: A mixture whose central tensors are frozen; in the layout "balanced", in the identity gauge and without
            truncation.
        folder: Made if it is not there; an adapter in it is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: A model without matrix product operators, another gauge or truncation, a central tensor that
            trains, nothing that trains, an active adapter of which a part is frozen, a folder that cannot be written.
    """
    config, experts = mpoe_config(model), sharing_experts(model)
    trained = _trained(model)
    if config is None or not experts:
        raise ValueError(
            f"only a mixture with matrix product operators has an adapter; this {type(model).__name__} has none: make "
            "them with mpoe.upcycle, or save the whole model with save_pretrained"
        )
    for name, module in experts.items():
        if isinstance(module, MPOExperts) and not _is_centred_on_base(module):
            raise ValueError(
                f"an adapter needs gauge 'identity' and no truncated bond, so that a central tensor is the base's "
                f"weight; {name} has gauge {module.gauge!r} and bonds {module.dims.bond_dims(module.max_bond_dim)}: "
                "save the whole model with save_pretrained"
            )
        central = module.central if isinstance(module, MPOExperts) else module.base_weight
        if central is not None and central.requires_grad:
            raise ValueError(
                f"an adapter leaves the central tensors to the base, so they must be frozen; that of {name} requires a "
                "gradient: train with --tensor_learn or freeze the base before mpoe.upcycle, or save the whole model "
                "with save_pretrained"
            )
    if not trained:
        raise ValueError("an adapter holds the parameters that require a gradient; none does: unfreeze what you train")
    adapters = _adapters(model)
    frozen = sorted(adapters.active_values.keys() & dict(model.named_parameters()).keys() - trained)
    if frozen:
        raise ValueError(
            f"every parameter of the active adapter {adapters.active!r} must require a gradient to be saved with it; "
            f"{_first_of(frozen)} does not: unfreeze it with requires_grad_(True)"
        )

    tensors = _tensors(model)
    held = trained | (tensors.keys() - dict(model.named_parameters()).keys())
    weights = safetensors.torch.save({n: _copy(t) for n, t in tensors.items() if n in held}, {"format": "pt"})
    values = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": type(model).__name__,
        "head": {name: getattr(model.config, name, None) for name in HEAD_OPTIONS},
        "base_model_name_or_path": model.name_or_path,
        "base_hash": _base_hash(model, held, adapters.base),
        "base_dtypes": _dtypes(model, held),
        "weights_hash": hashlib.sha256(weights).hexdigest(),
        "mpoe": config.to_dict(),
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / WEIGHTS_FILE, weights)
        write_json(folder / CONFIG_FILE, values)
    except OSError as error:
        raise ValueError(f"{folder} must be a folder that can be written; {error.strerror}: name another") from error
    return folder


def load_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default") -> PreTrainedModel:
    """Load an adapter onto its base model and make it the active one, ready to be used or trained further.

    Afterwards exactly the adapter's parameters require a gradient. Its values take the dtype and device of the model's
    parameters and stay in memory under `name` for `set_adapter`.

    Args:
        model: The dense base model, which is upcycled in place with the adapter's config; or a mixture of an equal
            config. The mixture that the first adapter is loaded onto is the base as it is, so it should be fresh from
            `upcycle`: what its parameters are then is what `set_adapter(model, None)` brings back.
        folder: What `save_adapter` wrote.
        name: A name that no loaded adapter has.

    Returns:
        The same object.

    Raises:
        ValueError: A folder without a complete adapter, another config than the mixture's, parameters that the model
            has not, another base, a name that is taken, parameters that train outside of the active adapter. A mixture
            is unchanged then. A dense model is upcycled before its parameters can be compared, and stays so.
    """
    saved, config, adapters = read_saved(Path(folder)), mpoe_config(model), _adapters(model)
    held_tensors = read_tensors(Path(folder), saved)
    if config is None:
        try:
            upcycle(model, saved.config)
        except ValueError as error:
            raise ValueError(f"{folder} must be an adapter of this kind of model; {error}") from error
        align(model)  # without it the base's weights, fresh from a file, may give other last bits than in training
    else:
        _check_config(saved.config, config, folder)
    if name in adapters.adapters:
        raise ValueError(f"name must be new; {name!r} is one of the loaded adapters {sorted(adapters.adapters)}")
    _check_trained(model, adapters)
    tensors = _tensors(model)
    for held, value in sorted(held_tensors.items()):
        if held not in tensors or tensors[held].shape != value.shape:
            here = f"one of shape {tuple(tensors[held].shape)}" if held in tensors else "none"
            raise ValueError(
                f"{folder} must be an adapter of this kind of model; it holds a {held} of shape {tuple(value.shape)}, "
                f"the model has {here}"
            )
    _check_base(model, adapters, saved, held_tensors, folder)

    for held in held_tensors:
        adapters.base.setdefault(held, _copy(tensors[held]))
    adapters.adapters[name] = held_tensors
    setattr(model, _ATTRIBUTE, adapters)
    _activate(model, adapters, name)
    return model


def set_adapter(model: PreTrainedModel, name: str | None) -> None:
    """Make another adapter the active one, in place; what the model shares with its base is not touched.

    The values of the adapter that was active are taken back into memory first, so what it learned since it was loaded
    is kept (in memory; `save_adapter` writes it). Parameters that only other adapters hold go back to the base's
    values. Afterwards exactly the adapter's parameters require a gradient, and all gradients are None; an optimizer
    made before has the moments of another adapter, so make a new one.

    Args:
        model: A model with adapters.
        name: One that `load_adapter` gave; None is the base, of which nothing requires a gradient.

    Raises:
        ValueError: A name that is not loaded, parameters that train outside of the active adapter. Nothing has changed
            then.
    """
    adapters = _adapters(model)
    if name is not None and name not in adapters.adapters:
        raise ValueError(
            f"name must be one of the loaded adapters {sorted(adapters.adapters)} or None; got {name!r}; load it with "
            "mpoe.load_adapter"
        )
    _check_trained(model, adapters)
    _activate(model, adapters, name)


def active_adapter(model: PreTrainedModel) -> str | None:
    """The name of the adapter whose values are in the model; None is the base.

    Args:
        model: Any model.
    """
    return _adapters(model).active


def _activate(model: nn.Module, adapters: AdapterSet, name: str | None) -> None:
    tensors = _tensors(model)
    if adapters.active is not None:
        adapters.adapters[adapters.active] = {held: _copy(tensors[held]) for held in adapters.active_values}
    adapters.active = name
    with torch.no_grad():
        for held, value in {**adapters.base, **adapters.active_values}.items():
            tensors[held].copy_(value)
    for held, parameter in model.named_parameters():
        parameter.requires_grad_(held in adapters.active_values)
        # It belongs to the old values, and an optimizer would even move a frozen parameter by it.
        parameter.grad = None


def _adapters(model: nn.Module) -> AdapterSet:
    return getattr(model, _ATTRIBUTE, None) or AdapterSet()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that an adapter may hold, by name: parameters (tied ones once), scales, and the routers' biases.

    The scales follow from the base, but the last bits of a mean depend on the machine.
    """
    found: dict[str, Tensor] = dict(model.named_parameters())
    for name, experts in sharing_experts(model).items():
        found |= {f"{name}.{own}": buffer for own, buffer in experts.named_buffers() if own in ("scale", "scales")}
    for name, router in routers(model).items():
        found |= dict(router.named_buffers(prefix=f"{name}.router"))
    return found


def _is_centred_on_base(experts: MPOExperts) -> bool:
    return experts.gauge == "identity" and experts.central.numel() == experts.dims.padded_out * experts.dims.padded_in


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _base_hash(model: nn.Module, held: Collection[str], base: Mapping[str, Tensor]) -> str:
    """The sha256 of all parameters that an adapter does not hold; `base` has those that another adapter changed."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name not in held:
            tensor = base[name].to(parameter.dtype) if name in base else parameter.detach()
            for value in plain_tensors(tensor):
                digest.update(f"{name} {_dtype_name(value)} {tuple(value.shape)}\n".encode())
                digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dtypes(model: nn.Module, held: Collection[str]) -> list[str]:
    stay = (parameter for name, parameter in model.named_parameters() if name not in held)
    return sorted({_dtype_name(value) for parameter in stay for value in plain_tensors(parameter)})


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_of(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _check_config(saved: MPOEConfig, config: MPOEConfig, folder: str | Path) -> None:
    # through JSON, where a list and a tuple are the same
    there, here = (json.loads(json.dumps(c.to_dict())) for c in (saved, config))
    if there != here:
        changes = ", ".join(f"{k}: {there[k]} there, {here[k]} here" for k in there if there[k] != here[k])
        raise ValueError(
            f"{folder} must be an adapter of a mixture with the model's config; {changes}: load it onto a dense base"
        )


def _check_trained(model: nn.Module, adapters: AdapterSet) -> None:
    """Refuse to switch away from trained values that memory has no name for, or that are taken for the base's."""
    stray = sorted(_trained(model) - adapters.active_values.keys())
    if adapters.adapters and stray:
        raise ValueError(
            f"only parameters of the active adapter ({adapters.active!r}) may train when another is to replace it; "
            f"{_first_of(stray)} requires a gradient: freeze it if it has not changed, or save_adapter and load that "
            "onto a fresh base"
        )


def _check_base(
    model: PreTrainedModel, adapters: AdapterSet, saved: SavedAdapter, held: Collection[str], folder: str | Path
) -> None:
    base_hash = _base_hash(model, held, adapters.base)
    if base_hash != saved.base_hash:
        dtypes = _dtypes(model, held)
        same = dtypes == saved.base_dtypes
        what = "weights that it was trained with" if same else f"base with dtype {' and '.join(saved.base_dtypes)}"
        raise ValueError(
            f"wrong base: the adapter in {folder} belongs to {saved.model.base_name!r} (hash {saved.base_hash[:12]}, "
            f"{' and '.join(saved.base_dtypes)}); this model is {model.name_or_path!r} (hash {base_hash[:12]}, "
            f"{' and '.join(dtypes)}); load the {what}"
        )
