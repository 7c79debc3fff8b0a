"""The mask discards updates whole: central parameters change on exactly the steps that it does not draw."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mpoe
from mpoe.models import sharing_experts
from mpoe.training.gradient_mask import GradientMask, GradientMaskCallback
from tiny import tiny_batch, tiny_t5

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adamw, one by one": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=False),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.fixture(params=["extended", "balanced"])
def make_model(request):
    def make():
        torch.manual_seed(0)
        config = mpoe.MPOEConfig(num_experts=3, layers=[1], layout=request.param)
        return mpoe.upcycle(tiny_t5(), config).train()

    return make


def centrals(model):
    return [experts.central for experts in sharing_experts(model).values()]


def auxiliaries(model):
    return [o for experts in sharing_experts(model).values() for o in experts.auxiliary.values()]


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def train(model, mask, make_optimizer, steps, observe=lambda step: None, first=0, optimizer=None):
    optimizer = optimizer or make_optimizer(model.parameters())
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        model(**tiny_batch()).loss.backward()
        mask.before_step(step, optimizer)
        optimizer.step()
        mask.after_step(optimizer)
        observe(step)
    return optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_central_tensors_change_on_exactly_the_unmasked_steps(make_model, name):
    model = make_model()
    mask = GradientMask(model, prob=0.5, seed=3)
    states = [copies(centrals(model))]
    helpers = [copies(auxiliaries(model))]

    def observe(step):
        states.append(copies(centrals(model)))
        helpers.append(copies(auxiliaries(model)))

    counts, real = [], mask.before_step

    def counted(step, optimizer):
        before = mask.discarded
        real(step, optimizer)
        counts.append(mask.discarded - before)

    mask.before_step = counted
    train(model, mask, OPTIMIZERS[name], 12, observe)
    unchanged = [
        sum(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in itertools.pairwise(states)
    ]
    assert unchanged == counts
    assert 0 < sum(unchanged) < 12 * len(centrals(model))
    assert mask.discarded == sum(unchanged)
    assert mask.drawn == 12 * len(centrals(model))
    for before, after in itertools.pairwise(helpers):
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("level", ["tensor", "element"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_1_they_are_bitwise_unchanged_and_the_optimizer_knows_nothing_of_them(make_model, name, level):
    model = make_model()
    before = copies(centrals(model))
    mask = GradientMask(model, prob=1.0, level=level)
    optimizer = train(model, mask, OPTIMIZERS[name], 5)
    assert all(torch.equal(a, b) for a, b in zip(before, centrals(model), strict=True))
    assert mask.discarded == mask.drawn > 0
    for central in centrals(model):
        moments = [s for s in optimizer.state.get(central, {}).values() if torch.is_tensor(s) and s.ndim]
        assert all((moment == 0).all() for moment in moments)


@pytest.mark.parametrize("level", ["tensor", "element"])
def test_at_0_nothing_is_changed(make_model, level):
    models = make_model(), make_model()
    masks = GradientMask(models[0], prob=0.0, level=level), GradientMask(models[1], prob=1e-12, level=level)
    for model, mask in zip(models, masks, strict=True):
        train(model, mask, OPTIMIZERS["adamw"], 3)
    plain = make_model()
    optimizer = OPTIMIZERS["adamw"](plain.parameters())
    for step in range(3):
        torch.manual_seed(100 + step)
        optimizer.zero_grad()
        plain(**tiny_batch()).loss.backward()
        optimizer.step()
    for a, b, c in zip(*(model.parameters() for model in (*models, plain)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_elements_move_or_stay_with_their_moments(make_model, name):
    """Against the written-out update of one element at a time: a masked element skips the step altogether."""
    model = make_model().double()  # in float32 a small step may round to nothing
    mask = GradientMask(model, prob=0.4, level="element", seed=1)
    seen = []
    before = copies(centrals(model))

    def observe(step):
        nonlocal before
        now = copies(centrals(model))
        seen.append(torch.cat([(a == b).flatten() for a, b in zip(before, now, strict=True)]))
        before = now

    optimizer = train(model, mask, OPTIMIZERS[name], 6, observe)
    stayed = torch.stack(seen)
    assert int(stayed.sum()) == mask.discarded  # an unmasked element always moves: weight decay alone sees to that
    assert mask.discarded / mask.drawn == pytest.approx(0.4, abs=0.02)
    always = stayed.all(dim=0)
    moments = [
        torch.cat([optimizer.state[central][key].flatten() for central in centrals(model)])
        for key, value in optimizer.state[centrals(model)[0]].items()
        if torch.is_tensor(value) and value.ndim
    ]
    assert always.any()
    for moment in moments:
        assert (moment[always] == 0).all()
        assert (moment[~always] != 0).any()


def test_the_share_over_10_000_draws_is_within_3_sigma(make_model):
    model = make_model()
    for p in (0.2, 0.5, 0.8):
        mask = GradientMask(model, prob=p, seed=11)
        steps = 10_000 // len(mask.central) + 1
        for step in range(steps):
            for central in mask.central:
                central.grad = torch.zeros_like(central)
            mask.before_step(step, None)
        assert mask.drawn >= 10_000
        assert abs(mask.discarded / mask.drawn - p) <= 3 * (p * (1 - p) / mask.drawn) ** 0.5


@pytest.mark.parametrize("level", ["tensor", "element"])
def test_a_resumed_run_and_another_rank_draw_the_same(make_model, level):
    whole = make_model()
    train(whole, GradientMask(whole, 0.5, level, seed=4), OPTIMIZERS["adamw"], 8)
    parts = make_model()
    optimizer = train(parts, GradientMask(parts, 0.5, level, seed=4), OPTIMIZERS["adamw"], 3)
    train(parts, GradientMask(parts, 0.5, level, seed=4), None, 5, first=3, optimizer=optimizer)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    other = make_model()
    train(other, GradientMask(other, 0.5, level, seed=5), OPTIMIZERS["adamw"], 8)
    assert any(not torch.equal(a, b) for a, b in zip(centrals(whole), centrals(other), strict=True))


def test_counts_survive_a_checkpoint(make_model):
    from transformers import TrainerState

    callback = GradientMaskCallback(GradientMask(make_model(), 0.5))
    callback.mask.drawn, callback.mask.discarded = 40, 17
    state = TrainerState(stateful_callbacks={"GradientMaskCallback": callback.state()})
    fresh = GradientMaskCallback(GradientMask(make_model(), 0.5))
    fresh.on_train_begin(None, state, None)
    assert (fresh.mask.drawn, fresh.mask.discarded) == (40, 17)


def test_a_sharded_model_is_masked_too(make_model, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model()
        mask = GradientMask(model, prob=1.0)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        before = [central.full_tensor().clone() for central in centrals(model)]
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        model(**tiny_batch()).loss.backward()
        mask.before_step(0, optimizer)
        optimizer.step()
        assert mask.discarded == mask.drawn == len(before) == 6
        assert all(torch.equal(a, b.full_tensor()) for a, b in zip(before, centrals(model), strict=True))
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_masked_is_said(make_model):
    with pytest.raises(ValueError, match=r"gradient_mask_prob must be in \[0, 1\]; got 1.5"):
        GradientMask(make_model(), 1.5)
    with pytest.raises(ValueError, match="gradient_mask_level must be one of"):
        GradientMask(make_model(), 0.5, "row")
    with pytest.raises(ValueError, match="needs a central tensor that trains"):
        GradientMask(tiny_t5(), 0.5)
