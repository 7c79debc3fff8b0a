"""Dispatch: sort tokens by expert, so that each expert sees one contiguous block, and put the results back.

Shape letters: T tokens, D width of whatever is moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """A sorting of T tokens by expert.

    Attributes:
        order: Position p of the sorted tokens holds token order[p].
        counts: Tokens of every expert, in order; some may be 0.
    """

    order: Int[Tensor, " T"]
    counts: list[int]

    @classmethod
    def by_expert(cls, expert_index: Int[Tensor, " T"], tokens_per_expert: Int[Tensor, " E"]) -> Dispatch:
        """Sort stably by expert, so that a result does not depend on the sorting algorithm."""
        return cls(torch.argsort(expert_index, stable=True), tokens_per_expert.tolist())

    def dispatch(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Tokens in the experts' order."""
        return x[self.order]

    def combine(self, y: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Back to the tokens' own order."""
        return torch.empty_like(y).index_copy(0, self.order, y)
