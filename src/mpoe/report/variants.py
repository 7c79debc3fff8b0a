"""Ways to train one model, by parameters and FLOPs, whatever the number of devices: dense, MPOE and Switch.

Letters: T tokens, E experts, K experts per token, R expert rank; D, F input and output width of a matrix; of a matrix's
MPO: a, b the bonds left and right of the central tensor, o, i its dimensions, p, q all dimensions of the left and of
the right arm together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpoe.config import LAYOUTS, MPOEConfig
from mpoe.models.matrices import empty_mpo
from mpoe.mpo import Caps, SiteDims
from mpoe.mpo.plan import plan
from mpoe.nn import MPOExperts
from mpoe.report.model_shape import ModelShape

SWITCH_CAPACITY = 1.25
"""Capacity factor of Switch with expert parallelism where none is given."""
TRAINED, FROZEN = 3, 2
"""FLOPs of forward and backward together over those of the forward, for weights that train and for frozen ones."""


@dataclass(frozen=True)
class Variant:
    """A way to train a model.

    Attributes:
        name: For tables.
        shape: The dense model.
        parameters: Those that every device has, or gathers, count.
        trained: Of these, count.
        plain_flops: Of a token outside of matrices that experts share, training.
        shared_flops: Of a token in matrices that experts share, training.
        rebuild_flops: Of a device and step, training: multiplying out, whatever the number of tokens.
        multiplied_out: Elements that are multiplied out at one time, those of one layer, count; 0 but for "balanced".
        expert_parameters: Whole experts, all trained, that are divided over devices, count.
        experts: E, among how many, count.
        exchanged: Values of a token that travel to experts on other devices and back, count.
    """

    name: str
    shape: ModelShape
    parameters: int
    trained: int
    plain_flops: float
    shared_flops: float = 0.0
    rebuild_flops: float = 0.0
    multiplied_out: int = 0
    expert_parameters: int = 0
    experts: int = 1
    exchanged: float = 0.0

    @property
    def total(self) -> int:
        """All parameters, each once, count."""
        return self.parameters + self.expert_parameters

    @property
    def total_trained(self) -> int:
        """All that train, each once, count."""
        return self.trained + self.expert_parameters

    def flops_per_token(self, tokens: int) -> float:
        """Training FLOPs of a token, with its part of what is multiplied out.

        Args:
            tokens: T of a device and step, count.
        """
        return self.plain_flops + self.shared_flops + self.rebuild_flops / tokens


def variants(shape: ModelShape, config: MPOEConfig) -> list[Variant]:
    """Dense, MPOE in both layouts and as an adapter of a frozen base, Switch with and without expert parallelism.

    Args:
        shape: The dense model.
        config: The mixture. What it does not say of the others (the other layout, whole experts) is their default; so
            is the number of experts per token where it says neither `moe_type` nor `top_k`.

    Raises:
        ValueError: Something else than a mixture of feed-forward layers that share their matrices, or stacks and blocks
            that are not there.
    """
    _check(config)
    blocks = mixture_blocks(shape, config)
    extended, balanced = (config if config.layout == of else _like(config, layout=of) for of in LAYOUTS)
    whole = _like(config, layout="balanced", mpo_layers=())
    capacity = config.capacity_factor or SWITCH_CAPACITY
    return [
        _dense(shape),
        _extended(shape, extended, blocks),
        _extended(shape, extended, blocks, is_adapter=True),
        _balanced(shape, balanced, blocks),
        *_switch(shape, whole, blocks, capacity),
    ]


def matmul_flops(weights: float, passes: int = TRAINED) -> float:
    """Training FLOPs of one token in products with so many weights: 6 a weight, 4 if it is frozen.

    2 a weight forward, 2 for the gradient of the input, 2 for the weight's own. Not counted, as is the custom: the
    attention's products of activations with each other, and what is computed a second time in the backward.

    Args:
        weights: Count.
        passes: TRAINED or FROZEN.

    Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020, §2.1. The attention's part: Narayanan et al.
        (Megatron-LM), SC 2021, appendix.
    """
    return 2 * passes * weights


def extended_adds(config: MPOEConfig, out_features: int, in_features: int) -> int:
    """Multiply-adds of one token with the experts of an extended matrix, which are as many as their parameters.

    E·R·(D + F): all experts are computed at once, and the router's gates are between the two products.

    Args:
        config: `num_experts` and `expert_rank`.
        out_features: F, count.
        in_features: D, count.
    """
    return config.num_experts * config.expert_rank * (out_features + in_features)


def rebuild_adds(dims: SiteDims, max_bond_dim: Caps = None) -> float:
    """Multiply-adds of multiplying one expert's matrix out.

    p·a·o·i·b and p·o·i·b·q for the left arm onto the central tensor and then the right one, or a·o·i·b·q and p·a·o·i·q
    the other way around, whichever is less; and the arms themselves.

    Args:
        dims: Any site dimensions.
        max_bond_dim: Truncation, count; None is none.
    """
    product = dims.out_features * dims.in_features
    return plan(dims, max_bond_dim, 1, tokens=1).costs["rebuild"].flops / 2 - product


def ffn_experts(shape: ModelShape, config: MPOEConfig) -> list[MPOExperts]:
    """The matrices of one FFN as a balanced mixture's experts, without values, on the meta device.

    Args:
        shape: The dense model.
        config: The mixture.

    Raises:
        ValueError: A config that makes no MPOs of feed-forward layers.
    """
    _check(config)
    if config.is_extended:
        raise ValueError(
            "only matrices of layout 'balanced' are planned; got 'extended', whose matrices are computed in one way: "
            "W for all tokens at once, and beside it U and V of all experts. Add --layout balanced"
        )
    with torch.device("meta"):
        bias = "none" if config.expert_bias == "base" else config.expert_bias  # these sizes are of bases without
        return [empty_mpo(out, inner, config, "mlp", name, config.num_experts, bias) for name, out, inner in shape.ffn]


def mixture_blocks(shape: ModelShape, config: MPOEConfig) -> int:
    """Blocks whose FFN the config turns into a mixture, count.

    Args:
        shape: The dense model.
        config: `stacks` and `layers` say which.

    Raises:
        ValueError: Stacks and blocks that are not there.
    """
    if not set(config.stacks or ()) <= set(shape.stacks):
        raise ValueError(f"stacks must be among the model's {sorted(shape.stacks)}; got {list(config.stacks or ())}")
    deepest = max(shape.stacks.values())
    if any(layer >= deepest for layer in config.layers or ()):
        raise ValueError(f"layers must be among the model's 0..{deepest - 1}; got {list(config.layers or ())}")
    return sum(
        depth if config.layers is None else sum(layer < depth for layer in config.layers)
        for stack, depth in shape.stacks.items()
        if stack in (config.stacks or shape.stacks)
    )


def _dense(shape: ModelShape) -> Variant:
    flops = matmul_flops(_met(shape, shape.blocks * shape.ffn_parameters))
    return Variant("dense", shape, shape.parameters, shape.parameters, flops)


def _check(config: MPOEConfig) -> None:
    if not config.is_mixture or config.mpo_layers != ("mlp",):
        raise ValueError(
            "only mixtures of feed-forward layers whose experts share a matrix are costed: num_experts >= 2, moe_type "
            f"'switch' or 'moe', mpo_layers ('mlp',); got {config.num_experts}, {config.moe_type!r}, "
            f"{config.mpo_layers}"
        )


def _like(config: MPOEConfig, **options: Any) -> MPOEConfig:
    """Another mixture of as many experts, in the same places."""
    same = {name: getattr(config, name) for name in ("num_experts", "moe_type", "top_k", "stacks", "layers")}
    return MPOEConfig(**same, **options)


def _extended(shape: ModelShape, config: MPOEConfig, blocks: int, is_adapter: bool = False) -> Variant:
    own = blocks * sum(extended_adds(config, out, inner) for _, out, inner in shape.ffn)
    kept, router, base = _kept(shape, blocks), _router(shape, config, blocks), FROZEN if is_adapter else TRAINED
    total, new = shape.parameters + router + own, router + own
    return Variant(
        name="MPOE adapter" if is_adapter else "MPOE extended",
        shape=shape,
        parameters=total,
        trained=new if is_adapter else total,
        plain_flops=matmul_flops(_met(shape, kept - shape.other_parameters), base)
        + matmul_flops(router / len(shape.stacks)),
        shared_flops=(matmul_flops(blocks * shape.ffn_parameters, base) + matmul_flops(own)) / len(shape.stacks),
    )


def _balanced(shape: ModelShape, config: MPOEConfig, blocks: int) -> Variant:
    experts, kept, router = ffn_experts(shape, config), _kept(shape, blocks), _router(shape, config, blocks)
    total = kept + router + blocks * sum(p.numel() for mpo in experts for p in mpo.parameters())
    rebuilt = config.num_experts * sum(rebuild_adds(mpo.dims, mpo.max_bond_dim) for mpo in experts)
    return Variant(
        name="MPOE balanced",
        shape=shape,
        parameters=total,
        trained=total,
        plain_flops=matmul_flops(_met(shape, kept - shape.other_parameters) + router / len(shape.stacks)),
        shared_flops=matmul_flops(config.experts_per_token * blocks * shape.ffn_parameters / len(shape.stacks)),
        rebuild_flops=matmul_flops(rebuilt) * blocks,
        multiplied_out=config.num_experts * shape.ffn_parameters,
    )


def _switch(shape: ModelShape, config: MPOEConfig, blocks: int, capacity: float) -> tuple[Variant, Variant]:
    stacks, router = len(shape.stacks), _router(shape, config, blocks)
    kept = _kept(shape, blocks)
    plain = matmul_flops(_met(shape, kept - shape.other_parameters) + router / stacks)
    met = matmul_flops(config.experts_per_token * blocks * shape.ffn_parameters / stacks)
    experts = config.num_experts * blocks * shape.ffn_parameters
    everywhere = Variant("Switch", shape, kept + router + experts, kept + router + experts, plain + met)
    divided = Variant(
        "Switch EP",
        shape,
        kept + router,
        kept + router,
        plain + capacity * met,
        expert_parameters=experts,
        experts=config.num_experts,
        # there and back, and the same for the gradients; buffers are computed and sent at their full capacity
        exchanged=4 * capacity * config.experts_per_token * shape.d_model * blocks / stacks,
    )
    return everywhere, divided


def _kept(shape: ModelShape, blocks: int) -> int:
    """Parameters outside of the mixtures, routers not counted."""
    return shape.other_parameters + (shape.blocks - blocks) * shape.ffn_parameters


def _met(shape: ModelShape, ffn_parameters: float) -> float:
    """Weights outside of mixtures that a token is multiplied with; it passes one stack."""
    return (shape.other_parameters - shape.lookup_parameters + ffn_parameters) / len(shape.stacks)


def _router(shape: ModelShape, config: MPOEConfig, blocks: int) -> int:
    """Parameters of all routers, each a linear layer, with a bias but for extended matrices."""
    return (shape.d_model + (not config.is_extended)) * config.num_experts * blocks
