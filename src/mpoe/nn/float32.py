"""`Float32Module`: a module whose own tensors keep their dtype when the model around it is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A base class whose own parameters and buffers never get a dtype narrower than float32.

    `.to(bfloat16)` and `.half()` only move them: small steps on a factor or a router round to nothing in half
    precision. Submodules are cast as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def without_cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_half = moved.is_floating_point() and moved.dtype.itemsize < torch.float32.itemsize
            return tensor.to(moved.device, torch.float32) if is_half else moved

        return super()._apply(without_cast, recurse=False)
