import itertools

import jaxtyping
import numpy as np
import opt_einsum
import pytest
import tensorly
import torch
from tensorly.decomposition import tensor_train_matrix

from mpoe.mpo import MPO, SiteDims, decompose, low_rank_dims, site_dims, truncation_bound, truncation_error

GAUGES = ("identity", "central", "sqrt")
LAYOUTS = {"balanced": site_dims, "low_rank": low_rank_dims}
SIZES = [(96, 64), (31, 47), (64, 96), (1, 97), (97, 1), (1, 1), (12, 200), (7, 13)]
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def matrices(out_features, in_features, dtype):
    yield "random", torch.randn(out_features, in_features, dtype=dtype)
    yield "zero", torch.zeros(out_features, in_features, dtype=dtype)
    yield "rank one", torch.randn(out_features, 1, dtype=dtype) @ torch.randn(1, in_features, dtype=dtype)
    yield "decaying", torch.randn(out_features, in_features, dtype=dtype) / torch.arange(1, in_features + 1)


def einsum_oracle(operator):
    """The chain written as one einsum over all indices and contracted by opt_einsum."""
    m = len(operator.sites)
    terms = [("b", k) for k in range(m + 1)]
    operands = []
    for k, site in enumerate(operator.sites):
        operands += [site, [terms[k], ("o", k), ("i", k), terms[k + 1]]]
    output = [terms[0], *(("o", k) for k in range(m)), *(("i", k) for k in range(m)), terms[m]]
    matrix = opt_einsum.contract(*operands, output)
    dims = operator.dims
    return matrix.reshape(dims.padded_out, dims.padded_in)[: dims.out_features, : dims.in_features]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_full_bonds_are_exact(size, layout, gauge, dtype):
    for kind, matrix in matrices(*size, dtype):
        operator = decompose(matrix, LAYOUTS[layout](*size), gauge=gauge)
        assert operator.bond_dims == operator.dims.bond_dims()
        assert all(torch.isfinite(site).all() for site in operator.sites), kind
        assert truncation_error(operator, matrix) <= EXACT[dtype], kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_bonds_are_exact_at_t5_base_size(dtype):
    matrix = torch.randn(3072, 768, dtype=dtype)
    for layout, gauge in itertools.product(LAYOUTS, GAUGES):
        operator = decompose(matrix, LAYOUTS[layout](3072, 768), gauge=gauge)
        assert truncation_error(operator, matrix) <= EXACT[dtype]


def test_identity_gauge_is_the_matrix_itself():
    matrix = torch.randn(96, 64)
    operator = decompose(matrix, ((6, 16, 1), (1, 2, 32)))
    assert torch.equal(operator.central.reshape(96, 64), matrix)
    for end in operator.auxiliary:
        assert torch.equal(end.flatten(), torch.eye(int(end.numel() ** 0.5)).flatten())


@pytest.mark.parametrize("max_bond_dim", [None, 3])
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("dims", [((2, 3, 4), (3, 2, 2)), ((3, 2, 2, 2, 1), (1, 2, 3, 1, 2)), ((4, 6, 1), (1, 2, 5))])
def test_to_matrix_and_apply_agree_with_opt_einsum(dims, gauge, max_bond_dim):
    sizes = [int(np.prod(side)) for side in dims]
    operator = decompose(torch.randn(*sizes, dtype=torch.float64), dims, max_bond_dim, gauge)
    oracle = einsum_oracle(operator)
    torch.testing.assert_close(operator.to_matrix(), oracle)
    x = torch.randn(2, 5, sizes[1], dtype=torch.float64)
    torch.testing.assert_close(operator.apply(x), x @ oracle.T)


@pytest.mark.parametrize("size", [(31, 47), (11, 97)])
def test_padding_is_never_seen(size):
    matrix = torch.randn(*size, dtype=torch.float64)
    dims = SiteDims(((4, 2, 4), (4, 3, 1))[size[0] == 11], ((4, 3, 4), (1, 7, 14))[size[0] == 11], *size)
    operator = decompose(matrix, dims)
    torch.testing.assert_close(operator.to_matrix(), matrix)
    x = torch.randn(3, size[1], dtype=torch.float64)
    torch.testing.assert_close(operator.apply(x), x @ matrix.T)


@pytest.mark.parametrize("max_bond_dim", [1, 2, 3, 5, 8, 13])
def test_truncation_agrees_with_tensorly(max_bond_dim):
    """Tensorly truncates left to right and we towards the centre: the errors are alike, the exact case is equal."""
    out_dims, in_dims = (2, 3, 4), (3, 2, 4)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(24, 24)) @ np.diag(0.7 ** np.arange(24))
    tensorly.set_backend("numpy")  # tensorly-torch, where it is installed, sets another one
    tensor = tensorly.tensor(matrix.reshape(*out_dims, *in_dims))
    theirs = tensor_train_matrix(tensor, [1, max_bond_dim, max_bond_dim, 1]).to_matrix()
    operator = decompose(torch.from_numpy(matrix), (out_dims, in_dims), max_bond_dim)
    ours = truncation_error(operator, torch.from_numpy(matrix))
    assert ours == pytest.approx(np.linalg.norm(theirs - matrix) / np.linalg.norm(matrix), rel=0.05, abs=1e-12)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(96, 64), (31, 47), (12, 200)])
def test_truncation_is_within_its_bound_and_monotone(size, layout, gauge):
    dims = LAYOUTS[layout](*size)
    for kind, matrix in matrices(*size, torch.float64):
        errors = []
        for max_bond_dim in (1, 2, 3, 5, 8, 13, 21, 34):
            operator = decompose(matrix, dims, max_bond_dim, gauge)
            assert operator.bond_dims == dims.bond_dims(max_bond_dim)
            errors.append(truncation_error(operator, matrix))
            assert errors[-1] <= truncation_bound(matrix, dims, max_bond_dim) * (1 + 1e-9) + 1e-7, kind
        assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors)), (kind, errors)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("max_bond_dim", [1, 4, 9])
def test_two_sites_are_as_good_as_svd(gauge, max_bond_dim):
    """With one trivial site the chain has one bond, and the best matrix of that rank is known."""
    matrix = torch.randn(24, 40, dtype=torch.float64)
    dims = SiteDims((24, 1, 1), (1, 40, 1), 24, 40)
    singular_values = torch.linalg.svdvals(matrix)
    best = singular_values[max_bond_dim:].norm() / singular_values.norm()
    assert truncation_error(decompose(matrix, dims, max_bond_dim, gauge), matrix) == pytest.approx(
        best.item(), rel=1e-9
    )


def test_gauges_are_what_they_say():
    matrix = torch.randn(48, 36, dtype=torch.float64)
    dims = site_dims(48, 36)
    central = decompose(matrix, dims, gauge="central")
    for k in range(dims.central):
        left = central.sites[k].reshape(-1, central.bond_dims[k + 1])
        torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))
        right = central.sites[-1 - k].reshape(central.bond_dims[-2 - k], -1)
        torch.testing.assert_close(right @ right.T, torch.eye(right.shape[0], dtype=torch.float64))
    assert central.central.norm().item() == pytest.approx(matrix.norm().item())
    shared = decompose(matrix, dims, gauge="sqrt")
    first = shared.sites[0].reshape(-1, shared.bond_dims[1])
    torch.testing.assert_close((first**2).sum(0), shared.spectrum(1))


def test_spectrum_entropy_and_norm():
    matrix = torch.randn(24, 40, dtype=torch.float64)
    dims = SiteDims((4, 3, 2), (5, 2, 4), 24, 40)
    for gauge in GAUGES:
        operator = decompose(matrix, dims, gauge=gauge)
        unfolded = matrix.reshape(4, 6, 5, 8).permute(0, 2, 1, 3).reshape(20, 48)
        expected = torch.linalg.svdvals(unfolded)
        torch.testing.assert_close(operator.spectrum(1), expected)
        p = expected**2 / (expected**2).sum()
        assert operator.entropy(1) == pytest.approx(-(p * p.log()).sum().item())
        assert operator.norm() == pytest.approx(matrix.norm().item())
    assert decompose(torch.zeros(24, 40), dims).entropy(1) == 0
    product = torch.kron(torch.randn(4, 5), torch.randn(6, 8))
    assert decompose(product, dims).entropy(1) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match=r"bond must be in 1\.\.2; got 3"):
        operator.spectrum(3)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "must be finite"),
        (torch.tensor([[1.0, float("inf")]]), "must be finite"),
        (torch.ones(2, 2, dtype=torch.int64), "floating-point"),
    ],
)
def test_bad_matrices(matrix, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who have no checker before us
    with pytest.raises(ValueError, match=message):
        decompose(matrix, site_dims(*matrix.shape))


def test_bad_arguments():
    matrix = torch.randn(8, 8)
    with pytest.raises(ValueError, match="gauge must be"):
        decompose(matrix, site_dims(8, 8), gauge="left")
    with pytest.raises(ValueError, match="max_bond_dim must be >= 1; got 0"):
        decompose(matrix, site_dims(8, 8), max_bond_dim=0)
    with pytest.raises(ValueError, match="for a matrix of 8 × 8; got some for 8 × 4"):
        decompose(matrix, site_dims(8, 4))
    with pytest.raises(ValueError, match="must be a pair"):
        decompose(matrix, [[2, 2, 2]])
    with pytest.raises(ValueError, match="site tensors must have shapes"):
        MPO((torch.ones(1, 8, 8, 2),), SiteDims((8,), (8,), 8, 8))
