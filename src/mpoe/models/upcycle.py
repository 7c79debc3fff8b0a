"""`upcycle`: a dense Transformers model becomes a mixture of experts, in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from mpoe.config import MPOEConfig
from mpoe.models.families import FoundFeedForward, find_feed_forwards
from mpoe.models.router_loss import add_router_loss_hook, mixtures
from mpoe.mpo import SiteDims, site_dims
from mpoe.nn import DenseExperts, MoEFeedForward, MPOExperts, SwitchRouter


def upcycle(model: PreTrainedModel, config: MPOEConfig | None = None) -> PreTrainedModel:
    """Turn the feed-forward networks of a dense model into mixtures of experts, in place.

    Right after it the model computes what it computed before (without truncation and noise, and with
    `is_scale_prob=False`), because every expert starts as the pre-trained layer.

    Args:
        model: Any model of a family in `mpoe.models.families`, on any device, in any floating dtype.
        config: What the mixture is made of; None is `MPOEConfig()`.

    Returns:
        The same object. `model.config.quantization_config` holds the config, so that `save_pretrained` writes it.

    Raises:
        ValueError: An unknown family, stacks or layers that the model has not, or a model that is already a mixture.

    Source: MPOE (Gao et al., COLING 2022), §3; Sparse upcycling (Komatsuzaki et al., ICLR 2023).
    """
    config = MPOEConfig() if config is None else config
    found = _find(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    for feed_forward in logging.tqdm(found, desc="Upcycling", delay=2):  # silent where it takes no time
        _replace(model, feed_forward, _mixture_like(feed_forward, config), generator, config.expert_noise)
    _mark(model, config)
    return model


def swap_modules(model: PreTrainedModel, config: MPOEConfig) -> None:
    """Put empty mixtures in the places of the feed-forward networks, for weights that are about to be loaded.

    Args:
        model: A model on the meta device, or one whose weights do not matter.
        config: As in `upcycle`.
    """
    for feed_forward in _find(model, config):
        mixture = _mixture_like(feed_forward, config)
        model.set_submodule(feed_forward.name, mixture)
        kept = set(model._keep_in_fp32_modules or ())
        if feed_forward.names.down in kept:  # T5 overflows in float16 there
            model._keep_in_fp32_modules = {*kept, f"{feed_forward.name}.down"}
    _mark(model, config)


def _find(model: PreTrainedModel, config: MPOEConfig) -> list[FoundFeedForward]:
    if mixtures(model):
        raise ValueError("the model must be dense to be upcycled; it already is a mixture of experts")
    return find_feed_forwards(model, model.config.model_type, config)


def _mark(model: PreTrainedModel, config: MPOEConfig) -> None:
    model.config.quantization_config = config
    add_router_loss_hook(model, config.load_balancing_coef)


def _mixture_like(feed_forward: FoundFeedForward, config: MPOEConfig) -> MoEFeedForward:
    """An empty mixture with the sizes, dtypes, device and mode of a dense feed-forward module."""
    module, names = feed_forward.module, feed_forward.names

    def experts(name: str) -> MPOExperts | DenseExperts:
        weight = _weight(module, name)
        with torch.device(weight.device):
            empty = _empty_experts(weight.shape[0], weight.shape[1], config)
        empty.requires_grad_(weight.requires_grad)
        return empty.to(weight.dtype)

    up = experts(names.up)
    gate = None if names.gate is None else experts(names.gate)
    weight = _weight(module, names.up)
    with torch.device(weight.device):
        router = SwitchRouter(weight.shape[1], config.num_experts, config.is_scale_prob).to(weight.dtype)
    mixture = MoEFeedForward(
        router, up, experts(names.down), getattr(module, names.activation), gate, getattr(module, names.dropout).p
    )
    return mixture.train(module.training)


def _empty_experts(out_features: int, in_features: int, config: MPOEConfig) -> MPOExperts | DenseExperts:
    if "mlp" not in config.mpo_layers:
        return DenseExperts(out_features, in_features, config.num_experts)
    given = (config.site_dims or {}).get(f"{out_features}x{in_features}")
    dims = (
        site_dims(out_features, in_features, config.num_sites, config.layout, config.max_auxiliary_bond)
        if given is None
        else SiteDims.of(given, out_features, in_features)
    )
    return MPOExperts(dims, config.num_experts, config.max_bond_dim, config.gauge, config.offset_scale)


def _replace(
    model: nn.Module, feed_forward: FoundFeedForward, mixture: MoEFeedForward, generator: torch.Generator, noise: float
) -> None:
    names, module = feed_forward.names, feed_forward.module
    for experts, name in ((mixture.up, names.up), (mixture.gate, names.gate), (mixture.down, names.down)):
        if experts is not None and name is not None:
            experts.load_matrix(_weight(module, name))
            if noise:
                experts.add_noise(noise, generator)
    mixture.router.initialize(generator)
    model.set_submodule(feed_forward.name, mixture)


def _weight(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(f"{name}.weight")
