"""Cut the bonds of an MPO, or of several that share their central tensor: what every cut loses, and the smaller chain.

At a bond a chain is a product L R. With the Gram matrices Lᵀ L = A Aᵀ and R Rᵀ = B Bᵀ and Aᵀ B = U s Vᵀ, the s are the
singular values across the bond, and L (B V s⁻¹) (U Aᵀ) R with the leading columns of U and V is the best chain of a
smaller bond. Of experts the Gram matrices are summed, so that all of them are cut in the same place.

Shape letters: E experts (1 where they share); a, b bonds of one site; o, i its dimensions; d a bond; m sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mpoe.mpo.sites import SiteDims

Chain = list[Float[Tensor, "_ _ _ _ _"]]
"""The site tensors (E, a, o, i, b) of all experts; of those that they share E is 1."""


@dataclass(frozen=True)
class Cut:
    """How one bond of size d can be cut.

    Attributes:
        lost: What is lost at a bond r = 1 .. d, as a share of the squared norm of all experts' matrices; lost[r - 1].
        outwards: What the site on the left is multiplied with, its first r columns.
        inwards: What the site on the right is multiplied with, transposed, its first r columns.
    """

    lost: Float[Tensor, " d"]
    outwards: Float[Tensor, "d d"]
    inwards: Float[Tensor, "d d"]


def cuts(chain: Chain, dims: SiteDims, moments: Sequence[Tensor] | None = None) -> list[Cut]:
    """How every inner bond of a chain can be cut, computed in float64.

    Args:
        chain: m sites.
        dims: Their dimensions.
        moments: For every site a symmetric positive matrix (i_k, i_k), whose Kronecker product is the second moment of
            the inputs: then it is the outputs' error that is least, not the matrix's. None is the identity.

    Returns:
        m - 1 cuts. The square of the relative error of a chain that is cut at several bonds is at most the sum of what
        these lose (Oseledets 2011, Theorem 2.2) for one expert; for several it is a mean over all pairs of a left and a
        right arm.
    """
    sites = [site.double() for site in chain]
    grams = enumerate(_grams_of_bonds(sites, dims, moments))
    return [_cut(*left_and_right, is_left=k < dims.central) for k, left_and_right in grams]


def cut(chain: Chain, dims: SiteDims, bonds: Sequence[int], moments: Sequence[Tensor] | None = None) -> Chain:
    """The chain with smaller bonds; auxiliary tensors become isometries there, and the central tensor has the norm.

    Bond after bond from the ends inwards, each for what is left by those before it: that loses less than to cut all of
    them for the whole chain.

    Args:
        chain: m sites.
        dims: Their dimensions.
        bonds: d_0 .. d_m, as `SiteDims.bond_dims` gives them; one that is the chain's is left as it is.
        moments: As in `cuts`.

    Returns:
        Sites of the dtype of `chain`.
    """
    sites = [site.double() for site in chain]
    c, m = dims.central, dims.num_sites
    for k in (*range(c), *range(m - 2, c - 1, -1)):
        bond = bonds[k + 1]
        if bond < sites[k].shape[4]:
            of_bond = _cut(*_grams_of_bonds(sites, dims, moments)[k], is_left=k < c)
            sites[k] = sites[k] @ of_bond.outwards[:, :bond]
            sites[k + 1] = torch.einsum("dr,edoib->eroib", of_bond.inwards[:, :bond], sites[k + 1])
    return [site.to(like.dtype).contiguous() for site, like in zip(sites, chain, strict=True)]


def _grams_of_bonds(chain: Chain, dims: SiteDims, moments: Sequence[Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    """Of every inner bond, the Gram matrices of the sites on its left and on its right."""
    weights = [None] * dims.num_sites if moments is None else [moment.double() for moment in moments]
    from_left = _grams(chain, weights, dims.central)
    turned = [site.permute(0, 4, 2, 3, 1) for site in reversed(chain)]
    from_right = _grams(turned, weights[::-1], dims.central)[::-1]
    return list(zip(from_left, from_right, strict=True))


def _grams(chain: Chain, weights: Sequence[Tensor | None], central: int) -> list[Tensor]:
    """Of the sites before every inner bond, the Gram matrix over the bond, summed over experts, (d, d)."""
    gram_eaa, found = chain[0].new_ones(1, 1, 1), []
    for k, (site, weight) in enumerate(zip(chain[:-1], weights[:-1], strict=True)):
        if k == central:
            gram_eaa = gram_eaa.sum(dim=0, keepdim=True)
        experts, a, o, i, b = site.shape
        weighed = gram_eaa @ site.reshape(experts, a, o * i * b)
        if weight is not None:
            weighed = torch.einsum("ij,eaojb->eaoib", weight, weighed.view(-1, a, o, i, b))
        rows = site.reshape(experts, a * o * i, b)
        gram_eaa = rows.transpose(1, 2) @ weighed.reshape(-1, a * o * i, b)
        found.append(gram_eaa.sum(dim=0))
    return found


def _cut(left_dd: Tensor, right_dd: Tensor, is_left: bool) -> Cut:
    """The cut of a bond on the left or right of the central tensor, from the Gram matrices of both sides."""
    a, b = _root(left_dd), _root(right_dd)
    u, s, vh = torch.linalg.svd(a.T @ b)
    squares = s**2
    total = squares.sum()
    lost = squares.flip(0).cumsum(0).flip(0)[1:] / total.clamp_min(torch.finfo(total.dtype).tiny)
    # directions in which there is nothing but rounding are left out, not divided by
    inverse = torch.where(s > s[0] * torch.finfo(s.dtype).eps * len(s), 1 / s, 0).nan_to_num(posinf=0)
    outwards, inwards = b @ vh.T, a @ u
    outwards, inwards = (outwards * inverse, inwards) if is_left else (outwards, inwards * inverse)
    return Cut(torch.cat([lost, lost.new_zeros(1)]), outwards, inwards)


def _root(gram_dd: Tensor) -> Tensor:
    """A with A Aᵀ = G."""
    eigenvalues, vectors = torch.linalg.eigh(gram_dd)
    return vectors * eigenvalues.clamp_min(0).sqrt()
