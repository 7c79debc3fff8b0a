"""What a mixture is without its routers' judgement: the test of whether the routing matters."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mpoe.models.router_loss import routers
from mpoe.nn import RouterOutput


@contextlib.contextmanager
def shuffled_routing(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """A context in which every layer's decisions are dealt out anew among the tokens of a batch.

    Each expert gets as many tokens as before, but not those that the router meant for it. A model that is as good
    with its routing shuffled has experts that do the same, or routers that do not tell tokens apart: its mixture does
    nothing.

    Args:
        model: A mixture. Padding keeps its own decisions.
        seed: Of the shuffles.

    Raises:
        ValueError: A model without routers.
    """
    found = routers(model)
    if not found:
        raise ValueError("shuffled routing needs a mixture of experts; this model has no routers")
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device shuffles alike

    def shuffle(router: nn.Module, args: Any, route: RouterOutput) -> RouterOutput:
        tokens = len(route.expert_index)
        source = torch.arange(tokens)
        real = source.clone() if route.mask is None else source[route.mask.cpu()]
        source[real] = real[torch.randperm(len(real), generator=generator)]
        source = source.to(route.expert_index.device)
        return dataclasses.replace(
            route,
            expert_index=route.expert_index[source],
            weight=route.weight[source],
            kept=None if route.kept is None else route.kept[source],
        )

    handles = [router.register_forward_hook(shuffle) for router in found.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
