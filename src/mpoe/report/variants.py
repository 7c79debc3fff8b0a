"""Ways to train one model, by parameters and FLOPs, whatever the number of devices: dense, MPOE and Switch.

Letters: T tokens, E experts, K experts per token, D model width; of a matrix's MPO: a, b the bonds left and right of
the central tensor, o, i its dimensions, p, q all dimensions of the left and of the right arm together.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from mpoe.config import MPOEConfig
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
        plain_flops: Of a token outside of MPOs, training.
        mpo_flops: Of a token in MPOs, training.
        rebuild_flops: Of a device and step, training: multiplying out, whatever the number of tokens.
        multiplied_out: Elements that are multiplied out at one time, those of one layer, count.
        is_separable: Whether its MPOs are.
        expert_parameters: Whole experts, all trained, that are divided over devices, count.
        experts: E, among how many, count.
        exchanged: Values of a token that travel to experts on other devices and back, count.
    """

    name: str
    shape: ModelShape
    parameters: int
    trained: int
    plain_flops: float
    mpo_flops: float = 0.0
    rebuild_flops: float = 0.0
    multiplied_out: int = 0
    is_separable: bool = False
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
        return self.plain_flops + self.mpo_flops + self.rebuild_flops / tokens


def variants(shape: ModelShape, config: MPOEConfig) -> list[Variant]:
    """Dense, MPOE in both layouts and as an adapter of a frozen base, Switch with and without expert parallelism.

    Args:
        shape: The dense model.
        config: The mixture. In the layout that it does not name, sites are the library's own choice.

    Raises:
        ValueError: Something else than a mixture of MPO feed-forward layers, or stacks and blocks that are not there.
    """
    blocks = mixture_blocks(shape, config)
    other = dataclasses.replace(
        config,
        layout="balanced" if config.layout == "separable" else "separable",
        num_sites=None,
        site_dims=None,
    )
    mpoe = {of.layout: _mpoe(shape, of, blocks) for of in (config, other)}
    adapter = _mpoe(shape, config if config.layout == "separable" else other, blocks, is_adapter=True)
    return [_dense(shape), mpoe["separable"], adapter, mpoe["balanced"], *_switch(shape, config, blocks)]


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


def separable_adds(dims: SiteDims, max_bond_dim: Caps = None) -> tuple[float, float]:
    """Multiply-adds of one token in y = L (C (R x)): with C, and with the ends L and R.

    a·o·i·b with C; i·b·q with R, which acts on each of i parts of x, and o·p·a with L.

    Args:
        dims: Separable site dimensions, three sites.
        max_bond_dim: Truncation, count; None is none.
    """
    central = math.prod(dims.site_shapes(max_bond_dim)[dims.central])
    return central, plan(dims, max_bond_dim, 1, tokens=1).costs["apply"].flops / 2 - central


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
    """The matrices of one FFN as a mixture's experts, without values, on the meta device.

    Args:
        shape: The dense model.
        config: The mixture.

    Raises:
        ValueError: A config that makes no MPOs of feed-forward layers.
    """
    if not config.is_mixture or config.mpo_layers != ("mlp",):
        raise ValueError(
            "only mixtures of MPO feed-forward layers are costed: num_experts >= 2, moe_type 'switch' or 'moe', "
            f"mpo_layers ('mlp',); got {config.num_experts}, {config.moe_type!r}, {config.mpo_layers}"
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


def _mpoe(shape: ModelShape, config: MPOEConfig, blocks: int, is_adapter: bool = False) -> Variant:
    layer, kept, router = _layer(shape, config), _kept(shape, blocks), _router(shape, config, blocks)
    base = FROZEN if is_adapter else TRAINED
    total = kept + router + blocks * (layer.central + layer.own)
    flops = matmul_flops(layer.base_adds, base) + matmul_flops(layer.end_adds)
    return Variant(
        name="MPOE adapter" if is_adapter else f"MPOE {config.layout}",
        shape=shape,
        parameters=total,
        trained=router + blocks * layer.own if is_adapter else total,
        plain_flops=matmul_flops(_met(shape, kept - shape.other_parameters), base)
        + matmul_flops(router / len(shape.stacks)),
        mpo_flops=flops * config.experts_per_token * blocks / len(shape.stacks),
        rebuild_flops=matmul_flops(layer.rebuild_adds) * blocks,
        multiplied_out=layer.multiplied_out,
        is_separable=layer.multiplied_out == 0,
    )


def _switch(shape: ModelShape, config: MPOEConfig, blocks: int) -> tuple[Variant, Variant]:
    stacks, router = len(shape.stacks), _router(shape, config, blocks)
    kept = _kept(shape, blocks)
    plain = matmul_flops(_met(shape, kept - shape.other_parameters) + router / stacks)
    met = matmul_flops(config.experts_per_token * blocks * shape.ffn_parameters / stacks)
    experts = config.num_experts * blocks * shape.ffn_parameters
    capacity = config.capacity_factor or SWITCH_CAPACITY
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
    """Parameters of all routers, each a linear layer with a bias."""
    return (shape.d_model + 1) * config.num_experts * blocks


@dataclass(frozen=True)
class _Layer:
    """One FFN as a mixture: parameters, and multiply-adds of the forward.

    Attributes:
        central: Parameters of the central tensors.
        own: Parameters of all experts.
        base_adds: Of a token, with the central tensors or with matrices that are multiplied out.
        end_adds: Of a token, with what is the expert's own.
        rebuild_adds: Of a step, for all experts.
        multiplied_out: Elements of the matrices of all experts; 0 if they are applied as they are.
    """

    central: int = 0
    own: int = 0
    base_adds: float = 0
    end_adds: float = 0
    rebuild_adds: float = 0
    multiplied_out: int = 0

    def __add__(self, other: _Layer) -> _Layer:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return _Layer(*(a + b for a, b in pairs))


def _layer(shape: ModelShape, config: MPOEConfig) -> _Layer:
    return sum(map(_matrix, ffn_experts(shape, config)), _Layer())


def _matrix(mpo: MPOExperts) -> _Layer:
    dims, experts = mpo.dims, mpo.num_experts
    central = mpo.central.numel()
    own = sum(p.numel() for p in mpo.parameters()) - central
    if dims.is_separable and dims.num_sites == 3:
        base, ends = separable_adds(dims, mpo.max_bond_dim)
        return _Layer(central, own, base, ends)
    whole = dims.out_features * dims.in_features
    return _Layer(central, own, whole, 0, experts * rebuild_adds(dims, mpo.max_bond_dim), experts * whole)
