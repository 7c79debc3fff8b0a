"""`MoEFeedForward`: a router, experts and the base model's activation in the place of a Transformer's FFN.

Shape letters: T tokens, D model width, F FFN width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mpoe.nn.dispatch import Dispatch
from mpoe.nn.experts import DenseExperts, MPOExperts
from mpoe.nn.router import RouterOutput, SwitchRouter


class MoEFeedForward(nn.Module):
    """A mixture of feed-forward experts: y = weight · down(dropout(act(up x))), with a gate act(gate x) · up x inside.

    Args:
        router: Picks an expert for every token.
        up: Experts' matrices F × D.
        down: Experts' matrices D × F.
        activation: The base model's activation.
        gate: Experts' matrices F × D of a gated FFN, the ones that are activated; None for a plain FFN.
        dropout: Probability, as in the base model.

    Attributes:
        router_output: What the router decided in the last forward; None after the model's loss has taken it.
        tokens_per_expert: Tokens sent to every expert since `reset_usage`, count; None before the first.
    """

    def __init__(
        self,
        router: SwitchRouter,
        up: MPOExperts | DenseExperts,
        down: MPOExperts | DenseExperts,
        activation: Callable[[Tensor], Tensor],
        gate: MPOExperts | DenseExperts | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.router = router
        self.up = up
        self.gate = gate
        self.down = down
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.router_output: RouterOutput | None = None
        self.tokens_per_expert: Tensor | None = None

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The routed expert's FFN for every token."""
        x_TD = x.reshape(-1, x.shape[-1])
        route = self.router(x_TD)
        self._record(route)
        dispatch = Dispatch.by_expert(route.expert_index, route.tokens_per_expert)
        sorted_TD = dispatch.dispatch(x_TD)
        h_TF = self.up(sorted_TD, dispatch.counts)
        if self.gate is None:
            h_TF = self.activation(h_TF)
        else:
            h_TF = self.activation(self.gate(sorted_TD, dispatch.counts)) * h_TF
        y_TD = dispatch.combine(self.down(self.dropout(h_TF), dispatch.counts))
        return (y_TD * route.weight[:, None].to(y_TD.dtype)).reshape(x.shape)

    def reset_usage(self) -> None:
        """Start counting tokens per expert anew."""
        self.tokens_per_expert = None

    def _record(self, route: RouterOutput) -> None:
        # In evaluation nobody adds the loss up, and a kept graph would be kept memory.
        self.router_output = route if self.training else None
        counted = self.tokens_per_expert
        if counted is None or counted.device != route.tokens_per_expert.device:
            counted = torch.zeros_like(route.tokens_per_expert)
        self.tokens_per_expert = counted + route.tokens_per_expert
