"""What the routers of a mixture see of a text, measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.models.router_loss import routers


@dataclass
class RouterInputs:
    """What a router has seen of a text; the root mean square of a token is what ours divides its logits by.

    Attributes:
        tokens: Without padding, count.
        rms_sum: The sum of their root mean squares.
        scale_sum: The sum of 1 over them.
        token_sum: The sum of the tokens themselves, shape (D,), on the CPU.
    """

    tokens: int = 0
    rms_sum: float = 0.0
    scale_sum: float = 0.0
    token_sum: Tensor | float = 0.0

    @property
    def rms(self) -> float:
        """The mean over tokens of their root mean square."""
        return self.rms_sum / self.tokens

    @property
    def scale(self) -> float:
        """The mean over tokens of 1 over their root mean square."""
        return self.scale_sum / self.tokens

    def constant(self, like: Tensor) -> Tensor:
        """The direction u of the mean token, so long that u · x is 1 on the mean: what a bias can be added along.

        Args:
            like: Of the result's dtype and device.
        """
        mean = torch.as_tensor(self.token_sum) / self.tokens
        return (mean / (mean @ mean)).to(like)


@contextmanager
def measured_inputs(model: nn.Module) -> Iterator[dict[str, RouterInputs]]:
    """A context in which the inputs of every router are measured, by the name of its layer.

    Args:
        model: A mixture; run a text through it within the context.
    """
    found = {name: RouterInputs() for name in routers(model)}

    def measure(inputs: RouterInputs, router: nn.Module, args: tuple[Any, ...]) -> None:
        x, mask, *_ = args
        x = (x if mask is None else x[mask]).float()
        rms = (x.square().mean(dim=-1) + torch.finfo(torch.float32).eps).sqrt().double()
        inputs.tokens += len(x)
        inputs.rms_sum += rms.sum().item()
        inputs.scale_sum += rms.reciprocal().sum().item()
        inputs.token_sum = x.double().sum(dim=0).cpu() + inputs.token_sum

    hooks = [router.register_forward_pre_hook(partial(measure, found[name])) for name, router in routers(model).items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
