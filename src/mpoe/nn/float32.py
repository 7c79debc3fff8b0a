"""`Float32Module`: a module whose own tensors keep their dtype when the model around it is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Float32Module(nn.Module):
    """A base class. `.to(bfloat16)`, `.half()` and the like move its own parameters and buffers, and do not cast them.

    Small steps on a factor or a router round to nothing in half precision. Submodules are cast as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def without_cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)

        return super()._apply(without_cast, recurse=False)
