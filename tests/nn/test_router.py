import pytest
import torch

from mpoe.nn import Dispatch, SwitchRouter, load_balancing_loss


def make_router(hidden_size=12, num_experts=4, **options):
    router = SwitchRouter(hidden_size, num_experts, **options)
    router.initialize(torch.Generator().manual_seed(3))
    return router


def test_routing_is_the_softmax_written_out():
    router = make_router(is_scale_prob=True)
    x = torch.randn(50, 12)
    route = router(x)
    for token, expert, weight in zip(x, route.expert_index, route.weight, strict=True):
        scaled = token / token.square().mean().sqrt()
        logits = [(router.weight[e] @ scaled + router.bias[e]).item() for e in range(4)]
        probabilities = torch.tensor(logits).exp() / torch.tensor(logits).exp().sum()
        assert expert == probabilities.argmax()
        assert weight.item() == pytest.approx(probabilities.max().item(), rel=1e-5)
    assert route.tokens_per_expert.tolist() == [(route.expert_index == e).sum().item() for e in range(4)]


def test_unit_weight_has_the_gradient_of_log_p():
    """p / p.detach() is 1, and its derivative is that of log p."""
    router = make_router()
    x = torch.randn(20, 12)
    weight = router(x).weight
    assert torch.equal(weight, torch.ones(20))
    upstream = torch.randn(20)
    got = torch.autograd.grad(weight, router.weight, upstream)[0]
    logits = torch.nn.functional.rms_norm(x, (12,)) @ router.weight.T + router.bias
    expected = torch.autograd.grad(logits.log_softmax(-1).max(-1).values, router.weight, upstream)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_scale_of_the_input_does_not_matter(scale):
    router = make_router()
    x = torch.randn(30, 12)
    assert torch.equal(router(x * scale).expert_index, router(x).expert_index) or scale == 1e-6  # eps of the norm
    assert torch.isfinite(router(x * scale).load_balancing_loss)


def test_routing_is_in_float32_under_autocast_and_in_bfloat16():
    router = make_router()
    x = torch.randn(30, 12)
    expected = router(x).expert_index
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x).expert_index, expected)
        assert router(x).weight.dtype == torch.float32
    assert router.bfloat16()(x.bfloat16()).weight.dtype == torch.float32


def test_load_balancing_loss_by_hand():
    probabilities = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
    # shares 3/4 and 1/4, mean probabilities 0.6 and 0.4: 2 · (0.75 · 0.6 + 0.25 · 0.4)
    assert load_balancing_loss(probabilities, torch.tensor([3, 1])).item() == pytest.approx(1.1)
    assert load_balancing_loss(torch.full((8, 4), 0.25), torch.full((4,), 2)).item() == pytest.approx(1)
    certain = torch.eye(4)[[2, 2, 2]]
    assert load_balancing_loss(certain, torch.tensor([0, 0, 3, 0])).item() == pytest.approx(4)
    assert load_balancing_loss(torch.empty(0, 4), torch.zeros(4, dtype=torch.int64)).item() == 0


def test_load_balancing_loss_is_gshards():
    probabilities = torch.randn(40, 5).softmax(-1)
    index = probabilities.argmax(-1)
    density = torch.nn.functional.one_hot(index, 5).float().mean(0)
    gshard = (density * probabilities.mean(0)).mean() * 5**2
    ours = load_balancing_loss(probabilities, torch.bincount(index, minlength=5))
    assert ours.item() == pytest.approx(gshard.item(), rel=1e-6)


def test_its_gradient_pushes_probability_off_the_crowded_expert():
    router = make_router(num_experts=3)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    route = router(torch.randn(64, 12))
    route.load_balancing_loss.backward()
    assert router.bias.grad.argmax() == 0


def test_dispatch_sorts_and_combine_puts_back():
    index = torch.tensor([2, 0, 1, 0, 2, 2])
    dispatch = Dispatch.by_expert(index, torch.bincount(index, minlength=4))
    assert dispatch.counts == [2, 1, 3, 0]
    x = torch.randn(6, 3, requires_grad=True)
    blocks = dispatch.dispatch(x)
    assert torch.equal(blocks, x[[1, 3, 2, 0, 4, 5]])
    combined = dispatch.combine(blocks)
    assert torch.equal(combined, x)
    upstream = torch.randn(6, 3)
    assert torch.equal(torch.autograd.grad(combined, x, upstream)[0], upstream)


def test_initial_logits_have_unit_variance():
    router = SwitchRouter(512, 8)
    router.initialize(torch.Generator().manual_seed(0))
    logits = torch.nn.functional.rms_norm(torch.randn(200, 512), (512,)) @ router.weight.T
    assert logits.std().item() == pytest.approx(1, rel=0.1)
