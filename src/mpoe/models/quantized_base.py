"""Quantised bases: which layers are quantised, experts around them, and the marks that Transformers keeps on the model.

A quantised weight is either a tensor subclass around plain tensors (torchao) or whole numbers that only its module can
read (bitsandbytes).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from mpoe.config import MPOEConfig
from mpoe.files import brief
from mpoe.models.matrices import empty_mpo
from mpoe.nn import FrozenBaseExperts
from mpoe.nn.frozen_base import FrozenLinear


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of a layer is quantised.

    Args:
        layer: Any with a weight.
    """
    return _is_quantized(layer.get_parameter("weight"))


def frozen_base_experts(
    base: nn.Module, config: MPOEConfig, name: str, num_experts: int = 1, bias: str = "none"
) -> FrozenBaseExperts:
    """Experts around a linear layer of the base, which stays where it is in memory.

    Args:
        base: The layer, quantised or not.
        config: Layout, gauge, site dimensions and scale of the offsets.
        name: Of the layer in its module, "wo" or "mlp.up_proj".
        num_experts: E, count.
        bias: See `FrozenBaseExperts`.

    Raises:
        ValueError: A layout, gauge, truncation or site dimensions whose central tensor is not the layer's own matrix,
            or whole experts.
    """
    if (
        config.layout != "separable"
        or config.gauge != "identity"
        or config.max_bond_dim is not None
        or config.matrices
        or not config.auxiliary_start
    ):
        raise ValueError(
            "a quantised base needs layout 'separable', gauge 'identity', max_bond_dim and matrices None, and "
            f"auxiliary_start, so that the central tensor is its own weight; got {config.layout!r}, {config.gauge!r}, "
            f"{config.max_bond_dim}, {brief(config.matrices)} and {config.auxiliary_start} for {name}"
        )
    if "mlp" not in config.mpo_layers:
        raise ValueError(
            f"experts around the quantised {name} are MPOs, so mpo_layers must have 'mlp'; got {config.mpo_layers}: "
            "load the base in floating point for whole experts"
        )
    with torch.device("meta"):
        dims = empty_mpo(base.out_features, base.in_features, config, "mlp", name.rpartition(".")[2]).dims  # pyright: ignore[reportArgumentType]
    try:
        return FrozenBaseExperts(base, dims, num_experts, config.offset_scale, bias)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def take_over_quantizer(model: PreTrainedModel) -> None:
    """Make Transformers' marks on a model that it has quantised those of a mixture around a quantised base.

    The model still refuses casts, the Trainer trains it, and `save_pretrained` says what to do instead. The other
    layers with torchao's weights become `FrozenLinear`. A quantiser that has left no quantised weight (GGUF files are
    multiplied out while they load) is taken off.

    Args:
        model: Just upcycled; one that Transformers has not quantised stays as it is.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    if not any(_is_quantized(parameter) for parameter in model.parameters()):
        quantizer.remove_quantization_config(model)
        return
    model.hf_quantizer = _FrozenBaseQuantizer(quantizer)  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        if type(module) is nn.Linear and is_traceable_wrapper_subclass(module.weight):
            module.__class__ = FrozenLinear


def memory_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters and buffers, bytes; tied ones once.

    Args:
        model: Any, quantised or not.
    """
    tensors = (*model.parameters(), *model.buffers())
    return sum(plain.numel() * plain.element_size() for tensor in tensors for plain in plain_tensors(tensor))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, or those inside of a subclass.

    Args:
        tensor: Any.
    """
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


class _FrozenBaseQuantizer(HfQuantizer):
    """In the place of the quantiser that loaded the base, whose answers are about a model without adapters."""

    def __init__(self, loader: HfQuantizer) -> None:
        super().__init__(loader.quantization_config)
        self.loader = loader

    def is_serializable(self) -> None:
        """Asked by `save_pretrained`, before it writes anything."""
        raise ValueError(
            "a mixture on a quantised base is saved as an adapter, without the base: use mpoe.save_adapter(model, "
            "folder) instead of save_pretrained (for the Trainer, save_strategy='no')"
        )

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Auxiliary tensors and routers train; the quantised weights are frozen."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The question with which the Trainer lets a quantised model pass that has no adapter of PEFT's."""
        return True

    @property
    def is_compileable(self) -> bool:
        """As the base is."""
        return self.loader.is_compileable


def _is_quantized(weight: Tensor) -> bool:
    return is_traceable_wrapper_subclass(weight) or not weight.is_floating_point()
