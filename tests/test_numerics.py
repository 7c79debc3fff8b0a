"""Half precision, extreme routing and odd shapes: finite, and equal to float32, a plain loop or the dense model."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from transformers.trainer_pt_utils import safe_globals

import mpoe
from mpoe.cli.main import main
from mpoe.models import mixtures, mpoe_config, routers, take_router_loss
from mpoe.training.trainer import IGNORED, step_loss, summed_cross_entropy
from plain_layer import by_hand, make_layer
from tiny import FLAGS, V1_0, files, moved, tiny_t5
from tiny_families import family_batch, tiny_model

EXPERTS = {"extended": {}, "balanced": {"layout": "balanced"}, "whole": {"mpo_layers": ()}}
KINDS = ["extended", "balanced", "dense"]  # of `make_layer`
HALVES = {torch.float16: 0.01, torch.bfloat16: 0.05}
"""How far from float32 the gradient as a whole may be: about ten roundings of each type, through two blocks."""


def mixture(name, experts, **options):
    """In training, with experts that differ."""
    model = mpoe.upcycle(tiny_model(name), mpoe.MPOEConfig(num_experts=3, **EXPERTS[experts], **options))
    return moved(model).train()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def follow(model, other):
    """Send the model's tokens where the other's go: of two experts that are as good a rounding picks another one."""
    routes, is_extended = {}, mpoe_config(model).is_extended

    def followed(name, route):
        index = routes[name].expert_index
        probability = route.probabilities.gather(1, index)
        weight = probability if is_extended else probability / probability.detach()
        return dataclasses.replace(route, expert_index=index, weight=weight)

    for name, router in routers(other).items():
        router.register_forward_hook(lambda module, args, route, name=name: routes.update({name: route}))
    for name, router in routers(model).items():
        router.register_forward_hook(lambda module, args, route, name=name: followed(name, route))


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["t5-v1.1", "llama", "bert", "gpt2"])
def test_a_training_step_in_half_precision_with_loss_scaling(name, dtype, experts):
    half = mixture(name, experts)
    full, batch = copy.deepcopy(half), family_batch(name)
    follow(half, full)
    loss = full(**batch).loss
    loss.backward()
    optimizer = torch.optim.SGD(half.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype):
        half_loss = half(**batch).loss
    scaler.scale(half_loss).backward()
    scaler.unscale_(optimizer)
    assert half_loss.item() == pytest.approx(loss.item(), rel=HALVES[dtype])
    assert gradient(half).isfinite().all()
    assert torch.linalg.vector_norm(gradient(half) - gradient(full)) < HALVES[dtype] * gradient(full).norm()
    before = copy.deepcopy(half.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # a step that overflowed would have been left out, and halved it
    assert any(not torch.equal(before[name], tensor) for name, tensor in half.state_dict().items())


@pytest.mark.parametrize("experts", EXPERTS)
def test_a_step_that_overflows_is_left_out(experts):
    model = mixture("llama", experts)
    before = copy.deepcopy(model.state_dict())
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", torch.float16):
        loss = model(**family_batch("llama")).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    model(**family_batch("llama"))
    assert not any(router.balancing.steps.any() for router in routers(model).values()), "no step, no biases moved"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["t5-v1.1", "llama"])
def test_routers_decide_in_float32_under_autocast(name, dtype):
    model = mixture(name, "extended")
    seen = []
    for router in routers(model).values():
        router.register_forward_hook(lambda module, args, route: seen.append((module, args, route)))
    with torch.autocast("cpu", dtype):
        model(**family_batch(name))
    assert len(seen) == len(routers(model))
    for router, (x, *mask), route in seen:
        forward = type(router).forward(router, x.float(), *mask)  # without the hook
        assert route.logits.dtype == route.probabilities.dtype == route.weight.dtype == torch.float32
        assert torch.equal(route.logits, forward.logits)
        assert route.load_balancing_loss.dtype == route.z_loss.dtype == torch.float32


@pytest.mark.parametrize("routing", [{}, {"is_scale_prob": True}, {"top_k": 2}, {"capacity_factor": 0.5}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, routing):
    layer = make_layer(kind, has_loss=True, **routing)
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([-1e4, 1e4, 0.0]))
    x = torch.randn(20, 24, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.isfinite().all()
    torch.testing.assert_close(y, by_hand(layer, x))
    route = layer.router_output
    assert route.load_balancing_loss.item() == pytest.approx(3.0)  # all to one of three, with certainty
    assert route.z_loss.item() == pytest.approx(1e8, rel=1e-2)
    (y.square().sum() + route.load_balancing_loss + 1e-8 * route.z_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (x, *layer.parameters()))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e18, 1e30])
def test_inputs_of_any_size_give_finite_routes(scale):
    router = make_layer().router.float()
    x = (torch.randn(7, 24) * scale).requires_grad_()
    route = router(x)
    assert route.logits.isfinite().all()
    torch.testing.assert_close(route.probabilities.sum(dim=1), torch.ones(7))
    (route.weight.sum() + route.load_balancing_loss + route.z_loss).backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize("expert", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_collapsed_onto_one_expert(kind, expert):
    layer = make_layer(kind, has_loss=True)
    with torch.no_grad():
        layer.router.bias.fill_(-50).index_fill_(0, torch.tensor(expert), 50)
    x = torch.randn(4, 9, 24, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, by_hand(layer, x))
    assert layer.router_output.tokens_per_expert.tolist() == [36 * (e == expert) for e in range(3)]
    y.square().sum().backward()
    for experts in (layer.up, layer.gate, layer.down):
        own = [experts.weight] if kind == "dense" else experts.auxiliary.values()
        of_experts = [p.grad for p in own]
        if kind == "extended":
            of_experts = [experts.offsets_V.grad.T.reshape(3, -1), experts.offsets_U.grad.reshape(3, -1)]
        for gradient in of_experts:
            assert gradient.isfinite().all()
            assert [bool(of_expert.any()) for of_expert in gradient] == [e == expert for e in range(3)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("routing", [{}, {"top_k": 2}, {"capacity_factor": 1.0}], ids=str)
@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (0, 5, 24)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind, shape, routing, training):
    layer = make_layer(kind, has_loss=True, **routing).train(training)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(training):
        y = layer(x)
    assert y.shape == shape
    if training:
        route = layer.router_output
        loss = y.sum() + route.load_balancing_loss + route.z_loss
        assert loss.item() == 0
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_one_token_and_a_long_sequence(tokens, kind, grad):
    layer = make_layer(kind, has_loss=True)
    x = torch.randn(1, tokens, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand(layer, x)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    torch.testing.assert_close(y, expected)
    if grad:
        (y.square().mean() + layer.router_output.load_balancing_loss).backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_a_fresh_mixture_is_the_dense_network_for_any_length(tokens, experts):
    model = tiny_t5(V1_0)
    network = copy.deepcopy(model.encoder.block[0].layer[1].DenseReluDense)
    layer = next(iter(mixtures(mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=3, **EXPERTS[experts]))).values()))
    x = torch.randn(1, tokens, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), network(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(
    ("name", "routing"),
    [
        *((name, "token") for name in ("t5-v1.1", "llama", "bert", "bart", "gpt2")),
        *((name, routing) for name in ("t5-v1.1", "bert") for routing in ("sequence", "prefix")),
    ],
)
def test_a_batch_of_padding_only(name, experts, routing):
    """It has no target: the loss of a step is 0, and moves nothing."""
    batch = family_batch(name)
    batch["labels"] = torch.full((3, 1) if name == "bert" else batch["labels"].shape, IGNORED)
    batch["input_ids"], batch["attention_mask"] = (torch.zeros_like(batch[k]) for k in ("input_ids", "attention_mask"))
    labels = batch.pop("labels")
    if name in ("t5-v1.1", "bart"):
        batch["decoder_input_ids"] = torch.zeros_like(labels)
    options = {} if routing == "token" else {"routing": routing, "stacks": ("encoder",)}
    if routing == "token" and experts != "extended":
        options["capacity_factor"] = 1.0
    model = mixture(name, experts, **options)
    output = model(**batch)
    assert output.logits.isfinite().all()
    loss = step_loss(model, summed_cross_entropy())(output, labels)
    assert loss.item() == 0
    loss.backward()
    assert not gradient(model).any()


@pytest.mark.parametrize("name", ["t5-v1.1", "llama", "bert"])
def test_the_routers_loss_of_padding_only_is_finite(name):
    batch = family_batch(name)
    batch["attention_mask"].zero_()
    del batch["labels"]
    if name == "t5-v1.1":
        batch["decoder_input_ids"] = torch.zeros(3, 1, dtype=torch.long)
    model = mixture(name, "extended", router_z_loss_coef=0.1)
    model(**batch)
    loss = take_router_loss(model)
    assert math.isfinite(loss.item())
    loss.backward()
    assert gradient(model).isfinite().all()


@pytest.mark.parametrize("layout", ["extended", "balanced"])
@pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")
def test_two_runs_with_full_determinism_have_equal_bytes(ground, monkeypatch, layout):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # Transformers sets them for the process
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    flags = [*FLAGS, "--full_determinism", "True", "--layout", layout]
    try:
        for folder in ("first", "second"):
            assert main(["finetune", *flags, "--output_dir", folder]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    first, second = (files(ground / folder) for folder in ("first", "second"))
    with_clocks = {"results.json", "trainer_state.json", "training_args.bin", "checksums.json"}  # or the folder's name
    compared = {path for path in first if path.name not in with_clocks}
    assert first.keys() == second.keys()
    assert {path.name for path in compared} >= {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"}
    assert Path("model.safetensors") in compared
    differ = [path for path in compared if first[path] != second[path]]
    # beartype, which tests run under, draws from Python's generator as often as a function is checked
    assert [path for path in differ if path.name != "rng_state.pth"] == []
    for path in (path for path in compared if path.name == "rng_state.pth"):
        with safe_globals():
            states = [torch.load(Path(folder, path), weights_only=True) for folder in ("first", "second")]
        assert torch.equal(states[0]["cpu"], states[1]["cpu"])
        assert str(states[0]["numpy"]) == str(states[1]["numpy"])
