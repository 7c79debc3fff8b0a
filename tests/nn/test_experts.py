import pytest
import torch

from mpoe.mpo import SiteDims, site_dims
from mpoe.nn import DenseExperts, MPOExperts, per_token

COUNTS = [[3, 0, 4], [0, 0, 5], [2, 2, 2], [1, 0, 0]]
SIZES = [(96, 64), (31, 47), (64, 96), (7, 13), (41, 9)]


def make_experts(size, gauge="identity", max_bond_dim=None, dtype=torch.float64):
    experts = MPOExperts(site_dims(*size), 3, max_bond_dim, gauge).to(dtype)
    experts.load_matrix(torch.randn(*size, dtype=dtype))
    experts.add_noise(0.3, torch.Generator().manual_seed(torch.randint(1000, ()).item()))
    return experts


def assert_same_outputs_and_gradients(experts, counts, in_features, dtype=torch.float64, **tolerance):
    x = torch.randn(sum(counts), in_features, dtype=dtype, requires_grad=True)
    fast, plain = experts(x, counts), per_token(experts, x, counts)
    torch.testing.assert_close(fast, plain, **tolerance)
    upstream = torch.randn_like(fast)
    leaves = [x, *experts.parameters()]
    gradients = (torch.autograd.grad(y, leaves, upstream, allow_unused=True) for y in (fast, plain))
    for of_fast, of_plain in zip(*gradients, strict=True):
        torch.testing.assert_close(of_fast, of_plain, **tolerance)


@pytest.mark.parametrize("max_bond_dim", [None, 6])
@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
@pytest.mark.parametrize("size", SIZES)
def test_fast_paths_agree_with_the_plain_one(size, gauge, max_bond_dim):
    experts = make_experts(size, gauge, max_bond_dim)
    for counts in COUNTS:
        assert_same_outputs_and_gradients(experts, counts, size[1])


@pytest.mark.parametrize("max_bond_dim", [None, 3])
@pytest.mark.parametrize("way", ["apply", "rebuild", "cached"])
def test_every_way_agrees_with_the_plain_one(way, max_bond_dim):
    experts = make_experts((31, 47), "identity", max_bond_dim)
    experts.way = way
    for counts in COUNTS:
        assert_same_outputs_and_gradients(experts, counts, 47)
        x = torch.randn(sum(counts), 47, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(experts(x, counts), per_token(experts, x, counts))
            torch.testing.assert_close(experts(x, torch.tensor(counts)), per_token(experts, x, counts))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, {"rtol": 1e-4, "atol": 1e-4}), (torch.bfloat16, {"rtol": 0.1, "atol": 0.3})],
)
def test_fast_paths_agree_in_lower_precision(dtype, tolerance):
    experts = make_experts((96, 64), dtype=dtype)
    assert_same_outputs_and_gradients(experts, [5, 0, 8], 64, dtype, **tolerance)


def test_dense_experts_agree_with_the_plain_path():
    experts = DenseExperts(31, 47, 3).double()
    matrix = torch.randn(31, 47, dtype=torch.float64)
    experts.load_matrix(matrix)
    assert all(torch.equal(experts.expert_matrix(e), matrix) for e in range(3))
    experts.add_noise(0.1, torch.Generator().manual_seed(0))
    assert not torch.equal(experts.expert_matrix(0), experts.expert_matrix(1))
    for counts in COUNTS:
        assert_same_outputs_and_gradients(experts, counts, 47)


def test_no_tokens():
    experts = make_experts((96, 64))
    assert experts(torch.empty(0, 64, dtype=torch.float64), [0, 0, 0]).shape == (0, 96)


@pytest.mark.parametrize("gauge", ["identity", "central", "sqrt"])
def test_every_expert_starts_as_the_matrix(gauge):
    matrix = torch.randn(96, 64, dtype=torch.float64)
    experts = MPOExperts(site_dims(96, 64), 4, None, gauge).double()
    experts.load_matrix(matrix)
    for e in range(4):
        torch.testing.assert_close(experts.expert_matrix(e), matrix)
    assert all((offset == 0).all() for offset in experts.offsets)


def test_bonds_are_those_of_the_site_dimensions():
    dims = site_dims(96, 64)
    experts = MPOExperts(dims, 2, max_bond_dim=5, gauge="central")
    experts.load_matrix(torch.randn(96, 64))
    assert experts.expert(1).bond_dims == dims.bond_dims(5)


def test_offsets_are_scaled_by_the_weights():
    """s = 0.3 · rms(identity) / rms(central): what a unit of a parameter does is relative to the weights' own scale."""
    experts = MPOExperts(SiteDims((8, 4, 1), (1, 2, 16), 32, 32), 2)
    matrix = torch.randn(32, 32)
    experts.load_matrix(matrix)
    rms = matrix.square().mean().sqrt().item()
    assert experts.scales.tolist() == pytest.approx([0.3 * 8**-0.5 / rms, 0.3 * 16**-0.5 / rms], rel=1e-5)
    experts.load_matrix(100 * matrix)
    assert experts.scales[0].item() == pytest.approx(0.3 * 8**-0.5 / rms / 100, rel=1e-5)
    experts.load_matrix(torch.zeros(32, 32))
    assert torch.isfinite(experts.scales).all()


@pytest.mark.parametrize("gauge", ["identity", "central"])
def test_noise_is_relative_to_the_start(gauge):
    experts = MPOExperts(site_dims(256, 256), 4, None, gauge)
    experts.load_matrix(torch.randn(256, 256))
    before = experts.expert(2).sites[1].detach().clone()
    experts.add_noise(0.05, torch.Generator().manual_seed(0))
    noise = experts.expert(2).sites[1].detach() - before
    assert (noise.square().mean() / before.square().mean()).sqrt().item() == pytest.approx(0.05, rel=0.1)


def test_the_central_tensor_is_one_parameter_without_an_expert_axis():
    names = {name: tuple(p.shape) for name, p in MPOExperts(site_dims(96, 64), 5).named_parameters()}
    assert names == {
        "central": (24, 4, 4, 16),
        "offsets.0": (5, 1, 2, 2, 4),
        "offsets.1": (5, 4, 3, 2, 24),
        "offsets.2": (5, 16, 2, 2, 4),
        "offsets.3": (5, 4, 2, 2, 1),
    }
