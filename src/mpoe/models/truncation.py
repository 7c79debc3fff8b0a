"""Every matrix of a mixture: its sites and bonds, its parameters, and what its truncation lost."""

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
from mpoe.nn import MPOExperts


@dataclass(frozen=True)
class MatrixFacts:
    """One matrix of a mixture.

    Attributes:
        name: Of its layer in the dense model.
        dims: Site dimensions.
        bonds: d_0 .. d_m.
        num_experts: E, count; 1 without a mixture.
        central: Parameters of the central tensor, count.
        auxiliary: Parameters of all experts' auxiliary tensors, count.
        error: Relative Frobenius error of the matrix, of several experts the root mean square; None where it cannot be
            known.
    """

    name: str
    dims: SiteDims
    bonds: tuple[int, ...]
    num_experts: int
    central: int
    auxiliary: int
    error: float | None

    @property
    def is_cut(self) -> bool:
        """Whether any bond is less than full."""
        return self.bonds != self.dims.bond_dims()


@torch.no_grad()
def matrix_facts(mixture: PreTrainedModel, dense: PreTrainedModel | None = None) -> list[MatrixFacts]:
    """The facts of every MPO of a mixture, in the model's order; none of experts that are whole matrices.

    Args:
        mixture: With its weights, or on the meta device.
        dense: What it was upcycled from, with its weights. Against it the matrices of a mixture with weights are
            measured; for one on the meta device the error is that which upcycling would make. None: the error is 0
            where no bond is cut and the mixture has no weights, and unknown elsewhere.
    """
    config = mpoe_config(mixture)
    if config is None:
        return []
    facts = []
    for name, place in logging.tqdm(find_matrices(empty_like(mixture), config).items(), desc="Measuring", delay=2):
        experts = mixture.get_submodule(place)
        if not isinstance(experts, MPOExperts):
            continue
        bonds = experts.dims.bond_dims(experts.max_bond_dim)
        auxiliary = sum(offset.numel() for offset in experts.offsets)
        error = _error(experts, None if dense is None else matrix_of(dense.get_submodule(name)))
        facts.append(
            MatrixFacts(name, experts.dims, bonds, experts.num_experts, experts.central.numel(), auxiliary, error)
        )
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
