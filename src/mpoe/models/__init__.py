"""Everything about Transformers models: where their parts are, upcycling, saving and loading."""

from mpoe.models.checkpoint import clear_load_errors, from_pretrained, load_tokenizer
from mpoe.models.families import FAMILIES, find_feed_forwards
from mpoe.models.inspect import ParameterCount, count_parameters, expert_shares, reset_usage
from mpoe.models.router_loss import mixtures, take_router_loss
from mpoe.models.upcycle import upcycle

__all__ = [
    "FAMILIES",
    "ParameterCount",
    "clear_load_errors",
    "count_parameters",
    "expert_shares",
    "find_feed_forwards",
    "from_pretrained",
    "load_tokenizer",
    "mixtures",
    "reset_usage",
    "take_router_loss",
    "upcycle",
]
