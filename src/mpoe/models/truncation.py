"""Every matrix of a mixture: its parameters, its rank or its sites and bonds, and what its truncation lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from mpoe.models.find import find_matrices, matrix_of
from mpoe.models.merge import empty_like
from mpoe.models.router_loss import mpoe_config
from mpoe.mpo import SiteDims, decompose, truncation_error
from mpoe.nn import ExtendedExperts, MPOExperts


@dataclass(frozen=True)
class MatrixFacts:
    """One matrix of a mixture.

    Attributes:
        name: Of its layer in the dense model.
        out_features: Rows, count.
        in_features: Columns, count.
        num_experts: E, count; 1 without a mixture.
        central: Parameters of the central tensor, count.
        auxiliary: Parameters of all experts' auxiliary tensors, count.
        expert_rank: Of an extended matrix: the rank of each expert, count; None of an MPO.
        dims: Of an MPO: site dimensions; None of an extended matrix.
        bonds: Of an MPO: d_0 .. d_m.
        error: Of an MPO: relative Frobenius error of the matrix, of several experts the root mean square; None where it
            cannot be known.
    """

    name: str
    out_features: int
    in_features: int
    num_experts: int
    central: int
    auxiliary: int
    expert_rank: int | None = None
    dims: SiteDims | None = None
    bonds: tuple[int, ...] = ()
    error: float | None = None

    @property
    def is_cut(self) -> bool:
        """Whether any bond is less than full."""
        return self.dims is not None and self.bonds != self.dims.bond_dims()


@torch.no_grad()
def matrix_facts(mixture: PreTrainedModel, dense: PreTrainedModel | None = None) -> list[MatrixFacts]:
    """The facts of every matrix that experts share, in the model's order; none of experts that are whole matrices.

    Args:
        mixture: With its weights, or on the meta device.
        dense: What it was upcycled from, with its weights. Against it the matrices of a mixture with weights are
            measured; for one on the meta device the error is that which upcycling would make. None: the error is 0
            where no bond is cut and the mixture has no weights, and unknown elsewhere. Extended matrices have no error.
    """
    config = mpoe_config(mixture)
    if config is None:
        return []
    facts = []
    for name, place in logging.tqdm(find_matrices(empty_like(mixture), config).items(), desc="Measuring", delay=2):
        experts = mixture.get_submodule(place)
        if not isinstance(experts, MPOExperts | ExtendedExperts):
            continue
        size = experts.out_features, experts.in_features
        central = math.prod(size) if experts.central is None else experts.central.numel()  # None: quantised
        counts = experts.num_experts, central, sum(own.numel() for own in experts.auxiliary.values())
        if isinstance(experts, ExtendedExperts):
            facts.append(MatrixFacts(name, *size, *counts, expert_rank=experts.rank))
        else:
            bonds = experts.dims.bond_dims(experts.max_bond_dim)
            error = _error(experts, None if dense is None else matrix_of(dense.get_submodule(name)))
            facts.append(MatrixFacts(name, *size, *counts, dims=experts.dims, bonds=bonds, error=error))
    return facts


def _error(experts: MPOExperts, matrix: Tensor | None) -> float | None:
    is_empty = experts.central.is_meta
    if is_empty and experts.dims.bond_dims(experts.max_bond_dim) == experts.dims.bond_dims():
        return 0.0
    if matrix is None:
        return None
    if is_empty:
        operator = decompose(matrix, experts.dims, experts.max_bond_dim, experts.gauge)
        return truncation_error(operator, cast(Tensor, matrix))
    errors = [truncation_error(experts.expert(e), matrix) for e in range(experts.num_experts)]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))
