"""A mixture's layer by its definition, expert after expert: what gpu.py compares results with.

Shape letters: T tokens, K experts per token, D model width, F FFN width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mpoe.nn import ExtendedExperts, MoEFeedForward, TopKRouter
from mpoe.nn.extended import ACTIVATIONS


def router_of(layer: Any) -> TopKRouter:
    """Return the router of a layer that has one."""
    assert isinstance(layer, MoEFeedForward), "the layer is a mixture"
    assert layer.router is not None, "the layer has several experts"
    return layer.router


def probabilities(router: TopKRouter, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
    """Return the softmax over experts for tokens of unit root mean square."""
    mean_square = x_TD.square().mean(dim=-1, keepdim=True)
    unit = x_TD / (mean_square + torch.finfo(torch.float32).eps).sqrt()
    logits = unit @ router.weight.T
    return (logits if router.bias is None else logits + router.bias).softmax(dim=-1)


def plain_layer(layer: MoEFeedForward, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
    """Return the output of a layer without a gate matrix and biases, before balancing changes any selection."""
    router = router_of(layer)
    seen_TD = x_TD if router.gradient == "all" else x_TD.detach()
    top, index = probabilities(router, seen_TD).topk(router.top_k, dim=-1)
    if isinstance(layer.up, ExtendedExperts):
        h_TF = layer.activation(_extended(layer.up, x_TD, index, top))
        return _extended(layer.down, h_TF, index, top)
    weight = top / (top.detach() if router.top_k == 1 else top.sum(dim=-1, keepdim=True))
    used = kept(index, router.num_experts, router.capacity_factor)
    y = torch.zeros_like(x_TD)
    for e in range(router.num_experts):
        token, choice = torch.where((index == e) & used)
        h = layer.activation(x_TD[token] @ _matrix(layer.up, e).T)
        y = y.index_add(0, token, h @ _matrix(layer.down, e).T * weight[token, choice, None])
    return y


def _matrix(experts: Any, e: int) -> Tensor:
    return experts.expert_matrix(e)


def _extended(experts: Any, x: Tensor, index: Int[Tensor, "T K"], weight: Float[Tensor, "T K"]) -> Tensor:
    y = x @ experts.base.weight.T
    for e in range(experts.num_experts):
        own = slice(e * experts.rank, (e + 1) * experts.rank)
        token, choice = torch.where(index == e)
        u = x[token] @ experts.offsets_U[own].T
        u = u if experts.activation is None else ACTIVATIONS[experts.activation](u)
        y = y.index_add(0, token, experts.scale * weight[token, choice, None] * (u @ experts.offsets_V[:, own].T))
    return y


def kept(index: Int[Tensor, "T K"], num_experts: int, factor: float | None) -> Bool[Tensor, "T K"]:
    """Return which assignments fit into their experts: first choices before second ones, early tokens before late ones.

    Args:
        index: The experts of every token.
        num_experts: E, count.
        factor: The router's capacity factor; None drops nothing.
    """
    fits = torch.ones_like(index, dtype=torch.bool)
    if factor is not None:
        places = [max(4, int(factor * len(index) / num_experts))] * num_experts
        for k in range(index.shape[1]):
            for t, e in enumerate(index[:, k].tolist()):
                fits[t, k] = places[e] > 0
                places[e] -= 1
    return fits
