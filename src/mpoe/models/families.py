"""Where each family of models keeps its feed-forward networks: one row a family.

A new family is a new row; nothing else needs to know its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from mpoe.config import MPOEConfig


@dataclass(frozen=True)
class FeedForwardNames:
    """The names of one kind of feed-forward module.

    Attributes:
        path: Regular expression for the module's full name, with groups `stack` and `block`.
        up: Attribute of the matrix D -> F.
        down: Attribute of the matrix F -> D.
        gate: Attribute of the activated matrix D -> F of a gated FFN; None for a plain one.
        activation: Attribute of the activation.
        dropout: Attribute of the dropout between the activation and `down`.
    """

    path: str
    up: str
    down: str
    gate: str | None = None
    activation: str = "act"
    dropout: str = "dropout"


_T5_PATH = r"(?:^|\.)(?P<stack>encoder|decoder)\.block\.(?P<block>\d+)\.layer\.\d+\.DenseReluDense$"

FAMILIES: dict[str, tuple[FeedForwardNames, ...]] = {
    "t5": (
        FeedForwardNames(_T5_PATH, up="wi_1", gate="wi_0", down="wo"),  # v1.1, flan
        FeedForwardNames(_T5_PATH, up="wi", down="wo"),  # v1.0
    ),
}

T5_SIZES: dict[str, dict[str, int]] = {
    "t5-small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16},
}
"""Published sizes of T5 v1.0 (Raffel et al., JMLR 2020, §3.7), for counting parameters where no hub is reachable."""


@dataclass(frozen=True)
class FoundFeedForward:
    """One feed-forward module of a model, with the row that describes it."""

    name: str
    module: nn.Module
    names: FeedForwardNames


def find_feed_forwards(model: nn.Module, model_type: str, config: MPOEConfig) -> list[FoundFeedForward]:
    """The feed-forward modules that `config` asks to turn into mixtures.

    Args:
        model: The model.
        model_type: `model.config.model_type`, a key of FAMILIES.
        config: `stacks` and `layers` say which.

    Returns:
        At least one, in the model's order.

    Raises:
        ValueError: An unknown family, a family's model without the modules that its row names, a stack or block that
            the model has not.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {sorted(FAMILIES)}; got {model_type!r}. Modules that look like its "
            f"feed-forward networks: {_candidates(model)}; a row in mpoe/models/families.py describes a new family"
        )
    found = list(_matches(model, FAMILIES[model_type]))
    if not found:
        raise ValueError(
            f"a {model_type} model must have feed-forward modules named like {FAMILIES[model_type][0].path}; "
            f"{type(model).__name__} has none. Modules that look like them: {_candidates(model)}"
        )
    stacks = {place.group("stack") for _, place in found}
    blocks = {int(place.group("block")) for _, place in found}
    if config.stacks is not None and not set(config.stacks) <= stacks:
        raise ValueError(f"stacks must be among the model's {sorted(stacks)}; got {list(config.stacks)}")
    if config.layers is not None and not set(config.layers) <= blocks:
        raise ValueError(f"layers must be among the model's 0..{max(blocks)}; got {list(config.layers)}")
    return [
        feed_forward
        for feed_forward, place in found
        if (config.stacks is None or place.group("stack") in config.stacks)
        and (config.layers is None or int(place.group("block")) in config.layers)
    ]


def _matches(model: nn.Module, rows: tuple[FeedForwardNames, ...]) -> Iterator[tuple[FoundFeedForward, re.Match[str]]]:
    for name, module in model.named_modules():
        for names in rows:
            place = re.search(names.path, name)
            needed = (names.up, names.down, names.activation, names.dropout, names.gate or names.up)
            if place and all(hasattr(module, attribute) for attribute in needed):
                yield FoundFeedForward(name, module, names), place
                break


def _candidates(model: nn.Module, limit: int = 5) -> list[str]:
    """Names of modules with two or three linear layers and nothing else that is large."""
    names = [
        f"{name} ({type(module).__name__}: {', '.join(n for n, child in module.named_children() if _is_linear(child))})"
        for name, module in model.named_modules()
        if 2 <= sum(_is_linear(child) for child in module.children()) <= 3
        and not any(list(child.children()) for child in module.children())
    ]
    return names[:limit] + (["..."] if len(names) > limit else [])


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
