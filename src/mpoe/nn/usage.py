"""What a router has done since somebody looked: sums over forwards, from which shares and means are taken.

Shape letters: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from mpoe.nn.router import RouterOutput


@dataclass(frozen=True)
class RouterUsage:
    """Sums over the tokens of some forwards, padding left out.

    They stay on the device, so that counting costs no synchronisation, and where they are, so that a CUDA graph finds
    them again.

    Attributes:
        tokens: Tokens routed, count.
        tokens_per_expert: Tokens that every expert got, count.
        dropped: Assignments that found their expert full, count.
        probability: Of every expert, summed over tokens.
        gate: The weight of every expert that a token was sent to, summed over tokens.
        entropy: Of every token's probabilities, summed, nats.
        balance_loss: Load-balancing losses, summed over the forwards whose loss has been taken.
        losses: These forwards, count.
    """

    tokens: Int[Tensor, ""]
    tokens_per_expert: Int[Tensor, " E"]
    dropped: Int[Tensor, ""]
    probability: Float[Tensor, " E"]
    gate: Float[Tensor, " E"]
    entropy: Float[Tensor, ""]
    balance_loss: Float[Tensor, ""]
    losses: Int[Tensor, ""]

    @classmethod
    def nothing(cls, num_experts: int, device: torch.device) -> RouterUsage:
        """Before the first forward."""
        with torch.inference_mode(False):  # or it could not be added to outside of that mode
            return cls(
                tokens=torch.zeros((), dtype=torch.long, device=device),
                tokens_per_expert=torch.zeros(num_experts, dtype=torch.long, device=device),
                dropped=torch.zeros((), dtype=torch.long, device=device),
                probability=torch.zeros(num_experts, device=device),
                gate=torch.zeros(num_experts, device=device),
                entropy=torch.zeros((), device=device),
                balance_loss=torch.zeros((), device=device),
                losses=torch.zeros((), dtype=torch.long, device=device),
            )

    @torch.no_grad()  # gradient checkpointing counts what a forward keeps for its backward
    def add(self, route: RouterOutput) -> None:
        """Add one forward."""
        probabilities, gates = route.probabilities, route.gates
        if route.mask is None:
            self.tokens.add_(len(probabilities))
        else:
            self.tokens.add_(route.mask.sum())
            probabilities = probabilities * route.mask[:, None]  # the entropy of zeros is 0 too
            gates = gates * route.mask[:, None]
        self.tokens_per_expert.add_(route.real_tokens_per_expert)
        self.dropped.add_(route.dropped)
        self.probability.add_(probabilities.sum(dim=0))
        self.gate.add_(gates.sum(dim=0))
        self.entropy.add_(torch.special.entr(probabilities).sum())

    @torch.no_grad()
    def add_balance_loss(self, loss: Float[Tensor, ""]) -> None:
        """Add the load-balancing loss of a forward that has been added."""
        self.balance_loss.add_(loss)
        self.losses.add_(1)

    @torch.no_grad()
    def plus(self, other: RouterUsage) -> RouterUsage:
        """The sums of both, in memory of their own.

        Args:
            other: Of the same layer.
        """
        return RouterUsage(**{name: count + getattr(other, name) for name, count in vars(self).items()})

    @torch.no_grad()
    def take(self) -> RouterUsage:
        """What it is now, in memory of its own; this one is nothing again."""
        taken = RouterUsage(**{name: count.clone() for name, count in vars(self).items()})
        for count in vars(self).values():
            count.zero_()
        return taken

    def sum_over_processes(self) -> None:
        """Add what the other processes of a distributed run have counted; all of them have to call it."""
        for count in vars(self).values():
            dist.all_reduce(count)

    def statistics(self) -> RouterStatistics:
        """Shares and means, as plain numbers."""
        tokens = max(int(self.tokens), 1)
        kept, dropped = int(self.tokens_per_expert.sum()), int(self.dropped)
        return RouterStatistics(
            share=(self.tokens_per_expert / max(kept, 1)).tolist(),
            mean_probability=(self.probability / tokens).tolist(),
            gate_mass=(self.gate / tokens).tolist(),
            dropped_fraction=dropped / max(kept + dropped, 1),
            entropy=float(self.entropy) / tokens,
        )

    def mean_balance_loss(self) -> float | None:
        """The mean load-balancing loss of a forward, dimensionless, 1 when balanced; None if none has been taken."""
        losses = int(self.losses)
        return float(self.balance_loss) / losses if losses else None


@dataclass(frozen=True)
class RouterStatistics:
    """How one layer's router spreads its tokens.

    Attributes:
        share: Of the assignments that each expert got; sums to 1.
        mean_probability: Of each expert, over tokens; sums to 1.
        gate_mass: Of each expert, the mean weight over tokens, 0 where it is not selected. An expert that its bias
            selects with a tiny probability has a share and no gate mass.
        dropped_fraction: Of the assignments, those that found their expert full, in [0, 1].
        entropy: Mean over tokens of the entropy of their probabilities, nats; ln E if the router does not care.
    """

    share: list[float]
    mean_probability: list[float]
    gate_mass: list[float]
    dropped_fraction: float
    entropy: float
