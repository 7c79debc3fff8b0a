"""Routers: which expert a token goes to, with what weight, and the loss that keeps the experts evenly used.

Shape letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass
class RouterOutput:
    """What a router decided for T tokens.

    Attributes:
        expert_index: The expert of every token, 0 .. E - 1.
        weight: What the expert's output is multiplied by.
        tokens_per_expert: Tokens sent to every expert, count.
        load_balancing_loss: Dimensionless; 1 when balanced.
    """

    expert_index: Int[Tensor, " T"]
    weight: Float[Tensor, " T"]
    tokens_per_expert: Int[Tensor, " E"]
    load_balancing_loss: Float[Tensor, ""]


class SwitchRouter(nn.Module):
    """Top-1 routing: a softmax over a linear layer of the token.

    The token is scaled to unit root mean square first. Pre-trained models feed their FFNs with anything (T5's
    layer-norm weights are about 0.08), and a router that sees tiny inputs learns slowly and looks balanced whatever it
    does. Always computed in float32.

    Args:
        hidden_size: D, model width, count.
        num_experts: E, count.
        is_scale_prob: True: an expert's output is multiplied by its probability p, as in Switch Transformer, eq. 2.
            False: by p / p with a stopped gradient below, as in the MPOE reference: its value is 1, so the pre-trained
            function is kept, and its gradient still reaches the router.

    Source: Fedus, Zoph, Shazeer, Switch Transformers (JMLR 2022), §2.
    """

    def __init__(self, hidden_size: int, num_experts: int, is_scale_prob: bool = False) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.is_scale_prob = is_scale_prob
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights so that the logits of a token have variance 1, on the CPU so that every device agrees."""
        drawn = torch.randn(self.weight.shape, generator=generator) * self.weight.shape[1] ** -0.5
        self.weight.copy_(drawn)
        self.bias.zero_()

    def forward(self, x: Float[Tensor, "T D"]) -> RouterOutput:
        """Route every token."""
        with torch.autocast(x.device.type, enabled=False):
            x = nn.functional.rms_norm(x.float(), x.shape[-1:])
            logits = nn.functional.linear(x, self.weight.float(), self.bias.float())
            probabilities = logits.softmax(dim=-1)
        top_probability, expert_index = probabilities.max(dim=-1)
        weight = top_probability if self.is_scale_prob else top_probability / top_probability.detach()
        tokens_per_expert = torch.bincount(expert_index, minlength=self.num_experts)
        return RouterOutput(
            expert_index=expert_index,
            weight=weight,
            tokens_per_expert=tokens_per_expert,
            load_balancing_loss=load_balancing_loss(probabilities, tokens_per_expert),
        )


def load_balancing_loss(probabilities: Float[Tensor, "T E"], tokens_per_expert: Int[Tensor, " E"]) -> Float[Tensor, ""]:
    """E · Σ_e f_e P_e with f_e the share of tokens sent to expert e and P_e its mean probability.

    Args:
        probabilities: Router probabilities of every token.
        tokens_per_expert: Tokens sent to every expert, count.

    Returns:
        Dimensionless, 1 when balanced, E when all goes to one expert with certainty; 0 without tokens.

    Source: Switch Transformers, eq. 4; GShard's mean(density · density_proxy) · E² is the same number.
    """
    num_tokens, num_experts = probabilities.shape
    if num_tokens == 0:
        return probabilities.sum()
    share = tokens_per_expert.to(probabilities.dtype) / num_tokens
    return num_experts * (share * probabilities.mean(dim=0)).sum()
