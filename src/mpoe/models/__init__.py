"""Everything about Transformers models: where their parts are, upcycling, saving and loading."""

from mpoe.models.adapter import active_adapter, load_adapter, save_adapter, set_adapter
from mpoe.models.checkpoint import (
    NO_CODE,
    class_of,
    clear_load_errors,
    from_pretrained,
    load_config,
    load_tokenizer,
    load_whole,
    read_config,
)
from mpoe.models.families import FAMILIES
from mpoe.models.find import find_feed_forwards
from mpoe.models.inspect import (
    ParameterCount,
    component_modules,
    count_parameters,
    expert_shares,
    is_upcycled,
    mpo_experts,
    reset_usage,
    router_statistics,
    sharing_experts,
    sum_usage,
)
from mpoe.models.matrices import set_compute
from mpoe.models.merge import merge
from mpoe.models.quantized_base import memory_bytes
from mpoe.models.router_loss import mixtures, mpoe_config, routers, take_router_loss
from mpoe.models.routing import shuffled_routing
from mpoe.models.spectra import BondSpectrum, bond_spectra
from mpoe.models.token_experts import LayerChoice, TokenRouting, route_text
from mpoe.models.upcycle import upcycle

__all__ = [
    "FAMILIES",
    "NO_CODE",
    "BondSpectrum",
    "LayerChoice",
    "ParameterCount",
    "TokenRouting",
    "active_adapter",
    "bond_spectra",
    "class_of",
    "clear_load_errors",
    "component_modules",
    "count_parameters",
    "expert_shares",
    "find_feed_forwards",
    "from_pretrained",
    "is_upcycled",
    "load_adapter",
    "load_config",
    "load_tokenizer",
    "load_whole",
    "memory_bytes",
    "merge",
    "mixtures",
    "mpo_experts",
    "mpoe_config",
    "read_config",
    "reset_usage",
    "route_text",
    "router_statistics",
    "routers",
    "save_adapter",
    "set_adapter",
    "set_compute",
    "sharing_experts",
    "shuffled_routing",
    "sum_usage",
    "take_router_loss",
    "upcycle",
]
