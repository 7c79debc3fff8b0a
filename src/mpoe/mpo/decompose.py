"""Matrix to MPO: exact or truncated, in a chosen gauge, with the error and its bound.

Shape letters: a, b bonds; o, i dimensions of one site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mpoe.mpo.operator import MPO
from mpoe.mpo.sites import SiteDims


def decompose(
    matrix: Float[Tensor, "out_features in_features"],
    site_dims: SiteDims | Sequence[Sequence[int]],
    max_bond_dim: int | None = None,
    gauge: str = "identity",
) -> MPO:
    """Write a matrix as an MPO.

    Args:
        matrix: W, of any floating dtype; finite.
        site_dims: From `mpoe.mpo.site_dims`, or a pair (output dimensions, input dimensions).
        max_bond_dim: Keep at most this many singular values on every bond, count, >= 1; None is exact.
        gauge: "identity": wherever a bond loses nothing the auxiliary tensors are identities, so at full bonds the
            central tensor is the matrix itself and no decomposition is computed; a truncated bond is as in "central".
            "central": the auxiliary tensors are isometries, the central tensor carries the norm. "sqrt": every bond
            carries the square root of its singular values on both sides, as in the reference implementation.

    Returns:
        MPO with the dtype of `matrix` and the bonds `site_dims.bond_dims(max_bond_dim)`. At full bonds it is exact. If
        truncated, its relative error is at most `truncation_bound`.

    Raises:
        ValueError: Not a finite floating-point matrix, site dimensions that do not multiply out, an unknown gauge.

    Source: MPOE, §2; the isometries are those of a tensor-train SVD (Oseledets 2011) made towards the centre, from the
    eigenvectors of the float64 Gram matrices.
    """
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"need a floating-point matrix; got shape {tuple(matrix.shape)} of {matrix.dtype}")
    if not torch.isfinite(matrix).all():
        raise ValueError("the matrix must be finite; it has NaN or infinite elements")
    if gauge not in ("identity", "central", "sqrt"):
        raise ValueError(f"gauge must be 'identity', 'central' or 'sqrt'; got {gauge!r}")
    if max_bond_dim is not None and max_bond_dim < 1:
        raise ValueError(f"max_bond_dim must be >= 1; got {max_bond_dim}")
    dims = _as_site_dims(site_dims, *matrix.shape)
    bonds = dims.bond_dims(max_bond_dim)
    rest = _interleave(matrix, dims)
    if gauge != "identity" or bonds != _outer_bonds(dims):
        rest = rest.double()

    sites: list[Tensor] = [torch.empty(0)] * dims.num_sites
    scales = [torch.ones(1, dtype=rest.dtype, device=rest.device)] * (dims.num_sites + 1)
    for k in range(dims.central):  # from the left: `rest` becomes (d_k, everything to the right)
        rest = rest.reshape(bonds[k] * dims.out_dims[k] * dims.in_dims[k], -1)
        isometry, scales[k + 1], rest = _split_rows(rest, bonds[k + 1], keep_basis=gauge == "identity")
        sites[k] = isometry.reshape(bonds[k], dims.out_dims[k], dims.in_dims[k], bonds[k + 1])
    for k in range(dims.num_sites - 1, dims.central, -1):  # and from the right
        rest = rest.reshape(-1, dims.out_dims[k] * dims.in_dims[k] * bonds[k + 1])
        isometry, scales[k], rest_t = _split_rows(rest.T, bonds[k], keep_basis=gauge == "identity")
        sites[k] = isometry.T.reshape(bonds[k], dims.out_dims[k], dims.in_dims[k], bonds[k + 1])
        rest = rest_t.T
    c = dims.central
    sites[c] = rest.reshape(bonds[c], dims.out_dims[c], dims.in_dims[c], bonds[c + 1])
    if gauge == "sqrt":
        sites = _share_singular_values(sites, [s.sqrt() for s in scales], c)
    return MPO(tuple(site.to(matrix.dtype) for site in sites), dims)


def truncation_error(operator: MPO, matrix: Float[Tensor, "out_features in_features"]) -> float:
    """The relative Frobenius error of an MPO against the matrix it stands for, dimensionless, 0 = exact."""
    matrix = matrix.double()
    difference = operator.to_matrix().double() - matrix
    return float(difference.norm() / matrix.norm().clamp_min(torch.finfo(torch.float64).tiny))


def truncation_bound(
    matrix: Float[Tensor, "out_features in_features"],
    site_dims: SiteDims | Sequence[Sequence[int]],
    max_bond_dim: int,
) -> float:
    """An upper bound on the relative Frobenius error of `decompose(matrix, site_dims, max_bond_dim)`, dimensionless.

    sqrt(sum over bonds of the squares of the discarded singular values) / |W|; from the spectra alone, before anything
    is cut.

    Source: Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 33 (2011), Theorem 2.2.
    """
    dims = _as_site_dims(site_dims, *matrix.shape)
    exact = decompose(matrix.double(), dims, gauge="identity")
    kept = dims.bond_dims(max_bond_dim)
    discarded = sum(float((exact.spectrum(k)[kept[k] :] ** 2).sum()) for k in range(1, dims.num_sites))
    return math.sqrt(discarded) / max(float(matrix.double().norm()), torch.finfo(torch.float64).tiny)


def _as_site_dims(dims: SiteDims | Sequence[Sequence[int]], out_features: int, in_features: int) -> SiteDims:
    if not isinstance(dims, SiteDims):
        return SiteDims.of(dims, out_features, in_features)
    if (dims.out_features, dims.in_features) != (out_features, in_features):
        raise ValueError(
            f"site dimensions must be for a matrix of {out_features} × {in_features}; got some for "
            f"{dims.out_features} × {dims.in_features}"
        )
    return dims


def _interleave(matrix: Tensor, dims: SiteDims) -> Tensor:
    """W as a tensor (o_1, i_1, .., o_m, i_m), padded with zeros."""
    padding = (0, dims.padded_in - dims.in_features, 0, dims.padded_out - dims.out_features)
    m = dims.num_sites
    tensor = torch.nn.functional.pad(matrix, padding).reshape(*dims.out_dims, *dims.in_dims)
    return tensor.permute([n for k in range(m) for n in (k, m + k)]).contiguous()


def _outer_bonds(dims: SiteDims) -> tuple[int, ...]:
    """The bonds of a chain whose auxiliary tensors are all square, seen from the centre."""
    sizes = [o * i for o, i in zip(dims.out_dims, dims.in_dims, strict=True)]
    c = dims.central
    return tuple(math.prod(sizes[:k]) if k <= c else math.prod(sizes[k:]) for k in range(dims.num_sites + 1))


def _split_rows(matrix: Tensor, bond: int, keep_basis: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix (p, q) = isometry (p, bond) @ rest (bond, q), the best such for its bond, and its singular values."""
    if keep_basis and bond == matrix.shape[0]:
        unit = torch.eye(bond, dtype=matrix.dtype, device=matrix.device)
        return unit, torch.ones(bond, dtype=matrix.dtype, device=matrix.device), matrix
    eigenvalues, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    isometry = vectors[:, -bond:].flip(1)
    # A tiny eigenvalue may come out negative. Any positive scale will do as a gauge; the floor keeps 1/s finite.
    squares = eigenvalues[-bond:].flip(0)
    floor = squares[0].clamp_min(0) * torch.finfo(matrix.dtype).eps
    singular_values = squares.clamp_min(floor).sqrt()
    if singular_values[0] == 0:
        singular_values = torch.ones_like(singular_values)
    return isometry, singular_values, isometry.T @ matrix


def _share_singular_values(sites: list[Tensor], roots: list[Tensor], central: int) -> list[Tensor]:
    """Move sqrt(s) from the central tensor onto the auxiliary side of every bond: X X⁻¹ = 1 is inserted there."""
    shared = []
    for k, site in enumerate(sites):
        left, right = roots[k][:, None, None, None], roots[k + 1]
        if k < central:
            shared.append(site / left * right)
        elif k > central:
            shared.append(site * left / right)
        else:
            shared.append(site / left / right)
    return shared
