"""Dispatch: sort assignments by expert, so that each expert sees one contiguous block, and put the results back.

Shape letters: T tokens, K experts per token, N assignments kept, N <= T·K; E experts, D width of whatever is moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mpoe.nn.grouped import Counts, is_known_to_host
from mpoe.nn.router import RouterOutput


@dataclass(frozen=True)
class Dispatch:
    """A sorting of the assignments of T tokens to K experts each.

    Where the host knows the counts, dropped assignments are left out. Where it does not, the number of rows must not
    depend on them: they stay, with the last expert, and weigh nothing.

    Attributes:
        order: Row n of the sorted tokens is assignment order[n]; assignment t·K + k is the k-th choice of token t.
        counts: Tokens of every expert, in order; some may be 0. Their sum is N.
        top_k: K.
        kept: Which assignments weigh something; None is all of those in `order`.
    """

    order: Int[Tensor, " N"]
    counts: Counts
    top_k: int
    kept: Bool[Tensor, "T K"] | None = None

    @classmethod
    def by_expert(cls, route: RouterOutput) -> Dispatch:
        """Sort stably by expert, so that a result does not depend on the sorting algorithm."""
        index, counts = route.expert_index, route.tokens_per_expert
        top_k, last = index.shape[1], len(counts) - 1
        if is_known_to_host(index.device):
            known = counts.tolist()
            if route.kept is not None:
                index = index.masked_fill(~route.kept, last + 1)
            return cls(torch.argsort(index.flatten(), stable=True)[: sum(known)], known, top_k)
        if route.kept is not None:
            index = index.masked_fill(~route.kept, last)
            counts = torch.cat([counts[:-1], index.numel() - counts[:-1].sum(0, keepdim=True)])
        # what grouped products take, and a copy: the router's own may become the sum that `RouterUsage` adds to
        return cls(torch.argsort(index.flatten(), stable=True), counts.to(torch.int32), top_k, route.kept)

    @property
    def token_index(self) -> Int[Tensor, " N"]:
        """The token of every row."""
        return _token_index(self.order, self.top_k)

    def dispatch(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "N D"]:
        """Tokens in the experts' order, once for each expert that they go to."""
        if not torch.is_grad_enabled():
            return x.index_select(0, self.token_index)
        return _Rows.apply(x, self.order, self.top_k)  # pyright: ignore[reportReturnType]

    def combine(self, y: Float[Tensor, "N D"], weight: Float[Tensor, "T K"]) -> Float[Tensor, "T D"]:
        """Back to the tokens' own order: the weighted sum of what their experts say, 0 where nobody says anything."""
        if self.kept is not None:
            weight = weight.masked_fill(~self.kept, 0)
        y_TKD, weight = _of_assignments(y, self.order, *weight.shape), weight.to(y.dtype)
        return (y_TKD * weight[:, :, None]).sum(dim=1) if self.top_k > 1 else y_TKD.squeeze(1) * weight


def _token_index(order: Tensor, top_k: int) -> Tensor:
    return order if top_k == 1 else order // top_k


class _Rows(torch.autograd.Function):
    """Rows of x by assignment. No row is written twice on the way back, which PyTorch's own backward allows for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(order)
        ctx.top_k, ctx.num_tokens = top_k, len(x)
        return x.index_select(0, _token_index(order, top_k))

    @staticmethod
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        dx_TKD = _of_assignments(of_outputs[0], order, ctx.num_tokens, ctx.top_k)
        return dx_TKD.squeeze(1) if ctx.top_k == 1 else dx_TKD.sum(dim=1), None, None


def _of_assignments(y: Tensor, order: Tensor, tokens: int, top_k: int) -> Tensor:
    """Sorted rows at the places of their assignments, (T, K, D); 0 where an assignment was dropped."""
    # without drops every row is written, and zeros would be written twice
    rows = y.new_empty if len(order) == tokens * top_k else y.new_zeros
    return rows(tokens * top_k, y.shape[1]).index_copy_(0, order, y).view(tokens, top_k, y.shape[1])
