"""Singular values and entanglement entropies of the experts' matrices, from a model's weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from mpoe.mpo import MPO
from mpoe.mpo.operator import spectrum_entropy
from mpoe.nn import MPOExperts, UnsharedMPOExperts

KEPT_VALUES = 40  # of a spectrum


@dataclass(frozen=True)
class BondSpectrum:
    """What lies on one bond of one matrix.

    Attributes:
        matrix: The matrix's name in the model.
        bond: 1 .. m - 1; bond k lies behind site k, counted from 1.
        bond_dim: Singular values, count.
        index: Which of them are kept, from 1, about evenly on a logarithmic scale.
        values: Those of every expert, each expert's largest first, relative to the largest of the first expert.
        entropy: Of every expert, over all values, nats, at most ln(bond_dim).
    """

    matrix: str
    bond: int
    bond_dim: int
    index: list[int]
    values: list[list[float]]
    entropy: list[float]


@torch.no_grad()
def bond_spectra(model: nn.Module) -> list[BondSpectrum]:
    """The spectra of all MPOs, bond by bond, in the model's order.

    Args:
        model: Any; matrices that are no MPOs have no bonds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the factorisations are small: where cores are busy, threads only wait for each other
    try:
        return [
            _spectrum(name, bond, operators)
            for name, operators in tqdm(list(_operators(model)), desc="Singular values", delay=5, leave=False)
            for bond in range(1, operators[0].dims.num_sites)
        ]
    finally:
        torch.set_num_threads(threads)


def _operators(model: nn.Module) -> Iterator[tuple[str, list[MPO]]]:
    """Of every matrix, the experts' MPOs."""
    seen: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, UnsharedMPOExperts):
            seen.update(module.mpos)
            yield name, [mpo.expert(0) for mpo in module.mpos]
        elif isinstance(module, MPOExperts) and module not in seen:
            # a layer without experts keeps its MPO under that name
            yield name.removesuffix(".experts"), [module.expert(e) for e in range(module.num_experts)]


def _spectrum(name: str, bond: int, operators: Sequence[MPO]) -> BondSpectrum:
    spectra = [MPO(tuple(site.float() for site in mpo.sites), mpo.dims).spectrum(bond).cpu() for mpo in operators]
    size = len(spectra[0])
    index = sorted({round(math.exp(n / (KEPT_VALUES - 1) * math.log(size))) for n in range(KEPT_VALUES)})
    largest = float(spectra[0][0]) or 1.0
    kept = torch.tensor(index) - 1
    return BondSpectrum(
        matrix=name,
        bond=bond,
        bond_dim=size,
        index=index,
        values=[[float(f"{value:.4g}") for value in (values[kept] / largest).tolist()] for values in spectra],
        entropy=[spectrum_entropy(values) for values in spectra],
    )
