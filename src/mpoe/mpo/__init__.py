"""Matrix product operators: torch only, no networks."""

from mpoe.mpo.decompose import decompose, truncation_bound, truncation_error
from mpoe.mpo.operator import MPO
from mpoe.mpo.sites import SiteDims, site_dims

__all__ = ["MPO", "SiteDims", "decompose", "site_dims", "truncation_bound", "truncation_error"]
