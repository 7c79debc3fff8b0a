"""The routers' losses, added to a model's own loss while it trains.

Every layer keeps what its router decided in the last forward. A hook on the model takes these and adds their losses to
`output.loss`, so that any training loop gets them, evaluation losses stay clean and nothing global is kept. Where a
loop computes its loss from the logits instead (label smoothing does), `take_router_loss` hands over the same number.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from mpoe.config import MPOEConfig
from mpoe.models.difference import IGNORED
from mpoe.nn import MoEFeedForward, TopKRouter
from mpoe.nn.balancing import is_recomputed
from mpoe.nn.feed_forward import warn_of_unused_loss


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
            loss = (config.load_balancing_coef or 0.0 if config.balancing == "loss" else 0.0) * balance_loss
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
    """Add the routers' losses to the loss of every training forward that has one, `return_dict=False` too."""
    model.register_forward_hook(_add_router_loss, with_kwargs=True)


def _add_router_loss(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    if isinstance(output, tuple):  # the loss comes first where there is one, and is the only scalar
        loss = output[0] if isinstance(output[0], Tensor) and output[0].ndim == 0 else None
    else:
        loss = getattr(output, "loss", None)
    if not module.training or loss is None or is_recomputed():
        return None
    routed = [layer.router_output for layer in mixtures(module).values() if layer.router_output is not None]
    router_loss = take_router_loss(module)
    if router_loss is None:
        return None
    if router_loss.requires_grad and not torch.compiler.is_compiling():
        _watch_use(router_loss, routed[-1].logits)
    loss = loss + (router_loss * _share_of_step(module, kwargs)).to(loss.device, loss.dtype)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return None


def _watch_use(router_loss: Tensor, logits: Tensor) -> None:
    """Warn if a backward pass reaches a router and not its loss: a loop with a loss of its own, as TRL's trainers have.

    The gradient of the logits is complete only after the pass has been through all that they are used for.
    """
    used = False

    def note(_: Tensor) -> None:
        nonlocal used
        used = True

    def check(_: Tensor) -> None:
        if not used:
            warn_of_unused_loss()

    router_loss.register_hook(note)
    logits.register_hook(check)


def _share_of_step(model: Any, kwargs: dict[str, Any]) -> Tensor | float:
    """The share of a micro-batch in its optimizer step, by targets as the Trainer counts them.

    Where a loop passes `num_items_in_batch`, the targets of the whole step, most models divide their loss by that
    number and the loop does not divide by the number of micro-batches. A loss that is a mean of the micro-batch has to
    be weighed in the same way, or it counts once for every micro-batch. A model that ignores the number (T5) counts its
    own loss that often, and the routers' loss keeps its weight relative to it.
    """
    if not _divides_by_items(type(model).forward):
        return 1.0
    num_items, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs.get("labels")
        if labels is not None and shifts_labels(model):
            labels = labels[..., 1:]
    if num_items is None or labels is None:
        return 1.0
    return (labels != IGNORED).sum() / torch.as_tensor(num_items, device=labels.device)


@functools.cache
def _divides_by_items(forward: Any) -> bool:
    """Whether a model's `forward` hands `num_items_in_batch` to its loss; no attribute of Transformers tells."""
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except OSError:  # no source at hand
        return True
    return re.search(r"loss_function\((?:[^()]|\([^()]*\))*\*\*\w+", source) is not None


def shifts_labels(model: Any) -> bool:
    """Whether a model's loss compares each logit with the next label; the Trainer counts the labels after the first."""
    return LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss and not getattr(
        model.config, "is_encoder_decoder", False
    )
