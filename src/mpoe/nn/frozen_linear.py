"""Frozen linear layers with torchao's quantised weights, which keep nothing dequantised for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FrozenLinear(nn.Linear):
    """A frozen `nn.Linear` with torchao's quantised weight that keeps only the layer for the backward pass.

    torchao's own would keep its weight materialized in floating point from forward to backward, one in each layer:
    more memory than the quantised weights have saved. A compiled graph materializes it again by itself. An `nn.Linear`
    becomes one by setting its `__class__`; only the forward differs.
    """

    def forward(self, input: Float[Tensor, "*N k"]) -> Float[Tensor, "*N l"]:
        """Return W x + b in the dtype of x."""
        weight: Any = self.weight
        if torch.compiler.is_compiling():
            y = nn.functional.linear(input, weight).to(input.dtype)
        else:
            y: Any = _FrozenProduct.apply(input, weight)
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
