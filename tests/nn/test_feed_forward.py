import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpoe.mpo import site_dims
from mpoe.nn import MoEFeedForward, MPOExperts
from plain_layer import by_hand, make_layer


@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"is_scale_prob": True},
        {"top_k": 2},
        {"top_k": 3, "second_policy_train": "threshold", "second_threshold": 0.3},
        {"capacity_factor": 0.5},
        {"top_k": 2, "capacity_factor": 0.5, "is_scale_prob": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", ["none", "shared", "expert"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("experts", ["extended", "balanced", "dense"])
def test_layer_agrees_with_a_loop_over_tokens(experts, gated, bias, routing):
    layer = make_layer(experts, gated, bias=bias, **routing)
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    fast, plain = layer(x), by_hand(layer, x)
    # the router works in float32
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(fast)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_a_router_the_one_expert_gets_everything():
    matrices = torch.randn(40, 24), torch.randn(24, 40)
    up, down = (MPOExperts(site_dims(*matrix.shape), 1) for matrix in matrices)
    for experts, matrix in zip((up, down), matrices, strict=True):
        experts.load_matrix(matrix)
    layer = MoEFeedForward(None, up, down, torch.nn.functional.silu)
    x = torch.randn(2, 7, 24)
    expected = torch.nn.functional.silu(x @ matrices[0].T) @ matrices[1].T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.reset_usage()
    layer(x)
    assert layer.usage is None


def test_without_a_router_every_extended_expert_has_a_gate_of_one():
    layer = make_layer(bias="shared")
    layer.router = None
    x = torch.randn(2, 7, 24, dtype=torch.float64)

    def linear(experts, h):
        matrix = experts.base.weight + experts.scale * experts.offsets_V @ experts.offsets_U
        return h @ matrix.T + experts.base.bias

    expected = linear(layer.down, layer.activation(linear(layer.gate, x)) * linear(layer.up, x))
    torch.testing.assert_close(layer(x), expected)


def test_dropout_is_between_activation_and_down():
    layer = make_layer(gated=False, dropout=1.0)
    x = torch.randn(4, 24, dtype=torch.float64)
    assert (layer(x) == 0).all()
    assert not (layer.eval()(x) == 0).any()


def test_usage_is_counted_and_reset():
    layer = make_layer()
    x = torch.randn(5, 24, dtype=torch.float64)
    layer(x)
    assert layer.usage is None, "nobody has asked for it"
    layer.reset_usage()
    layer(x), layer(x)
    assert layer.usage.tokens == 10
    assert torch.equal(layer.usage.tokens_per_expert, 2 * layer.router(x).tokens_per_expert)
    torch.testing.assert_close(layer.usage.gate, 2 * layer.router(x).gates.sum(dim=0))
    layer.reset_usage()
    assert layer.usage.tokens == 0


@pytest.mark.parametrize("has_loss", [True, False])
def test_only_a_training_forward_whose_loss_is_wanted_keeps_its_graph(has_loss):
    layer, x = make_layer(has_loss=has_loss), torch.randn(5, 24, dtype=torch.float64)
    layer.eval()(x)
    assert layer.router_output is None
    layer.train()(x)
    assert (layer.router_output is not None) == has_loss


def test_a_loss_that_nobody_takes_is_said():
    layer, x = make_layer(has_loss=True), torch.randn(5, 24, dtype=torch.float64)
    layer(x)
    with pytest.warns(UserWarning, match="load-balancing loss of a training forward was not used"):
        layer(x)
    layer.router_output = None
    layer(x)


def test_empty_batch():
    assert make_layer()(torch.empty(0, 24, dtype=torch.float64)).shape == (0, 24)


def test_autocast_runs_and_is_close():
    layer = make_layer().float()
    x = torch.randn(9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


COMPILED = """
import torch
from plain_layer import make_layer

for experts in ("extended", "balanced", "dense"):
    for routing in ({}, {"top_k": 2}, {"top_k": 2, "capacity_factor": 0.5}):
        torch._dynamo.reset()
        layer = make_layer(experts, gated=False, **routing).float()
        layer.reset_usage()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 9, 24, requires_grad=True)
        results = compiled(x), layer(x)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        upstream = torch.randn(2, 9, 24)
        leaves = [x, *layer.parameters()]
        for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in results), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert layer.usage.tokens == 36
"""


def test_compiled_it_is_one_graph_and_the_same_function():
    # in a process of its own: the type checker that the tests hang in would break the graph
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("top_k", [1, 2])
def test_selected_experts_alone_give_the_same_outputs_and_gradients(monkeypatch, top_k):
    results = []
    for select_from, select_tokens in ((10**9, 1), (1, 10**9), (1, 1)):
        monkeypatch.setattr("mpoe.nn.extended.SELECT_FROM", select_from)
        monkeypatch.setattr("mpoe.nn.extended.SELECT_TOKENS", select_tokens)
        torch.manual_seed(0)
        layer = make_layer(top_k=top_k)
        assert layer.up.selects(7) == (select_from == select_tokens == 1)
        x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, by_hand(layer, x))
        results.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])
