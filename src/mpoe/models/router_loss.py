"""The routers' load-balancing loss, added to a model's own loss while it trains.

Every layer keeps what its router decided in the last forward. A hook on the model takes these and adds their loss to
`output.loss`, so that any training loop gets it, evaluation losses stay clean and nothing global is kept. Where a loop
computes its loss from the logits instead (label smoothing does), `take_router_loss` hands over the same number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoe.nn import MoEFeedForward


def mixtures(model: nn.Module) -> dict[str, MoEFeedForward]:
    """The mixture-of-experts layers of a model by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEFeedForward)}


def take_router_loss(model: nn.Module, coef: float) -> Tensor | None:
    """The load-balancing loss of the last training forward; a second call finds nothing.

    Args:
        model: A model with mixture-of-experts layers.
        coef: Weight of the mean over layers, dimensionless, >= 0.

    Returns:
        Scalar, or None if no layer has been run in training since the last call.

    Raises:
        ValueError: The layers ran without a graph, as they do under reentrant gradient checkpointing.
    """
    losses = []
    for layer in mixtures(model).values():
        if layer.router_output is not None:
            loss = layer.router_output.load_balancing_loss
            if torch.is_grad_enabled() and layer.router.weight.requires_grad and not loss.requires_grad:
                raise ValueError(
                    "the routers' loss must reach the routers, but the layers ran without a graph: use non-reentrant "
                    "gradient checkpointing, gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            losses.append(loss)
            layer.router_output = None
    if not losses:
        return None
    # Under device_map the layers sit on several devices.
    return coef * torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()


def add_router_loss_hook(model: nn.Module, coef: float) -> None:
    """Add the routers' loss to `output.loss` of every training forward that has one."""

    def add_router_loss(module: nn.Module, args: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and loss is not None:
            router_loss = take_router_loss(module, coef)
            if router_loss is not None:
                output.loss = loss + router_loss.to(loss.device, loss.dtype)

    model.register_forward_hook(add_router_loss)
