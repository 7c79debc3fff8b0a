"""`merge`: a mixture becomes a dense model of its family again, of one of its experts or of their mean."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpoe.models.find import find_embedding, find_matrices
from mpoe.models.router_loss import mpoe_config
from mpoe.nn import Experts, FrozenBaseExperts


@torch.no_grad()
def merge(model: PreTrainedModel, expert: int | None = None) -> PreTrainedModel:
    """Multiply a mixture out into a dense model of the class that it was upcycled from.

    A dense model has one feed-forward network where a mixture has several and a router, so unless all experts are
    alike it computes something else: what the mixture would compute if every token went to that expert, or to one whose
    matrices are the means of all experts' matrices. MPOs without experts (attention, word embedding) are multiplied
    out exactly.

    Args:
        model: A mixture; it stays as it is.
        expert: Index of the expert whose matrices are taken in every layer; None is the mean of all.

    Returns:
        A new model in the mode of the old one. Tensors that both have are shared, not copied.

    Raises:
        ValueError: A dense model, one on a quantised base, or an expert that it has not.
    """
    config = mpoe_config(model)
    if config is None:
        raise ValueError(f"only a mixture can be merged; this {type(model).__name__} is dense: upcycle it first")
    if any(isinstance(module, FrozenBaseExperts) for module in model.modules()):
        raise ValueError(
            "a mixture must be on a base in floating point to be merged, and this one's is quantised: it is kept as an "
            "adapter, mpoe.save_adapter"
        )
    count = config.num_experts if config.is_mixture else 1
    if expert is not None and not 0 <= expert < count:
        raise ValueError(f"expert must be None or in 0..{count - 1}; got {expert}")
    dense = empty_like(model)
    share_tensors(model, dense)
    for name, place in find_matrices(dense, config).items():
        experts = cast(Experts, model.get_submodule(place))
        _fill(dense.get_submodule(name), experts, expert if experts.num_experts > 1 else 0, name)
    if "word_embed" in config.mpo_layers:
        found = find_embedding(dense, model.config.model_type)
        for name in (*found.users, *((found.head,) if found.head and config.tied_head else ())):
            dense.get_submodule(name).weight = dense.get_parameter(f"{found.table}.weight")
    return dense


def empty_like(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model of the class and in the mode of another one, on the meta device.

    Args:
        model: Dense or a mixture.
    """
    dense_config = copy.deepcopy(model.config)
    if hasattr(dense_config, "quantization_config"):
        delattr(dense_config, "quantization_config")
    with torch.device("meta"):
        dense = type(model)(dense_config)
    if model.can_generate():
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense.train(model.training)


def share_tensors(model: nn.Module, dense: nn.Module) -> None:
    """Give a model what it has under the same name as another; what is one tensor there is one in it.

    Args:
        model: Has the values.
        dense: Gets them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for prefix, module in dense.named_modules(remove_duplicate=False):
        for own, there in ((module._parameters, parameters), (module._buffers, buffers)):
            for name in (name for name, tensor in own.items() if tensor is not None):  # a bias that it has not stays so
                if (value := there.get(f"{prefix}.{name}" if prefix else name)) is not None:
                    own[name] = value  # pyright: ignore[reportArgumentType]


def _fill(layer: nn.Module, experts: Experts, expert: int | None, name: str) -> None:
    """Give a linear layer an expert's matrix and bias, or the means."""
    if expert is None:
        matrix = sum(experts.expert_matrix(e) for e in range(experts.num_experts)) / experts.num_experts
    else:
        matrix = experts.expert_matrix(expert)
    matrix = cast(Tensor, matrix)
    layer.weight = nn.Parameter((matrix.T if isinstance(layer, Conv1D) else matrix).contiguous())
    if experts.bias is None:
        return
    bias = experts.bias.mean(dim=0) if expert is None else experts.bias[min(expert, len(experts.bias) - 1)]
    if getattr(layer, "bias", None) is not None:
        layer.bias = nn.Parameter(bias.clone())
    elif bias.any():
        raise ValueError(
            f"a dense model must have a bias wherever the mixture has one; {name} has none, and its experts' biases "
            "have been trained (expert_bias): such a mixture cannot be merged"
        )
