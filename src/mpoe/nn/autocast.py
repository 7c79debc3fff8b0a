"""Autocast, for layers that choose the types of their products themselves."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What products with a weight are computed in: autocast's type where it is on, else the weight's own."""
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for a while; nothing where it is off, because switching takes its time."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
