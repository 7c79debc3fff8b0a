"""Routers: which experts a token goes to, with what weight, and the losses that keep the experts evenly used.

Shape letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mpoe.nn.autocast import without_autocast
from mpoe.nn.balancing import BiasBalancing, is_recomputed
from mpoe.nn.float32 import Float32Module

MIN_CAPACITY = 4


@dataclass
class RouterOutput:
    """What a router decided for T tokens.

    Attributes:
        expert_index: The experts of every token, most probable first, 0 .. E - 1.
        weight: What each expert's output is multiplied by.
        kept: Which of these assignments the experts really get; None is all of them.
        logits: Of every expert.
        probabilities: Their softmax.
        dropped: Assignments that found their expert full, count.
        mask: Which tokens are no padding; None is all.
    """

    expert_index: Int[Tensor, "T K"]
    weight: Float[Tensor, "T K"]
    kept: Bool[Tensor, "T K"] | None
    logits: Float[Tensor, "T E"]
    probabilities: Float[Tensor, "T E"]
    dropped: Int[Tensor, ""]
    mask: Bool[Tensor, " T"] | None = None

    @property
    def tokens_per_expert(self) -> Int[Tensor, " E"]:
        """Tokens that every expert gets, padding too, count."""
        return _count(self.expert_index, self.logits.shape[1], self.kept)

    @property
    def gates(self) -> Float[Tensor, "T E"]:
        """The weight of every expert for every token; 0 for experts that are not selected."""
        weight = self.weight if self.kept is None else self.weight.masked_fill(~self.kept, 0)
        return torch.zeros_like(self.probabilities).scatter(1, self.expert_index, weight)

    def for_tokens(self, length: int, mask: Bool[Tensor, " T"] | None) -> RouterOutput:
        """Decisions on whole inputs as decisions on each of their tokens.

        Args:
            length: Tokens of an input, padding included, count.
            mask: Of these tokens.
        """
        return RouterOutput(
            expert_index=self.expert_index.repeat_interleave(length, dim=0),
            weight=self.weight.repeat_interleave(length, dim=0),
            kept=None if self.kept is None else self.kept.repeat_interleave(length, dim=0),
            logits=self.logits.repeat_interleave(length, dim=0),
            probabilities=self.probabilities.repeat_interleave(length, dim=0),
            dropped=self.dropped,
            mask=mask,
        )

    @property
    def real_tokens_per_expert(self) -> Int[Tensor, " E"]:
        """Tokens that every expert gets, without padding, count."""
        if self.mask is None:
            return self.tokens_per_expert
        kept = self.mask[:, None].expand_as(self.expert_index)
        return _count(self.expert_index, self.logits.shape[1], kept if self.kept is None else kept & self.kept)

    @property
    def load_balancing_loss(self) -> Float[Tensor, ""]:
        """Dimensionless; 1 when balanced."""
        # of the first choices, whatever becomes of them: a full expert shall still be felt as full
        first_choices = _count(self.expert_index[:, 0], self.logits.shape[1], self.mask)
        return load_balancing_loss(self.probabilities, first_choices, self.mask)

    @property
    def z_loss(self) -> Float[Tensor, ""]:
        """Mean square of the log of the softmax's denominator, nats²."""
        return router_z_loss(self.logits, self.mask)


class TopKRouter(Float32Module):
    """A softmax over a linear layer of the token; the K most probable experts get it.

    For experts that extend a matrix, the weights of a token's experts are their probabilities. Where outputs are mixed,
    it is Switch Transformer's router with K = 1 and GShard's with K >= 2: the weights are the probabilities divided by
    the sum of all K, so that they add up to 1.

    The token is scaled to unit root mean square first. Pre-trained models feed their FFNs with anything (T5's
    layer-norm weights are about 0.08), and a router that sees tiny inputs learns slowly and looks balanced whatever it
    does. Weights and computation are always in float32.

    Args:
        hidden_size: D, model width, count.
        num_experts: E, count.
        top_k: K, count.
        is_scale_prob: True: an expert's weight is its probability p, as in Switch Transformer, eq. 2.
            False, K = 1: by p / p with a stopped gradient below, as in the MPOE reference: its value is 1, so the
            pre-trained function is kept, and its gradient still reaches the router. False, K >= 2: as said above.
        gradient: What the gradient of p / p reaches, "all", "router" or "none"; see `MPOEConfig.router_gradient`.
        capacity_factor: See `MPOEConfig`; also for those that follow.
        eval_capacity_factor: In evaluation.
        second_policy_train: For the experts after the first.
        second_policy_eval: In evaluation.
        second_threshold: Of the policies "threshold" and "random".
        jitter: Noise on the inputs in training.
        input_norm: Whether tokens are scaled to unit root mean square.
        has_bias: Whether the linear layer has a bias.
        balancing: Changes which experts are selected; None selects by probability alone.

    Source: Fedus, Zoph, Shazeer, Switch Transformers (JMLR 2022), §2; Lepikhin et al., GShard (ICLR 2021), algorithm 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        is_scale_prob: bool = False,
        gradient: str = "router",
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        second_policy_train: str = "all",
        second_policy_eval: str = "all",
        second_threshold: float = 0.2,
        jitter: float = 0.0,
        input_norm: bool = True,
        has_bias: bool = True,
        balancing: BiasBalancing | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.is_scale_prob = is_scale_prob
        # other weights are part of the function, and their gradient is the function's
        self.gradient = "all" if is_scale_prob or top_k > 1 else gradient
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.second_policy_train = second_policy_train
        self.second_policy_eval = second_policy_eval
        self.second_threshold = second_threshold
        self.jitter = jitter
        self.input_norm = input_norm
        self.balancing = balancing
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32)) if has_bias else None

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw the weights so that the logits of a token have variance 1, on the CPU so that every device agrees."""
        drawn = torch.randn(self.weight.shape, generator=generator) * self.weight.shape[1] ** -0.5
        self.weight.copy_(drawn)
        if self.bias is not None:
            self.bias.zero_()
        if self.balancing is not None:
            self.balancing.reset(self.weight)

    def forward(
        self, x: Float[Tensor, "T D"], mask: Bool[Tensor, " T"] | None = None, watched: Tensor | None = None
    ) -> RouterOutput:
        """Route every token.

        Args:
            x: The tokens.
            mask: Which of them are no padding; None is all. Padding is routed, and never dropped for want of room.
            watched: A tensor that every optimizer step changes, for balancing by bias; None is the router's weight.
        """
        with without_autocast(x.device):
            logits = self._logits(x.float() if self.gradient == "all" else x.detach().float())
            probabilities = logits.softmax(dim=-1)
        top_probability, expert_index = self._select(probabilities, mask, watched)
        if self.is_scale_prob:
            weight = top_probability
        elif self.top_k == 1:
            counted = top_probability.detach() if self.gradient == "none" else top_probability
            weight = counted / top_probability.detach()
        else:
            weight = top_probability / top_probability.sum(dim=-1, keepdim=True)
        kept = self._wanted(weight)
        kept, dropped = self._within_capacity(expert_index, kept, mask)
        return RouterOutput(
            expert_index=expert_index,
            weight=weight,
            kept=kept,
            logits=logits,
            probabilities=probabilities,
            dropped=dropped,
            mask=mask,
        )

    def _select(
        self, probabilities: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None, watched: Tensor | None
    ) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """The probabilities and indices of the experts of every token, best first."""
        balancing = self.balancing
        if balancing is None:
            return probabilities.topk(self.top_k, dim=-1)
        # a mixture of which nothing trains has no optimizer steps, and stays as it is
        counts = self.training and not is_recomputed() and (self.weight.requires_grad or watched is not None)
        if counts:
            balancing.follow(self.weight if watched is None else watched)
        expert_index = balancing.scores(probabilities.detach()).topk(self.top_k, dim=-1).indices
        if counts:
            balancing.count(expert_index, mask)
        return probabilities.gather(1, expert_index), expert_index

    def _logits(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()  # of a model in float64
        noisy = x
        if self.training and self.jitter:
            noisy = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        if not self.input_norm:
            return nn.functional.linear(noisy, weight, bias)
        # the scale goes onto the few logits instead of onto the token
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        eps = norm.new_full((), torch.finfo(torch.float32).eps)
        scale = torch.rsqrt(torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]))
        logits = nn.functional.linear(noisy, weight)
        return logits * scale if bias is None else torch.addcmul(bias, logits, scale)

    def _wanted(self, weight: Float[Tensor, "T K"]) -> Bool[Tensor, "T K"] | None:
        """The first choices, and the others as the policy says; None is all."""
        policy = self.second_policy_train if self.training else self.second_policy_eval
        if policy == "all" or self.top_k == 1:
            return None
        if policy == "none":
            wanted = torch.zeros_like(weight, dtype=torch.bool)
        elif policy == "threshold":
            wanted = weight > self.second_threshold
        else:
            wanted = torch.rand_like(weight) < weight / self.second_threshold
        return wanted.index_fill(1, torch.zeros(1, dtype=torch.long, device=weight.device), True)

    def _within_capacity(
        self, expert_index: Int[Tensor, "T K"], kept: Bool[Tensor, "T K"] | None, mask: Bool[Tensor, " T"] | None
    ) -> tuple[Bool[Tensor, "T K"] | None, Int[Tensor, ""]]:
        """Cut what exceeds an expert's capacity: first choices go before second ones, and earlier tokens before later.

        Returns:
            What is still kept, and the number of assignments that were cut.
        """
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        tokens, num_choices = expert_index.shape
        if factor is None:
            return kept, torch.zeros((), dtype=torch.long, device=expert_index.device)
        asked = torch.ones_like(expert_index, dtype=torch.bool) if kept is None else kept
        if mask is None:
            takes_room, capacity = asked, max(MIN_CAPACITY, int(factor * tokens / self.num_experts))
        else:
            takes_room = asked & mask[:, None]
            # in float64, as the host computes it, or padding could change a capacity by one; Apple's GPUs have none
            tokens_there = mask.sum(dtype=torch.float32 if mask.device.type == "mps" else torch.float64)
            capacity = (factor * tokens_there / self.num_experts).floor().clamp(min=MIN_CAPACITY)
        one_hot_NE = nn.functional.one_hot(expert_index.T.reshape(-1), self.num_experts)
        one_hot_NE = one_hot_NE * takes_room.T.reshape(-1, 1)
        # 1, 2, .. in its expert; 0 for what takes no room
        place = (one_hot_NE.cumsum(dim=0) * one_hot_NE).sum(dim=1).view(num_choices, tokens).T
        within = asked & (place <= capacity)
        return within, asked.sum() - within.sum()


def _count(
    expert_index: Int[Tensor, "*any"], num_experts: int, kept: Bool[Tensor, "*any"] | None = None
) -> Int[Tensor, " E"]:
    """How often each expert is named; `bincount` would wait for the device."""
    ones = torch.ones_like(expert_index) if kept is None else kept.to(expert_index.dtype)
    return expert_index.new_zeros(num_experts).scatter_add_(0, expert_index.flatten(), ones.flatten())


def load_balancing_loss(
    probabilities: Float[Tensor, "T E"], tokens_per_expert: Int[Tensor, " E"], mask: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """E · Σ_e f_e P_e with f_e the share of tokens whose first choice is expert e, and P_e its mean probability.

    Args:
        probabilities: Router probabilities of every token.
        tokens_per_expert: Tokens whose first choice is each expert, count.
        mask: Which tokens count, in `tokens_per_expert` too; None is all.

    Returns:
        Dimensionless, 1 when balanced, E when all goes to one expert with certainty; 0 without tokens.

    Source: Switch Transformers, eq. 4; GShard's mean(density · density_proxy) · E² is the same number.
    """
    num_tokens, num_experts = probabilities.shape
    if num_tokens == 0:
        return probabilities.sum()
    if mask is None:
        share = tokens_per_expert.to(probabilities.dtype) / num_tokens
        return num_experts * (share * probabilities.mean(dim=0)).sum()
    share = tokens_per_expert.to(probabilities.dtype) / mask.sum().clamp(min=1)
    return num_experts * (share * _masked_mean(probabilities, mask)).sum()


def router_z_loss(logits: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None = None) -> Float[Tensor, ""]:
    """The mean over tokens of (log Σ_e exp logit_e)², which keeps a router's logits small; 0 without tokens.

    Args:
        logits: Of every token.
        mask: Which tokens count; None is all.

    Source: Zoph et al., ST-MoE (2022), eq. 5.
    """
    squares = logits.logsumexp(dim=-1).square()
    if mask is not None:
        return _masked_mean(squares, mask)
    return squares.mean() if len(squares) else squares.sum()


def _masked_mean(values: Tensor, mask: Bool[Tensor, " T"]) -> Tensor:
    """Over the first axis."""
    weight = mask.to(values.dtype) / mask.sum().clamp(min=1)
    return weight @ values
