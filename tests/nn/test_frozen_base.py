import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mpoe.mpo import SiteDims, site_dims
from mpoe.nn import FrozenBaseExperts, MPOExperts
from mpoe.nn.frozen_base import FrozenLinear, dense_weight, frozen_linear

COUNTS = [[3, 0, 4], [0, 0, 5], [2, 2, 2], [1, 0, 0]]
SIZES = [(96, 64), (45, 63), (64, 96), (30, 30)]
TOLERANCES = {
    torch.float64: {},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.05},
}


class CodebookLinear(nn.Module):
    """A linear layer of a library that nobody knows: codes of 8 bits, and what they mean."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.out_features, self.in_features, self.bias = out_features, in_features, None
        codes = torch.randint(256, (out_features, in_features), dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("meaning", torch.randn(256))

    def forward(self, x):
        return x @ self.meaning[self.weight.int()].T


def make_linear(size, kind="int8", dtype=torch.float32, bias=False):
    if kind == "codebook":
        return CodebookLinear(*size).to(dtype)
    linear = nn.Linear(size[1], size[0], bias=bias, dtype=dtype)
    nn.init.normal_(linear.weight)
    if kind == "int8":
        quantize_(linear, Int8WeightOnlyConfig())
    return linear


def make_experts(size, kind="int8", dtype=torch.float32, sides="both", bias="none", num_experts=3):
    dims = site_dims(*size, layout="separable", auxiliary_sides=sides)
    experts = FrozenBaseExperts(make_linear(size, kind, dtype, bias != "none"), dims, num_experts, bias=bias)
    experts.add_noise(0.3, torch.Generator().manual_seed(torch.randint(1000, ()).item()))
    return experts


def trained(experts):
    return [p for p in experts.parameters() if p.requires_grad]


def plain(experts, x, counts, left, right, bias):
    """Every token by itself, times (L ⊗ 1) W (1 ⊗ R)."""
    (_, o, _), (_, i, _) = experts.dims.out_dims, experts.dims.in_dims
    units = torch.eye(o, dtype=x.dtype), torch.eye(i, dtype=x.dtype)
    weight = dense_weight(experts.base).to(x.dtype)
    rows = []
    for e, token in zip((e for e, count in enumerate(counts) for _ in range(count)), x, strict=True):
        ends = []
        for offset, scale in zip((left[e], right[e]), experts.scales.to(x.dtype), strict=True):
            size = round(offset.numel() ** 0.5)
            ends.append(torch.eye(size, dtype=x.dtype) + scale * offset.view(size, size))
        matrix = torch.kron(ends[0], units[0]) @ weight @ torch.kron(units[1], ends[1])
        rows.append(matrix @ token + (0 if bias is None else bias[min(e, len(bias) - 1)]))
    return torch.stack(rows)


@pytest.mark.parametrize("bias", ["none", "shared", "expert"])
@pytest.mark.parametrize("sides", ["both", "narrow"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("plain", torch.float64),
        ("plain", torch.bfloat16),
        ("int8", torch.float32),
        ("int8", torch.bfloat16),
        ("codebook", torch.float32),
    ],
)
def test_outputs_and_gradients_are_those_of_the_dequantised_matrices(kind, dtype, size, sides, bias):
    if kind == "codebook" and bias != "none":
        pytest.skip("it has no bias")
    experts = make_experts(size, kind, dtype, sides, bias)
    assert len(trained(experts)) == 2 + (bias != "none")
    for counts in COUNTS:
        x = torch.randn(sum(counts), size[1], dtype=dtype, requires_grad=True)
        leaves = [x, *trained(experts)]
        wide_x, *wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        slow = plain(experts, wide_x, counts, *wide[-2:], wide[0] if bias != "none" else None)
        upstream = torch.randn_like(slow).to(dtype)
        expected = torch.autograd.grad(slow, [wide_x, *wide], upstream.double())
        for given in (counts, torch.tensor(counts)):
            y = experts(x, given)
            assert y.dtype == dtype
            found = torch.autograd.grad(y, leaves, upstream)
            scale = max(gradient.abs().max() for gradient in expected)  # a factor's is a long sum that may cancel
            torch.testing.assert_close(y.double() / slow.abs().max(), slow / slow.abs().max(), **TOLERANCES[dtype])
            for of_fast, of_slow in zip(found, expected, strict=True):
                torch.testing.assert_close(of_fast.double() / scale, of_slow / scale, **TOLERANCES[dtype])
            with torch.no_grad():
                torch.testing.assert_close(experts(x, given), y)


@pytest.mark.parametrize("sides", ["both", "narrow"])
@pytest.mark.parametrize("kind", ["int8", "plain"])
def test_it_is_the_mpo_of_the_same_matrix(kind, sides):
    """`MPOExperts` with the same offsets have the same matrices, outputs and gradients."""
    experts = make_experts((96, 64), kind, sides=sides)
    dense = MPOExperts(experts.dims, 3)
    dense.load_matrix(dense_weight(experts.base))
    torch.testing.assert_close(experts.scales, dense.scales)
    dense.offsets.load_state_dict(experts.offsets.state_dict())
    x, counts = torch.randn(9, 64), [4, 0, 5]
    results = []
    for module in (experts, dense):
        y = module(x, counts)
        results.append([module.expert_matrix(1), y, *torch.autograd.grad(y.square().sum(), list(module.offsets))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)


def test_noise_is_that_of_the_mpo_of_the_same_matrix():
    experts = FrozenBaseExperts(make_linear((96, 64)), site_dims(96, 64, layout="separable"), 3)
    dense = MPOExperts(experts.dims, 3)
    dense.load_matrix(dense_weight(experts.base))
    for module in (experts, dense):
        module.add_noise(0.1, torch.Generator().manual_seed(3))
    for offsets in zip(experts.offsets, dense.offsets, strict=True):
        torch.testing.assert_close(*offsets)


@pytest.mark.parametrize("kind", ["int8", "plain", "codebook"])
def test_every_expert_starts_as_the_base_and_the_base_is_not_copied(kind):
    linear = make_linear((96, 64), kind)
    x, weight = torch.randn(7, 64), linear.weight
    expected = linear(x).detach()
    experts = FrozenBaseExperts(linear, site_dims(96, 64, layout="separable"), 4)
    assert experts.base.weight is weight
    assert not weight.requires_grad
    assert torch.equal(experts(x, [2, 0, 4, 1]), expected)
    torch.testing.assert_close(experts.expert_matrix(3) @ x.T, expected.T)


@pytest.mark.parametrize("kind", ["shared", "expert"])
def test_the_bias_of_the_base_comes_behind_the_left_end(kind):
    linear = make_linear((96, 64), bias=True)
    x = torch.randn(7, 64)
    expected, value = linear(x).detach(), linear.bias.detach().clone()
    experts = FrozenBaseExperts(linear, site_dims(96, 64, layout="separable"), 4, bias=kind)
    torch.testing.assert_close(experts(x, [2, 0, 4, 1]), expected)
    experts.add_noise(0.3, torch.Generator().manual_seed(0))
    assert torch.equal(experts(torch.zeros(4, 64), [1, 1, 1, 1]), value.expand(4, 96))
    without = FrozenBaseExperts(make_linear((96, 64)), site_dims(96, 64, layout="separable"), 4, bias=kind)
    assert (without.bias == 0).all()


def test_no_dense_weight_is_kept_for_the_backward():
    linear = make_linear((96, 64))
    x = torch.randn(5, 64, requires_grad=True)
    kept = {}
    for name, product in (("ours", lambda: frozen_linear(linear, x)), ("torchao", lambda: linear(x))):
        sizes = kept.setdefault(name, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()), lambda _: None):
            product()
    assert kept["ours"] == []
    assert max(kept["torchao"]) == 96 * 64  # or the function is no longer needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_layer_is_the_same_function(bias, dtype):
    linear = make_linear((9, 41), dtype=dtype, bias=bias)
    x = torch.randn(2, 3, 41, dtype=dtype, requires_grad=True)
    leaves = [x, linear.bias] if bias else [x]
    before = linear(x)
    linear.__class__ = FrozenLinear
    after, upstream = linear(x), torch.randn_like(before)
    torch.testing.assert_close(after, before)
    for pair in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (after, before)), strict=True):
        torch.testing.assert_close(*pair, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x), before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["int8", "plain"])
def test_no_tokens(kind):
    experts = make_experts((96, 64), kind)
    for counts in ([0, 0, 0], torch.zeros(3, dtype=torch.long)):
        assert experts(torch.empty(0, 64), counts).shape == (0, 96)


@pytest.mark.parametrize("kind", ["int8", "plain"])
def test_autocast_computes_in_its_type(kind):
    experts = make_experts((96, 64), kind)
    x = torch.randn(9, 64, requires_grad=True)
    expected = experts(x, [4, 0, 5])
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, [4, 0, 5])
    assert y.dtype == torch.bfloat16
    scale = expected.detach().abs().max()
    torch.testing.assert_close(y.float() / scale, expected / scale, rtol=0.03, atol=0.03)
    leaves = [x, *experts.offsets]
    for found, exact in zip(*(torch.autograd.grad(o.float().sum(), leaves) for o in (y, expected)), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found / exact.abs().max(), exact / exact.abs().max(), rtol=0.05, atol=0.05)


COMPILED = """
import torch
from test_frozen_base import make_experts, trained

for kind in ("int8", "plain"):
    for bias in ("shared", "expert"):
        torch._dynamo.reset()
        experts = make_experts((96, 64), kind, bias=bias)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        x, counts = torch.randn(9, 64, requires_grad=True), torch.tensor([4, 0, 5])
        results = compiled(x, counts), experts(x, counts)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        upstream, leaves = torch.randn(9, 96), [x, *trained(experts)]
        for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in results), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
"""


def test_compiled_it_is_one_graph_and_the_same_function():
    # in a process of its own: the type checker that the tests hang in would break the graph
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_site_dimensions_that_make_no_centre_of_the_base_are_refused():
    linear = make_linear((31, 47))
    for dims, message in [
        (site_dims(31, 47, layout="separable"), r"without padding.*31x47.*\(\(.*name others in site_dims"),
        (site_dims(31, 48, layout="separable"), "31x47; got ones of 31x48"),
        (site_dims(31, 47, layout="balanced"), "must be separable"),
        (SiteDims((31, 1, 1), (1, 1, 47), 31, 47), "no larger than the rest of the chain"),
    ]:
        with pytest.raises(ValueError, match=message):
            FrozenBaseExperts(linear, dims, 2)
    dims = SiteDims((31, 1, 1), (1, 47, 1), 31, 47)
    with pytest.raises(ValueError, match="bias must be 'shared' or 'expert'"):
        FrozenBaseExperts(make_linear((31, 47), bias=True), dims, 2)
    FrozenBaseExperts(linear, dims, 2)
