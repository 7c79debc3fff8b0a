"""`MoEFeedForward`: a router, experts and the base model's activation in the place of a Transformer's FFN.

Shape letters: T tokens, N assignments of tokens to experts, D model width, F FFN width, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mpoe.nn.balancing import is_recomputed
from mpoe.nn.dispatch import Dispatch
from mpoe.nn.experts import DenseExperts, MPOExperts
from mpoe.nn.extended import ExtendedExperts
from mpoe.nn.grouped import all_rows, is_known_to_host
from mpoe.nn.router import RouterOutput, TopKRouter
from mpoe.nn.unshared import UnsharedMPOExperts
from mpoe.nn.usage import RouterUsage

Experts = ExtendedExperts | MPOExperts | UnsharedMPOExperts | DenseExperts


class MoEFeedForward(nn.Module):
    """A mixture of feed-forward experts: down(dropout(act(up x))), or with act(gate x) · up x if gated.

    Experts that extend a matrix (`ExtendedExperts`) take all tokens and the router's gates. The outputs of other
    experts, which take their own tokens alone, are mixed: y = Σ weight · FFN_e(x).

    Args:
        router: Picks the experts of every token. None: extended matrices have gates of 1; others have one expert.
        up: Experts' matrices F × D.
        down: Experts' matrices D × F.
        activation: The base model's activation.
        gate: Experts' matrices F × D of a gated FFN, the ones that are activated; None for a plain FFN.
        dropout: Probability, between the activation and `down`.
        output_dropout: Probability, after everything.
        is_fused: Whether `up` is 2F × D: the gate's matrices first, then those that are not activated.
        routing: What is routed as one, see `MPOEConfig.routing`.
        has_loss: Whether the router's losses are to be added to the model's, see `router_output`.

    Attributes:
        token_mask: Which tokens are not padding; None is all. Padding is computed like everything else, but it takes no
            expert's capacity and does not count in losses, loads and shares. A mask that is longer than the input is
            aligned at its end, as with a cache of keys and values.
        prefix: What begins every input, (B, D), which routing "prefix" goes by; None if unset.
        router_output: The routing decision of the last training forward if `has_loss`, until the model's loss takes it.
        usage: Sums over the forwards since `reset_usage` or `take_usage`; None before `reset_usage`, and then nothing
            is counted.
        taken_usage: Sums taken since `reset_usage`; `None` if nothing was taken.
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
        has_loss: bool = False,
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
        self.has_loss = has_loss
        self.token_mask: Bool[Tensor, "B S"] | None = None
        self.prefix: Float[Tensor, "B D"] | None = None
        self.router_output: RouterOutput | None = None
        self.usage: RouterUsage | None = None
        self.taken_usage: RouterUsage | None = None

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The experts' FFN for every token; of mixed outputs, 0 for a token that all its experts dropped."""
        x_TD = x.reshape(-1, x.shape[-1])
        if self.router is None:
            y_TD = self._ffn(x_TD, all_rows(x_TD) if self.up.mixes_outputs else None)
            return self.output_dropout(y_TD.reshape(x.shape))
        route = self._route(self.router, x)
        self._record(route)
        if self.up.mixes_outputs:
            dispatch = Dispatch.by_expert(route)
            y_TD = dispatch.combine(self._ffn(dispatch.dispatch(x_TD), dispatch.counts), route.weight)
        elif cast(ExtendedExperts, self.up).selects(len(x_TD)) and is_known_to_host(x.device):
            dispatch = Dispatch.by_expert(route)
            y_TD = self._ffn(x_TD, route.weight.flatten()[dispatch.order], dispatch)
        else:
            y_TD = self._ffn(x_TD, route.gates)
        return self.output_dropout(y_TD.reshape(x.shape))

    def reset_usage(self) -> None:
        """Start to count what the router decides, from nothing."""
        self.usage = self.taken_usage = None
        if self.router is not None:
            self.usage = RouterUsage.nothing(self.router.num_experts, self.router.weight.device)

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
        """What the router has decided since `reset_usage`; None before it."""
        if self.usage is None or self.taken_usage is None:
            return self.usage
        return self.usage.plus(self.taken_usage)

    def watched_parameter(self) -> nn.Parameter | None:
        """Return the trained tensor by which balancing notices optimizer steps; None is the router's weight."""
        router = self.router
        if router is None or router.balancing is None or router.weight.requires_grad:
            return None
        needed = router.weight.numel()
        # V first: every row has all experts, idle ones too, and it has a gradient from the first step on
        own = [self.up.offsets_V] if isinstance(self.up, ExtendedExperts) else []
        return next((p for p in (*own, *self.parameters()) if p.requires_grad and p.numel() >= needed), None)

    def _route(self, router: TopKRouter, x: Tensor) -> RouterOutput:
        tokens = x.shape[:-1].numel()
        mask, watched = self._mask(tokens), self.watched_parameter() if self.training else None
        if self.routing == "token":
            return router(x.reshape(tokens, x.shape[-1]), mask, watched)
        if x.ndim != 3:
            raise ValueError(f"routing {self.routing!r} needs inputs (batch, tokens, width); got {tuple(x.shape)}")
        if self.routing == "sequence":
            weight = x.new_ones(x.shape[:2], dtype=torch.float32) if mask is None else mask.view(x.shape[:2]).float()
            decisive = torch.einsum("bsd,bs->bd", x.float(), weight / weight.sum(dim=1, keepdim=True).clamp(min=1))
        elif self.prefix is not None and len(self.prefix) == len(x):
            decisive = self.prefix
        else:
            raise ValueError("routing 'prefix' goes by the first tokens: the model must be called with input_ids")
        return router(decisive, watched=watched).for_tokens(x.shape[1], mask)

    def _mask(self, tokens: int) -> Tensor | None:
        if self.token_mask is None:
            return None
        batch, length = self.token_mask.shape
        if tokens % batch or tokens // batch > length:  # somebody else's tokens
            return None
        return self.token_mask[:, length - tokens // batch :].reshape(-1)

    def _ffn(self, x: Tensor, *routing: Any) -> Tensor:
        """Both or all three matrices; `routing` is what the experts' `forward` takes beside the rows."""
        h_NF = self.up(x, *routing)
        if self.is_fused:
            gate_NF, h_NF = h_NF.chunk(2, dim=-1)
            h_NF = self.activation(gate_NF) * h_NF
        elif self.gate is not None:
            h_NF = self.activation(self.gate(x, *routing)) * h_NF
        else:
            h_NF = self.activation(h_NF)
        return self.down(self.dropout(h_NF), *routing)

    def _record(self, route: RouterOutput) -> None:
        if is_recomputed():
            return
        if self.has_loss and self.training:
            before = self.router_output
            if before is not None and before.logits.requires_grad and not torch.compiler.is_compiling():
                warn_of_unused_loss()
            self.router_output = route
        if self.usage is not None:
            if self.usage.tokens.device != route.logits.device:
                self.reset_usage()
            self.usage.add(route)


def warn_of_unused_loss() -> None:
    """Warn that the routers' losses do not reach the optimizer."""
    # the filter "default" shows a message once for each place
    warnings.warn(
        "the load-balancing loss of a training forward was not used: the training loop computes its loss outside of "
        "the model. Use balancing='bias', or add mpoe.models.take_router_loss(model) to the loss",
        stacklevel=2,
    )
