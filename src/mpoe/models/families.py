"""Where each family of models keeps its feed-forward networks, attention and word embedding: one row a family.

A new family is a new row; nothing else needs to know its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

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


@dataclass(frozen=True)
class EmbeddingNames:
    """Regular expressions for the full names of the modules that a word embedding is made of.

    Attributes:
        table: The embedding.
        users: Other modules that look words up in the same table.
        head: The language-model head, with or without a matrix of its own.
    """

    table: str
    users: str
    head: str


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep their parts.

    Attributes:
        feed_forwards: One for every kind of feed-forward module.
        attention: Regular expression for the full names of the attention's linear layers, with groups `stack` and
            `block`; None if it is not known.
        word_embed: None if it is not known.
    """

    feed_forwards: tuple[FeedForwardNames, ...]
    attention: str | None = None
    word_embed: EmbeddingNames | None = None


_T5_LAYER = r"(?:^|\.)(?P<stack>encoder|decoder)\.block\.(?P<block>\d+)\.layer\.\d+"

FAMILIES: dict[str, Family] = {
    "t5": Family(
        feed_forwards=(
            FeedForwardNames(_T5_LAYER + r"\.DenseReluDense$", up="wi_1", gate="wi_0", down="wo"),  # v1.1, flan
            FeedForwardNames(_T5_LAYER + r"\.DenseReluDense$", up="wi", down="wo"),  # v1.0
        ),
        attention=_T5_LAYER + r"\.(?:SelfAttention|EncDecAttention)\.[qkvo]$",
        word_embed=EmbeddingNames(
            table=r"(?:^|\.)shared$", users=r"(?:^|\.)(?:encoder|decoder)\.embed_tokens$", head=r"(?:^|\.)lm_head$"
        ),
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


@dataclass(frozen=True)
class FoundEmbedding:
    """The word embedding of a model, by the names of its modules.

    Attributes:
        table: The embedding.
        users: Other modules that look words up in the same table.
        head: The language-model head; None if the model has none.
    """

    table: str
    users: tuple[str, ...]
    head: str | None


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
    rows = _family(model, model_type).feed_forwards
    found = list(_matches(model, rows))
    if not found:
        raise ValueError(
            f"a {model_type} model must have feed-forward modules named like {rows[0].path}; "
            f"{type(model).__name__} has none. Modules that look like them: {_candidates(model)}"
        )
    return _chosen(found, config)


def find_attention(model: nn.Module, model_type: str, config: MPOEConfig) -> list[str]:
    """The names of the attention's linear layers that `config` asks to turn into MPOs.

    Args:
        model: The model.
        model_type: As in `find_feed_forwards`.
        config: `stacks` and `layers` say which.

    Returns:
        At least one, in the model's order.

    Raises:
        ValueError: A family whose attention is not known, layers that are not there or not `nn.Linear`, a stack or
            block that the model has not.
    """
    path = _family(model, model_type).attention
    if path is None:
        raise _unknown("attention", model_type)
    found = [(name, place) for name, _ in model.named_modules() if (place := re.search(path, name))]
    if not found:
        raise ValueError(f"a {model_type} model must have attention named like {path}; {type(model).__name__} has none")
    for name, _ in found:
        _require_type(model, name, nn.Linear)
    return _chosen(found, config)


def find_embedding(model: nn.Module, model_type: str) -> FoundEmbedding:
    """The word embedding of a model.

    Args:
        model: The model.
        model_type: As in `find_feed_forwards`.

    Raises:
        ValueError: A family whose embedding is not known, modules that are not there, not `nn.Embedding` and
            `nn.Linear`, or of a form that an MPO has not.
    """
    names = _family(model, model_type).word_embed
    if names is None:
        raise _unknown("word_embed", model_type)
    # with duplicates: after a resize the users are the very same module under several names
    there = [name for name, _ in model.named_modules(remove_duplicate=False)]
    tables, users, heads = (
        [name for name in there if re.search(path, name)] for path in (names.table, names.users, names.head)
    )
    if len(tables) != 1 or len(heads) > 1:
        raise ValueError(
            f"a {model_type} model must have one word embedding named like {names.table} and at most one head like "
            f"{names.head}; {type(model).__name__} has {tables} and {heads}"
        )
    for name in (*tables, *users):
        embedding = _require_type(model, name, nn.Embedding)
        if embedding.padding_idx is not None or embedding.max_norm is not None:
            raise ValueError(f"{name} must have neither padding_idx nor max_norm to become an MPO; it is {embedding}")
    for name in heads:
        _require_type(model, name, nn.Linear)
    return FoundEmbedding(tables[0], tuple(users), heads[0] if heads else None)


def _family(model: nn.Module, model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {sorted(FAMILIES)}; got {model_type!r}. Modules that look like its "
            f"feed-forward networks: {_candidates(model)}; a row in mpoe/models/families.py describes a new family"
        )
    return FAMILIES[model_type]


def _unknown(component: str, model_type: str) -> ValueError:
    return ValueError(
        f"mpo_layers must be among what is known of a {model_type} model; its {component} is not: leave that out, or "
        "complete the family's row in mpoe/models/families.py"
    )


_Layer = TypeVar("_Layer", nn.Linear, nn.Embedding)


def _require_type(model: nn.Module, name: str, kind: type[_Layer]) -> _Layer:
    module = model.get_submodule(name)
    if not isinstance(module, kind):
        raise ValueError(f"{name} must be an nn.{kind.__name__} to become an MPO; it is a {type(module).__name__}")
    return module


_Part = TypeVar("_Part")


def _chosen(found: list[tuple[_Part, re.Match[str]]], config: MPOEConfig) -> list[_Part]:
    """Those in the stacks and blocks that `config` names."""
    stacks = {place.group("stack") for _, place in found}
    blocks = {int(place.group("block")) for _, place in found}
    if config.stacks is not None and not set(config.stacks) <= stacks:
        raise ValueError(f"stacks must be among the model's {sorted(stacks)}; got {list(config.stacks)}")
    if config.layers is not None and not set(config.layers) <= blocks:
        raise ValueError(f"layers must be among the model's 0..{max(blocks)}; got {list(config.layers)}")
    return [
        part
        for part, place in found
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
