import math

import numpy as np
import opt_einsum
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpoe.mpo import MPO, SiteDims, machine_of, site_dims
from mpoe.mpo.contraction import apply_order, bucket, contraction_order, labels, products, right_to_left

LEFT_TO_RIGHT = ((3, 0), (4, 1), (5, 2))


def random_mpo(out_dims, in_dims, max_bond_dim, features=None):
    dims = SiteDims(out_dims, in_dims, *(features or (math.prod(out_dims), math.prod(in_dims))))
    sites = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in dims.site_shapes(max_bond_dim))
    return MPO(sites, dims)


@st.composite
def chains(draw):
    """Output and input dimensions, cap on the bonds, and rows; sizes of 1 everywhere now and then."""
    m = draw(st.sampled_from([1, 3, 5]))
    sizes = st.lists(st.integers(1, 5), min_size=m, max_size=m).map(tuple)
    return draw(sizes), draw(sizes), draw(st.sampled_from([None, 1, 2, 3, 7])), draw(st.integers(1, 40))


def einsum_of(dims, bonds, rows):
    """The network as opt_einsum takes it, without data."""
    sizes = (rows, *dims.out_dims, *dims.in_dims, *bonds[1:-1])
    operands = [
        part for names in labels(dims.num_sites) for part in (np.broadcast_to(0.0, [sizes[n] for n in names]), names)
    ]
    return [*operands, range(dims.num_sites + 1)]


@given(chains())
def test_flops_are_those_of_the_optimal_order(chain):
    out_dims, in_dims, max_bond_dim, rows = chain
    dims = SiteDims(out_dims, in_dims, math.prod(out_dims), math.prod(in_dims))
    bonds = dims.bond_dims(max_bond_dim)
    order = contraction_order(dims, bonds, rows)
    flops = sum(product.flops for product in products(dims, bonds, rows, order))
    einsum = einsum_of(dims, bonds, rows)
    assert flops == opt_einsum.contract_path(*einsum, optimize="optimal")[1].opt_cost
    assert flops == opt_einsum.contract_path(*einsum, optimize=opt_einsum.paths.ssa_to_linear(order))[1].opt_cost


@pytest.mark.parametrize("num_sites", [7, 9])
def test_long_chains_are_no_worse_than_opt_einsums_branches(num_sites):
    dims = site_dims(256, 192, num_sites=num_sites)
    bonds = dims.bond_dims(3)
    flops = sum(product.flops for product in products(dims, bonds, 5, contraction_order(dims, bonds, 5)))
    assert flops <= opt_einsum.contract_path(*einsum_of(dims, bonds, 5), optimize="branch-all")[1].opt_cost


def test_chains_too_long_to_search_have_the_plain_order():
    dims = SiteDims((2,) * 11, (1,) * 11, 2**11, 1)
    assert contraction_order(dims, dims.bond_dims(2), 3) == right_to_left(11)


@pytest.mark.parametrize("max_bond_dim", [None, 1, 3])
@pytest.mark.parametrize(
    "dims",
    [
        ((3, 2, 4), (2, 3, 2)),
        ((2, 3, 1), (1, 2, 4)),
        ((1, 5, 1), (1, 3, 1)),
        ((7,), (5,)),
        ((2, 1, 3, 2, 2), (2, 3, 2, 1, 2)),
    ],
)
def test_every_order_agrees_with_the_matrix(dims, max_bond_dim):
    operator = random_mpo(*dims, max_bond_dim)
    m = len(dims[0])
    bonds = operator.bond_dims
    orders = {right_to_left(m), *(contraction_order(operator.dims, bonds, rows) for rows in (1, 7, 10**6))}
    orders |= {apply_order(operator.dims, bonds, 7, machine_of(kind)) for kind in ("cpu", "cuda")}
    orders |= {LEFT_TO_RIGHT, ((0, 1), (4, 2), (5, 3)), ((0, 2), (1, 3), (4, 5))} if m == 3 else set()
    x = torch.randn(2, 3, operator.dims.in_features, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 3, operator.dims.out_features, dtype=torch.float64)
    expected = x @ operator.to_matrix().T
    expected_gradients = torch.autograd.grad(expected, [x, *operator.sites], gradient)
    for order in orders:
        y = operator.apply(x, order)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, [x, *operator.sites], gradient), expected_gradients)


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_own_order_with_padding_and_in_other_dtypes(rows, dtype, tolerance):
    operator = random_mpo((4, 2, 4), (4, 3, 4), 5, features=(31, 47))
    x = torch.randn(rows, 47, dtype=torch.float64)
    expected = x @ operator.to_matrix().T
    y = MPO(tuple(site.to(dtype) for site in operator.sites), operator.dims).apply(x.to(dtype))
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert rows == 0 or (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_apply_makes_nothing_of_the_size_of_the_matrix():
    dims = site_dims(3072, 768)
    for rows in (1, 100, 10**6):
        order = apply_order(dims, dims.bond_dims(), rows)
        sites = {k: 1 << k for k in range(dims.num_sites + 1)}
        for n, ((s, t), product) in enumerate(zip(order, products(dims, dims.bond_dims(), 1, order), strict=True)):
            sites[dims.num_sites + 1 + n] = merged = sites[s] | sites[t]
            assert merged >> dims.num_sites or product.rows * product.columns <= 3072 * 768 / 4


def test_many_rows_multiply_out_first_if_they_may():
    dims = site_dims(48, 36)
    assert contraction_order(dims, dims.bond_dims(), 10**6)[-1][0] == dims.num_sites


def test_copies_are_counted_where_tensordot_makes_them():
    """x (N, i_1, i_2, i_3) is a matrix for the last site, and for the middle one has its dimensions the wrong way."""
    dims = SiteDims((2, 3, 2), (3, 4, 5), 12, 60)
    last, *_ = products(dims, dims.bond_dims(), 7, right_to_left(3))
    assert last.copied == 0
    middle, *_ = products(dims, dims.bond_dims(), 7, ((3, 1), (4, 2), (5, 0)))
    assert middle.copied >= 7 * 60


def test_the_plain_order_where_rows_may_be_a_symbol(monkeypatch):
    """Not compiled here: the checks of annotations, which only tests have, cannot be."""
    operator = random_mpo((2, 3, 2), (3, 2, 4), 5)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("mpoe.mpo.operator.apply_order", None)
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(operator.apply(x), x @ operator.to_matrix().T)


@pytest.mark.parametrize("order", [(), ((2, 3), (1, 4)), ((2, 3), (2, 4), (0, 5)), ((2, 5), (1, 4), (0, 3))])
def test_steps_that_do_not_contract_everything_once(order):
    operator = random_mpo((2, 3, 2), (2, 2, 2), None)
    with pytest.raises(ValueError, match=r"must have 3 steps that use every operand once"):
        operator.apply(torch.randn(4, 8, dtype=torch.float64), order)


def test_rows_of_another_length():
    with pytest.raises(ValueError, match=r"must be in_features = 8; got \(4, 9\)"):
        random_mpo((2, 3, 2), (2, 2, 2), None).apply(torch.randn(4, 9, dtype=torch.float64))


def test_buckets_are_powers_of_sqrt_2():
    assert [bucket(count) for count in (0, 1, 2, 3, 4, 100, 1000, 1024)] == [1, 1, 2, 3, 4, 91, 1024, 1024]
    assert all(abs(math.log2(bucket(count) / count)) <= 0.26 for count in range(8, 5000))
