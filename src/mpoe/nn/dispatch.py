"""Dispatch: sort assignments by expert, so that each expert sees one contiguous block, and put the results back.

Shape letters: T tokens, K experts per token, N assignments kept, N <= T·K; E experts, D width of whatever is moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mpoe.nn.router import RouterOutput


@dataclass(frozen=True)
class Dispatch:
    """A sorting of the assignments of T tokens to K experts each.

    Attributes:
        order: Row n of the sorted tokens is assignment order[n]; assignment t·K + k is the k-th choice of token t.
        counts: Tokens of every expert, in order; some may be 0. Their sum is N.
        top_k: K.
    """

    order: Int[Tensor, " N"]
    counts: list[int]
    top_k: int

    @classmethod
    def by_expert(cls, route: RouterOutput) -> Dispatch:
        """Sort stably by expert, so that a result does not depend on the sorting algorithm; leave dropped ones out."""
        index = route.expert_index
        if route.kept is not None:
            index = index.masked_fill(~route.kept, route.probabilities.shape[1])  # behind the last expert
        counts = route.tokens_per_expert.tolist()
        return cls(torch.argsort(index.flatten(), stable=True)[: sum(counts)], counts, index.shape[1])

    def dispatch(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "N D"]:
        """Tokens in the experts' order, once for each expert that they go to."""
        return x[self.order // self.top_k]

    def combine(self, y: Float[Tensor, "N D"], weight: Float[Tensor, "T K"]) -> Float[Tensor, "T D"]:
        """Back to the tokens' own order: the weighted sum of what their experts say, 0 where nobody says anything."""
        tokens, top_k = weight.shape[0], self.top_k
        # without drops every row is written, and zeros would be written twice
        rows = y.new_empty if len(self.order) == tokens * top_k else y.new_zeros
        y_TKD = rows(tokens * top_k, y.shape[1]).index_copy(0, self.order, y).view(tokens, top_k, y.shape[1])
        return (y_TKD * weight[:, :, None].to(y.dtype)).sum(dim=1)
