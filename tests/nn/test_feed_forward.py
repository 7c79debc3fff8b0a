import pytest
import torch

from mpoe.mpo import site_dims
from mpoe.nn import DenseExperts, MoEFeedForward, MPOExperts, SwitchRouter


def make_layer(experts="separable", gated=True, is_scale_prob=False, dropout=0.0, noise=0.2):
    def matrix(out_features, in_features):
        if experts == "dense":
            made = DenseExperts(out_features, in_features, 3)
        else:
            made = MPOExperts(site_dims(out_features, in_features, layout=experts), 3)
        made.load_matrix(torch.randn(out_features, in_features) * in_features**-0.5)
        made.add_noise(noise, torch.Generator().manual_seed(1))
        return made

    router = SwitchRouter(24, 3, is_scale_prob)
    router.initialize(torch.Generator().manual_seed(2))
    gate = matrix(40, 24) if gated else None
    return MoEFeedForward(router, matrix(40, 24), matrix(24, 40), torch.nn.functional.silu, gate, dropout).double()


def by_hand(layer, x):
    """Token by token, with every matrix multiplied out."""
    rows = []
    route = layer.router(x.reshape(-1, x.shape[-1]))
    for token, e, weight in zip(x.reshape(-1, x.shape[-1]), route.expert_index.tolist(), route.weight, strict=True):
        hidden = layer.up.expert_matrix(e) @ token
        if layer.gate is None:
            hidden = layer.activation(hidden)
        else:
            hidden = layer.activation(layer.gate.expert_matrix(e) @ token) * hidden
        rows.append(weight * (layer.down.expert_matrix(e) @ hidden))
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("is_scale_prob", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("experts", ["separable", "balanced", "dense"])
def test_layer_agrees_with_a_loop_over_tokens(experts, gated, is_scale_prob):
    layer = make_layer(experts, gated, is_scale_prob)
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    fast, plain = layer(x), by_hand(layer, x)
    # the router works in float32
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(fast)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_is_between_activation_and_down():
    layer = make_layer(gated=False, dropout=1.0)
    x = torch.randn(4, 24, dtype=torch.float64)
    assert (layer(x) == 0).all()
    assert not (layer.eval()(x) == 0).any()


def test_usage_is_counted_and_reset():
    layer = make_layer()
    x = torch.randn(5, 24, dtype=torch.float64)
    layer(x), layer(x)
    assert layer.tokens_per_expert.sum() == 10
    assert torch.equal(layer.tokens_per_expert, 2 * layer.router(x).tokens_per_expert)
    layer.reset_usage()
    assert layer.tokens_per_expert is None


def test_evaluation_keeps_no_graph():
    layer = make_layer()
    layer(torch.randn(5, 24, dtype=torch.float64))
    assert layer.router_output is not None
    layer.eval()(torch.randn(5, 24, dtype=torch.float64))
    assert layer.router_output is None


def test_empty_batch():
    assert make_layer()(torch.empty(0, 24, dtype=torch.float64)).shape == (0, 24)


def test_autocast_runs_and_is_close():
    layer = make_layer().float()
    x = torch.randn(9, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
