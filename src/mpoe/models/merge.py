"""`merge`: a mixture becomes a dense model of its family again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mpoe.models.find import find_embedding, find_matrices, matrix_of
from mpoe.models.inspect import router_statistics
from mpoe.models.router_loss import mixtures, mpoe_config
from mpoe.nn import Experts, ExtendedExperts


@torch.no_grad()
def merge(
    model: PreTrainedModel, expert: int | None = None, batches: Iterable[Mapping[str, Tensor]] | None = None
) -> PreTrainedModel:
    """Materialize a mixture as a dense model of the class that it was upcycled from.

    A dense model has no router, so it computes something else unless all experts are alike. In the layout "extended"
    every matrix becomes W + s · V diag(g) U with gates g that are the same for all tokens: their mean over `batches`,
    or 1 / num_experts. In other layouts every matrix becomes the mean of the experts' matrices, or that of one expert.
    MPOs without experts (attention, word embedding) are materialized exactly. `mpoe export` also reports how far the
    logits and the loss of the merged model are from the mixture's.

    Args:
        model: A mixture; it stays as it is.
        expert: Where outputs are mixed, index of the expert whose matrices are taken in every layer; None is the mean.
        batches: Layout "extended": keyword arguments of the model, with padding masked. None is uniform gates.

    Returns:
        A new model in the mode of the old one. Tensors that both have are shared, not copied.

    Raises:
        ValueError: A dense model, a base that is quantised or wrapped by LoRA, experts with an activation, or an
            `expert` or `batches` that the layout does not have.
    """
    config = mpoe_config(model)
    if config is None:
        raise ValueError(f"only a mixture can be merged; this {type(model).__name__} is dense: upcycle it first")
    count = config.num_experts if config.is_mixture else 1
    if config.is_extended:
        if expert is not None:
            raise ValueError(
                f"expert must be None with layout 'extended', where experts only add to what they share; got {expert}"
            )
        _check_bases(model)
    elif batches is not None:
        raise ValueError("batches is for layout 'extended', whose gates it measures; leave it out")
    elif expert is not None and not 0 <= expert < count:
        raise ValueError(f"expert must be None or in 0..{count - 1}; got {expert}")
    gates = mean_gates(model, batches)
    dense = empty_like(model)
    share_tensors(model, dense)
    for name, place in find_matrices(dense, config).items():
        experts, layer = cast(Experts, model.get_submodule(place)), dense.get_submodule(name)
        if isinstance(experts, ExtendedExperts):
            _fill_extended(layer, experts, gates.get(place.rpartition(".")[0]))
        else:
            _fill(layer, experts, expert if experts.num_experts > 1 else 0, name)
    if "word_embed" in config.mpo_layers:
        found = find_embedding(dense, model.config.model_type)
        for name in (*found.users, *((found.head,) if found.head and config.tied_head else ())):
            dense.get_submodule(name).weight = dense.get_parameter(f"{found.table}.weight")
    return dense


def mean_gates(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]] | None) -> dict[str, Tensor]:
    """Return the mean gate of every expert, (E,) for every layer by its name.

    Args:
        model: A mixture.
        batches: As for `merge`; None is 1 / E for all.
    """
    layers = mixtures(model)
    if batches is None:
        counts = {name: layer.up.num_experts for name, layer in layers.items()}
        return {name: torch.full((count,), 1 / count, device=model.device) for name, count in counts.items()}
    before = {name: (layer.usage, layer.taken_usage) for name, layer in layers.items()}
    training = model.training
    model.eval()
    try:
        for layer in layers.values():
            layer.reset_usage()
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise ValueError(
                    "batches must be a list of keyword arguments of the model, [{'input_ids': ...}]; got a batch of "
                    f"type {type(batch).__name__}"
                )
            cast(Any, model)(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        found = router_statistics(model)
    finally:
        model.train(training)
        for name, layer in layers.items():
            layer.usage, layer.taken_usage = before[name]
    if missing := sorted(layers.keys() - found.keys()):
        raise ValueError(f"batches must reach every layer with experts; {missing[0]} has seen no token")
    return {name: torch.tensor(of_layer.gate_mass, device=model.device) for name, of_layer in found.items()}


def _check_bases(model: PreTrainedModel) -> None:
    for name, experts in model.named_modules():
        if not isinstance(experts, ExtendedExperts):
            continue
        if experts.base_weight is None or experts.central is None:
            raise ValueError(
                f"a mixture must be on a base in floating point to be merged, and {name}.base is quantised: keep it as "
                "an adapter (mpoe.save_adapter)"
            )
        if type(experts.base) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"a mixture can be merged if its base's layers are plain linear layers; {name}.base is a "
                f"{type(experts.base).__module__}.{type(experts.base).__name__}. Keep the mixture as an adapter "
                "(mpoe.save_adapter), or merge a LoRA adapter before mpoe.upcycle"
            )


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


def _fill_extended(layer: nn.Module, experts: ExtendedExperts, gates: Tensor | None) -> None:
    """Give a linear layer the base's matrix and bias, and what the experts add with these gates."""
    matrix = matrix_of(experts.base)
    _set_matrix(layer, (matrix + experts.offset_matrix(gates)).to(matrix.dtype))
    if experts.base.bias is not None:
        layer.bias = experts.base.bias


def _set_matrix(layer: nn.Module, matrix: Tensor) -> None:
    layer.weight = nn.Parameter((matrix.T if isinstance(layer, Conv1D) else matrix).contiguous())


def _fill(layer: nn.Module, experts: Any, expert: int | None, name: str) -> None:
    """Give a linear layer an expert's matrix and bias, or the means."""
    if expert is None:
        matrix = sum(experts.expert_matrix(e) for e in range(experts.num_experts)) / experts.num_experts
    else:
        matrix = experts.expert_matrix(expert)
    matrix = cast(Tensor, matrix)
    _set_matrix(layer, matrix)
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
