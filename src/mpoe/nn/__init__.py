"""Layers of a mixture: torch only, no Transformers."""

from mpoe.nn.dispatch import Dispatch
from mpoe.nn.experts import DenseExperts, MPOExperts, per_token
from mpoe.nn.feed_forward import MoEFeedForward
from mpoe.nn.router import RouterOutput, SwitchRouter, load_balancing_loss

__all__ = [
    "DenseExperts",
    "Dispatch",
    "MPOExperts",
    "MoEFeedForward",
    "RouterOutput",
    "SwitchRouter",
    "load_balancing_loss",
    "per_token",
]
