"""How far the experts of a layer have moved apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mpoe.nn.feed_forward import MoEFeedForward


@torch.no_grad()
def divergence(layer: MoEFeedForward) -> Float[Tensor, ""]:
    """Return the root mean square over experts and matrices of an expert's relative distance from the mean expert.

    Of experts that extend a matrix W: ‖Δ_e - Δ̄‖ / ‖W‖ in the Frobenius norm, where expert e adds Δ_e to W. Of MPOs: of
    each auxiliary tensor, relative to its own mean. Of whole experts: of the matrices. Without synchronisation.

    Args:
        layer: A feed-forward layer with experts; their tensors must be whole, not sharded over processes.

    Returns:
        Dimensionless; 0 when all experts are equal, as right after upcycling.
    """
    squares = [experts.divergence() for experts in (layer.up, layer.gate, layer.down) if experts is not None]
    return torch.stack([square.to(squares[0].device) for square in squares]).mean().sqrt()
