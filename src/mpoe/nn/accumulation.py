"""`Accumulation`: under gradient accumulation, matrices are multiplied out once per optimizer step.

All micro-batches of a step see the same parameters, so they can share W_e. Each adds its dy_eᵀ x_e to the gradient of
W_e, and what all of them together mean for the site tensors is worked out once.

Shape letters: E experts, N rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from mpoe.mpo import SiteDims
from mpoe.nn.matrix_cache import TensorState
from mpoe.nn.rebuild import Rebuild, multiply_out, rebuilt_linear


@runtime_checkable
class Rebuilt(Protocol):
    """A layer whose matrices are multiplied out: `MPOExperts`."""

    dims: SiteDims
    num_experts: int
    accumulation: Accumulation | None

    def sources(self) -> Sequence[Tensor]:
        """Every tensor that the matrices are made of, as it is stored; the central one first."""
        ...

    def site_stacks(self, experts: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        """The central tensor, and of every auxiliary site the given experts' tensors, stacked; differentiable.

        Args:
            experts: Indices, ascending.
            dtype: Of the results.
        """
        ...


class Accumulation:
    """What the micro-batches of one optimizer step share, in all layers of a model.

    ```python
    accumulation = Accumulation(model)
    for micro_batches in steps:
        with accumulation.step():
            for batch in micro_batches:
                model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ```

    Within a step every expert that gets tokens keeps W_e and its gradient; at the end of the step the gradients go to
    the parameters. The result is that of plain accumulation. It costs memory: twice the size of a dense model with as
    many experts. Copies of the model take no part.

    With DistributedDataParallel gradients must reach the parameters in the last micro-batch's backward pass, where
    ranks exchange them: say which one is the last, as in `step(lambda: accelerator.sync_gradients)`. Not for parameters
    that are sharded (FSDP, DeepSpeed ZeRO-3), whose memory comes and goes.

    Args:
        model: Its layers whose matrices are multiplied out take part.
        limit_bytes: Memory for matrices and their gradients, bytes; a layer that does not fit any more multiplies out
            in every micro-batch. None is no limit.

    Raises:
        ValueError: No such layer.
    """

    def __init__(self, model: nn.Module, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        layers = [module for module in model.modules() if isinstance(module, Rebuilt)]
        if not layers:
            raise ValueError(
                "the model must have a layer whose matrices are multiplied out; it has none: mpoe.upcycle with "
                "layout='balanced' makes them, in any other model leave this out"
            )
        for layer in layers:
            layer.accumulation = self
        self._members = weakref.WeakSet(layers)
        self._reset()

    @property
    def is_active(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._handle is not None

    @property
    def pending(self) -> bool:
        """Whether there are gradients that have not reached the parameters."""
        return any(held.gradients for held in self._layers.values())

    @property
    def bytes(self) -> int:
        """Memory of matrices and gradients, bytes."""
        tensors = (t for held in self._layers.values() for of in (held.matrices, held.gradients) for t in of.values())
        return sum(t.nbytes for t in tensors)

    @contextmanager
    def step(self, is_last: Callable[[], bool] | None = None) -> Iterator[None]:
        """The forward and backward passes of one optimizer step; all gradients are on the parameters at its end.

        Args:
            is_last: Asked in every forward pass, whether no micro-batch follows. Then gradients reach the parameters in
                this one's backward pass; otherwise, and always without it, at the end of the step.
        """
        self.begin(is_last)
        try:
            yield
        finally:  # after an exception too, as with plain accumulation
            self.end()

    def begin(self, is_last: Callable[[], bool] | None = None) -> None:
        """Begin a step.

        Args:
            is_last: As in `step`.

        Raises:
            RuntimeError: The last step has gradients that did not reach the parameters.
            ValueError: Several processes train, and none is told which micro-batch is the last.
        """
        if self.pending:
            raise RuntimeError(
                "the gradients of a step must reach the parameters before the next step begins; some did not: call "
                "end() or flush() after the last micro-batch, or clear() to drop them"
            )
        if is_last is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise ValueError(
                "is_last must be given where several processes train, because they exchange gradients in the last "
                "micro-batch's backward pass; got None: pass a function that says whether no micro-batch follows, such "
                "as `lambda: accelerator.sync_gradients`"
            )
        self.clear()
        self._is_last = is_last
        self._handle = register_optimizer_step_pre_hook(self._refuse_optimizer_step)

    def end(self) -> None:
        """End a step: flush, and drop the matrices. Nothing if none has begun."""
        try:
            self.flush()
        finally:
            self.clear()

    def flush(self) -> None:
        """Send all gradients there are to the parameters' `grad` now.

        Raises:
            RuntimeError: Parameters have changed since the matrices were multiplied out.
        """
        for owner, held in self._layers.items():
            if not held.gradients:
                continue
            layer, experts = cast(Rebuilt, owner), sorted(held.gradients)
            held.check(layer)
            with torch.enable_grad():
                central, auxiliary = layer.site_stacks(experts, held.dtype)
            sites = [central, *auxiliary]
            gradients = held.push_back(experts, layer.dims, sites, [site.requires_grad for site in sites])
            pairs = [(site, gradient) for site, gradient in zip(sites, gradients, strict=True) if gradient is not None]
            torch.autograd.backward([site for site, _ in pairs], [gradient for _, gradient in pairs])

    def clear(self) -> None:
        """Drop everything, gradients too; the step, if one has begun, is over."""
        if self._handle is not None:
            self._handle.remove()
        for held in self._layers.values():
            held.is_over = True
        self._reset()

    def linear(
        self, layer: Rebuilt, x: Float[Tensor, "N in_features"], counts: Sequence[int]
    ) -> Float[Tensor, "N out_features"]:
        """y_n = W_{e(n)} x_n, as `rebuilt_linear`, with the matrices of the step.

        Args:
            layer: Of the model.
            x: Rows, sorted by expert, of the dtype that the product is to have.
            counts: Rows of each of the layer's E experts; they sum to N.

        Raises:
            RuntimeError: Parameters have changed since the matrices were multiplied out.
        """
        active = [e for e, count in enumerate(counts) if count]
        held = self._held(layer, x.dtype)
        if held is None:
            active = active or [0]
            return rebuilt_linear(x, [counts[e] for e in active], *layer.site_stacks(active, x.dtype), layer.dims)
        held.check(layer)
        if missing := [e for e in active if e not in held.matrices]:
            with torch.no_grad():
                stacks = layer.site_stacks(missing, x.dtype)
            held.matrices.update(zip(missing, multiply_out(*stacks, layer.dims), strict=True))
        # Without experts to push back to, any parameter will do: the graph must lead somewhere for a backward to come.
        experts, sites = [], [t for t in layer.sources() if t.requires_grad][:1]
        if sites and self._is_last is not None and self._is_last():
            # all of them, because gradient checkpointing wants the same operations when it runs this again
            experts = list(range(layer.num_experts))
            central, auxiliary = layer.site_stacks(experts, x.dtype)
            sites = [central, *auxiliary]
        return _HeldLinear.apply(x, list(counts), layer.dims, held, experts, *sites)  # pyright: ignore[reportReturnType]

    def __reduce__(self) -> Any:
        return type(None), ()  # copies and pickles of a layer have none

    def _reset(self) -> None:
        self._layers: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()
        self._handle: RemovableHandle | None = None
        self._is_last: Callable[[], bool] | None = None
        self._reserved = 0

    def _held(self, layer: Rebuilt, dtype: torch.dtype) -> _Held | None:
        """What the layer keeps in this step; None if it has no room, keeps another dtype, or is a short-lived copy."""
        owner, dims = cast(nn.Module, layer), layer.dims
        if owner not in self._members:
            return None
        if owner not in self._layers:
            gradient_dtype = layer.sources()[0].dtype
            element_bytes = dtype.itemsize + gradient_dtype.itemsize
            size = layer.num_experts * dims.padded_out * dims.padded_in * element_bytes
            if self.limit_bytes is not None and self._reserved + size > self.limit_bytes:
                return None
            self._reserved += size
            self._layers[owner] = _Held(dtype, gradient_dtype, TensorState(layer.sources()))
        held = self._layers[owner]
        return held if held.dtype == dtype else None

    def _refuse_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for owner, held in self._layers.items():
            if held.gradients and any(id(t) in moved for t in cast(Rebuilt, owner).sources()):
                raise RuntimeError(
                    "all gradients must be on the parameters before optimizer.step(); those of accumulated "
                    "micro-batches are not: call it after the block `with accumulation.step()`. Where a callback tells "
                    "which micro-batch is the last, every layer must take part in that one's backward pass; a layer "
                    "was left out (layer dropout, frozen parts): train without Accumulation"
                )


@dataclass
class _Held:
    """What a layer keeps during a step: by expert, W_e and the gradient of W_e so far."""

    dtype: torch.dtype
    gradient_dtype: torch.dtype  # the parameters': sums of many micro-batches would lose digits in autocast's
    state: TensorState
    matrices: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    is_over: bool = False

    def check(self, layer: Rebuilt) -> None:
        if not self.state.is_of(layer.sources()):
            raise RuntimeError(
                "parameters must stay as they are between the micro-batches of a step; some have changed since "
                "matrices were multiplied out: change them after the step has ended, or call clear() to drop the step"
            )

    def add(self, expert: int, dy: Tensor, x: Tensor) -> None:
        """Add a micro-batch to the gradient of W_e."""
        if self.is_over:
            raise RuntimeError(
                "the backward pass of a micro-batch must run in its step; this step has ended: call loss.backward() "
                "inside the block `with accumulation.step()`"
            )
        if expert not in self.gradients:
            self.gradients[expert] = torch.mm(dy.T, x).to(self.gradient_dtype)
        elif x.dtype == self.gradient_dtype:
            self.gradients[expert].addmm_(dy.T, x)
        else:
            self.gradients[expert].add_(torch.mm(dy.T, x))

    def push_back(
        self, experts: Sequence[int], dims: SiteDims, sites: Sequence[Tensor], needs_gradient: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the central tensor and of the stacks, of these experts' matrices, which lose theirs."""
        rebuild = Rebuild(sites[0], sites[1:], dims, len(experts), needs_gradient)
        for n, e in enumerate(experts):
            if e in self.gradients:
                rebuild.push_back(n, self.gradients.pop(e), rebuild.middle(n))
        return rebuild.gradients()


class _HeldLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, counts: list[int], dims: SiteDims, held: _Held, experts: list[int], *sites: Tensor
    ) -> Tensor:
        y = x.new_empty(len(x), dims.out_features)
        for e, (x_e, y_e) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
            if len(x_e):
                torch.mm(x_e, held.matrices[e].T, out=y_e)
        # The matrices belong to the step, and the sites that they go back to are those of this pass: under gradient
        # checkpointing only x is made again.
        ctx.matrices = dict(held.matrices)
        ctx.sites = [site.detach() for site in sites]
        ctx.counts, ctx.dims, ctx.held, ctx.experts = counts, dims, held, experts
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,), (dy,), counts = ctx.saved_tensors, of_outputs, ctx.counts
        needs_x, needs_sites = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dx = torch.empty_like(x)
        for e, (x_e, dx_e, dy_e) in enumerate(zip(x.split(counts), dx.split(counts), dy.split(counts), strict=True)):
            if len(x_e) and needs_x:
                torch.mm(dy_e, ctx.matrices[e], out=dx_e)
            if len(x_e) and any(needs_sites):
                ctx.held.add(e, dy_e, x_e)
        gradients: Sequence[Tensor | None] = [None] * len(ctx.sites)
        if ctx.experts:
            gradients = ctx.held.push_back(ctx.experts, ctx.dims, ctx.sites, needs_sites)
        return dx if needs_x else None, None, None, None, None, *gradients
