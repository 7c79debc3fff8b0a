"""Matrix to MPO: exact or truncated, in a chosen gauge, with the error and its bound.

Shape letters: a, b bonds of one site, outwards and towards the centre; o, i its dimensions, n = o * i; p, q rows and
columns of the matrix to split, the rows being the sites that are split off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mpoe.mpo.operator import MPO
from mpoe.mpo.sites import Caps, SiteDims

GRAM_BLOCK = 2**20  # elements that are converted to float64 at once: 8 MiB, which caches hold


def decompose(
    matrix: Float[Tensor, "out_features in_features"],
    site_dims: SiteDims | Sequence[Sequence[int]],
    max_bond_dim: Caps = None,
    gauge: str = "identity",
) -> MPO:
    """Write a matrix as an MPO.

    Args:
        matrix: W, of any floating dtype; finite.
        site_dims: From `mpoe.mpo.site_dims`, or a pair (output dimensions, input dimensions).
        max_bond_dim: Keep at most this many singular values on every bond, count, >= 1, or one number for each inner
            bond; None is exact.
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
    eigenvectors of float64 Gram matrices, or, where a cut loses nothing, from an SVD; the rest is computed in the dtype
    of `matrix`, at least float32.
    """
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(f"need a floating-point matrix; got shape {tuple(matrix.shape)} of {matrix.dtype}")
    if gauge not in ("identity", "central", "sqrt"):
        raise ValueError(f"gauge must be 'identity', 'central' or 'sqrt'; got {gauge!r}")
    if isinstance(max_bond_dim, int) and max_bond_dim < 1:
        raise ValueError(f"max_bond_dim must be >= 1; got {max_bond_dim}")
    dims = _as_site_dims(site_dims, *matrix.shape)
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(matrix)):  # one pass; a NaN is both extremes
        raise ValueError("the matrix must be finite; it has NaN or infinite elements")

    rest = _interleave(matrix, dims)
    sites: list[Tensor] = [rest] * dims.num_sites
    scales = [torch.ones(1, device=rest.device)] * (dims.num_sites + 1)
    for piece in _pieces(dims, dims.bond_dims(max_bond_dim)):
        parts, rest = _split_off(piece, rest, keep_basis=gauge == "identity")
        for k, (isometry, singular_values) in zip(piece.sites, parts, strict=True):
            sites[k], scales[k + 1 if piece.is_left else k] = isometry, singular_values
    sites[dims.central] = rest
    sites = [site.reshape(shape) for site, shape in zip(sites, dims.site_shapes(max_bond_dim), strict=True)]
    if gauge == "sqrt":
        sites = _share_singular_values(sites, [s.sqrt() for s in scales], dims.central)
    return MPO(tuple(site.to(matrix.dtype) for site in sites), dims)


def truncation_error(operator: MPO, matrix: Float[Tensor, "out_features in_features"]) -> float:
    """The relative Frobenius error of an MPO against the matrix it stands for, dimensionless, 0 = exact."""
    matrix = matrix.double()
    difference = operator.to_matrix().double() - matrix
    return (difference.norm() / matrix.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def truncation_bound(
    matrix: Float[Tensor, "out_features in_features"],
    site_dims: SiteDims | Sequence[Sequence[int]],
    max_bond_dim: int | tuple[int, ...],
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
    """W as a tensor (o_1, i_1, .., o_m, i_m), padded with zeros; never the same memory."""
    padding = (0, dims.padded_in - dims.in_features, 0, dims.padded_out - dims.out_features)
    m = dims.num_sites
    padded = torch.nn.functional.pad(matrix, padding) if any(padding) else matrix
    tensor = padded.reshape(*dims.out_dims, *dims.in_dims).permute([n for k in range(m) for n in (k, m + k)])
    return tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Piece:
    """Neighbouring sites at one end of the chain that are split off together: only the innermost bond may be cut.

    Attributes:
        is_left: Whether it is the left end.
        sites: Their indices, from the end inwards, as all that follows.
        sizes: (a, n, b) of each: the bond on the side of the end, o * i, the bond on the side of the centre.
    """

    is_left: bool
    sites: list[int]
    sizes: list[tuple[int, int, int]]

    @property
    def rows(self) -> int:
        """Rows of the matrix that is split, p."""
        return self.sizes[0][0] * math.prod(n for _, n, _ in self.sizes)

    @property
    def is_cut(self) -> bool:
        """Whether the innermost bond is less than full."""
        return self.sizes[-1][2] < self.rows


def _pieces(dims: SiteDims, bonds: Sequence[int]) -> list[_Piece]:
    """All auxiliary sites, in the order in which to split them off."""
    c, m = dims.central, dims.num_sites
    arms = [_arm(dims, bonds, range(c)), _arm(dims, bonds, range(m - 1, c, -1))]

    def worth(arm: list[_Piece]) -> float:
        """The share of the other arm's work that this one spares if it comes first, for its own work."""
        p, b = math.prod(n for piece in arm for _, n, _ in piece.sizes), arm[-1].sizes[-1][2]
        return (1 - b / p) / (p * (p + b))

    return [piece for arm in sorted(filter(None, arms), key=worth, reverse=True) for piece in arm]


def _arm(dims: SiteDims, bonds: Sequence[int], sites: range) -> list[_Piece]:
    """The sites of one arm; after a cut the rest is smaller, so that a new piece begins."""
    pieces: list[_Piece] = []
    for k in sites:
        is_left = k < dims.central
        outer, inner = (k, k + 1) if is_left else (k + 1, k)
        if not pieces or pieces[-1].is_cut:
            pieces.append(_Piece(is_left, [], []))
        pieces[-1].sites.append(k)
        pieces[-1].sizes.append((bonds[outer], dims.out_dims[k] * dims.in_dims[k], bonds[inner]))
    return pieces


def _split_off(piece: _Piece, rest: Tensor, keep_basis: bool) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """`rest` = isometries @ new rest, the best such for the bonds; with each isometry its singular values.

    One Gram matrix serves the whole piece: those of its full bonds are partial traces of it.
    """
    if keep_basis and not piece.is_cut:
        return [_unit(b, rest) for _, _, b in piece.sizes], rest
    rest = rest.to(torch.promote_types(rest.dtype, torch.float32))
    rest = rest.reshape(piece.rows, -1) if piece.is_left else rest.reshape(-1, piece.rows)
    matrix_pq = rest if piece.is_left else rest.T
    gram_pp = _gram(matrix_pq)
    # Below this share of the largest, squares are rounding errors: of the Gram matrix, or of the matrix itself.
    noise = max(torch.finfo(gram_pp.dtype).eps, torch.finfo(rest.dtype).eps ** 2)
    parts, (before, _) = [], _unit(piece.sizes[0][0], gram_pp)
    for a, n, b in piece.sizes:
        if keep_basis and b == a * n:
            vectors, singular_values = _unit(b, gram_pp)
        elif b == matrix_pq.shape[1] < a * n:  # a cut that loses nothing; squares would lose the small singular values
            vectors, singular_values, _ = torch.linalg.svd(matrix_pq.double(), full_matrices=False)
            singular_values = _floored(singular_values, noise)
        else:
            vectors, singular_values = _leading(_trace_out(gram_pp, a * n, piece.is_left), b, noise)
        # The bonds before are full, so the vectors of the site before are a rotation (a, a), which is taken off here.
        if piece.is_left:
            isometry = torch.einsum("xa,xnb->anb", before, vectors.view(a, n, b))
        else:
            isometry = torch.einsum("xa,nxb->bna", before, vectors.view(n, a, b))
        parts.append((isometry, singular_values))
        before = vectors
    basis_pb = before.to(rest.dtype)
    return parts, basis_pb.T @ rest if piece.is_left else rest @ basis_pb


def _unit(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """An isometry that changes nothing, and scales that change nothing."""
    return torch.eye(size, dtype=like.dtype, device=like.device), torch.ones(1, dtype=like.dtype, device=like.device)


def _gram(matrix_pq: Tensor) -> Tensor:
    """The lower triangle of M Mᵀ, (p, p); in float64, because squares lose half of the digits.

    The upper one holds parts of it and zeros, and nothing reads it: neither eigh nor, through a partial trace, eigh.
    """
    p = len(matrix_pq)
    gram = matrix_pq.new_zeros(p, p, dtype=torch.float64)
    step = -(-p // 4)
    for columns in matrix_pq.split(max(1, GRAM_BLOCK // p), dim=1):
        block = columns.double()
        for start in range(0, p, step):
            rows = slice(start, start + step)
            gram[rows, : rows.stop].addmm_(block[rows], block[: rows.stop].T)
    return gram


def _trace_out(gram_pp: Tensor, kept: int, is_left: bool) -> Tensor:
    """The Gram matrix of the outermost sites, whose indices together have the size `kept`."""
    p = len(gram_pp)
    if is_left:
        return torch.einsum("axbx->ab", gram_pp.view(kept, p // kept, kept, p // kept))
    return torch.einsum("xaxb->ab", gram_pp.view(p // kept, kept, p // kept, kept))


def _leading(gram_pp: Tensor, bond: int, noise: float) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (p, bond) of a Gram matrix, and the singular values (bond)."""
    eigenvalues, vectors = torch.linalg.eigh(gram_pp)  # ascending
    squares = eigenvalues[-bond:].flip(0).clamp_min(0)  # a tiny one may come out negative
    return vectors[:, -bond:].flip(1), _floored(squares.sqrt(), noise)


def _floored(singular_values: Tensor, noise: float) -> Tensor:
    """Singular values, largest first, as a gauge: any positive scale will do, and the floor keeps 1/s finite."""
    if singular_values[0] == 0:
        return torch.ones_like(singular_values)
    return singular_values.clamp_min(singular_values[0] * math.sqrt(noise))


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
            shared.append(site / (left * right).to(site.dtype))
    return shared
