"""The matrices of a model as experts: the config's choices about site dimensions, bonds, gauge and how to compute."""

from __future__ import annotations

from torch import nn

from mpoe.config import MPOEConfig
from mpoe.models.inspect import mpo_experts
from mpoe.mpo import Caps, SiteDims, site_dims
from mpoe.nn import MatrixCache, MPOExperts


def empty_mpo(
    out_features: int,
    in_features: int,
    config: MPOEConfig,
    component: str,
    name: str,
    num_experts: int = 1,
    bias: str = "none",
) -> MPOExperts:
    """Experts whose matrices are MPOs, without values.

    Args:
        out_features: Rows, count.
        in_features: Columns, count.
        config: Layout, sites, bonds and gauge.
        component: Of `mpoe.config.COMPONENTS`; each has its own truncation.
        name: Full name of the matrix in the dense model; its last part, "wo" or "q", is its name in its module.
        num_experts: E, count.
        bias: See `MPOExperts`.

    Raises:
        ValueError: Site dimensions of the config that do not fit the matrix.
    """
    shape, own = f"{out_features}x{in_features}", config.site_dims or {}
    alone = (config.matrices or {}).get(name)
    given = own.get(f"{name.rpartition('.')[2]}:{shape}", own.get(shape)) if alone is None else alone["site_dims"]
    dims = (
        site_dims(out_features, in_features, config.num_sites, config.max_auxiliary_bond)
        if given is None
        else SiteDims.of(given, out_features, in_features)
    )
    caps: dict[str, Caps] = {
        "mlp": config.max_bond_dim,
        "attention": config.attention_bond_dim,
        "word_embed": config.word_embed_bond_dim,
    }
    bonds = caps[component] if alone is None else tuple(alone["bonds"])
    return MPOExperts(
        dims, num_experts, bonds, config.gauge, config.offset_scale, bias, has_start=config.auxiliary_start
    )


def set_compute(model: nn.Module, config: MPOEConfig) -> None:
    """Tell the layers of a model how to compute their products, and what memory they may use for it.

    The cache goes to layers in the model's order, as long as all of a layer's matrices find room. So it never drops
    what the next batch needs.

    Args:
        model: An upcycled model.
        config: Its `compute`, `matrix_cache_gib` and `matrix_save_gib`.
    """
    layers = mpo_experts(model).values()
    cache = MatrixCache(int(config.matrix_cache_gib * 2**30))
    left = cache.limit_bytes
    for experts in layers:
        experts.way = None if config.compute == "auto" else config.compute
        experts.save_bytes = int(config.matrix_save_gib * 2**30) // max(len(layers), 1)
        dims = experts.dims
        needed = experts.num_experts * dims.padded_out * dims.padded_in * experts.central.element_size()
        experts.cache = cache if needed <= left else None
        left -= needed if experts.cache is not None else 0
