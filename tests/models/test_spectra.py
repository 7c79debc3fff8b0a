import math

import pytest
import torch

import mpoe
from mpoe.models import bond_spectra, mpo_experts
from tiny import moved, tiny_t5


def make_model(**options):
    of = {"num_experts": 3, "layout": "balanced", "stacks": ("encoder",), **options}
    return moved(mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(**of)))


@pytest.mark.parametrize("options", [{}, {"site_dims": {"64x32": [[4, 16, 1], [1, 8, 4]]}}])
def test_they_are_those_of_the_matrix_cut_at_the_bond(options):
    model = make_model(**options)
    found = bond_spectra(model)
    experts = mpo_experts(model)
    assert {spectrum.matrix for spectrum in found} == set(experts)
    for spectrum in found:
        of_matrix = experts[spectrum.matrix]
        dims, first = of_matrix.dims, None
        for e in range(3):
            matrix = torch.zeros(dims.padded_out, dims.padded_in)
            matrix[: dims.out_features, : dims.in_features] = of_matrix.expert_matrix(e).detach()
            pairs = matrix.reshape(*dims.out_dims, *dims.in_dims)
            left = [n for k in range(spectrum.bond) for n in (k, dims.num_sites + k)]
            right = [n for n in range(2 * dims.num_sites) if n not in left]
            rows = math.prod(pairs.shape[n] for n in left)
            values = torch.linalg.svdvals(pairs.permute(*left, *right).reshape(rows, -1))
            first = values[0] if first is None else first
            kept = torch.tensor(spectrum.index) - 1
            expected = torch.where(kept < len(values), values[kept.clamp(max=len(values) - 1)], 0) / first
            torch.testing.assert_close(torch.tensor(spectrum.values[e]), expected, atol=1e-4, rtol=2e-3)
            share = values**2 / (values**2).sum()
            assert spectrum.entropy[e] == pytest.approx(float(torch.special.entr(share).sum()), abs=1e-4)
            assert spectrum.entropy[e] <= math.log(spectrum.bond_dim) + 1e-6


def test_what_has_no_bonds():
    assert bond_spectra(tiny_t5()) == []
    assert bond_spectra(make_model(mpo_layers=())) == []
    assert bond_spectra(make_model(layout="extended")) == []


def test_experts_that_share_nothing_and_matrices_without_experts():
    found = bond_spectra(make_model(share_central=False, mpo_layers=("mlp", "attention")))
    experts = {spectrum.matrix.rpartition(".")[2]: len(spectrum.values) for spectrum in found}
    assert experts == {"up": 3, "gate": 3, "down": 3, "q": 1, "k": 1, "v": 1, "o": 1}
