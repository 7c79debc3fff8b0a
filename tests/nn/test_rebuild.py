"""Every fast way to multiply out against `MPO.to_matrix` and plain autograd."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mpoe.mpo import MPO, SiteDims, site_dims
from mpoe.nn.rebuild import Rebuild, multiply_out, rebuilt_linear

SIZES = [(96, 64), (64, 96), (31, 47), (7, 13), (41, 9), (1, 1)]
RIGHT_FIRST = SiteDims((4, 4, 2, 1, 2), (4, 2, 2, 1, 2), 64, 32)
COUNTS = [3, 0, 4]


def make_sites(dims, max_bond_dim=None, num_experts=3, dtype=torch.float64):
    """A central tensor, stacks, and the experts' MPOs of the same tensors."""
    shapes = dims.site_shapes(max_bond_dim)
    central = torch.randn(shapes[dims.central], dtype=dtype, requires_grad=True)
    auxiliary = [torch.randn(num_experts, *shapes[k], dtype=dtype, requires_grad=True) for k in dims.auxiliary]
    c = dims.central
    experts = [
        MPO((*(t[e] for t in auxiliary[:c]), central, *(t[e] for t in auxiliary[c:])), dims) for e in range(num_experts)
    ]
    return central, auxiliary, experts


def plain_linear(x, counts, experts):
    return torch.cat([x_e @ expert.to_matrix().T for x_e, expert in zip(x.split(counts), experts, strict=True)])


def assert_same_gradients(fast, plain, leaves, **tolerance):
    upstream = torch.randn_like(fast)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    for of_fast, of_plain in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(of_fast, of_plain, **tolerance)


@pytest.mark.parametrize("save", ["nothing", "one matrix", "everything"])
@pytest.mark.parametrize("max_bond_dim", [None, 6, 1])
@pytest.mark.parametrize("num_sites", [1, 3, 5, 7])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_plain_product(size, num_sites, max_bond_dim, save):
    dims = site_dims(*size, num_sites)
    central, auxiliary, experts = make_sites(dims, max_bond_dim)
    x = torch.randn(sum(COUNTS), size[1], dtype=torch.float64, requires_grad=True)
    save_bytes = {"nothing": 0, "one matrix": 8 * dims.padded_out * dims.padded_in, "everything": 2**30}[save]
    fast = rebuilt_linear(x, COUNTS, central, auxiliary, dims, save_bytes)
    plain = plain_linear(x, COUNTS, experts)
    torch.testing.assert_close(fast, plain)
    assert_same_gradients(fast, plain, [x, central, *auxiliary])


@pytest.mark.parametrize("save_bytes", [0, 2**30])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("dims", [site_dims(31, 47, 3), RIGHT_FIRST], ids=["left first", "right first"])
def test_only_gradients_that_are_needed(dims, needs, save_bytes):
    """Of x, of the central tensor, of the first and of the last auxiliary site."""
    central, auxiliary, experts = make_sites(dims, 6)
    x = torch.randn(sum(COUNTS), dims.in_features, dtype=torch.float64)
    leaves = [x, central, auxiliary[0], auxiliary[-1]]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    for middle in auxiliary[1:-1]:
        middle.requires_grad_(False)
    fast = rebuilt_linear(x, COUNTS, central, auxiliary, dims, save_bytes)
    plain = plain_linear(x, COUNTS, experts)
    torch.testing.assert_close(fast, plain)
    assert fast.requires_grad == any(needs)
    if any(needs):
        assert_same_gradients(fast, plain, leaves)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, {"rtol": 1e-4, "atol": 1e-4}), (torch.bfloat16, {"rtol": 0.05, "atol": 0.02})],
)
def test_lower_precision(dtype, tolerance):
    dims = site_dims(96, 64)
    central, auxiliary, _ = make_sites(dims)
    # of the size of a trained layer's, so that outputs and gradients are about 1
    tensors = [(t / t[..., :1, :1, :1].numel() ** 0.5 / t.shape[-4] ** 0.5).detach() for t in [central, *auxiliary]]
    x = torch.randn(sum(COUNTS), 64, dtype=torch.float64)
    results = []
    for of in (torch.float64, dtype):
        low_x, low_central, *low_auxiliary = (t.to(dtype).to(of).requires_grad_() for t in [x, *tensors])
        y = rebuilt_linear(low_x, COUNTS, low_central, low_auxiliary, dims)
        assert y.dtype == of
        results.append([y, *torch.autograd.grad(y.square().sum() / y.numel(), [low_x, low_central, *low_auxiliary])])
    for exact, low in zip(*results, strict=True):
        scale = exact.abs().max()
        torch.testing.assert_close(low.double() / scale, exact / scale, **tolerance)


def test_matrices_without_a_graph():
    dims = site_dims(31, 47)
    central, auxiliary, experts = make_sites(dims)
    matrices = list(multiply_out(central, auxiliary, dims))
    assert not any(matrix.requires_grad for matrix in matrices)
    for matrix, expert in zip(matrices, experts, strict=True):  # each has memory of its own
        torch.testing.assert_close(matrix, expert.to_matrix())


def test_no_rows_and_rows_in_any_memory_order():
    dims = site_dims(96, 64)
    central, auxiliary, experts = make_sites(dims)
    empty = rebuilt_linear(torch.empty(0, 64, dtype=torch.float64), [0, 0, 0], central, auxiliary, dims)
    assert empty.shape == (0, 96)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(empty.sum(), [central, *auxiliary]))
    x = torch.randn(64, sum(COUNTS), dtype=torch.float64).T.requires_grad_()
    fast = rebuilt_linear(x, COUNTS, central, auxiliary, dims).sum()  # its gradient is one number, expanded
    plain = plain_linear(x, COUNTS, experts).sum()
    assert_same_gradients(fast, plain, [x, central, *auxiliary])
    transposed = rebuilt_linear(x, COUNTS, central.transpose(1, 2).contiguous().transpose(1, 2), auxiliary, dims)
    torch.testing.assert_close(transposed.sum(), plain)


def test_what_is_kept_for_the_backward_stays_within_the_budget():
    dims, counts = site_dims(96, 64), [2, 2, 2]
    central, auxiliary, _ = make_sites(dims)
    x = torch.randn(6, 64, dtype=torch.float64, requires_grad=True)
    arguments = sum(t.nbytes for t in (x, central, *auxiliary))

    def kept(save_bytes):
        saved = {}
        hooks = (lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = rebuilt_linear(x, counts, central, auxiliary, dims, save_bytes)
        y.sum().backward()
        return sum(t.nbytes for t in saved.values()) - arguments

    matrix = 96 * 64 * 8  # at full bonds an intermediate result is as large
    for share, expected in [(0, 0), (0.99, 0), (1, 1), (2.5, 2), (4, 4), (99, 6)]:
        assert kept(int(share * matrix)) == expected * matrix
    with torch.no_grad():
        assert not rebuilt_linear(x, counts, central, auxiliary, dims, 2**30).requires_grad


@pytest.mark.parametrize(
    ("dims", "right_first"), [(SiteDims((2, 4, 4), (2, 2, 4), 32, 16), False), (RIGHT_FIRST, True)]
)
def test_the_cheaper_order_is_taken(dims, right_first):
    """FLOPs as PyTorch counts them: 2 per multiply-add, of the two large products and of the arms."""
    central, auxiliary, _ = make_sites(dims, 6, num_experts=1)
    with FlopCounterMode(display=False) as counter:
        list(multiply_out(central, auxiliary, dims))
    a, o, i, b = central.shape
    c = dims.central
    p, q = (
        torch.tensor([*dims.out_dims[arm], *dims.in_dims[arm]]).prod().item()
        for arm in (slice(0, c), slice(c + 1, None))
    )
    left, right = 2 * p * o * i * b * (a + q), 2 * a * o * i * q * (b + p)
    assert (right < left) == right_first
    with FlopCounterMode(display=False) as of_arms:
        Rebuild(central, auxiliary, dims, 1)
    assert counter.get_total_flops() - of_arms.get_total_flops() == min(left, right)
