"""`BiasBalancing`: experts are kept evenly loaded by a bias in their selection, without a loss.

Shape letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mpoe.nn.float32 import Float32Module


class BiasBalancing(Float32Module):
    """A bias per expert that moves against the expert's excess load once per optimizer step.

    It is added to the router's probabilities to select the top k and is never a weight. An optimizer step is noticed
    by comparing a trained tensor with a copy of it, on the device and without synchronisation; until then the loads of
    all training forwards are added up. So gradient accumulation needs no care, and neither does the loss.

    All state is in buffers: a resumed run continues exactly. The bias is stored as a whole number of steps, which no
    cast rounds.

    Args:
        num_experts: E, count.
        hidden_size: D, count.
        step: What one step adds to a bias or takes from it, relative to the mean probability 1 / E.

    Attributes:
        steps: Of each expert's bias, count, positive or negative.
        pending: Assignments since the last optimizer step, count, of all processes.
        reference: The trained tensor as it was in the last training forward, or its first E·D elements.

    Source: Wang et al., Auxiliary-Loss-Free Load Balancing (2024); DeepSeek-V3 (2024), §2.1.2.
    """

    def __init__(self, num_experts: int, hidden_size: int, step: float) -> None:
        super().__init__()
        self.step = step
        self.steps: Tensor
        self.pending: Tensor
        self.reference: Tensor
        self.register_buffer("steps", torch.zeros(num_experts, dtype=torch.long))
        self.register_buffer("pending", torch.zeros(num_experts, dtype=torch.long))
        self.register_buffer("reference", torch.zeros(num_experts * hidden_size, dtype=torch.float32))

    def scores(self, probabilities: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the probabilities with each expert's bias, by which experts are selected."""
        return torch.add(probabilities, self.steps, alpha=self.step / len(self.steps))

    @torch.no_grad()
    def reset(self, watched: Tensor) -> None:
        """Start from no bias.

        Args:
            watched: As for `follow`.
        """
        self.steps.zero_()
        self.pending.zero_()
        self.reference.copy_(self._sample(watched))

    @torch.no_grad()
    def follow(self, watched: Tensor) -> None:
        """Move the biases if the optimizer has stepped since the last call.

        Args:
            watched: A tensor that every optimizer step changes, with at least E·D elements.
        """
        now = self._sample(watched)
        stepped = (now != self.reference).any()
        # whole numbers: the sign of the mean load minus the expert's
        lack = torch.sign(self.pending.sum() - self.pending * len(self.pending))
        self.steps.add_(lack * stepped)
        self.steps.sub_(self.steps.sum().div(len(self.steps), rounding_mode="floor"))  # the same for all: no drift
        self.pending.mul_(~stepped)
        self.reference.copy_(now)

    @torch.no_grad()
    def count(self, expert_index: Int[Tensor, "T K"], mask: Bool[Tensor, " T"] | None) -> None:
        """Add the assignments of a training forward, of all processes.

        They are summed here and not when they are used: DistributedDataParallel makes the buffers of all processes
        those of the first one before each forward.

        Args:
            expert_index: The selected experts.
            mask: Which tokens are not padding; None is all.
        """
        ones = torch.ones_like(expert_index) if mask is None else mask[:, None].expand_as(expert_index).long()
        loads = torch.zeros_like(self.pending).scatter_add_(0, expert_index.flatten(), ones.flatten())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(loads)
        self.pending.add_(loads)

    def _sample(self, watched: Tensor) -> Tensor:
        return watched.detach().reshape(-1)[: len(self.reference)].to(self.reference.dtype)


def is_recomputed() -> bool:
    """Return whether this forward repeats an earlier one for the backward pass, as gradient checkpointing does.

    `torch.utils.checkpoint` asks the autograd engine in the same way.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
