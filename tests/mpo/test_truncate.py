"""Cut chains, and bonds given out over many matrices."""

import itertools

import pytest
import torch

from mpoe.mpo import MPO, SiteDims, decompose, low_rank_dims, site_dims, truncation_error
from mpoe.mpo.budget import Option, give_out
from mpoe.mpo.truncate import cut, cuts

THREE_SITES = SiteDims((8, 4, 1), (1, 3, 16), 32, 48)
DIMS = [
    THREE_SITES, SiteDims((4, 8, 1), (1, 4, 12), 31, 47), site_dims(32, 48),
    site_dims(24, 36, 7), low_rank_dims(32, 48), low_rank_dims(48, 32), SiteDims((9,), (7,), 9, 7),
]  # fmt: skip


def random_matrix(dims, decay=4.0):
    matrix = torch.randn(dims.out_features, dims.in_features, dtype=torch.float64)
    return matrix * torch.exp(-torch.linspace(0, decay, dims.in_features, dtype=torch.float64))


def chain_of(operator):
    return [site[None] for site in operator.sites]


def operator_of(chain, dims):
    return MPO(tuple(site[0] for site in chain), dims)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
def test_what_is_lost_is_in_the_spectrum_in_every_gauge(dims, gauge):
    operator = decompose(random_matrix(dims), dims, gauge=gauge)
    for k, of_bond in enumerate(cuts(chain_of(operator), dims), 1):
        squares = operator.spectrum(k) ** 2
        expected = torch.stack([squares[r:].sum() for r in range(1, len(squares) + 1)]) / squares.sum()
        torch.testing.assert_close(of_bond.lost, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_a_cut_chain_loses_no_more_than_predicted_and_full_bonds_nothing(dims):
    matrix = random_matrix(dims)
    chain = chain_of(decompose(matrix, dims))
    lost = [of_bond.lost for of_bond in cuts(chain, dims)]
    bonds = dims.bond_dims(tuple(max(1, bond // 2) for bond in dims.bond_dims()[1:-1]))
    smaller = operator_of(cut(chain, dims, bonds), dims)
    assert smaller.bond_dims == bonds
    bound = sum(float(of_bond[bond - 1]) for of_bond, bond in zip(lost, bonds[1:-1], strict=True)) ** 0.5
    error = truncation_error(smaller, matrix)
    assert error <= bound + 1e-9
    if sum(before != after for before, after in zip(bonds, dims.bond_dims(), strict=True)) == 1:
        assert error == pytest.approx(bound, rel=1e-6)  # a single cut is the best there is
    same = cut(chain, dims, dims.bond_dims())
    assert all(torch.equal(site, before) for site, before in zip(same, chain, strict=True))


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (30, 30)])
def test_a_low_rank_chain_is_the_singular_value_decomposition(size):
    dims, rank = low_rank_dims(*size), 7
    matrix = random_matrix(dims)
    chain = cut(chain_of(decompose(matrix, dims)), dims, dims.bond_dims((rank, rank)))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(operator_of(chain, dims).to_matrix(), u[:, :rank] * s[:rank] @ vh[:rank])
    assert sum(site.numel() for site in chain) == rank * sum(size) + 1


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_with_moments_the_outputs_are_kept(size):
    """At low rank the moments are used whole, which is the best there is: Eckart and Young for W S."""
    dims, rank = low_rank_dims(*size), 5
    matrix = torch.randn(size, dtype=torch.float64)
    root = torch.randn(size[1], size[1], dtype=torch.float64) * torch.linspace(2, 0.01, size[1], dtype=torch.float64)
    moment = root @ root.T
    moments = [moment if n == size[1] else torch.ones(1, 1, dtype=torch.float64) for n in dims.in_dims]
    chain = chain_of(decompose(matrix, dims))
    bonds = dims.bond_dims((rank, rank))
    difference = operator_of(cut(chain, dims, bonds, moments), dims).to_matrix() - matrix
    best = torch.linalg.svdvals(matrix @ root)[rank:].square().sum()
    torch.testing.assert_close((difference @ root).square().sum(), best)
    lost = cuts(chain, dims, moments)[0 if size[0] < size[1] else 1].lost
    torch.testing.assert_close(lost[rank - 1], best / (matrix @ root).square().sum())


def test_experts_are_cut_in_the_same_place():
    dims = THREE_SITES
    chain = chain_of(decompose(random_matrix(dims), dims))
    chain[0] = chain[0] + 0.01 * torch.randn(3, *chain[0].shape[1:], dtype=torch.float64)
    chain[2] = chain[2] + 0.01 * torch.randn(3, *chain[2].shape[1:], dtype=torch.float64)
    bonds = dims.bond_dims((6, 12))
    smaller = cut(chain, dims, bonds)
    assert [site.shape[0] for site in smaller] == [3, 1, 3]
    lost = [of_bond.lost for of_bond in cuts(chain, dims)]
    bound = sum(float(of_bond[bond - 1]) for of_bond, bond in zip(lost, bonds[1:-1], strict=True)) ** 0.5
    for e in range(3):
        exact = MPO((chain[0][e], chain[1][0], chain[2][e]), dims).to_matrix()
        now = MPO((smaller[0][e], smaller[1][0], smaller[2][e]), dims)
        assert truncation_error(now, exact) <= 1.1 * bound


def test_a_zero_matrix_is_cut_to_nothing():
    dims = SiteDims((3, 4, 1), (1, 3, 6), 12, 18)
    chain = chain_of(decompose(torch.zeros(12, 18), dims))
    assert all(of_bond.lost.eq(0).all() for of_bond in cuts(chain, dims))
    smaller = operator_of(cut(chain, dims, dims.bond_dims((1, 1))), dims)
    assert torch.equal(smaller.to_matrix(), torch.zeros(12, 18))


def options_of(matrices):
    return [
        [
            Option(dims, 1, tuple(of_bond.lost for of_bond in cuts(chain_of(decompose(matrix, dims)), dims)))
            for dims in (SiteDims((4, 2, 1), (1, 3, 4), 8, 12), low_rank_dims(8, 12), SiteDims((8,), (12,), 8, 12))
        ]
        for matrix in matrices
    ]


def test_the_bonds_that_are_given_out_are_about_the_best():
    """Against every combination of a low rank and the whole matrix: within what one more rank of one matrix spares."""
    options = [of[1:] for of in options_of([random_matrix(low_rank_dims(8, 12), decay) for decay in (1, 2, 6)])]
    costs = [(r * 20 + 1, float(of[0].lost[0][r - 1])) for of in options[:1] for r in range(1, 9)]
    for budget in (100, 150, 220):
        found = give_out(options, budget)
        assert sum(choice.parameters for choice in found) <= budget
        every = [[(r * 20 + 1, float(of[0].lost[0][r - 1])) for r in range(1, 9)] + [(96, 0.0)] for of in options]
        best = min(
            sum(lost for _, lost in combination)
            for combination in itertools.product(*every)
            if sum(cost for cost, _ in combination) <= budget
        )
        step = max(first[1] - second[1] for first, second in itertools.pairwise(costs))
        assert sum(choice.lost for choice in found) <= best + step


def test_a_budget_for_everything_keeps_matrices_whole_and_one_for_nothing_is_refused():
    options = options_of([random_matrix(low_rank_dims(8, 12)) for _ in range(3)])
    assert [choice.option for choice in give_out(options, 3 * 96)] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"must leave room for bonds of 1, \d+ for all parameters; got 10"):
        give_out(options, 10)


def test_auxiliary_tensors_can_have_a_budget_of_their_own():
    dims = THREE_SITES
    options = [
        [Option(dims, 8, tuple(of_bond.lost for of_bond in cuts(chain_of(decompose(random_matrix(dims), dims)), dims)))]
        for _ in range(2)
    ]
    free = give_out(options, 4000)
    limited = give_out(options, 4000, 1000)
    assert sum(choice.auxiliary for choice in free) > 1000 >= sum(choice.auxiliary for choice in limited)
    assert sum(choice.parameters for choice in limited) <= 4000
    with pytest.raises(ValueError, match="for the auxiliary tensors; got 10"):
        give_out(options, 4000, 10)


def test_caps_of_single_bonds():
    dims = site_dims(32, 48)
    full = dims.bond_dims()
    assert dims.bond_dims(tuple(full[1:-1])) == full
    assert dims.bond_dims((1, 99, 99, 99))[1:3] == (1, full[1])  # the second is no wider than what the first can carry
    for wrong in ((1, 2), (0, 1, 1, 1), (1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="must have 4 inner bonds, each >= 1"):
            dims.bond_dims(wrong)
