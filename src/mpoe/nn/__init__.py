"""Layers of a mixture: torch only, no Transformers."""

from mpoe.nn.accumulation import Accumulation
from mpoe.nn.balancing import BiasBalancing
from mpoe.nn.dispatch import Dispatch
from mpoe.nn.divergence import divergence
from mpoe.nn.experts import DenseExperts, MPOExperts, per_token
from mpoe.nn.extended import ExtendedExperts
from mpoe.nn.feed_forward import Experts, MoEFeedForward
from mpoe.nn.linear import MPOEmbedding, MPOLinear, MPOTiedHead, refer
from mpoe.nn.matrix_cache import MatrixCache
from mpoe.nn.router import RouterOutput, TopKRouter, load_balancing_loss, router_z_loss
from mpoe.nn.unshared import UnsharedMPOExperts
from mpoe.nn.usage import RouterStatistics, RouterUsage

__all__ = [
    "Accumulation",
    "BiasBalancing",
    "DenseExperts",
    "Dispatch",
    "Experts",
    "ExtendedExperts",
    "MPOEmbedding",
    "MPOExperts",
    "MPOLinear",
    "MPOTiedHead",
    "MatrixCache",
    "MoEFeedForward",
    "RouterOutput",
    "RouterStatistics",
    "RouterUsage",
    "TopKRouter",
    "UnsharedMPOExperts",
    "divergence",
    "load_balancing_loss",
    "per_token",
    "refer",
    "router_z_loss",
]
