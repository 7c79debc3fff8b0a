"""The separable layout's product y_t = L_{e(t)} (C (R_{e(t)} x_t)).

Two small products per expert, with its ends R and L, around one product with the central tensor C that all tokens of
all experts share and that is by far the largest. Nothing is multiplied out. On a CPU it has a backward of its own, and
what measured best there:

- An end acts on the last of a token's input dimensions and on the first of its output dimensions. So R wants a token
  in a row and L wants it in a column. C times the transposed tokens gives columns for free; only L's result has to be
  turned around, while it is still in the cache.
- Tokens go through in panels (see `mpoe.nn.panels`).
- Kept for the backward are x and C R x, and R x unless multiplying it again is cheap.

Shape letters: N tokens, sorted by expert; E experts; a, b the bonds left and right of the central tensor; o, i the
central site's output and input dimensions; p, q the dimensions at the output end and the input end; l, k the output
and input dimension of an end; r rows, c columns of a block that one expert's end is multiplied with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpoe.nn.grouped import Counts, linear, linear_columns, linear_per_expert, rows_of_experts
from mpoe.nn.panels import Panel, panels, whole

KEPT_BOND = 128  # from here on the backward takes R x from memory


@dataclass(frozen=True)
class End:
    """The matrices at one end of the chain, M_e = factor_e · (start + scale · offset_e).

    Attributes:
        offsets: One matrix per expert.
        factors: One number per expert; None is 1.
        start: What all experts share; None is the unit matrix, with which nothing is ever multiplied.
        scale: Of the offsets, dimensionless.
    """

    offsets: Float[Tensor, "E l k"]
    factors: Float[Tensor, " E"] | None
    start: Float[Tensor, "l k"] | None
    scale: Float[Tensor, ""]


def separable_product(
    x: Float[Tensor, "N iq"],
    counts: Counts,
    central: Float[Tensor, "a o i b"],
    right: End | None,
    left: End | None,
) -> Float[Tensor, "N po"]:
    """y_t = L_{e(t)} (C (R_{e(t)} x_t)), for tensors of one dtype.

    Args:
        x: Tokens, sorted by expert.
        counts: Tokens of every expert; they sum to N.
        central: C.
        right: R, with l = b and k = q; None is the unit matrix.
        left: L, with l = p and k = a; None is the unit matrix.
    """
    if isinstance(counts, Tensor):
        return _grouped_product(x, counts, central, right, left)
    tensors = [part for end in (right, left) for part in ((None, None) if end is None else (end.offsets, end.factors))]
    fixed = [None if end is None else (end.start, end.scale.item()) for end in (right, left)]
    if not torch.is_grad_enabled():
        return _product(fixed, counts, x.contiguous(), central, tensors, None)
    return _SeparableProduct.apply(fixed, counts, x.contiguous(), central, *tensors)  # pyright: ignore[reportReturnType]


def _grouped_product(x: Tensor, counts: Tensor, central: Tensor, right: End | None, left: End | None) -> Tensor:
    """With plain autograd and counts that stay on the device.

    The rows of C are permuted for L, not the tokens: there are fewer of them. What remains to be turned around is L's
    result, which `torch.compile` joins with the activation behind it.
    """
    a, o, i, b = central.shape
    n = len(x)
    z = x if right is None else _grouped_end(right, x.reshape(n * i, -1), counts * i).view(n, i * b)
    if left is None:
        return linear(z, central.reshape(a * o, i * b))
    u_noa = linear(z, central.transpose(0, 1).reshape(o * a, i * b))
    y_nop = _grouped_end(left, u_noa.reshape(n * o, a), counts * o).view(n, o, -1)
    return y_nop.transpose(1, 2).reshape(n, -1)


def _grouped_end(end: End, rows: Tensor, counts: Tensor) -> Tensor:
    """Every row times its expert's matrix, transposed."""
    offsets = end.offsets * end.scale
    if end.start is None:
        y = rows + linear_per_expert(rows, counts, offsets)
    else:
        y = linear_per_expert(rows, counts, end.start + offsets)
    return y if end.factors is None else y * rows_of_experts(end.factors[:, None], counts, len(rows))


class _SeparableProduct(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, fixed: Any, counts: Sequence[int], x: Tensor, central: Tensor, *of_ends: Tensor | None
    ) -> Tensor:
        kept: list[Tensor] = []
        y = _product(fixed, counts, x, central, of_ends, kept)
        ctx.fixed, ctx.counts = fixed, counts
        ctx.save_for_backward(x, central, *of_ends, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, central, *others = ctx.saved_tensors
        needs_x, needs_central, *needs_ends = ctx.needs_input_grad[2:]
        memory = _Memory(x)
        right, left = _ends(ctx.fixed, others[:4])
        kept = iter(others[4:])
        a, o, i, b = central.shape
        c = central.reshape(a * o, i * b)
        dx = torch.empty_like(x) if needs_x else None
        dc = None
        d_right = _EndSum(right) if right and any(needs_ends[:2]) else None
        d_left = _EndSum(left) if left and any(needs_ends[2:]) else None
        for panel in panels(ctx.counts) if left else whole(ctx.counts):
            dy = of_outputs[0][panel.rows]
            z = next(kept) if _is_kept(right) else None
            du = dy if left is None else _left_backward(left, d_left, dy, panel, kept, (a, o), memory)
            if needs_central:
                dc = _add_product(dc, du.T, _times_right(right, x, [panel], i) if z is None else z)
            if needs_x or d_right is not None:
                dz = torch.mm(du, c, out=memory("dz", len(du), i * b))
                _right_backward(right, d_right, dz, panel, x, dx, i)
        return (
            None,
            None,
            dx,
            _like(central, dc) if needs_central else None,
            *((None, None) if d_right is None else d_right.gradients()),
            *((None, None) if d_left is None else d_left.gradients()),
        )


def _product(
    fixed: Any,
    counts: Sequence[int],
    x: Tensor,
    central: Tensor,
    of_ends: Sequence[Tensor | None],
    kept: list[Tensor] | None,
) -> Tensor:
    """The forward pass; appends what the backward needs of it to `kept`."""
    right, left = _ends(fixed, of_ends)
    a, o, i, b = central.shape
    c = central.reshape(a * o, i * b)
    if left is None:
        z = _times_right(right, x, whole(counts), i)
        if kept is not None and _is_kept(right):
            kept.append(z)
        return linear(z, c)
    y, memory = x.new_empty(len(x), left.size * o), _Memory(x)
    for panel in panels(counts):
        z = _times_right(right, x, [panel], i)
        if kept is not None and _is_kept(right):
            kept.append(z)
        u_aoN = linear_columns(z, c).view(a, o, panel.size)
        for expert, rows in panel.segments:
            u_ac = u_aoN[:, :, panel.within(rows)].reshape(a, -1)
            y_pc = left.columns(expert, u_ac, out=memory("y", left.size, u_ac.shape[1]))
            y[rows] = y_pc.view(left.size * o, -1).T
            if kept is not None:
                kept.append(u_ac)
    return y


def _is_kept(right: _Ends | None) -> bool:
    return right is not None and right.offsets.shape[2] >= KEPT_BOND


def _times_right(right: _Ends | None, x: Tensor, some: Sequence[Panel], i: int) -> Tensor:
    """R x for the rows of some neighbouring panels: (rows, i·b)."""
    if not some:
        return x if right is None else x.new_empty(0, i * right.size)
    first, last = some[0].rows.start, some[-1].rows.stop
    if right is None:
        return x[first:last]
    z = x.new_empty((last - first) * i, right.size)
    for panel in some:
        for expert, rows in panel.segments:
            inside = slice((rows.start - first) * i, (rows.stop - first) * i)
            right.rows(expert, x[rows].view(-1, x.shape[1] // i), out=z[inside])
    return z.view(last - first, -1)


def _left_backward(
    left: _Ends,
    d_left: _EndSum | None,
    dy: Tensor,
    panel: Panel,
    kept: Iterator[Tensor],
    shape: tuple[int, int],
    memory: _Memory,
) -> Tensor:
    """From dy to d(C R x), a token a row in both; good until the next panel."""
    a, o = shape
    du_aoN = memory("du", a, o, panel.size)
    for expert, rows in panel.segments:
        inside, u_ac = panel.within(rows), next(kept)
        dy_pc = memory("dy", left.size * o, rows.stop - rows.start).copy_(dy[inside].T).view(left.size, -1)
        if d_left is not None:
            d_left.add(expert, dy_pc, u_ac.T)
        if len(panel.segments) == 1:
            left.columns(expert, dy_pc, out=du_aoN.view(a, -1), transpose=True)
        else:
            du_ac = left.columns(expert, dy_pc, out=memory("du of one", *u_ac.shape), transpose=True)
            du_aoN[:, :, inside] = du_ac.view(a, o, -1)
    return du_aoN.view(a * o, -1).T


def _right_backward(
    right: _Ends | None, d_right: _EndSum | None, dz: Tensor, panel: Panel, x: Tensor, dx: Tensor | None, i: int
) -> None:
    """From d(R x) to dx, written into its rows, and the gradient of R."""
    if right is None:
        if dx is not None:
            dx[panel.rows] = dz
        return
    for expert, rows in panel.segments:
        dz_rb = dz[panel.within(rows)].view(-1, right.size)
        x_rq = x[rows].view(len(dz_rb), -1)
        if d_right is not None:
            d_right.add(expert, dz_rb.T, x_rq)
        if dx is not None:
            right.rows(expert, dz_rb, out=dx[rows].view_as(x_rq), transpose=True)


class _Memory:
    """Buffers that every panel uses again: the page faults of fresh memory cost as much as a fifth of a product."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape, whose elements are the last one's of that name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)


class _Ends:
    """One end of all experts: what it is multiplied with."""

    def __init__(self, offsets: Tensor, factors: Tensor | None, start: Tensor | None, scale: float) -> None:
        self.offsets, self.start, self.scale = offsets, start, scale
        self.size = offsets.shape[1]
        self.factors = [1.0] * len(offsets) if factors is None else factors.tolist()
        self.has_factors = factors is not None

    def rows(self, expert: int, x_rk: Tensor, out: Tensor, transpose: bool = False) -> None:
        """Out = x Mᵀ, or x M."""
        offset, factor = self.offsets[expert], self.factors[expert]
        if self.start is None:
            # x + s·A x, not (1 + s·A) x: small offsets are kept that bfloat16 would round away beside a 1.
            torch.addmm(x_rk, x_rk, offset if transpose else offset.T, beta=factor, alpha=factor * self.scale, out=out)
        else:
            matrix = torch.add(self.start, offset, alpha=self.scale).mul_(factor)
            torch.mm(x_rk, matrix if transpose else matrix.T, out=out)

    def columns(self, expert: int, v_kc: Tensor, out: Tensor, transpose: bool = False) -> Tensor:
        """Out = M v, or Mᵀ v."""
        offset, factor = self.offsets[expert], self.factors[expert]
        if self.start is None:
            mixing, alpha = offset.T if transpose else offset, factor * self.scale
            return torch.addmm(v_kc, mixing, v_kc, beta=factor, alpha=alpha, out=out)
        matrix = torch.add(self.start, offset, alpha=self.scale).mul_(factor)
        return torch.mm(matrix.T if transpose else matrix, v_kc, out=out)


def _ends(fixed: Any, tensors: Sequence[Any]) -> tuple[_Ends | None, _Ends | None]:
    right, left = (
        None if of_end is None else _Ends(offsets, factors, *of_end)
        for of_end, offsets, factors in zip(fixed, tensors[::2], tensors[1::2], strict=True)
    )
    return right, left


class _EndSum:
    """The gradients of one end of all experts, summed block by block."""

    def __init__(self, ends: _Ends) -> None:
        self.ends = ends
        self.total = torch.zeros_like(ends.offsets)
        self.alpha = 1.0 if ends.has_factors else ends.scale

    def add(self, expert: int, left: Tensor, right: Tensor) -> None:
        """The gradient of one expert's M is left · right, and more of the same."""
        self.total[expert].addmm_(left, right, alpha=self.alpha)

    def gradients(self) -> tuple[Tensor, Tensor | None]:
        """Of the offsets and the factors."""
        ends, d_matrix = self.ends, self.total
        if not ends.has_factors:
            return d_matrix, None
        wide = d_matrix.to(torch.promote_types(d_matrix.dtype, torch.float32))  # long sums follow
        of_start = wide.diagonal(dim1=1, dim2=2) if ends.start is None else (wide * ends.start).flatten(1)
        d_factors = of_start.sum(dim=1) + ends.scale * (wide * ends.offsets).flatten(1).sum(dim=1)
        factors = torch.tensor(ends.factors, dtype=d_matrix.dtype, device=d_matrix.device)
        return d_matrix.mul_(ends.scale * factors[:, None, None]), d_factors.to(d_matrix.dtype)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Total + left · right, in float32 at least: it is a sum over panels."""
    wide = torch.promote_types(left.dtype, torch.float32)
    if total is None:
        return torch.mm(left, right).to(wide)
    return total.addmm_(left, right) if wide == left.dtype else total.add_(torch.mm(left, right))


def _like(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    return torch.zeros_like(tensor) if gradient is None else gradient.to(tensor.dtype).view_as(tensor)
