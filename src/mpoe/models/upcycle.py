"""`upcycle`: a dense Transformers model becomes a mixture of experts, in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from mpoe.config import MPOEConfig
from mpoe.models.components import check_embedding, replace_embedding, replace_linear, with_tied_head
from mpoe.models.find import (
    FoundEmbedding,
    FoundFeedForward,
    features_of,
    find_attention,
    find_embedding,
    find_feed_forwards,
    find_matrices,
    matrix_of,
    require_linear,
)
from mpoe.models.inspect import is_upcycled
from mpoe.models.matrices import empty_mpo, set_compute
from mpoe.models.padding import add_padding_hooks
from mpoe.models.quantized_base import refuse_saving_with_lora, take_over_quantizer
from mpoe.models.router_loss import add_router_loss_hook
from mpoe.nn import (
    BiasBalancing,
    DenseExperts,
    Experts,
    ExtendedExperts,
    MoEFeedForward,
    TopKRouter,
    UnsharedMPOExperts,
)

_ALWAYS_FLOAT32 = (r"\.router\.", r"\.offsets_[UV]$", r"\.(?:up|gate|down)\.scale$")  # regular expressions


def upcycle(model: PreTrainedModel, config: MPOEConfig | None = None) -> PreTrainedModel:
    """Turn the feed-forward networks of a dense model into mixtures of experts, in place.

    Right after it the model computes what it computed before (without truncation, noise and dropped tokens; where
    outputs are mixed, with `is_scale_prob=False`), because every expert starts as the pre-trained layer. In the layout
    "extended" the base's linear layers stay in place, quantised ones and those with a LoRA adapter too, and keep
    training or stay frozen as they were; the experts and routers train. In the layout "balanced" the matrices of the
    attention and the word embedding, if `mpo_layers` names them, become MPOs without experts; so do all of
    `mpo_layers` with a config without a mixture (`num_experts=1` or `moe_type="none"`).

    Args:
        model: Any model of a family in `mpoe.models.families`, or one that `config.feed_forward` describes; on any
            device, in any floating dtype.
        config: What the mixture is made of; None is `MPOEConfig()`.

    Returns:
        The same object. `model.config.quantization_config` holds the config, so that `save_pretrained` writes it.

    Raises:
        ValueError: An unknown family, components, stacks or layers that the model has not or that are of an unknown
            form, a model that has been upcycled before, or a config that would change nothing.

    Source: MPOE (Gao et al., COLING 2022), §3; Sparse upcycling (Komatsuzaki et al., ICLR 2023).
    """
    if not isinstance(model, PreTrainedModel):
        advice = "; pass what get_base_model() returns" if hasattr(model, "get_base_model") else ""
        raise ValueError(f"only a Transformers model can be upcycled; got {type(model).__name__}{advice}")
    config = MPOEConfig() if config is None else config
    found = _find(model, config)
    if found.embedding is not None:
        config = with_tied_head(model, found.embedding, config)
        check_embedding(model, found.embedding, config)
    generator = torch.Generator().manual_seed(config.seed)
    mixtures = []
    for feed_forward in logging.tqdm(found.feed_forwards, desc="Upcycling", delay=2):  # silent where it takes no time
        mixtures.append(_mixture_like(feed_forward, config))
        _load(mixtures[-1], feed_forward, generator, config)
    for feed_forward, mixture in zip(found.feed_forwards, mixtures, strict=True):  # only once nothing can fail any more
        _put(model, feed_forward, mixture)
    _replace_others(model, found, config, load=True)
    take_over_quantizer(model)
    refuse_saving_with_lora(model)
    _mark(model, config)
    return model


def swap_modules(model: PreTrainedModel, config: MPOEConfig) -> None:
    """Put empty mixtures in the places of the feed-forward networks, and empty MPOs in those of `mpo_layers`.

    Args:
        model: A model on the meta device, or one whose weights do not matter.
        config: As in `upcycle`. A `tied_head` is believed, because weights are not tied before they are loaded.
    """
    found = _find(model, config)
    if found.embedding is not None:
        config = with_tied_head(model, found.embedding, config)
    for feed_forward in found.feed_forwards:
        _put(model, feed_forward, _mixture_like(feed_forward, config))
        kept = set(model._keep_in_fp32_modules or ())
        if feed_forward.names.down in kept:  # T5 overflows in float16 there
            model._keep_in_fp32_modules = {*kept, f"{feed_forward.place}.down"}
    if found.feed_forwards:  # whatever dtype the rest is loaded in
        strict = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = {*strict, *_ALWAYS_FLOAT32}
    _replace_others(model, found, config, load=False)
    _mark(model, config)


@dataclass(frozen=True)
class _Found:
    """What a config asks to change; empty and None where it does not."""

    feed_forwards: list[FoundFeedForward]
    attention: list[str]
    embedding: FoundEmbedding | None


def _find(model: PreTrainedModel, config: MPOEConfig) -> _Found:
    if is_upcycled(model):
        raise ValueError("the model must be dense to be upcycled; it has been upcycled before")
    if not config.is_mixture and not config.mpo_layers:
        raise ValueError(
            "a config must have a mixture (num_experts >= 2 and moe_type 'switch' or 'moe') or mpo_layers; this one "
            "would leave the model as it is"
        )
    kind, components = model.config.model_type, config.mpo_layers
    feed_forwards = find_feed_forwards(model, kind, config) if config.is_mixture or "mlp" in components else []
    if config.routing != "token" and any(found.names.stack == "decoder" for found in feed_forwards):
        raise ValueError(
            f"routing {config.routing!r} must be of inputs that are there as a whole; a decoder's tokens must not see "
            "those after them, and would. Choose stacks: encoder, or routing 'token'"
        )
    embedding = find_embedding(model, kind) if "word_embed" in components else None
    if config.matrices:
        known = find_matrices(model, config if embedding is None else with_tied_head(model, embedding, config))
        if unknown := sorted(config.matrices.keys() - known.keys()):
            raise ValueError(
                f"matrices must name layers that become MPOs, like {next(iter(known))}; got {unknown[0]}: correct the "
                "name, or mpo_layers"
            )
    attention = find_attention(model, kind, config) if "attention" in components else []
    return _Found(feed_forwards, attention, embedding)


def _replace_others(model: PreTrainedModel, found: _Found, config: MPOEConfig, load: bool) -> None:
    for name in logging.tqdm(found.attention, desc="Attention", delay=2):
        replace_linear(model, name, config, "attention", load)
    if found.embedding is not None:
        replace_embedding(model, found.embedding, config, load)


def _mark(model: PreTrainedModel, config: MPOEConfig) -> None:
    model.config.quantization_config = config
    set_compute(model, config)
    add_router_loss_hook(model)
    add_padding_hooks(model)


def _mixture_like(feed_forward: FoundFeedForward, config: MPOEConfig) -> MoEFeedForward:
    """An empty mixture with the sizes, dtypes, device and mode of a dense feed-forward network."""
    names = feed_forward.names

    def experts(name: str) -> Experts:
        linear = feed_forward.linear(name)
        out_features, in_features = features_of(linear)
        if config.is_extended:
            return ExtendedExperts(
                linear, out_features, in_features, config.num_experts, config.expert_rank, config.expert_scale,
                config.expert_activation,
            )  # fmt: skip
        weight = matrix_of(require_linear(linear, f"{feed_forward.name}.{name}"))
        with torch.device(weight.device):
            full, has_bias = f"{feed_forward.name}.{name}", getattr(linear, "bias", None) is not None
            empty = _empty_experts(out_features, in_features, config, full, _bias_kind(config, has_bias, name))
        if empty.central is not None:  # what is the base's trains if the base does, and what is new always
            empty.central.requires_grad_(weight.requires_grad)
        return empty.to(weight.dtype)

    up = experts(names.up)
    router = None
    if config.is_mixture:
        with torch.device(next(up.parameters()).device):
            router = _empty_router(up.in_features, config)
    mixture = MoEFeedForward(
        router,
        up,
        experts(names.down),
        feed_forward.activation(),
        None if names.gate is None else experts(names.gate),
        feed_forward.dropout(names.dropout) if config.expert_dropout is None else config.expert_dropout,
        feed_forward.dropout(names.output_dropout),
        names.is_fused,
        config.routing,
        config.balancing == "loss" or config.router_z_loss_coef > 0,
    )
    return mixture.train(feed_forward.module.training)


def _bias_kind(config: MPOEConfig, has_bias: bool, name: str) -> str:
    if config.expert_bias == "base":
        return "shared" if has_bias else "none"
    if has_bias and config.expert_bias == "none":
        raise ValueError(
            f"expert_bias must be 'base', 'shared' or 'expert' for a base with biases; got 'none', and {name} has one"
        )
    return config.expert_bias


def _empty_experts(out_features: int, in_features: int, config: MPOEConfig, name: str, bias: str) -> Experts:
    if "mlp" not in config.mpo_layers:
        return DenseExperts(out_features, in_features, config.num_experts, bias)
    num_experts = config.num_experts if config.is_mixture else 1
    if not config.share_central:
        alone = [empty_mpo(out_features, in_features, config, "mlp", name) for _ in range(num_experts)]
        return UnsharedMPOExperts(alone, bias)
    return empty_mpo(out_features, in_features, config, "mlp", name, num_experts, bias)


def _empty_router(hidden_size: int, config: MPOEConfig) -> TopKRouter:
    balancing = None
    if config.balancing == "bias":
        balancing = BiasBalancing(config.num_experts, hidden_size, config.balancing_step)
    router = TopKRouter(
        hidden_size,
        config.num_experts,
        config.experts_per_token,
        config.is_scale_prob or config.is_extended,
        config.router_gradient,
        config.capacity_factor,
        config.eval_capacity_factor,
        config.second_policy_train,
        config.second_policy_eval,
        config.second_threshold,
        config.router_jitter,
        config.router_input_norm,
        has_bias=not config.is_extended,
        balancing=balancing,
    )
    return router.requires_grad_(not config.frozen_router)


def _load(
    mixture: MoEFeedForward, feed_forward: FoundFeedForward, generator: torch.Generator, config: MPOEConfig
) -> None:
    names = feed_forward.names
    for experts, name in ((mixture.up, names.up), (mixture.gate, names.gate), (mixture.down, names.down)):
        if experts is None or name is None:
            continue
        if isinstance(experts, ExtendedExperts):
            experts.initialize(generator)
            continue
        linear = feed_forward.linear(name)
        experts.load_matrix(matrix_of(linear), getattr(linear, "bias", None))
        if config.expert_noise:
            experts.add_noise(config.expert_noise, generator)
    if mixture.router is not None:
        mixture.router.initialize(generator)


def _put(model: nn.Module, feed_forward: FoundFeedForward, mixture: MoEFeedForward) -> None:
    """Put a mixture into its place, and make the parts that the model goes on to call pass everything through."""
    names, module = feed_forward.names, feed_forward.module
    model.set_submodule(feed_forward.place, mixture)
    if not names.at:
        return
    for part in names.parts:
        if part != names.at and not part.startswith(f"{names.at}."):
            owner, _, attribute = part.rpartition(".")
            nothing = 0.0 if part == names.dropout and not _is_module(module, part) else nn.Identity()
            setattr(module.get_submodule(owner), attribute, nothing)


def _is_module(module: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return isinstance(getattr(module.get_submodule(owner), attribute), nn.Module)
