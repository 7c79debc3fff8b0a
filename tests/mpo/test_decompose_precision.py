"""What `decompose` saves work with: a Gram matrix for several sites, in blocks; float32 products; the arms' order."""

import importlib

import pytest
import torch

from mpoe.mpo import SiteDims, decompose, low_rank_dims, site_dims, truncation_bound, truncation_error

DIMS = [
    ((2, 3, 5, 3, 2), (3, 1, 4, 2, 2)),
    ((2, 2, 1, 4, 3, 2, 2), (2, 1, 3, 2, 1, 2, 1)),
    ((1, 6, 5, 2, 2), (1, 2, 4, 3, 1)),
    ((3, 4, 2, 1, 1), (2, 3, 2, 1, 1)),
    ((6, 5, 1), (1, 4, 7)),
]


def sizes(dims):
    return tuple(torch.tensor(side).prod().item() for side in dims)


def tensor_train_svd(matrix, dims, max_bond_dim, arms):
    """The matrix that is left of W after one SVD a site, from the ends towards the centre, one arm after the other."""
    m, c = len(dims[0]), len(dims[0]) // 2
    order = [n for k in range(m) for n in (k, m + k)]
    rest = matrix.reshape(*dims[0], *dims[1]).permute(order)
    shape = rest.shape
    for k in [k for arm in arms for k in {"left": range(c), "right": range(m - 1, c, -1)}[arm]]:
        rows = shape[: 2 * (k + 1 if k < c else k)].numel()
        u, s, v = torch.linalg.svd(rest.reshape(rows, -1), full_matrices=False)
        rest = u[:, :max_bond_dim] * s[:max_bond_dim] @ v[:max_bond_dim]
    return rest.reshape(shape).permute([order.index(n) for n in range(2 * m)]).reshape(matrix.shape)


@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
@pytest.mark.parametrize("max_bond_dim", [1, 2, 5, 6, 9, 14, 100])
@pytest.mark.parametrize("dims", DIMS)
def test_it_is_the_tensor_train_svd(dims, max_bond_dim, gauge):
    matrix = torch.randn(*sizes(dims), dtype=torch.float64)
    ours = decompose(matrix, dims, max_bond_dim, gauge).to_matrix()
    plain = [tensor_train_svd(matrix, dims, max_bond_dim, arms) for arms in (("left", "right"), ("right", "left"))]
    assert min((ours - other).norm() for other in plain) <= 1e-10 * matrix.norm()


@pytest.mark.parametrize(("max_bond_dim", "arms"), [(3, ("left", "right")), (7, ("right", "left"))])
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_arm_that_spares_more_work_comes_first(mirrored, max_bond_dim, arms):
    """The smaller one, unless hardly anything of it is cut."""
    dims = ((8, 4, 1), (1, 2, 16))
    if mirrored:
        dims, arms = tuple(side[::-1] for side in dims), arms[::-1]
    matrix = torch.randn(32, 32, dtype=torch.float64)
    ours = decompose(matrix, dims, max_bond_dim).to_matrix()
    torch.testing.assert_close(ours, tensor_train_svd(matrix, dims, max_bond_dim, arms))


@pytest.mark.parametrize("dims", DIMS)
def test_every_bond_of_the_sqrt_gauge_has_its_own_singular_values(dims):
    operator = decompose(torch.randn(*sizes(dims), dtype=torch.float64), dims, gauge="sqrt")
    central, m = operator.dims.central, operator.dims.num_sites
    arm = torch.ones(1, 1, dtype=torch.float64)
    for k in range(central):
        arm = torch.tensordot(arm, operator.sites[k], dims=1).reshape(-1, operator.bond_dims[k + 1])
        torch.testing.assert_close((arm**2).sum(0), operator.spectrum(k + 1))
    arm = torch.ones(1, 1, dtype=torch.float64)
    for k in range(m - 1, central, -1):
        arm = torch.tensordot(operator.sites[k], arm, dims=1).reshape(operator.bond_dims[k], -1)
        torch.testing.assert_close((arm**2).sum(1), operator.spectrum(k))


@pytest.mark.parametrize("gauge", ["central", "sqrt"])
@pytest.mark.parametrize("max_bond_dim", [None, 4])
def test_the_gram_matrix_may_come_in_blocks(max_bond_dim, gauge, monkeypatch):
    dims = DIMS[0]
    matrix = torch.randn(*sizes(dims), dtype=torch.float64)
    whole = decompose(matrix, dims, max_bond_dim, gauge)
    for elements in (1, 50, 1000):
        # not `mpoe.mpo.decompose`, which is the function
        monkeypatch.setattr(importlib.import_module("mpoe.mpo.decompose"), "GRAM_BLOCK", elements)
        torch.testing.assert_close(decompose(matrix, dims, max_bond_dim, gauge).to_matrix(), whole.to_matrix())


@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
@pytest.mark.parametrize("make_dims", [site_dims, low_rank_dims])
@pytest.mark.parametrize("kind", ["random", "low rank", "decaying"])
def test_float32_truncates_as_well_as_float64(kind, make_dims, gauge):
    dims = make_dims(192, 96)
    matrix = torch.randn(192, 96, dtype=torch.float64)
    if kind == "low rank":
        matrix = decompose(matrix, dims, 3).to_matrix()
    if kind == "decaying":
        matrix = matrix * 0.8 ** torch.arange(96)
    for max_bond_dim in (3, 12, 30):
        single, double = matrix.float(), matrix.float().double()
        error = truncation_error(decompose(single, dims, max_bond_dim, gauge), single)
        best = truncation_error(decompose(double, dims, max_bond_dim, gauge), double)
        assert error == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert error <= truncation_bound(single, dims, max_bond_dim) + 1e-6


def test_noise_of_float32_does_not_swamp_the_sqrt_gauge():
    """The central tensor of a matrix of rank one has one element that is not 0: s / (sqrt(s) * sqrt(s)) = 1.

    The others are rounding errors of float32 over singular values that are none.
    """
    matrix = torch.randn(768, 1) @ torch.randn(1, 384)
    operator = decompose(matrix, ((192, 4, 1), (1, 2, 192)), gauge="sqrt")
    assert operator.central.norm() <= 4
    assert truncation_error(operator, matrix) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_bond_dim", [None, 10])
def test_half_precision(dtype, max_bond_dim):
    matrix = torch.randn(48, 36).to(dtype)
    dims = site_dims(48, 36)
    for gauge in ("identity", "central", "sqrt"):
        operator = decompose(matrix, dims, max_bond_dim, gauge)
        assert all(site.dtype == dtype for site in operator.sites)
        single = decompose(matrix.float(), dims, max_bond_dim, gauge).to_matrix()
        rounding = 10 * torch.finfo(dtype).eps * matrix.float().norm()
        assert (operator.to_matrix().float() - single).norm() <= rounding


@pytest.mark.parametrize("dims", [((6, 5, 1), (1, 4, 7)), ((30,), (28,)), ((1, 30, 1), (1, 28, 1))])
def test_the_sites_have_their_own_memory(dims):
    matrix = torch.randn(30, 28)
    operator = decompose(matrix, dims)
    before = matrix.clone()
    matrix.zero_()
    assert torch.equal(operator.to_matrix(), before)


def test_a_matrix_without_elements():
    with pytest.raises(ValueError, match="must be >= 1"):
        decompose(torch.empty(0, 4), ((1,), (4,)))
    with pytest.raises(ValueError, match="for a matrix of 4 × 0; got some for 4 × 4"):
        decompose(torch.empty(4, 0), SiteDims((4,), (4,), 4, 4))


@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
@pytest.mark.parametrize("dims", [((9, 1, 2), (1, 1, 2)), ((1, 1, 9), (1, 2, 1)), ((3, 1, 3), (1, 1, 2))])
def test_small_singular_values_survive_a_cut_that_loses_nothing(dims, gauge):
    """An arm that is larger than the rest of the chain, of a matrix that is nearly of rank 1."""
    matrix = torch.randn(*sizes(dims), dtype=torch.float64)
    matrix = matrix[:, :1] @ matrix[:1] + 1e-9 * matrix
    assert truncation_error(decompose(matrix, dims, gauge=gauge), matrix) < 1e-14
