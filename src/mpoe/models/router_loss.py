"""The routers' losses, added to a model's own loss while it trains.

Every layer keeps what its router decided in the last forward. A hook on the model takes these and adds their losses to
`output.loss`, so that any training loop gets them, evaluation losses stay clean and nothing global is kept. Where a
loop computes its loss from the logits instead (label smoothing does), `take_router_loss` hands over the same number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig
from mpoe.nn import MoEFeedForward, TopKRouter


def mixtures(model: nn.Module) -> dict[str, MoEFeedForward]:
    """The layers of a model that route between experts, by name, in its order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoEFeedForward) and module.router is not None
    }


def routers(model: nn.Module) -> dict[str, TopKRouter]:
    """The routers of a model, by the name of their layer, in its order."""
    return {name: layer.router for name, layer in mixtures(model).items() if layer.router is not None}


def take_router_loss(model: nn.Module) -> Tensor | None:
    """The routers' losses of the last training forward, weighed as the config says; a second call finds nothing.

    Args:
        model: A Transformers model, dense or a mixture.

    Returns:
        Scalar, or None if no layer has been run in training since the last call.

    Raises:
        ValueError: The layers ran without a graph, as they do under reentrant gradient checkpointing.
    """
    config = mpoe_config(model)
    if config is None:
        return None
    losses = []
    for layer in mixtures(model).values():
        output, layer.router_output = layer.router_output, None
        if output is not None and layer.router is not None:
            balance_loss = output.load_balancing_loss
            if layer.usage is not None:
                layer.usage.add_balance_loss(balance_loss.detach())
            loss = config.load_balancing_coef * balance_loss
            if config.router_z_loss_coef:
                loss = loss + config.router_z_loss_coef * output.z_loss
            if torch.is_grad_enabled() and layer.router.weight.requires_grad and not loss.requires_grad:
                raise ValueError(
                    "the routers' loss must reach the routers, but the layers ran without a graph: use non-reentrant "
                    "gradient checkpointing, gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            losses.append(loss)
    if not losses:
        return None
    # Under device_map the layers sit on several devices.
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()


def mpoe_config(model: nn.Module) -> MPOEConfig | None:
    """What a model was upcycled with; None for a dense one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if isinstance(config, MPOEConfig) else None


def add_router_loss_hook(model: nn.Module) -> None:
    """Add the routers' losses to `output.loss` of every training forward that has one."""
    model.register_forward_hook(_add_router_loss)


def _add_router_loss(module: nn.Module, args: Any, output: Any) -> None:
    loss = getattr(output, "loss", None)
    if module.training and loss is not None:
        router_loss = take_router_loss(module)
        if router_loss is not None:
            output.loss = loss + router_loss.to(loss.device, loss.dtype)
