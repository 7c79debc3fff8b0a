import math

import pytest
import torch

from mpoe.nn import Dispatch, RouterOutput, RouterUsage, TopKRouter, load_balancing_loss, router_z_loss


def make_router(hidden_size=12, num_experts=4, **options):
    router = TopKRouter(hidden_size, num_experts, **options)
    router.initialize(torch.Generator().manual_seed(3))
    return router


def test_routing_is_the_softmax_written_out():
    router = make_router(is_scale_prob=True)
    x = torch.randn(50, 12)
    route = router(x)
    for token, expert, weight in zip(x, route.expert_index[:, 0], route.weight[:, 0], strict=True):
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
    weight = router(x).weight[:, 0]
    assert torch.equal(weight, torch.ones(20))
    upstream = torch.randn(20)
    got = torch.autograd.grad(weight, router.weight, upstream)[0]
    logits = torch.nn.functional.rms_norm(x, (12,)) @ router.weight.T + router.bias
    expected = torch.autograd.grad(logits.log_softmax(-1).max(-1).values, router.weight, upstream)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("options", "of_router", "of_tokens"),
    [
        ({}, True, False),
        ({"gradient": "all"}, True, True),
        ({"gradient": "none"}, False, False),
        ({"gradient": "none", "is_scale_prob": True}, True, True),
        ({"gradient": "none", "top_k": 2}, True, True),
    ],
)
def test_how_far_the_gradient_of_the_weights_goes(options, of_router, of_tokens):
    router, x = make_router(**options), torch.randn(20, 12, requires_grad=True)
    route = router(x)
    assert route.weight.requires_grad == of_router
    if of_router:
        got = torch.autograd.grad(
            route.weight[:, 0] @ torch.randn(20), [router.weight, x], retain_graph=True, allow_unused=True
        )
        assert [gradient is not None and bool(gradient.any()) for gradient in got] == [True, of_tokens]
    balance = torch.autograd.grad(route.load_balancing_loss, [router.weight, x], allow_unused=True)
    assert [gradient is not None for gradient in balance] == [True, of_tokens]


@pytest.mark.parametrize("scale", [2.0**-4, 2.0**14])
def test_the_scale_of_the_input_does_not_matter(scale):
    router = make_router()
    x = torch.randn(30, 12)
    assert torch.equal(router(x * scale).expert_index, router(x).expert_index)
    torch.testing.assert_close(router(x * scale).probabilities, router(x).probabilities, rtol=1e-4, atol=1e-5)


def test_without_the_norm_the_logits_are_those_of_the_raw_input():
    router, x = make_router(input_norm=False), 7 * torch.randn(30, 12)
    expected = torch.nn.functional.linear(x, router.weight, router.bias).softmax(-1)
    torch.testing.assert_close(router(x).probabilities, expected)


def plain_route(router, x, seed):
    """The whole of a router's decision written out, token by token and choice by choice.

    Returns:
        Pairs (expert, weight) of every token that are kept, and the number of dropped assignments.
    """
    torch.manual_seed(seed)
    tokens, experts, k = len(x), router.num_experts, router.top_k
    policy = router.second_policy_train if router.training else router.second_policy_eval
    factor = router.capacity_factor if router.training else router.eval_capacity_factor
    draws = torch.rand(tokens, k) if policy == "random" else None
    wishes = []
    for t, token in enumerate(x):
        token = token / (token.square().mean() + torch.finfo(torch.float32).eps).sqrt()
        probabilities = (router.weight @ token + router.bias).softmax(0).tolist()
        chosen = sorted(range(experts), key=lambda e: -probabilities[e])[:k]
        total = sum(probabilities[e] for e in chosen)
        wishes.append([])
        for rank, e in enumerate(chosen):
            weight = probabilities[e] / total
            keep = rank == 0 or policy == "all"
            if rank and policy == "threshold":
                keep = weight > router.second_threshold
            if rank and policy == "random":
                keep = draws[t, rank].item() < weight / router.second_threshold
            wishes[t].append((e, probabilities[e] if router.is_scale_prob else weight, keep))
    capacity = tokens if factor is None else max(4, int(factor * tokens / experts))
    filled, dropped, kept = [0] * experts, 0, [[] for _ in range(tokens)]
    for rank in range(k):
        for t in range(tokens):
            e, weight, keep = wishes[t][rank]
            if keep and filled[e] < capacity:
                filled[e] += 1
                kept[t].append((e, weight))
            elif keep:
                dropped += 1
    return kept, dropped


@pytest.mark.parametrize("factors", [(None, None), (1.25, 2.0), (0.5, 0.3)])
@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_routing_agrees_with_the_plain_one(top_k, policy, factors, training):
    """Train and eval have options of their own, so each is set against another in the other mode."""
    other = "all" if policy == "none" else "none"
    policies = (policy, other) if training else (other, policy)
    router = make_router(
        top_k=top_k, capacity_factor=factors[0], eval_capacity_factor=factors[1], second_threshold=0.4,
        second_policy_train=policies[0], second_policy_eval=policies[1],
    ).train(training)  # fmt: skip
    for tokens in (1, 7, 50):
        x = torch.randn(tokens, 12)
        expected, dropped = plain_route(router, x, seed=5)
        torch.manual_seed(5)
        route = router(x)
        kept = torch.ones_like(route.expert_index, dtype=torch.bool) if route.kept is None else route.kept
        for t in range(tokens):
            got = {
                e: w
                for e, w, is_kept in zip(
                    route.expert_index[t].tolist(), route.weight[t].tolist(), kept[t].tolist(), strict=True
                )
                if is_kept
            }
            assert got == pytest.approx(dict(expected[t]) if top_k > 1 else {e: 1.0 for e, _ in expected[t]}, rel=1e-4)
        assert route.dropped.item() == dropped
        assert route.tokens_per_expert.sum().item() == sum(map(len, expected))


def test_the_gates_of_k_experts_add_up_to_one_and_reach_the_router():
    router = make_router(top_k=2)
    route = router(torch.randn(20, 12))
    torch.testing.assert_close(route.weight.sum(1), torch.ones(20))
    gradient = torch.autograd.grad(route.weight[:, 0].sum(), router.weight)[0]
    assert gradient.abs().max() > 0


def test_top_2_by_hand():
    """Three tokens, three experts, logits ln 1 to ln 4: gates, policy, capacity and both losses worked out on paper."""
    router = TopKRouter(3, 3, top_k=2, second_policy_train="threshold", second_threshold=0.3, input_norm=False)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
        router.bias.zero_()
    logits = torch.tensor([[4.0, 2.0, 1.0], [1.0, 4.0, 1.0 + 1e-3], [2.0, 1.0, 1.0 - 1e-3]]).log()
    route = router(logits)
    assert route.expert_index.tolist() == [[0, 1], [1, 2], [0, 1]]
    assert route.weight[0].tolist() == pytest.approx([4 / 6, 2 / 6])
    assert route.weight[1].tolist() == pytest.approx([4 / 5, 1 / 5], abs=1e-3)
    assert route.weight[2].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-3)
    assert route.kept.tolist() == [[True, True], [True, False], [True, True]]
    # first choices 2/3, 1/3, 0; mean probabilities (4/7 + 1/6 + 2/4)/3, (2/7 + 4/6 + 1/4)/3, ..
    expected = 3 * (2 / 3 * (4 / 7 + 1 / 6 + 2 / 4) / 3 + 1 / 3 * (2 / 7 + 4 / 6 + 1 / 4) / 3)
    assert route.load_balancing_loss.item() == pytest.approx(expected, abs=1e-3)
    # denominators 7, 6, 4
    z_loss = sum(math.log(total) ** 2 for total in (7, 6, 4)) / 3
    assert route.z_loss.item() == pytest.approx(z_loss, abs=1e-3)


def test_z_loss_of_nothing_is_nothing():
    assert router_z_loss(torch.empty(0, 4)).item() == 0


def test_jitter_multiplies_the_inputs_in_training_only():
    router, x = make_router(jitter=0.5, input_norm=False), torch.ones(4000, 12)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, 12))
    noisy = router(x).probabilities.log()
    noise = (noisy - noisy.mean(1, keepdim=True)).flatten()  # the logits but for a constant
    assert noise.abs().max() <= 1
    assert noise.std().item() == pytest.approx((1 / 12) ** 0.5 * (3 / 4) ** 0.5, rel=0.05)  # of uniform [0.5, 1.5]
    torch.testing.assert_close(router.eval()(x).probabilities, torch.full((4000, 4), 0.25))


def test_statistics_are_those_of_all_forwards_together():
    router = make_router(top_k=2, capacity_factor=0.6, second_policy_train="threshold")
    routes = [router(torch.randn(tokens, 12)) for tokens in (30, 11)]
    usage = RouterUsage.nothing(4, torch.device("cpu"))
    for route in routes:
        usage.add(route)
    found = usage.statistics()
    probabilities = torch.cat([route.probabilities for route in routes])
    counts = sum(route.tokens_per_expert for route in routes)
    dropped = sum(route.dropped.item() for route in routes)
    assert dropped > 0
    assert found.share == pytest.approx((counts / counts.sum()).tolist())
    assert found.mean_probability == pytest.approx(probabilities.mean(0).tolist(), rel=1e-5)
    assert found.dropped_fraction == pytest.approx(dropped / (counts.sum().item() + dropped))
    entropies = [-sum(p * math.log(p) for p in row) for row in probabilities.tolist()]
    assert found.entropy == pytest.approx(sum(entropies) / 41, rel=1e-5)


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


def decide(index, weight, kept=None, num_experts=4):
    logits = torch.zeros(len(index), num_experts)
    return RouterOutput(index, weight, kept, logits, logits, torch.zeros((), dtype=torch.long))


def test_dispatch_sorts_and_combine_puts_back():
    index = torch.tensor([[2], [0], [1], [0], [2], [2]])
    dispatch = Dispatch.by_expert(decide(index, torch.ones(6, 1)))
    assert dispatch.counts == [2, 1, 3, 0]
    x = torch.randn(6, 3, requires_grad=True)
    blocks = dispatch.dispatch(x)
    assert torch.equal(blocks, x[[1, 3, 2, 0, 4, 5]])
    combined = dispatch.combine(blocks, torch.ones(6, 1))
    assert torch.equal(combined, x)
    upstream = torch.randn(6, 3)
    assert torch.equal(torch.autograd.grad(combined, x, upstream)[0], upstream)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_dispatch_with_drops_is_a_sum_over_what_is_kept(top_k):
    tokens = 9
    index = torch.stack([torch.randperm(4)[:top_k] for _ in range(tokens)])
    kept, weight = torch.rand(tokens, top_k) < 0.6, torch.rand(tokens, top_k, requires_grad=True)
    kept[3] = False
    dispatch = Dispatch.by_expert(decide(index, weight, kept))
    x = torch.randn(tokens, 5, requires_grad=True)
    factors = torch.tensor([2.0, 3.0, 5.0, 7.0])
    rows = dispatch.dispatch(x) * torch.repeat_interleave(factors, torch.tensor(dispatch.counts))[:, None]
    fast = dispatch.combine(rows, weight)
    plain = torch.stack(
        [
            sum((weight[t, k] * factors[index[t, k]] * x[t] for k in range(top_k) if kept[t, k]), torch.zeros(5))
            for t in range(tokens)
        ]
    )
    torch.testing.assert_close(fast, plain)
    assert (fast[3] == 0).all()
    upstream = torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (fast, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_initial_logits_have_unit_variance():
    router = TopKRouter(512, 8)
    router.initialize(torch.Generator().manual_seed(0))
    logits = torch.nn.functional.rms_norm(torch.randn(200, 512), (512,)) @ router.weight.T
    assert logits.std().item() == pytest.approx(1, rel=0.1)
