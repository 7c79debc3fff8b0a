"""`MPO`: a matrix as a chain of site tensors, multiplied out, applied, measured.

Shape letters: a, b bonds; o, i output and input dimensions of one site; N rows of a batch; p, q products of dimensions
not yet or already contracted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mpoe.mpo.contraction import Labels, Order, apply_order, check_order, labels, result_labels, right_to_left
from mpoe.mpo.machine import machine_of
from mpoe.mpo.sites import SiteDims


@dataclass(frozen=True)
class MPO:
    """A matrix product operator W (out_features × in_features).

    Attributes:
        sites: The site tensors, site k of shape (d_{k-1}, o_k, i_k, d_k).
        dims: The site dimensions.

    Source: MPOE (Gao et al., COLING 2022), §2.
    """

    sites: tuple[Tensor, ...]
    dims: SiteDims

    def __post_init__(self) -> None:
        expected = tuple(zip(self.dims.out_dims, self.dims.in_dims, strict=True))
        got = tuple(tuple(site.shape) for site in self.sites)
        bonds = [1, *(shape[-1] for shape in got[:-1]), 1]
        if got != tuple((a, o, i, b) for (o, i), a, b in zip(expected, bonds[:-1], bonds[1:], strict=True)):
            raise ValueError(
                f"site tensors must have shapes (d_(k-1), o_k, i_k, d_k) with (o_k, i_k) = {expected}, equal bonds "
                f"between neighbours and 1 at both ends; got {got}"
            )

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """The bonds d_0 .. d_m."""
        return (1, *(site.shape[-1] for site in self.sites))

    @property
    def central(self) -> Tensor:
        """The central tensor."""
        return self.sites[self.dims.central]

    @property
    def auxiliary(self) -> tuple[Tensor, ...]:
        """The auxiliary tensors, in order."""
        return tuple(self.sites[k] for k in self.dims.auxiliary)

    @property
    def num_parameters(self) -> int:
        """Elements of all site tensors."""
        return sum(site.numel() for site in self.sites)

    def to_matrix(self) -> Float[Tensor, "out_features in_features"]:
        """Multiply the chain out.

        Both arms are contracted before the central tensor, which is by far the largest. Padding is cut off.
        """
        c = self.dims.central
        a, o, i, b = self.central.shape
        left_pa = _contract_arm(self.sites[:c], self._unit(1)).reshape(-1, a)
        right_bp = _contract_arm(self.sites[c + 1 :], self._unit(b)).reshape(b, -1)
        chain = left_pa @ self.central.reshape(a, o * i * b)
        chain = chain.reshape(-1, b) @ right_bp
        pairs = [n for pair in zip(self.dims.out_dims, self.dims.in_dims, strict=True) for n in pair]
        m = self.dims.num_sites
        # (o_1, i_1, .., o_m, i_m) -> (o_1, .., o_m, i_1, .., i_m)
        matrix = chain.reshape(pairs).permute([*range(0, 2 * m, 2), *range(1, 2 * m, 2)])
        matrix = matrix.reshape(self.dims.padded_out, self.dims.padded_in)
        return matrix[: self.dims.out_features, : self.dims.in_features]

    def apply(
        self, x: Float[Tensor, "... in_features"], order: Order | None = None
    ) -> Float[Tensor, "... out_features"]:
        """W x for every row of x, contracted with the site tensors two operands at a time.

        Args:
            x: Rows.
            order: Steps, see `mpoe.mpo.contraction`; `right_to_left(num_sites)` is the plain one. None is the fastest
                for about so many rows that makes nothing of the size of W, by the constants of the device; the plain
                one under `torch.compile`.

        Raises:
            ValueError: Rows of another length, or steps that do not contract every operand once.
        """
        if x.shape[-1] != self.dims.in_features:
            raise ValueError(f"last dimension of x must be in_features = {self.dims.in_features}; got {tuple(x.shape)}")
        m, rows = self.dims.num_sites, math.prod(x.shape[:-1])
        if order is None:
            # under torch.compile rows may be a symbol, for which no order is the fastest
            order = (
                right_to_left(m)
                if torch.compiler.is_compiling()
                else apply_order(self.dims, self.bond_dims, rows, machine_of(x.device.type))
            )
        check_order(order, m)
        padding = self.dims.padded_in - self.dims.in_features
        x_Ni = torch.nn.functional.pad(x, (0, padding)).reshape(rows, *self.dims.in_dims)
        # without the bonds of size 1 at both ends
        sites = [site.reshape(site.shape[k == 0 : 4 - (k == m - 1)]) for k, site in enumerate(self.sites)]
        operands = dict(enumerate(zip([*sites, x_Ni], labels(m), strict=True)))
        for n, (s, t) in enumerate(order):
            operands[m + 1 + n] = _contract_pair(*operands.pop(s), *operands.pop(t))  # what is used up is let go
        ((y, names),) = operands.values()
        y = y.permute([names.index(label) for label in range(m + 1)])
        return y.reshape(*x.shape[:-1], self.dims.padded_out)[..., : self.dims.out_features]

    def spectrum(self, bond: int) -> Float[Tensor, " b"]:
        """The singular values of the operator across one bond, largest first.

        Args:
            bond: 1 .. m - 1; bond k lies behind site k, counted from 1.
        """
        if not 1 <= bond < self.dims.num_sites:
            raise ValueError(f"bond must be in 1..{self.dims.num_sites - 1}; got {bond}")
        left_ab = self._unit(1)
        for site in self.sites[:bond]:
            merged = torch.tensordot(left_ab, site, dims=1)
            left_ab = torch.linalg.qr(merged.reshape(-1, site.shape[-1])).R
        right_ba = self._unit(1)
        for site in reversed(self.sites[bond:]):
            merged = torch.tensordot(site, right_ba.T, dims=1)
            right_ba = torch.linalg.qr(merged.reshape(site.shape[0], -1).T).R
        return torch.linalg.svdvals(left_ab @ right_ba.T)

    def entropy(self, bond: int) -> float:
        """The entanglement entropy across one bond, -sum p ln p with p = s² / sum s², in nats; 0 for a zero matrix."""
        return spectrum_entropy(self.spectrum(bond))

    def norm(self) -> float:
        """The Frobenius norm of the matrix (padding included, which is zero after `decompose`)."""
        if self.dims.num_sites == 1:
            return float(self.central.norm())
        return float(self.spectrum(1).norm())

    def _unit(self, size: int) -> Tensor:
        return torch.eye(size, dtype=self.central.dtype, device=self.central.device)


def spectrum_entropy(singular_values: Float[Tensor, " b"]) -> float:
    """The entropy of singular values, -sum p ln p with p = s² / sum s², in nats; 0 if all are zero.

    Args:
        singular_values: In any order.
    """
    squares = singular_values.double() ** 2
    total = squares.sum()
    return float(torch.special.entr(squares / total).sum()) if total else 0.0


def _contract_arm(sites: Sequence[Tensor], open_bond: Tensor) -> Tensor:
    """The sites of one arm multiplied onto `open_bond`, a unit matrix; the caller knows the shape of the result."""
    chain = open_bond
    for site in sites:
        chain = chain.reshape(-1, site.shape[0]) @ site.reshape(site.shape[0], -1)
    return chain


def _contract_pair(s: Tensor, s_labels: Labels, t: Tensor, t_labels: Labels) -> tuple[Tensor, Labels]:
    """Two operands summed over the indices that both have, and the labels of the result."""
    larger = s_labels if s.numel() > t.numel() else t_labels  # in whose order nothing large has to be copied
    shared = [label for label in larger if label in s_labels and label in t_labels]
    axes = [s_labels.index(label) for label in shared], [t_labels.index(label) for label in shared]
    result = torch.tensordot(s, t, dims=axes)  # pyright: ignore[reportArgumentType]  (typed by its default, an int)
    return result, result_labels(s_labels, t_labels)
