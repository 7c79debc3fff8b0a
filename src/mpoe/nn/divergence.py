"""How far the experts of a layer have moved apart: all of them start as the same matrices.

Shape letters: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mpoe.nn.experts import DenseExperts, MPOExperts
from mpoe.nn.feed_forward import MoEFeedForward
from mpoe.nn.frozen_base import FrozenBaseExperts
from mpoe.nn.unshared import UnsharedMPOExperts


@torch.no_grad()
def divergence(layer: MoEFeedForward) -> Float[Tensor, ""]:
    """The relative Frobenius distance of the experts' own tensors from their mean over the experts, root mean square.

    sqrt(mean over tensors k and experts e of ‖A_k⁽ᵉ⁾ - Ā_k‖² / ‖Ā_k‖²), over the auxiliary tensors of all matrices of
    the layer, each relative to its own mean Ā_k, so that no gauge of the chain and no scale of a matrix weighs more
    than another. Of experts that are whole matrices, over these. Linear in the tensors, without synchronisation.

    Args:
        layer: A feed-forward layer with experts; their tensors must be whole, not sharded over processes.

    Returns:
        Dimensionless: 0 when all experts are equal, as right after upcycling; about 1 when they have nothing in common.
    """
    stacks = [
        stack
        for experts in (layer.up, layer.gate, layer.down)
        if experts is not None
        for stack in _own_tensors(experts)
    ]
    squares = [_relative_square(stack) for stack in stacks]
    if not squares:  # an MPO of one site has no tensor of an expert's own
        return torch.zeros(())
    return torch.stack([square.to(squares[0].device) for square in squares]).mean().sqrt()


def _own_tensors(experts: torch.nn.Module) -> Sequence[Tensor]:
    """What each expert has of its own, stacked: a tensor (E, ...) a site, or a matrix."""
    if isinstance(experts, DenseExperts):
        return [experts.weight]
    if isinstance(experts, MPOExperts):
        return experts.site_stacks(range(experts.num_experts), torch.float32)[1]
    if isinstance(experts, UnsharedMPOExperts):
        of_experts = [_own_tensors(mpo) for mpo in experts.mpos]
        return [torch.cat(site) for site in zip(*of_experts, strict=True)]
    assert isinstance(experts, FrozenBaseExperts)  # nosec B101  # there is no other kind
    return experts.auxiliary_stacks(torch.float32)


def _relative_square(stack: Float[Tensor, "E ..."]) -> Float[Tensor, ""]:
    """The mean over experts of the squared relative distance from their mean."""
    stack = stack.float()
    mean = stack.mean(dim=0)
    tiny = torch.finfo(mean.dtype).tiny  # all experts 0 are all equal
    return (stack - mean).square().sum() / (len(stack) * mean.square().sum().clamp(min=tiny))
