"""`to_sparse`: a mixture, with its routers, in the sparse format that Transformers has for its architecture.

Such a model loads without mpoe. Every expert becomes whole matrices, so that it is as large as a mixture of those.

Letters: D model width, F FFN width, E experts; x is what a router sees of a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mpoe.config import MPOEConfig
from mpoe.models.find import FoundFeedForward, find_feed_forwards, matrix_of
from mpoe.models.merge import merge, share_tensors
from mpoe.models.router_inputs import RouterInputs
from mpoe.models.router_loss import mixtures, mpoe_config, routers
from mpoe.nn import MoEFeedForward, TopKRouter

FORMATS = {
    "T5ForConditionalGeneration": "SwitchTransformersForConditionalGeneration",
    "MT5ForConditionalGeneration": "SwitchTransformersForConditionalGeneration",
    "LlamaForCausalLM": "MixtralForCausalLM",
    "LlamaForSequenceClassification": "MixtralForSequenceClassification",
    "MistralForCausalLM": "MixtralForCausalLM",
    "MistralForSequenceClassification": "MixtralForSequenceClassification",
    "Qwen3ForCausalLM": "Qwen3MoeForCausalLM",
    "Qwen3ForSequenceClassification": "Qwen3MoeForSequenceClassification",
}
"""The class of Transformers that has a place for the routers and experts of a mixture of another class."""

SATURATION = 40
"""A saturated router's weights are multiplied by 2 to this. It is a shift of the exponent: no digit is lost."""
_NO_LIMIT = 2**31 - 1
_OTHERWISE = "export one expert or the mean of all instead"


def differences(model: PreTrainedModel) -> list[str]:
    """Why the model that `to_sparse` makes would compute something else; empty if it computes the same.

    Args:
        model: A mixture.

    Raises:
        ValueError: A model that no format of Transformers has a place for.
    """
    format_name = _format_of(model)
    found = routers(model)
    router = next(iter(found.values()))
    has_bias = any(_has_bias(r) for r in found.values())
    has_weights = router.top_k > 1 or router.is_scale_prob
    reasons = []
    if router.eval_capacity_factor is not None:
        reasons.append("its experts drop what exceeds eval_capacity_factor, and there nothing is dropped")
    if any(r.balancing is not None and bool(r.balancing.steps.any()) for r in found.values()):
        reasons.append("its experts are selected with a bias that balances them, and those there are not")
    if router.input_norm and has_weights:
        reasons.append("its routers divide a token by its size before they weigh its experts, and those there do not")
    if has_bias and not _is_switch(format_name):
        reasons.append("its routers have biases, and those there have none")
    elif has_bias and router.input_norm and not has_weights:
        reasons.append("its routers add a bias after they have divided a token by its size, and those there before")
    return reasons


@torch.no_grad()
def to_sparse(
    model: PreTrainedModel, inputs: Mapping[str, RouterInputs] | None = None, approximate: bool = False
) -> PreTrainedModel:
    """Make the model of FORMATS that computes what a mixture computes, with plain matrices for its experts.

    Where a token has one expert, that is exact if the routers have no biases: an expert's index does not depend on a
    token's size. Switch multiplies what the expert says by its probability p, which ours does not unless
    `is_scale_prob`: the router's weights are made so large that p is 1. Layers without experts become experts that are
    all alike where the format cannot leave them out.

    Args:
        model: A mixture; it stays as it is.
        inputs: From `measured_inputs`; only an approximation needs them. Where they are given, logits that are not
            saturated are as large as the mixture's, on the mean, so that training goes on as it was.
        approximate: Make a model that computes something else, as `differences` says, as close as a router without
            bias and scaling comes: sizes of tokens are replaced by their means, and a bias without a place is added
            along the mean token.

    Returns:
        A new model in evaluation mode. Tensors that both have are shared, not copied.

    Raises:
        ValueError: A model that no format has a place for, or `differences` without `approximate`.

    Source: Switch Transformers (Fedus et al., JMLR 2022), §2; Mixtral of Experts (Jiang et al., 2024), §2.1.
    """
    if reasons := differences(model):
        if not approximate:
            raise ValueError(
                f"a mixture must compute what {_format_of(model)} can; {'; '.join(reasons)}: approximate it, or "
                f"{_OTHERWISE}"
            )
        if inputs is None:
            raise ValueError("an approximation needs to know the routers' inputs: measure them (measured_inputs)")
    dense, layers = merge(model, 0), mixtures(model)
    feed_forwards = find_feed_forwards(dense, model.config.model_type, MPOEConfig())
    is_sparse = {found.name: found.name in layers for found in feed_forwards}
    config = _sparse_config(model, dense, is_sparse)
    with torch.device("meta"):
        sparse = _class(model)(config)
    share_tensors(dense, sparse)
    for found in feed_forwards:
        place = sparse.get_submodule(found.name.replace("DenseReluDense", "mlp"))
        experts = _matrices(found, layers.get(found.name), config.num_experts)
        layer = layers.get(found.name)
        router = None if layer is None else cast(TopKRouter, layer.router)
        _fill(place, experts, router, None if inputs is None else inputs.get(found.name))
    if _is_switch(_format_of(model)):
        _fit_head(sparse, _scales_outputs(model.config))
    _check_complete(dense, sparse)
    if model.can_generate():
        sparse.generation_config = copy.deepcopy(model.generation_config)
    return sparse.eval()


def _format_of(model: PreTrainedModel) -> str:
    """The name of the format's class.

    Raises:
        ValueError: There is none for this model.
    """
    config, name = mpoe_config(model), FORMATS.get(type(model).__name__)
    found = routers(model)
    if config is None or not found:
        raise ValueError(f"only a mixture can be exported with its routers; this model has none: {_OTHERWISE}")
    if config.is_extended:
        raise ValueError(
            "Transformers has no format with routers for layout 'extended', whose gates are inside the matrices; "
            "export the merged dense model instead (mpoe export without --routed), or keep the mixture"
        )
    router, switch = next(iter(found.values())), _is_switch(name)
    problem = None
    if name is None or (switch and model.config.is_gated_act):
        formats = "T5 with a plain feed-forward network -> Switch; LLaMA, Mistral -> Mixtral; Qwen3 -> Qwen3-MoE"
        gated = " whose feed-forward networks are gated" if name else ""
        problem = f"{type(model).__name__}{gated} has no sparse format in Transformers (there are: {formats})"
    elif config.routing != "token":
        problem = f"there tokens are routed one by one, and here whole inputs are (routing {config.routing!r})"
    elif router.second_policy_eval != "all":
        problem = (
            f"there a token goes to all of its experts, and here second_policy_eval is {router.second_policy_eval!r}"
        )
    elif switch and router.top_k > 1:
        problem = f"{name} sends a token to one expert, and this mixture to {router.top_k}"
    elif router.is_scale_prob and name.startswith("Mixtral"):
        problem = f"{name} divides the experts' weights by their sum, and this mixture does not (is_scale_prob)"
    elif getattr(model.config, "use_sliding_window", False) and name.startswith("Qwen3"):
        problem = f"{name} slides the attention's window in every layer or in none (use_sliding_window)"
    if problem is not None:
        raise ValueError(f"{problem}: {_OTHERWISE}")
    return cast(str, name)


def _is_switch(name: str | None) -> bool:
    return name is not None and name.startswith("SwitchTransformers")


def _has_bias(router: TopKRouter) -> bool:
    """Whether its biases tell experts apart; a bias that all share changes nothing."""
    bias = _bias(router)
    return bool((bias != bias[0]).any())


def _bias(router: TopKRouter) -> Tensor:
    """A router whose experts' outputs are mixed has one."""
    return cast(Tensor, router.bias)


def _scales_outputs(config: PreTrainedConfig) -> bool:
    return getattr(config, "scale_decoder_outputs", False)


def _class(model: PreTrainedModel) -> Any:
    return getattr(transformers, _format_of(model))


def _sparse_config(model: PreTrainedModel, dense: PreTrainedModel, is_sparse: Mapping[str, bool]) -> Any:
    """The format's config: what both have is taken over."""
    mixture, router = cast(MPOEConfig, mpoe_config(model)), next(iter(routers(model).values()))
    kind, old = _class(model).config_class, model.config
    known = {*kind().to_dict(), "head_dim", "decoder_start_token_id", "num_labels"} - {"model_type", "architectures"}
    values = {name: value for name, value in old.to_dict().items() if name in known}
    values |= {"dtype": model.dtype, "router_jitter_noise": router.jitter}
    if _is_switch(kind.__name__):
        is_tied = cast(Any, dense).lm_head.weight is cast(Any, dense).shared.weight
        biased = any(_has_bias(r) for r in routers(model).values())
        counts = {}
        for stack in ("encoder", "decoder"):
            of_stack = [sparse for name, sparse in is_sparse.items() if name.startswith(f"{stack}.")]
            counts[stack] = _num_sparse(of_stack)
            biased = biased or counts[stack] is None  # a layer of experts that are all alike has a bias for the first
            counts[stack] = len(of_stack) if counts[stack] is None else counts[stack]
        return kind(
            **values | {
                "num_experts": router.num_experts, "expert_capacity": _NO_LIMIT, "router_bias": biased,
                "num_sparse_encoder_layers": counts["encoder"], "num_sparse_decoder_layers": counts["decoder"],
                "tie_word_embeddings": is_tied,
                # a saturated router has no gradient from the balance loss, and a z-loss beyond all measure
                "router_aux_loss_coef": (mixture.load_balancing_coef or 0.0) if router.is_scale_prob else 0.0,
                "router_z_loss_coef": mixture.router_z_loss_coef if router.is_scale_prob else 0.0,
            }
        )  # fmt: skip
    values |= {
        "num_local_experts": router.num_experts, "num_experts_per_tok": router.top_k,
        "router_aux_loss_coef": mixture.load_balancing_coef or 0.0,
    }  # fmt: skip
    if kind.__name__.startswith("Qwen3"):
        values |= {
            "moe_intermediate_size": old.intermediate_size, "norm_topk_prob": not router.is_scale_prob,
            "decoder_sparse_step": 1, "mlp_only_layers": [n for n, has in enumerate(is_sparse.values()) if not has],
        }  # fmt: skip
    return kind(**values)


def _num_sparse(is_sparse: list[bool]) -> int | None:
    """How many sparse layers a Switch config must name so that its stack has them in these places; None: it cannot."""
    count = len(is_sparse)
    for asked in range(1, count + 2):  # more than there are is how it names none
        step = count // asked
        if [step == 1 or (step > 1 and n % step == 1) for n in range(count)] == is_sparse:
            return asked
    return None


_Expert = tuple[Tensor | None, Tensor, Tensor]  # gate, up, down


def _matrices(found: FoundFeedForward, layer: MoEFeedForward | None, num_experts: int) -> list[_Expert]:
    """The matrices of every expert; those of the dense network for all of them where there is no mixture."""
    names = found.names
    if layer is None:
        gate = None if names.gate is None else matrix_of(found.linear(names.gate))
        return [(gate, matrix_of(found.linear(names.up)), matrix_of(found.linear(names.down)))] * num_experts
    up, gate, down = (cast(Any, experts) for experts in (layer.up, layer.gate, layer.down))
    for experts in (up, gate, down):
        if experts is not None and experts.bias is not None and experts.bias.any():
            raise ValueError(
                f"experts must have no biases, as those of Transformers' formats; those of {found.name} have: "
                f"{_OTHERWISE}"
            )
    return [
        (
            None if gate is None else gate.expert_matrix(e),
            up.expert_matrix(e),
            down.expert_matrix(e),
        )
        for e in range(num_experts)
    ]


def _fill(place: Any, experts: list[_Expert], router: TopKRouter | None, inputs: RouterInputs | None) -> None:
    """Give one feed-forward network of the format its weights; `router` is None where the mixture has none."""
    gate, up, down = experts[0]
    if hasattr(place, "wi"):
        place.wi.weight, place.wo.weight = _copy(up), _copy(down)
    elif hasattr(place, "gate_proj"):
        place.gate_proj.weight, place.up_proj.weight, place.down_proj.weight = map(
            _copy, (cast(Tensor, gate), up, down)
        )
    elif hasattr(place, "router"):
        for e, (_, up, down) in enumerate(experts):
            expert = place.experts[f"expert_{e}"]
            expert.wi.weight, expert.wo.weight = _copy(up), _copy(down)
        weight, bias = _switch_router(router, inputs, place.router.classifier.weight.shape, up)
        place.router.classifier.weight = nn.Parameter(weight)
        if place.router.classifier.bias is not None:
            place.router.classifier.bias = nn.Parameter(bias)
    else:
        both = torch.stack([torch.cat([cast(Tensor, gate), up]) for gate, up, _ in experts])
        place.experts.gate_up_proj = nn.Parameter(both)
        place.experts.down_proj = nn.Parameter(torch.stack([down for _, _, down in experts]))
        place.gate.weight = nn.Parameter(_scaled_router(router, inputs, place.gate.weight.shape, up))


def _copy(matrix: Tensor) -> nn.Parameter:
    return nn.Parameter(matrix.clone(memory_format=torch.contiguous_format))


def _switch_router(
    router: TopKRouter | None, inputs: RouterInputs | None, shape: torch.Size, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a router that multiplies an expert's output by p."""
    if router is None:
        weight, bias = like.new_zeros(shape), like.new_zeros(shape[0])
        bias[0] = 1
    elif router.is_scale_prob:
        return router.weight * (inputs.scale if inputs and router.input_norm else 1.0), _bias(router).clone()
    else:  # divided by a token's size, which changes no order, the bias is what it was times that size
        weight, bias = router.weight, _bias(router) - _bias(router)[0]
        bias = bias * (inputs.rms if inputs and router.input_norm else 1.0)
    largest = max(weight.abs().max().item(), bias.abs().max().item(), torch.finfo(weight.dtype).tiny)
    room = math.floor(math.log2(torch.finfo(weight.dtype).max / largest)) - 1
    factor = 2.0 ** min(SATURATION, room)
    return weight * factor, bias * factor


def _scaled_router(router: TopKRouter | None, inputs: RouterInputs | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Weight of a router whose weights for the experts of a token do not depend on p, or sum to 1."""
    if router is None:
        return like.new_zeros(shape)
    weight = router.weight
    if _has_bias(router) and inputs is not None:
        bias = _bias(router) - _bias(router).mean()
        scale = inputs.scale if router.input_norm else 1.0
        return weight * scale + bias[:, None] * inputs.constant(weight)
    if inputs is None or not router.input_norm:
        return weight.clone()
    if router.top_k == 1 and not router.is_scale_prob:
        return weight * 2.0 ** round(math.log2(inputs.scale))  # rounds nothing
    return weight * inputs.scale


def _fit_head(sparse: Any, scales_outputs: bool) -> None:
    """Switch divides what goes into the head by sqrt(D) if the head is the embedding's table, and only then.

    It has one table for the encoder and the decoder in that case, too.
    """
    is_tied, width = sparse.config.tie_word_embeddings, sparse.config.d_model
    if is_tied != scales_outputs:
        norm = sparse.decoder.final_layer_norm
        norm.weight = nn.Parameter(norm.weight * width ** (0.5 if is_tied else -0.5))
    if not is_tied:
        for stack in (sparse.encoder, sparse.decoder):
            stack.embed_tokens.weight = _copy(stack.embed_tokens.weight)


def _check_complete(dense: nn.Module, sparse: nn.Module) -> None:
    """Everything of the format must have a value, and everything of the model a place."""
    there = dict(sparse.named_parameters(remove_duplicate=False))
    empty = [name for name, tensor in there.items() if tensor.is_meta]
    assert not empty, empty  # nosec B101  # cannot happen: the formats are known
    for name, tensor in dense.named_parameters():
        is_ours = ".mlp." in name or ".DenseReluDense." in name
        if name not in there and not is_ours and tensor.any():
            raise ValueError(f"{name} has no place in {type(sparse).__name__}: {_OTHERWISE}")
