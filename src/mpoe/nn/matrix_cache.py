"""`MatrixCache`: matrices multiplied out for evaluation, kept as long as the tensors that they were made of."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook


class TensorState:
    """What some tensors were at a moment, without keeping them alive.

    Every in-place operation raises a tensor's version, with two exceptions. Fused optimizers leave it alone, so every
    optimizer's step counts as a change of its parameters. What goes through `.data` cannot be seen.

    Args:
        tensors: Any; one that was made in inference mode has no version, and counts as changed at once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # a weak reference, because freed memory may be given to another tensor
        self._states = [(t.data_ptr(), _version(t), StorageWeakRef(t.untyped_storage())) for t in tensors]
        self._has_stepped = False
        _watch_optimizers()
        _not_stepped.add(self)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and unchanged.

        Args:
            tensors: In the same order.
        """
        return (
            not self._has_stepped
            and len(tensors) == len(self._states)
            and all(
                t.data_ptr() == address and version is not None and _version(t) == version and not storage.expired()
                for t, (address, version, storage) in zip(tensors, self._states, strict=True)
            )
        )

    def step(self, moved: set[int]) -> None:
        """An optimizer has stepped.

        Args:
            moved: The addresses of its parameters.
        """
        if any(address in moved for address, _, _ in self._states):
            self._has_stepped = True
            _not_stepped.discard(self)


_not_stepped: weakref.WeakSet[TensorState] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        states = list(_not_stepped)
        moved = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]} if states else set()
        for state in states:
            state.step(moved)

    register_optimizer_step_post_hook(after_step)


class MatrixCache:
    """Dense matrices of any number of layers, the least recently used ones dropped first.

    For evaluation only, because a matrix comes without a graph to the parameters. It is multiplied out again after any
    change that shows (see `TensorState`): an optimizer's step, an in-place change, `load_state_dict`, another tensor,
    dtype or device. A change through `.data` does not show; call `clear` after one.

    Copies and pickles of a cache are empty, with the same limit; layers that share a cache share its copy when they are
    copied together.

    Args:
        limit_bytes: Memory of all matrices together, bytes, >= 0. A matrix that does not fit alone is not kept.

    Raises:
        ValueError: A negative limit.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes of a matrix cache must be >= 0; got {limit_bytes}; 0 keeps nothing")
        self.limit_bytes = limit_bytes
        self._layers: weakref.WeakKeyDictionary[nn.Module, _Layer] = weakref.WeakKeyDictionary()
        self._clock = itertools.count()
        self._lock = threading.Lock()  # several threads may evaluate one model

    @property
    def bytes(self) -> int:
        """Memory of the matrices that are kept, bytes."""
        with self._lock:
            return self._bytes()

    def get(
        self,
        owner: nn.Module,
        expert: int,
        sources: Sequence[Tensor],
        dtype: torch.dtype,
        multiply_out: Callable[[], Tensor],
    ) -> Float[Tensor, "out_features in_features"]:
        """The matrix of one expert, as kept or multiplied out now.

        Args:
            owner: The layer; its matrices go when it goes.
            expert: Index.
            sources: Every tensor that the matrix is made of.
            dtype: Of the matrix.
            multiply_out: Makes it; called without gradients.
        """
        key = (expert, dtype)
        with self._lock:
            layer = self._layers.get(owner)
            if layer is None or not layer.state.is_of(sources):
                layer = self._layers[owner] = _Layer(TensorState(sources))
            if (entry := layer.entries.get(key)) is not None:
                entry.last_use = next(self._clock)
                return entry.matrix
        # A tensor made in inference mode could not take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            matrix = multiply_out()
        with self._lock:
            left = self.limit_bytes - _bytes_of(matrix)
            if left >= 0 and layer.state.is_of(sources):
                while self._bytes() > left:
                    self._drop_oldest()
                layer.entries[key] = _Entry(matrix, next(self._clock))
        return matrix

    def clear(self) -> None:
        """Drop every matrix."""
        with self._lock:
            self._layers.clear()

    def __reduce__(self) -> tuple[type[MatrixCache], tuple[int]]:
        return type(self), (self.limit_bytes,)

    def _bytes(self) -> int:
        return sum(_bytes_of(entry.matrix) for layer in self._layers.values() for entry in layer.entries.values())

    def _drop_oldest(self) -> None:
        layer, key = min(
            ((layer, key) for layer in self._layers.values() for key in layer.entries),
            key=lambda of: of[0].entries[of[1]].last_use,
        )
        del layer.entries[key]


@dataclass
class _Entry:
    matrix: Tensor
    last_use: int


@dataclass
class _Layer:
    state: TensorState
    entries: dict[tuple[int, torch.dtype], _Entry] = field(default_factory=dict)


def _bytes_of(matrix: Tensor) -> int:
    return matrix.untyped_storage().nbytes()  # with padding


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
