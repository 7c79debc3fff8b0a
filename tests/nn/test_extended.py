"""`ExtendedExperts` against the definition: one token and one expert at a time."""

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

from mpoe.nn import Dispatch, ExtendedExperts, TopKRouter
from plain_layer import make_layer, plain_extended

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.05},
}
ACTIVATIONS = pytest.mark.parametrize("activation", [None, "gelu", "relu", "silu"])


def lora(linear):
    """A PEFT layer around a linear layer, whose B is not 0."""
    model = peft.get_peft_model(
        nn.ModuleDict({"up": linear}), peft.LoraConfig(r=2, target_modules=["up"], lora_dropout=0.5)
    )
    layer = model.base_model.model["up"]
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer.eval()


def make_base(kind, out_features, in_features, dtype=torch.float32):
    if kind == "conv1d":
        base = Conv1D(out_features, in_features)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(in_features, out_features, bias=kind != "no bias")
    base = base.to(dtype)
    if kind == "int8":
        quantize_(base, Int8WeightOnlyConfig())
    return lora(base) if kind == "lora" else base


def make_experts(kind="linear", out_features=11, in_features=7, num_experts=4, rank=3, dtype=torch.float32, **options):
    """Experts that differ."""
    base = make_base(kind, out_features, in_features, dtype)
    experts = ExtendedExperts(base, out_features, in_features, num_experts, rank, **options)
    experts.initialize(torch.Generator().manual_seed(0))
    nn.init.normal_(experts.offsets_V)
    return experts


def make_gates(tokens, num_experts, top_k=2, dtype=torch.float32):
    """Probabilities, 0 for all but the top k of every token."""
    probabilities = torch.randn(tokens, num_experts).softmax(dim=-1)
    top = probabilities.topk(top_k, dim=-1)
    return torch.zeros_like(probabilities).scatter(1, top.indices, top.values).to(dtype)


def plain(experts, x, gates, base=None):
    """The definition, in the dtype of its tensors."""
    every = torch.ones(len(x), experts.num_experts, dtype=x.dtype) if gates is None else gates
    rows = [plain_extended(experts, token, list(enumerate(of_token)), base) for token, of_token in zip(x, every)]  # noqa: B905  # a token has gates
    return torch.stack(rows)


def assert_close(found, expected, dtype):
    """Relative to the largest element: sums cancel."""
    for of_fast, of_slow in zip(found, expected, strict=True):
        scale = of_slow.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(of_fast.double() / scale, of_slow.double() / scale, **TOLERANCES[dtype])


def gradients(y, leaves, upstream):
    return torch.autograd.grad(y, leaves, upstream.to(y.dtype))


@settings(max_examples=60)
@given(
    sizes=st.tuples(*(st.integers(1, 9) for _ in range(5))),
    tokens=st.integers(0, 12),
    activation=st.sampled_from([None, "gelu", "relu", "silu"]),
    kind=st.sampled_from(["linear", "no bias", "conv1d"]),
    has_gates=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
)
def test_outputs_and_all_gradients_are_those_of_the_definition(sizes, tokens, activation, kind, has_gates, dtype):
    out_features, in_features, num_experts, rank, top_k = sizes
    experts = make_experts(kind, out_features, in_features, num_experts, rank, dtype, activation=activation)
    if dtype == torch.bfloat16:  # the same values in both
        with torch.no_grad():
            experts.offsets_U.copy_(experts.offsets_U.bfloat16())
            experts.offsets_V.copy_(experts.offsets_V.bfloat16())
            experts.scale.copy_(experts.scale.bfloat16())
    x = torch.randn(tokens, in_features, dtype=dtype, requires_grad=True)
    gates = None
    if has_gates:
        own = torch.float64 if dtype == torch.float64 else torch.float32
        gates = make_gates(tokens, num_experts, min(top_k, num_experts)).bfloat16().to(own).requires_grad_()
    y = experts(x, gates)
    assert y.dtype == dtype
    assert y.shape == (tokens, out_features)
    if not tokens:
        return

    exact = copy.deepcopy(experts).double()
    wide_x, wide_gates = (None if t is None else t.detach().double().requires_grad_() for t in (x, gates))
    if kind == "conv1d":
        slow = plain(exact, wide_x, wide_gates, lambda token: token @ exact.base.weight + exact.base.bias)
    else:
        slow = plain(exact, wide_x, wide_gates)
    assert_close([y], [slow], dtype)
    upstream = torch.randn_like(slow).to(dtype)
    given_to_fast = [x, *experts.parameters(), *([gates] if has_gates else [])]
    given_to_slow = [wide_x, *exact.parameters(), *([wide_gates] if has_gates else [])]
    if activation == "relu" and dtype == torch.bfloat16:
        return  # a rounding at 0 switches a unit off
    assert_close(gradients(y, given_to_fast, upstream), gradients(slow, given_to_slow, upstream.double()), dtype)


@ACTIVATIONS
@pytest.mark.parametrize("kind", ["int8", "lora"])
def test_any_linear_layer_may_be_the_base(kind, activation):
    experts = make_experts(kind, activation=activation)
    x = torch.randn(6, 7, requires_grad=True)
    gates = make_gates(6, 4).requires_grad_()
    y, slow = experts(x, gates), plain(experts, x, gates, lambda token: experts.base(token[None])[0])
    assert_close([y], [slow], torch.float32)
    leaves = [x, gates, *(p for p in experts.parameters() if p.requires_grad)]
    assert len(leaves) == 2 + 2 + (2 if kind == "lora" else 1)
    upstream = torch.randn_like(y)
    assert_close(gradients(y, leaves, upstream), gradients(slow, leaves, upstream), torch.float32)


@ACTIVATIONS
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "int8", "lora"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_computing_the_selected_experts_alone_is_the_same_function(kind, activation, top_k):
    experts = make_experts(kind, activation=activation)
    router = TopKRouter(7, 4, top_k, is_scale_prob=True, has_bias=False)
    router.initialize(torch.Generator().manual_seed(1))
    x = torch.randn(9, 7, requires_grad=True)
    route = router(x)
    dispatch = Dispatch.by_expert(route)
    selected = experts(x, route.weight.flatten()[dispatch.order], dispatch)
    every = experts(x, route.gates)
    torch.testing.assert_close(selected, every, rtol=1e-4, atol=1e-5)
    leaves = [x, router.weight, *(p for p in experts.parameters() if p.requires_grad)]
    upstream = torch.randn_like(every)
    found = [torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in (selected, every)]
    assert_close(*found, torch.float32)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "int8", "lora"])
def test_right_after_initialization_the_base_is_kept_and_the_experts_can_learn(kind):
    base = make_base(kind, 11, 7)
    x, tensors = torch.randn(5, 7), list(base.parameters())
    expected = base(x)
    experts = ExtendedExperts(base, 11, 7, 4, 3)
    experts.initialize(torch.Generator().manual_seed(0))
    assert experts.base is base
    for gates in (None, make_gates(5, 4)):
        torch.testing.assert_close(experts(x, gates), expected, rtol=0, atol=0)
    assert all(a is b for a, b in zip(base.parameters(), tensors, strict=True))
    torch.testing.assert_close(base(x), expected, rtol=0, atol=0)
    V_gradient, U_gradient = torch.autograd.grad(
        experts(x, make_gates(5, 4)).square().sum(), [experts.offsets_V, experts.offsets_U]
    )
    assert V_gradient.any(dim=0).sum() >= 2 * 3, "of all experts that are used"
    assert not U_gradient.any(), "V is 0"


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d", "int8"])
def test_the_scale_is_the_gain_of_the_base(kind, mode):
    """By more probes than it was measured with, without the bias."""
    base = make_base(kind, 96, 128).train(mode)
    if getattr(base, "bias", None) is not None:
        nn.init.constant_(base.bias, 50.0)
    experts = ExtendedExperts(base, 96, 128, 4, 3, expert_scale=0.7)
    experts.initialize(torch.Generator().manual_seed(0))
    z = torch.randn(10_000, 128)
    zero = torch.zeros(1, 128)
    gain = ((base(z) - base(zero)).square().mean() / z.square().mean()).sqrt().item()
    assert experts.scale.item() == pytest.approx(0.7 * gain, rel=0.03)
    assert base.training == mode


def test_the_scale_does_not_see_a_fresh_lora_adapter_nor_its_dropout():
    linear = make_base("linear", 96, 128)
    plain_base = ExtendedExperts(linear, 96, 128, 4, 3)
    plain_base.initialize(torch.Generator().manual_seed(0))
    layer = lora(linear).train()
    nn.init.zeros_(layer.lora_B["default"].weight)
    wrapped = ExtendedExperts(layer, 96, 128, 4, 3)
    wrapped.initialize(torch.Generator().manual_seed(0))
    assert wrapped.scale == plain_base.scale
    assert torch.equal(wrapped.offsets_U, plain_base.offsets_U)
    assert layer.lora_dropout["default"].training
    nn.init.normal_(layer.lora_B["default"].weight, std=5.0)
    wrapped.initialize(torch.Generator().manual_seed(0))
    z = torch.randn(10_000, 128)
    gain = (layer.eval()(z) - layer(torch.zeros(1, 128))).square().mean().sqrt().item()
    assert gain > 1.2 * plain_base.scale.item()
    assert wrapped.scale.item() == pytest.approx(gain, rel=0.03), "what a layer with an adapter does"


def test_a_base_of_zeros_has_a_scale_with_which_experts_can_learn():
    base = nn.Linear(7, 11)
    nn.init.zeros_(base.weight)
    experts = ExtendedExperts(base, 11, 7, 4, 3, expert_scale=0.5)
    experts.initialize(torch.Generator().manual_seed(0))
    assert experts.scale == 0.5


@pytest.mark.parametrize("has_gates", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "int8"])
def test_the_offset_matrix_is_what_constant_gates_add(kind, has_gates):
    experts = make_experts(kind)
    gates = torch.rand(4) if has_gates else None
    x = torch.randn(6, 7)
    expected = experts(x, gates if gates is None else gates.expand(6, 4)) - experts.base(x)
    torch.testing.assert_close(x @ experts.offset_matrix(gates).T, expected, rtol=1e-4, atol=1e-5)


def test_experts_with_an_activation_are_no_matrix():
    with pytest.raises(ValueError, match="expert_activation is 'gelu'"):
        make_experts(activation="gelu").offset_matrix()


def test_the_centre_and_the_auxiliaries_are_the_tensors_themselves():
    experts = make_experts()
    assert experts.central is experts.base.weight
    assert experts.auxiliary == {0: experts.offsets_V, 2: experts.offsets_U}
    wrapped = make_experts("lora")
    assert wrapped.central is wrapped.base.base_layer.weight
    assert make_experts("int8").central is None
    names = {name: tuple(tensor.shape) for name, tensor in experts.state_dict().items()}
    assert names == {
        "offsets_U": (12, 7), "offsets_V": (11, 12), "scale": (), "base.weight": (11, 7), "base.bias": (11,),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "conv1d", "int8"])
def test_autocast_computes_in_its_dtype(kind):
    experts = make_experts(kind)
    x, gates = torch.randn(6, 7, requires_grad=True), make_gates(6, 4).requires_grad_()
    expected = experts(x, gates)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, gates)
    assert y.dtype == torch.bfloat16
    leaves = [x, gates, experts.offsets_U, experts.offsets_V]
    upstream = torch.randn_like(expected)
    found = gradients(y, leaves, upstream)
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert_close([y, *found], [expected, *gradients(expected, leaves, upstream)], torch.bfloat16)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_a_cast_of_the_model_leaves_factors_routers_and_counters_alone(cast):
    layer = make_layer().float()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    moved = layer.to(torch.bfloat16) if cast == "to" else getattr(layer, cast)()
    half = torch.float16 if cast == "half" else torch.bfloat16
    for name, tensor in moved.state_dict().items():
        if ".base." in name:
            assert tensor.dtype == half
        else:
            assert torch.equal(tensor, before[name]), name
            assert tensor.dtype == before[name].dtype, name
    assert moved(torch.randn(4, 24, dtype=half)).dtype == half


def test_a_cast_to_double_and_back_is_float32_again():
    layer = make_layer().float()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for back in (torch.float32, torch.bfloat16):
        layer.double().to(back)
        assert {t.dtype for name, t in layer.state_dict().items() if ".base." not in name} == {torch.float32}
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items() if ".base." not in name)


def test_a_deep_copy_shares_nothing():
    experts = make_experts()
    other = copy.deepcopy(experts)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in experts.parameters())


COMPILED = """
import torch
from plain_layer import make_layer

for options in ({}, {"top_k": 2, "activation": "gelu"}, {"gated": False, "bias": "shared"}):
    for training in (True, False):
        torch._dynamo.reset()
        layer = make_layer(**options).float().train(training)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 9, 24, requires_grad=True)
        results = compiled(x), layer(x)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        upstream = torch.randn(2, 9, 24)
        leaves = [x, *layer.parameters()]
        for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in results), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    layer = make_layer(**options).bfloat16()
    x = torch.randn(9, 24, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
"""


def test_compiled_it_is_one_graph_and_the_same_function():
    # in a process of its own: the type checker that the tests hang in would break the graph
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
