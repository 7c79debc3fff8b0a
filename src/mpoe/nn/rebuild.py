"""Matrices that must be multiplied out before they are applied: one expert at a time, with a hand-written backward.

W_e = left_e · C · right_e, reordered to (out, in): both arms of the chain are merged first, they are small. What costs
is the product with the central tensor C, which all experts share. Nothing of the size of a matrix outlives its expert's
turn unless there is a budget for it, forward or backward.

Shape letters: A experts, N rows; a, b the bonds left and right of the central tensor; o, i the central site's output
and input dimensions; p, q all dimensions of the left and of the right arm, outputs before inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpoe.mpo import SiteDims


def rebuilt_linear(
    x: Float[Tensor, "N in_features"],
    counts: Sequence[int],
    central: Float[Tensor, "a o i b"],
    auxiliary: Sequence[Float[Tensor, "A _ _ _ _"]],
    dims: SiteDims,
    save_bytes: int = 0,
) -> Float[Tensor, "N out_features"]:
    """y_n = W_{e(n)} x_n: every expert's matrix is multiplied out, applied to the expert's rows and dropped.

    The backward pass multiplies it out again and sends its gradient on to the site tensors at once, so that only two
    or three tensors of a matrix's size are there at any time, whatever the number of experts. For tensors of one dtype,
    without autocast.

    Args:
        x: Rows, sorted by expert.
        counts: Rows of each of the A experts, A >= 1; they sum to N.
        central: The shared central tensor.
        auxiliary: The A experts' tensors of every auxiliary site, stacked: (A, d_{k-1}, o_k, i_k, d_k). An expert
            without rows should be left out of them, and of `counts`.
        dims: Site dimensions.
        save_bytes: What may be kept from forward to backward beside the arguments, bytes, >= 0. A matrix that is kept
            spares the backward pass its larger product, its intermediate result the smaller one.
    """
    budget = save_bytes if torch.is_grad_enabled() else 0
    return _RebuiltLinear.apply(x, list(counts), dims, budget, central, *auxiliary)  # pyright: ignore[reportReturnType]


def multiply_out(
    central: Float[Tensor, "a o i b"], auxiliary: Sequence[Float[Tensor, "A _ _ _ _"]], dims: SiteDims
) -> Iterator[Float[Tensor, "out_features in_features"]]:
    """W_e of one expert after the other, without a graph; only what the caller keeps stays in memory.

    Args:
        central: The shared central tensor.
        auxiliary: As in `rebuilt_linear`; of an MPO with one site none, and there is one expert.
        dims: Site dimensions.
    """
    rebuild = Rebuild(central, auxiliary, dims, len(auxiliary[0]) if auxiliary else 1)
    for e in range(rebuild.num_experts):
        yield rebuild.matrix(e, rebuild.middle(e), keep=True)


class Rebuild:
    """One layer's experts, to be multiplied out and to get gradients of their matrices back to the site tensors.

    Made for one pass, and without a graph to its arguments. A matrix is put together slice by slice along the central
    site's o, so that what lies between the products is small enough for the cache; memory is used again from expert to
    expert, because the page faults of fresh memory cost as much as a fifth of the product that fills it.

    Args:
        central: The shared central tensor.
        auxiliary: As in `rebuilt_linear`.
        dims: Site dimensions.
        num_experts: A.
        needs_gradient: Of the central tensor and of every auxiliary stack; none by default.

    Attributes:
        num_experts: A.
        matrix_bytes: Memory of one matrix, padding included.
        middle_bytes: Memory of one intermediate result.
    """

    def __init__(
        self,
        central: Tensor,
        auxiliary: Sequence[Tensor],
        dims: SiteDims,
        num_experts: int,
        needs_gradient: Sequence[bool] = (),
    ) -> None:
        self.num_experts = num_experts
        self._dims = dims
        needs_central, *needs_sites = needs_gradient or [False] * (1 + len(auxiliary))
        self._auxiliary = [
            site.detach().requires_grad_(need) for site, need in zip(auxiliary, needs_sites, strict=True)
        ]
        with torch.enable_grad():
            left_Apa, right_Abq = _merge_arms(self._auxiliary, dims, central.new_ones(num_experts, 1, 1))
            (_, p, a), (_, b, q) = left_Apa.shape, right_Abq.shape
            # Multiply-adds: left · C first takes p·o·i·b·(a + q), C · right first a·o·i·q·(b + p), which is the same
            # thing in the mirror. From here on left is whatever comes first.
            self._mirrored = a * q * (b + p) < p * b * (a + q)
            if self._mirrored:
                central = central.permute(3, 1, 2, 0)
                left_Apa, right_Abq = right_Abq.mT, left_Apa.mT
        self._arms = left_Apa, right_Abq
        self._left_Apa, self._right_Abq = left_Apa.detach().contiguous(), right_Abq.detach().contiguous()
        self._central = central.detach().contiguous()
        self._d_central = torch.zeros_like(self._central) if needs_central else None
        self._d_left_Apa, self._d_right_Abq = (
            torch.zeros(arm.shape, dtype=arm.dtype, device=arm.device) if arm.requires_grad else None
            for arm in self._arms
        )
        self._buffers: dict[str, Tensor] = {}
        a, o, i, b = self._central.shape
        self.matrix_bytes = dims.padded_out * dims.padded_in * central.element_size()
        self.middle_bytes = self._left_Apa.shape[1] * o * i * b * central.element_size()

    def middle(self, e: int, keep: bool = False) -> Tensor:
        """The central tensor times the arm that comes first: what `matrix` and `push_back` start from.

        Args:
            e: Expert.
            keep: In memory of its own; otherwise it is good until the next call.

        Returns:
            (o, p, i·b)
        """
        a, o, i, b = self._central.shape
        left_opa = self._left_Apa[e].expand(o, -1, -1)
        out = self._memory("middle", keep, o, left_opa.shape[1], i * b)
        # one product for every slice: torch spreads them over the cores, which beats spreading a single product
        return torch.bmm(left_opa, self._central.view(a, o, i * b).transpose(0, 1), out=out)

    def matrix(self, e: int, middle: Tensor, keep: bool = False) -> Tensor:
        """W_e, (out_features, in_features).

        Args:
            e: Expert.
            middle: Of this expert.
            keep: In memory of its own; otherwise it is good until the next call of anything.
        """
        b, q = self._right_Abq.shape[1:]
        w = self._memory("matrix", keep, self._dims.padded_out, self._dims.padded_in)
        for middle_k, w_k in zip(middle, self._slices(w), strict=True):
            chain = self._memory("chain", False, *w_k.shape)
            torch.mm(middle_k.view(-1, b), self._right_Abq[e], out=chain.view(-1, q))
            w_k.copy_(chain)
        return w[: self._dims.out_features, : self._dims.in_features]

    def scratch_matrix(self) -> Tensor:
        """Memory of a matrix's shape for the gradient that `push_back` is to get; good until the next call."""
        return self._memory("matrix", False, self._dims.out_features, self._dims.in_features)

    def push_back(self, e: int, gradient: Tensor, middle: Tensor) -> None:
        """Add what the gradient of W_e means for the site tensors.

        Args:
            e: Expert.
            gradient: Of the loss by W_e, (out_features, in_features).
            middle: Of this expert.
        """
        left_pa, right_bq, d_central = self._left_Apa[e], self._right_Abq[e], self._d_central
        d_left_pa, d_right_bq = (None if d is None else d[e] for d in (self._d_left_Apa, self._d_right_Abq))
        (p, a), (b, q) = left_pa.shape, right_bq.shape
        for k, gradient_k in enumerate(self._slices(self._padded(gradient))):
            chain = self._memory("chain", False, *gradient_k.shape).copy_(gradient_k).view(-1, q)
            if d_right_bq is not None:
                d_right_bq.addmm_(middle[k].view(-1, b).T, chain)
            if d_left_pa is not None or d_central is not None:
                d_middle = self._memory("d_middle", False, p, middle.shape[2])
                torch.mm(chain, right_bq.T, out=d_middle.view(-1, b))
                if d_left_pa is not None:
                    d_left_pa.addmm_(d_middle, self._central[:, k].reshape(a, -1).T)
                if d_central is not None:
                    d_central[:, k].view(a, -1).addmm_(left_pa.T, d_middle)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the central tensor and of every auxiliary stack, as pushed back so far; None where none was needed."""
        wanted = [site for site in self._auxiliary if site.requires_grad]
        arms, upstream = [], []
        for arm, d_arm in zip(self._arms, (self._d_left_Apa, self._d_right_Abq), strict=True):
            if d_arm is not None:
                arms.append(arm)
                upstream.append(d_arm)
        found = iter(torch.autograd.grad(arms, wanted, upstream) if wanted else ())
        d_central = self._d_central
        if d_central is not None and self._mirrored:
            d_central = d_central.permute(3, 1, 2, 0).contiguous()
        return d_central, *(next(found) if site.requires_grad else None for site in self._auxiliary)

    def _padded(self, matrix: Tensor) -> Tensor:
        rows, columns = self._dims.padded_out - matrix.shape[0], self._dims.padded_in - matrix.shape[1]
        return torch.nn.functional.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix

    def _slices(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """A padded matrix seen as the chain, o by o: first arm's outputs and inputs, the centre's i, the second's."""
        c, dims = self._dims.central, self._dims
        (o_left, o, o_right), (i_left, i, i_right) = (
            (math.prod(sizes[:c]), sizes[c], math.prod(sizes[c + 1 :])) for sizes in (dims.out_dims, dims.in_dims)
        )
        order = (1, 2, 5, 4, 0, 3) if self._mirrored else (1, 0, 3, 4, 2, 5)
        return matrix.view(o_left, o, o_right, i_left, i, i_right).permute(order).unbind(0)

    def _memory(self, name: str, keep: bool, *shape: int) -> Tensor:
        """Memory of its own, or what was under this name before."""
        size = math.prod(shape)
        if keep:
            return self._central.new_empty(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._central.new_empty(size)
        return self._buffers[name][:size].view(shape)


class _RebuiltLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, counts: list[int], dims: SiteDims, save_bytes: int, central: Tensor, *auxiliary: Tensor
    ) -> Tensor:
        rebuild = Rebuild(central, auxiliary, dims, len(counts))
        num_matrices = save_bytes // rebuild.matrix_bytes if ctx.needs_input_grad[0] else 0
        num_middles = (save_bytes - min(num_matrices, len(counts)) * rebuild.matrix_bytes) // rebuild.middle_bytes
        matrices: list[Tensor | None] = [None] * len(counts)
        middles = matrices.copy()
        y = x.new_empty(len(x), dims.out_features)
        for e, (x_e, y_e) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
            if len(x_e):
                middle = rebuild.middle(e, keep=e < num_middles)
                w = rebuild.matrix(e, middle, keep=e < num_matrices)
                torch.mm(x_e, w.T, out=y_e)
                matrices[e] = w if e < num_matrices else None
                middles[e] = middle if e < num_middles else None
        ctx.counts, ctx.dims = counts, dims
        ctx.save_for_backward(x, central, *auxiliary, *matrices, *middles)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,), counts, A = of_outputs, ctx.counts, len(ctx.counts)
        x, central, *rest = ctx.saved_tensors
        auxiliary, matrices, middles = rest[: -2 * A], rest[-2 * A : -A], rest[-A:]
        needs_x, *needs_sites = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
        rebuild = Rebuild(central, auxiliary, ctx.dims, A, needs_sites)
        dx = torch.empty_like(x)
        for e, (x_e, dx_e, dy_e) in enumerate(zip(x.split(counts), dx.split(counts), dy.split(counts), strict=True)):
            w = matrices[e]
            if w is not None:  # only if x needs it
                torch.mm(dy_e, w, out=dx_e)
            if not len(x_e) or (w is not None and not any(needs_sites)):
                continue
            middle = rebuild.middle(e) if middles[e] is None else middles[e]
            if needs_x and w is None:
                torch.mm(dy_e, rebuild.matrix(e, middle), out=dx_e)
            if any(needs_sites):
                rebuild.push_back(e, torch.mm(dy_e.T, x_e, out=rebuild.scratch_matrix()), middle)
        return dx if needs_x else None, None, None, None, *rebuild.gradients()


def _merge_arms(auxiliary: Sequence[Tensor], dims: SiteDims, unit_A11: Tensor) -> tuple[Tensor, Tensor]:
    """Both arms multiplied out, for all experts at once: (A, p, a) and (A, b, q)."""
    c = dims.central
    left = right = unit_A11
    for site in auxiliary[:c]:
        left = (left @ site.flatten(2)).reshape(len(site), -1, site.shape[-1])
    for site in reversed(auxiliary[c:]):
        right = (site.flatten(1, 3) @ right).reshape(len(site), site.shape[1], -1)
    left_Aap = _outputs_first(left.mT, dims.out_dims[:c], dims.in_dims[:c])
    return left_Aap.mT.contiguous(), _outputs_first(right, dims.out_dims[c + 1 :], dims.in_dims[c + 1 :])


def _outputs_first(arm: Tensor, out_dims: Sequence[int], in_dims: Sequence[int]) -> Tensor:
    """(A, bond, o_1 i_1 o_2 i_2 ..) -> (A, bond, o_1 o_2 .. i_1 i_2 ..)."""
    pairs = [size for pair in zip(out_dims, in_dims, strict=True) for size in pair]
    order = [0, 1, *range(2, 2 + len(pairs), 2), *range(3, 2 + len(pairs), 2)]
    return arm.reshape(*arm.shape[:2], *pairs).permute(order).reshape(arm.shape)
