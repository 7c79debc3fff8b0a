"""Frozen linear layers with torchao's quantised weights, which keep nothing dequantised for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def frozen_linear(linear: nn.Module, x: Float[Tensor, "*N k"]) -> Float[Tensor, "*N l"]:
    """A frozen linear layer's product without its bias, that keeps nothing for the backward but the layer.

    torchao's own would keep its weight multiplied out in floating point from forward to backward, one in each layer:
    more memory than the quantised weights have saved. A compiled graph multiplies it out again by itself.

    Args:
        linear: A layer, of which only one with torchao's weight may have a bias.
        x: Tokens; the result has their dtype.
    """
    weight: Any = linear.weight
    if not is_traceable_wrapper_subclass(linear.weight):
        return linear(x).to(x.dtype)
    if torch.compiler.is_compiling():
        return nn.functional.linear(x, weight).to(x.dtype)
    return _FrozenProduct.apply(x, weight)  # pyright: ignore[reportReturnType]


class FrozenLinear(nn.Linear):
    """An `nn.Linear` with torchao's weight, frozen, that keeps nothing multiplied out, see `frozen_linear`.

    It is made of an `nn.Linear` by setting its `__class__`: nothing but the forward is another.
    """

    def forward(self, input: Float[Tensor, "*N k"]) -> Float[Tensor, "*N l"]:
        """Y = W x + b."""
        y = frozen_linear(self, input)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight = weight
        return nn.functional.linear(x, weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return of_outputs[0] @ ctx.weight.dequantize().to(of_outputs[0].dtype), None
