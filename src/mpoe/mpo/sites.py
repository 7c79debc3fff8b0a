"""Site dimensions: how a matrix of any size is cut into the sites of a matrix product operator (MPO).

Site k has o_k output and i_k input dimensions; the products over the sites are the matrix's sizes, padded with zero
rows or columns where a size has no useful divisors. Shape letters: a, b bonds; o, i dimensions of a site; m sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

# The dimensions that the paper's authors use, where ours would be another choice of the same quality.
PAPER_DIMS = {
    (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
    (4096, 1024): ((4, 4, 8, 8, 4), (4, 4, 4, 4, 4)),
}
Caps = int | tuple[int, ...] | None
"""The largest bonds of a truncated MPO: one number for all, one for each of the m - 1 inner bonds; None: full bonds."""
MAX_SIZE = 2**40  # of a side: its divisors are found by trying, in time that grows with the root
MAX_PADDING = 1 / 16  # of a size; beyond that a site without divisors is cheaper than the padding


@dataclass(frozen=True)
class SiteDims:
    """The dimensions of an MPO's sites.

    Attributes:
        out_dims: o_1 .. o_m; their product is `padded_out` >= out_features.
        in_dims: i_1 .. i_m; their product is `padded_in` >= in_features.
        out_features: Rows of the matrix, count.
        in_features: Columns of the matrix, count.
        note: What had to give way (padding, fewer sites), in words; empty if nothing had to.
    """

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    out_features: int
    in_features: int
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.out_dims) != len(self.in_dims) or len(self.out_dims) % 2 == 0:
            raise ValueError(
                "an MPO needs an odd number of sites, each with one output and one input dimension; "
                f"got {len(self.out_dims)} output dimensions {self.out_dims} and {len(self.in_dims)} input dimensions "
                f"{self.in_dims}"
            )
        for side, dims, size in (
            ("output", self.out_dims, self.out_features),
            ("input", self.in_dims, self.in_features),
        ):
            if min(*dims, size) < 1:
                raise ValueError(f"{side} dimensions and features must be >= 1; got {dims} for {size} features")
            padding = math.prod(dims) - size
            if padding < 0 or padding > max(1, size * MAX_PADDING):
                raise ValueError(
                    f"product of site {side} dimensions must equal {side}_features = {size} (or be at most 1/16 more, "
                    f"padded); got {dims} = {math.prod(dims)}. "
                    f"mpoe.mpo.site_dims({self.out_features}, {self.in_features}) gives valid ones."
                )

    @classmethod
    def of(cls, dims: Sequence[Sequence[int]], out_features: int, in_features: int) -> SiteDims:
        """Site dimensions that the user gives: `dims` is (output dimensions, input dimensions)."""
        if len(dims) != 2:
            raise ValueError(f"site dimensions must be a pair (output dimensions, input dimensions); got {dims!r}")
        return cls(tuple(dims[0]), tuple(dims[1]), out_features, in_features)

    @property
    def num_sites(self) -> int:
        """Sites, count, odd."""
        return len(self.out_dims)

    @property
    def central(self) -> int:
        """Index of the central site."""
        return self.num_sites // 2

    @property
    def auxiliary(self) -> tuple[int, ...]:
        """Indices of the auxiliary sites, all but the central one."""
        return tuple(k for k in range(self.num_sites) if k != self.central)

    @property
    def padded_out(self) -> int:
        """Rows with padding, count."""
        return math.prod(self.out_dims)

    @property
    def padded_in(self) -> int:
        """Columns with padding, count."""
        return math.prod(self.in_dims)

    def bond_dims(self, max_bond_dim: Caps = None) -> tuple[int, ...]:
        """The bonds d_0 .. d_m, d_0 = d_m = 1.

        Args:
            max_bond_dim: At most this many on each bond, count, >= 1, or a number for each of d_1 .. d_{m-1}; None is
                full bonds, d_k = min(prod_{n<=k} o_n i_n, prod_{n>k} o_n i_n).

        Raises:
            ValueError: Not one number >= 1 for each inner bond.

        Source: MPOE (Gao et al., COLING 2022), §2.
        """
        sizes = [o * i for o, i in zip(self.out_dims, self.in_dims, strict=True)]
        total = math.prod(sizes)
        full = (min(left, total // left) for left in accumulate(sizes, mul, initial=1))
        if not isinstance(max_bond_dim, tuple):
            return tuple(min(bond, max_bond_dim or bond) for bond in full)
        if len(max_bond_dim) != self.num_sites - 1 or min(max_bond_dim, default=1) < 1:
            raise ValueError(
                f"an MPO of {self.num_sites} sites must have {self.num_sites - 1} inner bonds, each >= 1; got "
                f"{list(max_bond_dim)}"
            )
        bonds = [min(pair) for pair in zip(full, (1, *max_bond_dim, 1), strict=True)]
        # a bond is never wider than what its neighbour and the site between them can carry
        for k in range(1, self.num_sites):
            bonds[k] = min(bonds[k], bonds[k - 1] * sizes[k - 1])
        for k in range(self.num_sites - 1, 0, -1):
            bonds[k] = min(bonds[k], bonds[k + 1] * sizes[k])
        return tuple(bonds)

    def site_shapes(self, max_bond_dim: Caps = None) -> tuple[tuple[int, int, int, int], ...]:
        """The shape (d_{k-1}, o_k, i_k, d_k) of every site tensor."""
        bonds = self.bond_dims(max_bond_dim)
        return tuple(zip(bonds[:-1], self.out_dims, self.in_dims, bonds[1:], strict=True))

    def num_parameters(self, max_bond_dim: Caps = None) -> tuple[int, int]:
        """Elements of the central tensor, and of all auxiliary tensors together."""
        counts = [math.prod(shape) for shape in self.site_shapes(max_bond_dim)]
        return counts[self.central], sum(counts) - counts[self.central]


def site_dims(
    out_features: int,
    in_features: int,
    num_sites: int | None = None,
    max_auxiliary_bond: int | None = None,
) -> SiteDims:
    """Site dimensions for a matrix of any size; every site carries a piece of both sides, as in the paper.

    Args:
        out_features: Rows, count, >= 1.
        in_features: Columns, count, >= 1.
        num_sites: Sites, odd, >= 1; None is 5.
        max_auxiliary_bond: Cap on the full bonds on both sides of the central tensor, count, >= 1: how large the
            auxiliary tensors may be. None is the size of the paper's shapes.

    Returns:
        SiteDims. Sizes without useful divisors (primes) are padded by at most 1/16; sites that would be left with
        one dimension are dropped; `note` says which was done.

    Raises:
        ValueError: A size, number of sites or bond that makes no sense.
    """
    for name, value in (("out_features", out_features), ("in_features", in_features)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}")
        if value > MAX_SIZE:
            raise ValueError(f"{name} must be at most {MAX_SIZE}; got {value}")
    if max_auxiliary_bond is not None and max_auxiliary_bond < 1:
        raise ValueError(f"max_auxiliary_bond must be >= 1; got {max_auxiliary_bond}")
    num_sites = 5 if num_sites is None else num_sites
    if num_sites < 1 or num_sites % 2 == 0:
        raise ValueError(f"num_sites must be odd and >= 1; got {num_sites}")
    return _balanced(out_features, in_features, num_sites, max_auxiliary_bond)


def low_rank_dims(out_features: int, in_features: int) -> SiteDims:
    """The site dimensions at which an MPO is a plain low-rank factorisation W = A B, of r (out + in) parameters.

    The factor on the narrow side is the auxiliary tensor, the other one the central tensor. The third site, of one
    element, is there because an MPO has a middle; its bond is 1. Truncated, it is the singular value decomposition.

    Args:
        out_features: Rows, count.
        in_features: Columns, count.
    """
    if out_features < in_features:
        return SiteDims((out_features, 1, 1), (1, in_features, 1), out_features, in_features)
    return SiteDims((1, out_features, 1), (1, 1, in_features), out_features, in_features)


def _balanced(out_features: int, in_features: int, num_sites: int, max_bond: int | None) -> SiteDims:
    out_dims, in_dims = _paper_dims(out_features, in_features, num_sites) or (
        _spread(_pad(out_features), num_sites),
        _spread(_pad(in_features), num_sites),
    )
    dims = [list(out_dims), list(in_dims)]
    centre = num_sites // 2
    for side in (range(centre), range(centre + 1, num_sites)):
        _shrink(dims, side, centre, max_bond)
    notes = [_padding_note(out_features, math.prod(out_dims), in_features, math.prod(in_dims))]
    kept = [k for k in range(num_sites) if k == centre or dims[0][k] * dims[1][k] > 1]
    # As many sites on the left as on the right, so that the middle one stays the central tensor.
    arm = max(sum(k < centre for k in kept), sum(k > centre for k in kept))
    if 2 * arm + 1 < num_sites:
        notes.append(f"num_sites = {2 * arm + 1} instead of {num_sites}: the sizes have too few divisors for more")
        left, right = [k for k in kept if k < centre], [k for k in kept if k > centre]
        dims = [
            [1] * (arm - len(left)) + [d[k] for k in left] + [d[centre]] + [d[k] for k in right]
            + [1] * (arm - len(right))
            for d in dims
        ]  # fmt: skip
    note = "; ".join(filter(None, notes))
    return SiteDims(tuple(dims[0]), tuple(dims[1]), out_features, in_features, note=note)


def _paper_dims(out_features: int, in_features: int, num_sites: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if num_sites != 5:
        return None
    if dims := PAPER_DIMS.get((out_features, in_features)):
        return dims
    if dims := PAPER_DIMS.get((in_features, out_features)):
        return dims[1], dims[0]
    return None


def _pad(size: int) -> int:
    """The next size that leaves enough small divisors for the auxiliary sites once the centre has the largest prime."""
    for padded in range(size, size + int(size * MAX_PADDING) + 1):
        largest, *others = _primes(padded)
        if padded // largest >= padded**0.4 and max(others, default=1) <= padded ** (1 / 3):
            return padded
    return size


def _primes(size: int) -> list[int]:
    """Prime factors, largest first; [1] for 1."""
    primes, divisor = [], 2
    while divisor * divisor <= size:
        while size % divisor == 0:
            primes.append(divisor)
            size //= divisor
        divisor += 1 + divisor % 2  # 2, 3, 5, 7, 9, ..
    if size > 1 or not primes:
        primes.append(size)
    return primes[::-1]


def _spread(size: int, num_sites: int) -> list[int]:
    """`size` as a product of `num_sites` factors as equal as they come, the largest in the middle."""
    factors = [1] * num_sites
    for prime in sorted(_primes(size), reverse=True):
        factors[factors.index(min(factors))] *= prime
    factors.sort(reverse=True)
    centre = num_sites // 2
    # largest at the centre, then alternately to its left and right
    order = sorted(range(num_sites), key=lambda k: (abs(k - centre), k))
    dims = [1] * num_sites
    for k, factor in zip(order, factors, strict=True):
        dims[k] = factor
    return dims


def _shrink(dims: list[list[int]], side: range, centre: int, max_bond: int | None) -> None:
    """Move factors from one side's sites to the central site until the side's full bond is within its limits."""
    total = math.prod(dims[0]) * math.prod(dims[1])
    while True:
        bond = math.prod(dims[0][k] * dims[1][k] for k in side)
        if bond <= (max_bond or bond) and bond * bond <= total:
            return
        which, k = max(((w, k) for w in (0, 1) for k in side), key=lambda wk: dims[wk[0]][wk[1]])
        prime = _primes(dims[which][k])[-1]
        dims[which][k] //= prime
        dims[which][centre] *= prime


def _padding_note(out_features: int, padded_out: int, in_features: int, padded_in: int) -> str:
    notes = [
        f"{side} padded from {size} to {padded}: {size} has no divisor of a useful size"
        for side, size, padded in (("outputs", out_features, padded_out), ("inputs", in_features, padded_in))
        if padded != size
    ]
    return "; ".join(notes)
