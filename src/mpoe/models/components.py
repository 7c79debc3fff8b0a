"""Attention and word embedding as MPOs: dense layers of a Transformers model replaced in place, one expert each.

Both roads lead through here: `upcycle` takes the weights over, `swap_modules` leaves empty layers for weights that are
about to be loaded.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpoe.config import MPOEConfig
from mpoe.models.find import FoundEmbedding, matrix_of
from mpoe.models.matrices import empty_mpo
from mpoe.nn import MPOEmbedding, MPOExperts, MPOLinear, MPOTiedHead, refer


def replace_linear(model: nn.Module, name: str, config: MPOEConfig, component: str, load: bool) -> None:
    """Make a linear layer an `MPOLinear`.

    Args:
        model: The model.
        name: Of an `nn.Linear` or Conv1D.
        config: What the MPO is made of.
        component: Of `mpoe.config.COMPONENTS`.
        load: Whether to take over the weights.
    """
    linear = model.get_submodule(name)
    _put(model, name, MPOLinear(_experts_like(linear, name, config, component, load)).train(linear.training))


def replace_embedding(model: PreTrainedModel, found: FoundEmbedding, config: MPOEConfig, load: bool) -> None:
    """Make the word embedding an `MPOEmbedding`, wherever it is used, and the head a product with its table or its own.

    Args:
        model: The model.
        found: Its word embedding and head.
        config: What the MPOs are made of; `tied_head` is known.
        load: Whether to take over the weights.
    """
    dense = model.get_submodule(found.table)
    experts = _experts_like(dense, found.table, config, "word_embed", load)
    embedding = MPOEmbedding(experts, dense.padding_idx).train(dense.training)  # pyright: ignore[reportArgumentType]
    if found.head is not None and config.tied_head:
        _put(model, found.head, MPOTiedHead(embedding).train(dense.training))
    elif found.head is not None:
        replace_linear(model, found.head, config, "word_embed", load)
    _put(model, found.table, embedding)
    for name in found.users:
        path, _, attribute = name.rpartition(".")
        refer(model.get_submodule(path), attribute, embedding)
    _forget_ties(model, found.table)


def with_tied_head(model: nn.Module, found: FoundEmbedding, config: MPOEConfig) -> MPOEConfig:
    """The config with `tied_head` as the model has it, if it was left open and there is a head.

    Args:
        model: A dense model.
        found: Its word embedding and head.
        config: The config.
    """
    if config.tied_head is not None or found.head is None:
        return config
    return dataclasses.replace(config, tied_head=_weight(model, found.head) is _weight(model, found.table))


def check_embedding(model: nn.Module, found: FoundEmbedding, config: MPOEConfig) -> None:
    """Refuse what would change the function of a dense model.

    Args:
        model: A dense model with its weights.
        found: Its word embedding and head.
        config: With `tied_head`.

    Raises:
        ValueError: A user of the table has one of its own, `tied_head` is not as the model has it, or a tied head has a
            bias.
    """
    weight = _weight(model, found.table)
    for name in found.users:
        if _weight(model, name) is not weight:
            raise ValueError(
                f"{name} must look words up in the table of {found.table} to become an MPO with it; it has one of its "
                "own: leave word_embed out of mpo_layers"
            )
    if found.head is None:
        return
    is_tied = _weight(model, found.head) is weight
    if config.tied_head is not is_tied:
        raise ValueError(f"tied_head must be None or as the model has it, {is_tied}; got {config.tied_head}")
    if is_tied and _bias(model.get_submodule(found.head)) is not None:
        raise ValueError(f"a head tied to the word embedding must have no bias to become an MPO; {found.head} has one")


def _experts_like(layer: nn.Module, name: str, config: MPOEConfig, component: str, load: bool) -> MPOExperts:
    """One expert of the sizes, dtype and device of a dense layer."""
    weight, bias = matrix_of(layer), _bias(layer)
    with torch.device(weight.device):
        experts = empty_mpo(
            weight.shape[0],
            weight.shape[1],
            config,
            component,
            name,
            bias="none" if bias is None else "shared",
        )
    experts.requires_grad_(weight.requires_grad).to(weight.dtype)
    if load:
        experts.load_matrix(weight, bias)
    return experts


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(f"{name}.weight")


def _bias(layer: nn.Module) -> nn.Parameter | None:
    return layer.bias if isinstance(layer, nn.Linear | Conv1D) else None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    model.set_submodule(name, module)
    # Its initializer knows dense layers only; what it is told here is that there is nothing for it to do.
    vars(model.get_submodule(name.rpartition(".")[0]))["_is_hf_initialized"] = True


def _forget_ties(model: nn.Module, table: str) -> None:
    """Take a table that is no parameter any more out of what Transformers ties when it loads and saves."""
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
                ties = getattr(part, attribute) or {}
                source = f"{table}.weight".removeprefix(f"{prefix}." if prefix else "")
                setattr(part, attribute, {target: of for target, of in ties.items() if of != source})
