"""One matrix of a model as empty experts: the config's choices about site dimensions, bonds and gauge, in one place."""

from __future__ import annotations

from mpoe.config import MPOEConfig
from mpoe.mpo import SiteDims, site_dims
from mpoe.nn import MPOExperts


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
        name: Of the matrix in its module, "wo" or "q".
        num_experts: E, count.
        bias: See `MPOExperts`.

    Raises:
        ValueError: `config.site_dims` that do not fit the matrix.
    """
    shape, own = f"{out_features}x{in_features}", config.site_dims or {}
    given = own.get(f"{name}:{shape}", own.get(shape))
    dims = (
        site_dims(out_features, in_features, config.num_sites, config.layout, config.max_auxiliary_bond)
        if given is None
        else SiteDims.of(given, out_features, in_features)
    )
    max_bond_dim = {
        "mlp": config.max_bond_dim,
        "attention": config.attention_bond_dim,
        "word_embed": config.word_embed_bond_dim,
    }[component]
    return MPOExperts(dims, num_experts, max_bond_dim, config.gauge, config.offset_scale, bias)
