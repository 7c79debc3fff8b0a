"""Find the parts of a model that a config asks to change, by the rows of `mpoe.models.families` or a user's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpoe.config import MPOEConfig
from mpoe.models.families import FAMILIES, Family, FeedForwardNames, name_pattern
from mpoe.models.quantized_base import is_quantized


@dataclass(frozen=True)
class FoundFeedForward:
    """One feed-forward network of a model.

    Attributes:
        name: Full name of the module that holds its parts.
        module: That module.
        names: What its parts are called.
    """

    name: str
    module: nn.Module
    names: FeedForwardNames

    @property
    def place(self) -> str:
        """Full name of the module that a mixture replaces."""
        return f"{self.name}.{self.names.at}" if self.names.at else self.name

    def linear(self, attribute: str) -> nn.Module:
        """One of its linear layers.

        Args:
            attribute: `names.up`, `gate` or `down`.
        """
        return self.module.get_submodule(attribute)

    def activation(self) -> Callable[[Tensor], Tensor]:
        """Its activation."""
        return _part(self.module, self.names.activation)

    def dropout(self, attribute: str | None) -> float:
        """A probability.

        Args:
            attribute: `names.dropout` or `names.output_dropout`; None is 0.
        """
        dropout = 0.0 if attribute is None else _part(self.module, attribute)
        return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout)


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


def find_matrices(dense: PreTrainedModel, config: MPOEConfig) -> dict[str, str]:
    """Every matrix that a config asks to change, and where upcycling puts its experts.

    Args:
        dense: A dense model, or one of its class on the meta device.
        config: What it becomes, or has become; with a known `tied_head`.

    Returns:
        By the full name of the matrix's layer in the dense model: the full name of its experts in the mixture.

    Raises:
        ValueError: As the three functions below.
    """
    kind, components, found = dense.config.model_type, config.mpo_layers, {}
    if config.is_mixture or "mlp" in components:
        for feed_forward in find_feed_forwards(dense, kind, config):
            names = feed_forward.names
            for name, experts in ((names.up, "up"), (names.gate, "gate"), (names.down, "down")):
                if name is not None:
                    found[f"{feed_forward.name}.{name}"] = f"{feed_forward.place}.{experts}"
    linears = find_attention(dense, kind, config) if "attention" in components else []
    if "word_embed" in components:
        embedding = find_embedding(dense, kind)
        linears.append(embedding.table)
        if embedding.head is not None and not config.tied_head:
            linears.append(embedding.head)
    return found | {name: f"{name}.experts" for name in linears}


def find_feed_forwards(model: nn.Module, model_type: str, config: MPOEConfig) -> list[FoundFeedForward]:
    """The feed-forward networks that `config` asks to turn into mixtures.

    Args:
        model: The model.
        model_type: `model.config.model_type`, a key of FAMILIES unless `config.feed_forward` describes the model.
        config: `stacks` and `layers` say which.

    Returns:
        At least one, in the model's order.

    Raises:
        ValueError: An unknown family, a model without the modules that its row or description names, a stack or block
            that the model has not.
    """
    if config.feed_forward is None:
        rows = _family(model, model_type).feed_forwards
    else:
        rows = (FeedForwardNames.from_dict(config.feed_forward),)
    if getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0):
        raise ValueError(
            "chunk_size_feed_forward must be 0, because a router looks at all tokens of a batch; got "
            f"{getattr(model.config, 'chunk_size_feed_forward')}: set it in the model's config"  # noqa: B009
        )
    found = [
        (FoundFeedForward(name, module, row), row.stack, int(place[1]))
        for name, module in model.named_modules()
        for row in rows
        if (place := name_pattern(row.path).search(name)) and _has_all(module, row.parts)
    ]
    if not found:
        what = ", or ".join(f"{row.path} with {', '.join(row.parts)}" for row in rows)
        raise ValueError(
            f"the model must have feed-forward networks {what}; {type(model).__name__} has none. {_candidates(model)}"
        )
    if config.feed_forward is not None:
        _check_described(found[0][0])
    return _chosen(found, config)


def find_attention(model: nn.Module, model_type: str, config: MPOEConfig) -> list[str]:
    """The names of the attention's linear layers that `config` asks to turn into MPOs.

    Args:
        model: The model.
        model_type: A key of FAMILIES.
        config: `stacks` and `layers` say which.

    Returns:
        At least one, in the model's order.

    Raises:
        ValueError: A family whose attention is not known, layers that are not there or not linear, a stack or block
            that the model has not.
    """
    rows = _family(model, model_type).attention
    if not rows:
        raise _unknown("attention", model_type)
    patterns = [(name_pattern(f"{path}.{layer}"), r.stack) for r in rows for path in r.paths for layer in r.layers]
    found = [
        (name, stack, int(place[1]))
        for name, _ in model.named_modules()
        for pattern, stack in patterns
        if (place := pattern.search(name))
    ]
    if not found:
        paths = ", ".join(path for row in rows for path in row.paths)
        raise ValueError(f"a {model_type} model must have attention named {paths}; {type(model).__name__} has none")
    for name, _, _ in found:
        require_linear(model.get_submodule(name), name)
    return _chosen(found, config)


def find_embedding(model: nn.Module, model_type: str) -> FoundEmbedding:
    """The word embedding of a model.

    Args:
        model: The model.
        model_type: A key of FAMILIES.

    Raises:
        ValueError: A family whose embedding is not known, modules that are not there, not `nn.Embedding` and linear,
            or of a form that an MPO has not.
    """
    names = _family(model, model_type).word_embed
    if names is None:
        raise _unknown("word_embed", model_type)
    # with duplicates: after a resize the users are the very same module under several names
    there = [name for name, _ in model.named_modules(remove_duplicate=False)]
    tables, heads, users = (
        [name for name in there if any(name_pattern(end).search(name) for end in ends)]
        for ends in ((names.table,), (names.head,), names.users)
    )
    if len(tables) != 1 or len(heads) > 1:
        raise ValueError(
            f"a {model_type} model must have one word embedding named {names.table} and at most one head "
            f"{names.head}; {type(model).__name__} has {tables} and {heads}"
        )
    for name in (*tables, *users):
        embedding = model.get_submodule(name)
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise ValueError(f"{name} must be an nn.Embedding without max_norm to become an MPO; it is {embedding}")
    for name in heads:
        require_linear(model.get_submodule(name), name)
    return FoundEmbedding(tables[0], tuple(users), heads[0] if heads else None)


def require_linear(layer: nn.Module, name: str) -> nn.Linear | Conv1D:
    """Return a layer that is a linear layer in floating point, as an MPO is made of.

    Args:
        layer: The layer.
        name: Its full name.

    Raises:
        ValueError: Another module, or quantised weights.
    """
    if type(layer) not in (nn.Linear, Conv1D):
        raise ValueError(
            f"{name} must be an nn.Linear or Conv1D to become an MPO; it is a {type(layer).__module__}."
            f"{type(layer).__name__}. Merge a LoRA adapter first (merge_and_unload), or use layout='extended'"
        )
    if is_quantized(layer):
        raise ValueError(
            f"{name} must be in floating point to become an MPO, and is quantised; use layout='extended', or load the "
            "base in floating point"
        )
    return layer  # pyright: ignore[reportReturnType]


def features_of(layer: nn.Module) -> tuple[int, int]:
    """Return the number of outputs and of inputs of a linear layer.

    Args:
        layer: An `nn.Linear`, Conv1D, a quantised layer, or one that wraps such a layer.
    """
    out_features, in_features = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features
    rows, columns = matrix_of(layer).shape
    return rows, columns


def matrix_of(layer: nn.Module) -> Tensor:
    """The matrix of a linear layer, outputs × inputs; a view. Transformers' Conv1D keeps it the other way round.

    Args:
        layer: An `nn.Linear`, Conv1D, or another layer with a weight.
    """
    weight = layer.get_parameter("weight")
    return weight.T if isinstance(layer, Conv1D) else weight


def _part(module: nn.Module, attribute: str) -> Any:
    for name in attribute.split("."):
        module = getattr(module, name)
    return module


def _has_all(module: nn.Module, attributes: Iterable[str]) -> bool:
    try:
        for attribute in attributes:
            _part(module, attribute)
    except AttributeError:
        return False
    return True


def _check_described(found: FoundFeedForward) -> None:
    """Refuse a description that leaves out a matrix of the module that is replaced: its gate, say."""
    names = found.names
    if names.at:
        return
    left_out = [name for name, layer in found.module.named_modules() if _is_linear(layer) and name not in names.parts]
    if left_out:
        raise ValueError(
            f"feed_forward must name every matrix of {found.name}, which is replaced; it leaves out "
            f"{', '.join(left_out)}: add gate, or say with at which module is replaced"
        )


def _family(model: nn.Module, model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type must be one of {', '.join(sorted(FAMILIES))}; got {model_type!r}. Another model can be "
            f"described: {_candidates(model)}"
        )
    return FAMILIES[model_type]


def _unknown(component: str, model_type: str) -> ValueError:
    return ValueError(
        f"mpo_layers must be among what is known of a {model_type} model; its {component} is not: leave that out, or "
        "complete the family's row in mpoe/models/families.py"
    )


_Part = TypeVar("_Part")


def _chosen(found: list[tuple[_Part, str, int]], config: MPOEConfig) -> list[_Part]:
    """Those in the stacks and blocks that `config` names."""
    stacks, blocks = {stack for _, stack, _ in found}, {block for _, _, block in found}
    if config.stacks is not None and not set(config.stacks) <= stacks:
        raise ValueError(f"stacks must be among the model's {sorted(stacks)}; got {list(config.stacks)}")
    if config.layers is not None and not set(config.layers) <= blocks:
        raise ValueError(f"layers must be among the model's 0..{max(blocks)}; got {list(config.layers)}")
    return [
        part
        for part, stack, block in found
        if (config.stacks is None or stack in config.stacks) and (config.layers is None or block in config.layers)
    ]


def _candidates(model: nn.Module, limit: int = 5) -> str:
    """Modules with a matrix D -> F and one F -> D, as a user would describe them."""
    found: dict[str, str] = {}
    for depth in (0, 1):  # matrices of a module itself; of the modules in it
        for name, module in model.named_modules():
            path = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
            if "*" not in path or any(f"{known}.".startswith(f"{path}.") for known in found):
                continue
            shapes = {
                part: tuple(matrix_of(layer).shape)
                for part, layer in module.named_modules()
                if part and part.count(".") == depth and _is_linear(layer)
            }
            if pair := _up_and_down(shapes):
                linears = ", ".join(f"{part} {out}x{size}" for part, (out, size) in shapes.items() if part in pair)
                found[path] = f"{path!r} ({type(module).__name__}: {linears})"
    advice = 'MPOEConfig(feed_forward={"path": ..., "up": ..., "down": ..., "activation": ...})'
    if not found:
        return f"Describe its feed-forward networks with {advice}; no module of it looks like one"
    return f"Describe its feed-forward networks with {advice}; modules that look like them: " + "; ".join(
        list(found.values())[:limit]
    )


def _up_and_down(shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """The names of matrices F × D (or 2F × D, fused with a gate) and D × F, if there are such."""
    for down, (width, inner) in shapes.items():
        ups = {up for up, shape in shapes.items() if shape in ((inner, width), (2 * inner, width))}
        if ups and inner > width:
            return {*ups, down}
    return set()


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
