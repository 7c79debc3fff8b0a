"""Matrix product operators: torch only, no networks."""

from mpoe.mpo.decompose import decompose, truncation_bound, truncation_error
from mpoe.mpo.machine import Machine, machine_of
from mpoe.mpo.operator import MPO
from mpoe.mpo.plan import WAYS, Plan, plan
from mpoe.mpo.sites import Caps, SiteDims, low_rank_dims, site_dims

__all__ = [
    "MPO",
    "WAYS",
    "Caps",
    "Machine",
    "Plan",
    "SiteDims",
    "decompose",
    "low_rank_dims",
    "machine_of",
    "plan",
    "site_dims",
    "truncation_bound",
    "truncation_error",
]
