"""Quantised bases: which layers are quantised, and the marks that Transformers keeps on the model.

A quantised weight is either a tensor subclass around plain tensors (torchao) or whole numbers that only its module can
read (bitsandbytes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from mpoe.config import MPOEConfig
from mpoe.nn.frozen_linear import FrozenLinear


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of a layer is quantised.

    Args:
        layer: Any with a weight.
    """
    return _is_quantized(layer.get_parameter("weight"))


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
    model.hf_quantizer = _SavedAsAdapter(  # pyright: ignore[reportArgumentType]
        quantizer.quantization_config, "a mixture on a quantised base", quantizer
    )
    for module in model.modules():
        if type(module) is nn.Linear and is_traceable_wrapper_subclass(module.weight):
            module.__class__ = FrozenLinear


def refuse_saving_with_lora(model: PreTrainedModel) -> None:
    """Make `save_pretrained` fail on a model that carries a LoRA adapter: it would write what cannot be loaded.

    Args:
        model: Just upcycled; one without an adapter stays as it is.
    """
    has_lora = any(name.endswith(".base_layer") for name, _ in model.named_modules())
    if has_lora and not isinstance(getattr(model, "hf_quantizer", None), _SavedAsAdapter):
        model.hf_quantizer = _SavedAsAdapter(  # pyright: ignore[reportArgumentType]
            MPOEConfig(), "a mixture on a base with a LoRA adapter"
        )


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


class _SavedAsAdapter(HfQuantizer):
    """In the place of the quantiser that loaded the base, whose answers are about a model without experts."""

    def __init__(self, config: Any, what: str, loader: HfQuantizer | None = None) -> None:
        super().__init__(config)
        self.what = what
        self.loader = loader

    def is_serializable(self) -> None:
        """Asked by `save_pretrained`, before it writes anything."""
        raise ValueError(
            f"{self.what} is saved as an adapter, without the base: use mpoe.save_adapter(model, folder) instead of "
            "save_pretrained (for the Trainer, save_strategy='no')"
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
        return self.loader is None or self.loader.is_compileable


def _is_quantized(weight: Tensor) -> bool:
    return is_traceable_wrapper_subclass(weight) or not weight.is_floating_point()
