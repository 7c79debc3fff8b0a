"""`MoEFeedForward`: a router, experts and the base model's activation in the place of a Transformer's FFN.

Shape letters: T tokens, N assignments of tokens to experts, D model width, F FFN width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mpoe.nn.dispatch import Dispatch
from mpoe.nn.experts import DenseExperts, MPOExperts
from mpoe.nn.frozen_base import FrozenBaseExperts
from mpoe.nn.grouped import Counts, all_rows
from mpoe.nn.panels import panels
from mpoe.nn.router import RouterOutput, TopKRouter
from mpoe.nn.unshared import UnsharedMPOExperts
from mpoe.nn.usage import RouterUsage

Experts = MPOExperts | UnsharedMPOExperts | DenseExperts | FrozenBaseExperts


class MoEFeedForward(nn.Module):
    """A mixture of feed-forward experts: y = Σ weight · down(dropout(act(up x))), with act(gate x) · up x if gated.

    Args:
        router: Picks the experts of every token; None: there is one expert, which gets them all.
        up: Experts' matrices F × D.
        down: Experts' matrices D × F.
        activation: The base model's activation.
        gate: Experts' matrices F × D of a gated FFN, the ones that are activated; None for a plain FFN.
        dropout: Probability, between the activation and `down`.
        output_dropout: Probability, after everything.
        is_fused: Whether `up` is 2F × D: the gate's matrices first, then those that are not activated.
        routing: What is routed as one, see `MPOEConfig.routing`.

    Attributes:
        token_mask: Which tokens are no padding; None is all. Padding is computed like everything else, but it takes no
            expert's capacity and does not count in losses and shares. Of a mask that is longer than the input, the last
            tokens are meant, as with a cache of keys and values.
        prefix: What begins every input, (B, D), which routing "prefix" goes by; None if nobody has said.
        router_output: What the router decided in the last forward; None after the model's loss has taken it.
        usage: What it has decided since `reset_usage` or `take_usage`; None before the first forward.
        taken_usage: What has been taken since `reset_usage`; None is nothing.
    """

    def __init__(
        self,
        router: TopKRouter | None,
        up: Experts,
        down: Experts,
        activation: Callable[[Tensor], Tensor],
        gate: Experts | None = None,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
        is_fused: bool = False,
        routing: str = "token",
    ) -> None:
        super().__init__()
        self.router = router
        self.up = up
        self.gate = gate
        self.down = down
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.output_dropout = nn.Dropout(output_dropout)
        self.is_fused = is_fused
        self.routing = routing
        self.token_mask: Bool[Tensor, "B S"] | None = None
        self.prefix: Float[Tensor, "B D"] | None = None
        self.router_output: RouterOutput | None = None
        self.usage: RouterUsage | None = None
        self.taken_usage: RouterUsage | None = None

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The routed experts' FFNs for every token; 0 for a token that all its experts dropped."""
        x_TD = x.reshape(-1, x.shape[-1])
        if self.router is None:
            return self.output_dropout(self._experts(x_TD, all_rows(x_TD)).reshape(x.shape))
        route = self._route(self.router, x)
        self._record(route)
        dispatch = Dispatch.by_expert(route)
        y_ND = self._experts_in_turn(dispatch.dispatch(x_TD), dispatch.counts)
        return self.output_dropout(dispatch.combine(y_ND, route.weight).reshape(x.shape))

    def reset_usage(self) -> None:
        """Start counting anew."""
        self.usage = self.taken_usage = None

    def take_usage(self) -> RouterUsage | None:
        """What the router has decided since this was last called; `total_usage` goes on counting.

        Sums that begin at 0 every time are the same in a run that was interrupted; differences of sums would not be.
        """
        if self.usage is None:
            return None
        taken = self.usage.take()
        self.taken_usage = taken if self.taken_usage is None else self.taken_usage.plus(taken)
        return taken

    def total_usage(self) -> RouterUsage | None:
        """What the router has decided since `reset_usage`; None if nothing."""
        if self.usage is None or self.taken_usage is None:
            return self.usage
        return self.usage.plus(self.taken_usage)

    def _route(self, router: TopKRouter, x: Tensor) -> RouterOutput:
        tokens = x.shape[:-1].numel()
        mask = self._mask(tokens)
        if self.routing == "token":
            return router(x.reshape(tokens, x.shape[-1]), mask)
        if x.ndim != 3:
            raise ValueError(f"routing {self.routing!r} needs inputs (batch, tokens, width); got {tuple(x.shape)}")
        if self.routing == "sequence":
            weight = x.new_ones(x.shape[:2], dtype=torch.float32) if mask is None else mask.view(x.shape[:2]).float()
            decisive = torch.einsum("bsd,bs->bd", x.float(), weight / weight.sum(dim=1, keepdim=True).clamp(min=1))
        elif self.prefix is not None and len(self.prefix) == len(x):
            decisive = self.prefix
        else:
            raise ValueError("routing 'prefix' goes by the first tokens: the model must be called with input_ids")
        return router(decisive).for_tokens(x.shape[1], mask)

    def _mask(self, tokens: int) -> Tensor | None:
        if self.token_mask is None:
            return None
        batch, length = self.token_mask.shape
        if tokens % batch or tokens // batch > length:  # somebody else's tokens
            return None
        return self.token_mask[:, length - tokens // batch :].reshape(-1)

    def _experts_in_turn(self, x_ND: Tensor, counts: Counts) -> Tensor:
        """Where nothing is kept for a backward, a few experts go through the whole layer before the next ones start.

        What lies between the matrices is then small enough to stay in the cache.
        """
        if torch.is_grad_enabled() or isinstance(counts, Tensor):
            return self._experts(x_ND, counts)
        in_turn = panels(counts)
        if len(in_turn) < 2:
            return self._experts(x_ND, counts)
        return torch.cat([self._experts(x_ND[panel.rows], panel.counts(len(counts))) for panel in in_turn])

    def _experts(self, x_ND: Tensor, counts: Counts) -> Tensor:
        h_NF = self.up(x_ND, counts)
        if self.is_fused:
            gate_NF, h_NF = h_NF.chunk(2, dim=-1)
            h_NF = self.activation(gate_NF) * h_NF
        elif self.gate is not None:
            h_NF = self.activation(self.gate(x_ND, counts)) * h_NF
        else:
            h_NF = self.activation(h_NF)
        return self.down(self.dropout(h_NF), counts)

    def _record(self, route: RouterOutput) -> None:
        # In evaluation nobody adds the loss up, and a kept graph would be kept memory.
        self.router_output = route if self.training else None
        if self.usage is None or self.usage.tokens.device != route.logits.device:
            self.usage = RouterUsage.nothing(route.logits.shape[1], route.logits.device)
            self.taken_usage = None
        self.usage.add(route)
