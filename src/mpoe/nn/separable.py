"""The separable layout's product y_t = L_{e(t)} (C (R_{e(t)} x_t)).

Two small products per expert, with its ends R and L, around one product with the central tensor C that all tokens of
all experts share and that is by far the largest. Nothing is multiplied out. On a CPU it has a backward of its own, and
what measured best there:

- An end acts on the last of a token's input dimensions and on the first of its output dimensions. So L finds its
  dimension in the last place only after a token's numbers have been swapped, (a, o) to (o, a), and its result is
  swapped back: cheap, because it is done while they are in the cache. With more tokens than C has columns it is
  cheaper to swap the rows of C.
- Tokens go through in panels (see `mpoe.nn.panels`).
- Kept for the backward are x and C R x, and R x unless multiplying it again is cheap.

Shape letters: N tokens, sorted by expert, P of them in a panel; E experts; a, b the bonds left and right of the central
tensor; o, i the central site's output and input dimensions; p, q the dimensions at the output end and the input end;
l, k the output and input dimension of an end; r vectors of a token that an end is multiplied with (i, or o).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpoe.nn.grouped import Counts, linear, linear_columns, linear_per_expert, rows_of_experts
from mpoe.nn.panels import Panel, panels, whole

KEPT_BOND = 128  # from here on the backward takes R x from memory
COLUMNS_SIZE = 49152  # numbers of one expert's tokens; up to here an end is faster on columns, on a CPU


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
    z = x if right is None else multiply_end(right, x.view(n, i, x.shape[1] // i), counts).reshape(n, i * b)
    if left is None:
        return linear(z, central.reshape(a * o, i * b))
    u_noa = linear(z, central.transpose(0, 1).reshape(o * a, i * b)).view(n, o, a)
    return multiply_end(left, u_noa, counts).transpose(1, 2).reshape(n, left.offsets.shape[1] * o)


def multiply_end(end: End, x: Float[Tensor, "N r k"], counts: Counts) -> Float[Tensor, "N r l"]:
    """Every vector of every token times its token's matrix, M_e x, with plain autograd.

    Args:
        end: The matrices.
        x: Tokens, sorted by expert, of the offsets' dtype.
        counts: Tokens of every expert; they sum to N.
    """
    n, r, k = x.shape
    rows = x.reshape(n * r, k)
    rows_of = counts * r if isinstance(counts, Tensor) else [count * r for count in counts]
    if end.start is not None:
        y = linear_per_expert(rows, rows_of, end.start + end.scale * end.offsets)
    elif isinstance(counts, Tensor):
        y = rows + linear_per_expert(rows, rows_of, end.scale * end.offsets)
    else:  # where the scale is at hand, no scaled copy of the offsets is kept for the backward
        y = torch.add(rows, linear_per_expert(rows, rows_of, end.offsets), alpha=end.scale.item())
    if end.factors is not None:
        wide = end.factors.to(torch.promote_types(x.dtype, torch.float32))  # its gradient is a sum over all rows
        y = y * rows_of_experts(wide[:, None], rows_of, len(rows)).to(x.dtype)
    return y.view(n, r, y.shape[1])


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
        right, left = _ends(ctx.fixed, others[:4])
        kept, memory = iter(others[4:]), _Memory(x)
        centre, i = _Centre(central, len(x), left is not None), central.shape[2]
        dx = torch.empty_like(x) if needs_x else None
        dc = None
        d_right = _EndSum(right) if right and any(needs_ends[:2]) else None
        d_left = _EndSum(left) if left and any(needs_ends[2:]) else None
        for panel in _panels(ctx.counts, left):
            x_P, du_P = x[panel.rows], of_outputs[0][panel.rows]
            z_P = next(kept) if _is_kept(right) else None
            if left is not None:
                v_Poa = next(kept)
                dw_Pop = memory("wide", panel.size, v_Poa.shape[1], left.size)
                dw_Pop.copy_(du_P.view(panel.size, left.size, -1).transpose(1, 2))
                if d_left is not None:
                    d_left.add(panel, dw_Pop, v_Poa)
                dv_Poa = left.multiply(panel, dw_Pop, memory("v", *v_Poa.shape), transpose=True)
                du_P = centre.swap_back(dv_Poa, memory)
            if needs_central:
                dc = _add_product(dc, du_P.T, _times_right(right, panel, x_P, i, memory) if z_P is None else z_P)
            dx_P = None if dx is None else dx[panel.rows]
            if right is None:
                if dx_P is not None:
                    torch.mm(du_P, centre.matrix, out=dx_P)
            elif needs_x or d_right is not None:
                dz_Pib = memory("z", panel.size, i, right.size)
                torch.mm(du_P, centre.matrix, out=dz_Pib.view(panel.size, -1))
                if d_right is not None:
                    d_right.add(panel, dz_Pib, x_P.view(panel.size, i, -1))
                if dx_P is not None:
                    right.multiply(panel, dz_Pib, dx_P.view(panel.size, i, -1), transpose=True)
        return (
            None,
            None,
            dx,
            centre.gradient(dc) if needs_central else None,
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
    centre, (a, o, i, _) = _Centre(central, len(x), left is not None), central.shape
    memory = _Memory(x)
    y = x.new_empty(len(x), o * (a if left is None else left.size))
    for panel in _panels(counts, left):
        is_kept = kept is not None and _is_kept(right)
        z_P = _times_right(right, panel, x[panel.rows], i, _Memory(x) if is_kept else memory)
        if kept is not None and is_kept:
            kept.append(z_P)
        if left is None:
            return linear(z_P, centre.matrix)
        v_Poa = centre.times(z_P, (memory if kept is None else _Memory(x))("v", panel.size, o, a), memory)
        if kept is not None:
            kept.append(v_Poa)
        w_Pop = left.multiply(panel, v_Poa, memory("wide", panel.size, o, left.size))
        y[panel.rows].view(panel.size, left.size, o).copy_(w_Pop.transpose(1, 2))
    return y


class _Centre:
    """C as a matrix, with its rows swapped from (a, o) to (o, a) where an end follows and that is worth a copy."""

    def __init__(self, central: Tensor, tokens: int, is_followed: bool) -> None:
        self.central = central
        a, o, i, b = central.shape
        self.is_swapped = is_followed and tokens > i * b
        rows = central.transpose(0, 1) if self.is_swapped else central
        self.matrix = rows.reshape(a * o, i * b)

    def times(self, z_P: Tensor, out_Poa: Tensor, memory: _Memory) -> Tensor:
        """Out = C z, swapped for the end that follows."""
        tokens, o, a = out_Poa.shape
        if self.is_swapped:
            torch.mm(z_P, self.matrix.T, out=out_Poa.view(tokens, -1))
        else:
            u_P = linear(z_P, self.matrix, out=memory("wide", tokens, a * o))
            out_Poa.copy_(u_P.view(tokens, a, o).transpose(1, 2))
        return out_Poa

    def swap_back(self, dv_Poa: Tensor, memory: _Memory) -> Tensor:
        """The gradient of `times`' result in the order of the matrix' rows, (rows, a·o)."""
        tokens, o, a = dv_Poa.shape
        if self.is_swapped:
            return dv_Poa.view(tokens, -1)
        return memory("wide", tokens, a, o).copy_(dv_Poa.transpose(1, 2)).view(tokens, -1)

    def gradient(self, total: Tensor | None) -> Tensor:
        """Of C, from that of the matrix; None is none."""
        if total is None:
            return torch.zeros_like(self.central)
        a, o, i, b = self.central.shape
        d_central = total.view(o, a, i, b).transpose(0, 1) if self.is_swapped else total.view(a, o, i, b)
        return d_central.to(self.central.dtype, memory_format=torch.contiguous_format)


def _panels(counts: Sequence[int], left: _Ends | None) -> list[Panel]:
    """One product for all rows, unless an end follows it that had better find its result in the cache."""
    return whole(counts) if left is None else panels(counts)


def _is_kept(right: _Ends | None) -> bool:
    return right is not None and right.offsets.shape[2] >= KEPT_BOND


def _times_right(right: _Ends | None, panel: Panel, x_P: Tensor, i: int, memory: _Memory) -> Tensor:
    """R x of a panel, (rows, i·b)."""
    if right is None:
        return x_P
    z_Pib = memory("z", panel.size, i, right.size)
    return right.multiply(panel, x_P.view(panel.size, i, -1), z_Pib).view(panel.size, -1)


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

    def multiply(self, panel: Panel, x_Prk: Tensor, out: Tensor, transpose: bool = False) -> Tensor:
        """Out = M x for every vector of every token of a panel, M of the token's expert; or Mᵀ x."""
        for expert, x_rk, out_rl in panel.split(x_Prk, out):
            self._multiply(expert, x_rk, out_rl, transpose)
        return out

    def _multiply(self, expert: int, x_rk: Tensor, out: Tensor, transpose: bool) -> None:
        """Out = x Mᵀ, or x M."""
        offset, factor = self.offsets[expert], self.factors[expert]
        alpha = factor * self.scale
        if self.start is not None:
            matrix = torch.add(self.start, offset, alpha=self.scale).mul_(factor)
        elif x_rk.numel() <= COLUMNS_SIZE:
            mixed = linear_columns(x_rk, offset.T if transpose else offset).T
            torch.add(x_rk if factor == 1 else x_rk * factor, mixed, alpha=alpha, out=out)
            return
        elif offset.element_size() < 4:
            # x + s·A x, not (1 + s·A) x, and above too: small offsets are kept that bfloat16 would round away beside 1
            torch.addmm(x_rk, x_rk, offset if transpose else offset.T, beta=factor, alpha=alpha, out=out)
            return
        else:
            matrix = offset * alpha
            matrix.diagonal().add_(factor)
        torch.mm(x_rk, matrix if transpose else matrix.T, out=out)


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

    def add(self, panel: Panel, dy_Prl: Tensor, x_Prk: Tensor) -> None:
        """The gradient of M from a panel's results M x."""
        for expert, dy_rl, x_rk in panel.split(dy_Prl, x_Prk):
            self.total[expert].addmm_(dy_rl.T, x_rk, alpha=self.alpha)

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
