"""Balancing in every training loop; `make balancing` has the default step and 300 of them."""

import copy
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

import mpoe
from balancing import LOOPS, rows, skewed_llama, spread, trainer
from mpoe.models import reset_usage, router_statistics, routers, sharing_experts
from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.objective import TrainerParts
from mpoe.training.trainer import build_trainer, step_loss, summed_cross_entropy
from tiny import enable_checkpointing, tiny_t5, tiny_tokenizer
from tiny_families import tiny_model

UNUSED = "the load-balancing loss of a training forward was not used"
# TRL 1.16's default, under the name that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def router_of(model):
    (router,) = routers(model).values()
    return router


@pytest.mark.parametrize("loop", LOOPS)
def test_two_overloaded_experts_are_relieved(loop, tmp_path):
    """A tenth of the steps of `make balancing`, several times as large."""
    model = skewed_llama(balancing_step=0.03)
    before = spread(model)
    assert sorted(before.share)[-2] > 0.4
    LOOPS[loop](model, tmp_path, 80)
    after = spread(model)
    assert max(after.share) < 0.2, (after.share, after.gate_mass)
    assert min(after.gate_mass) > 2 * min(before.gate_mass)


@pytest.mark.parametrize("loop", ["Trainer", "plain loop"])
def test_the_loss_relieves_them_too(loop, tmp_path):
    model = skewed_llama(balancing="loss", load_balancing_coef=0.1)
    LOOPS[loop](model, tmp_path, 80, learning_rate=3e-2)
    assert max(spread(model).share) < 0.2


@pytest.mark.parametrize("loop", LOOPS)
def test_a_bias_moves_once_per_optimizer_step(loop, tmp_path):
    """The last step's own loads are pending."""
    model = skewed_llama()
    for experts in sharing_experts(model).values():  # or the router has no gradient in the first step, and stays
        torch.nn.init.normal_(experts.offsets_V, std=0.01)
    LOOPS[loop](model, tmp_path, 4)
    balancing = router_of(model).balancing
    # the overloaded experts lose a step, the others gain one; then all of them the same, so that the sum is about 0
    steps = balancing.steps - balancing.steps.min()
    assert steps.tolist() == [0, 0, 6, 6, 6, 6, 6, 6]
    rows_a_step = 16 if "micro" in loop else 8
    assert rows_a_step * 12 * 2 <= balancing.pending.sum() <= rows_a_step * 14 * 2


def test_nothing_picks_up_the_loss_in_trls_trainer_and_one_warning_says_so(tmp_path):
    model = skewed_llama(balancing="loss")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        LOOPS["SFTTrainer"](model, tmp_path, 4)
    (warning,) = [warning for warning in caught if UNUSED in str(warning.message)]
    assert "Use balancing='bias'" in str(warning.message)


def test_the_loss_is_picked_up_without_a_warning(tmp_path):
    """Warnings are errors here."""
    trainer(skewed_llama(balancing="loss"), tmp_path, 3, gradient_accumulation_steps=2)


FAMILIES = {"gpt2": lambda: tiny_model("gpt2"), "llama": lambda: tiny_model("llama"), "t5": tiny_t5}


def pairs(family, count):
    """Rows that repeat: any micro-batch of an even number of them is the same as any other."""
    torch.manual_seed(1)
    ids = [torch.randint(3, 60, (12,)) for _ in range(2)]
    labels = [row[:4] if family == "t5" else row for row in ids]
    return [{"input_ids": ids[i % 2], "labels": labels[i % 2]} for i in range(count)]


def sgd_step(model, rows_of, folder, accumulation):
    """How far one step of the Trainer's SGD moves the routers, and everything else."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0,
        report_to=[], use_cpu=True, save_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows_of, data_collator=default_data_collator).train()
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    of_routers = [change.flatten() for name, change in moved.items() if ".router." in name]
    others = [change.flatten() for name, change in moved.items() if ".router." not in name]
    return torch.cat(of_routers or [torch.zeros(1)]), torch.cat(others)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_micro_batches_give_the_router_the_gradient_of_one_batch(family, tmp_path):
    """V is zero, so the routers learn from the balancing loss alone.

    T5's own loss ignores the number of targets of the whole step, and the Trainer does not divide by the number of
    micro-batches: the dense model's step is four times as large, and the routers' has to be so too.
    """
    dense = FAMILIES[family]().train()
    mixture = mpoe.upcycle(copy.deepcopy(dense), mpoe.MPOEConfig(num_experts=4, load_balancing_coef=1.0))
    data = pairs(family, 8)
    moved = {}
    for kind, model in (("dense", dense), ("mixture", mixture)):
        for accumulation in (1, 4):
            folder = tmp_path / f"{kind}-{accumulation}"
            moved[kind, accumulation] = sgd_step(copy.deepcopy(model), data, folder, accumulation)
    ratio = moved["dense", 4][1].norm() / moved["dense", 1][1].norm()
    assert ratio.item() == pytest.approx(4.0 if family == "t5" else 1.0, rel=1e-3)
    of_one, of_four = moved["mixture", 1][0], moved["mixture", 4][0]
    assert of_one.norm() > 0
    torch.testing.assert_close(of_four, ratio * of_one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_they_do_in_a_plain_loop(family):
    model = FAMILIES[family]().train()
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, load_balancing_coef=1.0))
    batch = default_data_collator(pairs(family, 2))
    found = []
    for micro_batches in (1, 4):
        model.zero_grad()
        for _ in range(micro_batches):
            (model(**batch).loss / micro_batches).backward()
        found.append(torch.cat([router.weight.grad.flatten() for router in routers(model).values()]))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_tuples_have_the_routers_loss_in_training(family):
    model = FAMILIES[family]().train()
    mpoe.upcycle(model, mpoe.MPOEConfig(num_experts=4, load_balancing_coef=1.0))
    batch = default_data_collator(pairs(family, 2))
    loss, *_ = model(**batch, return_dict=False)
    expected = model(**batch).loss
    clean, *_ = model.eval()(**batch, return_dict=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() > clean.item() + 0.5, "the loss of a layer is about 1"


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("balancing", ["bias", "loss"])
def test_label_smoothing_in_finetune(balancing, label_smoothing, tmp_path):
    """Its loss is computed outside of the model, and takes the routers' loss itself; warnings are errors here."""
    coef = {} if balancing == "bias" else {"load_balancing_coef": 0.1}
    model = skewed_llama(balancing=balancing, **coef)
    args = FinetuneTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=4, per_device_train_batch_size=8, warmup_steps=0,
        learning_rate=1e-1, save_strategy="no", eval_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = rows()
    for row in data:
        row["labels"] = torch.cat([torch.tensor([-100]), row["labels"][1:]])
    loss = step_loss(model, summed_cross_entropy(label_smoothing), shift=True)
    parts = TrainerParts(data, None, default_data_collator, loss)
    before = router_of(model).weight.detach().clone()
    build_trainer(model, tiny_tokenizer(), args, parts).train()
    if balancing == "bias":
        steps = router_of(model).balancing.steps
        assert (steps - steps.min()).max() > 0
    else:  # of both overloaded experts
        assert (router_of(model).weight[:2, 0] < before[:2, 0]).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_counts_every_token_once(use_reentrant):
    found = []
    for checkpoints in (False, True):
        model = skewed_llama(balancing_step=0.03)
        if checkpoints:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        if use_reentrant:
            model.enable_input_require_grads()
        reset_usage(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        batch = default_data_collator(rows()[:8])
        for _ in range(3):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((router_of(model), router_statistics(model)))
    (plain, statistics), (checkpointed, others) = found
    assert torch.equal(checkpointed.balancing.steps, plain.balancing.steps)
    assert torch.equal(checkpointed.balancing.pending, plain.balancing.pending)
    assert plain.balancing.steps.any()
    assert plain.balancing.pending.sum() == 8 * 13 * 2
    torch.testing.assert_close(checkpointed.weight, plain.weight)
    assert [s.share for s in others.values()] == [s.share for s in statistics.values()]


def test_a_loss_survives_gradient_checkpointing():
    found = []
    for checkpoints in (False, True):
        model = skewed_llama(balancing="loss", load_balancing_coef=1.0)
        if checkpoints:
            enable_checkpointing(model, use_reentrant=False)
        reset_usage(model)
        model(**default_data_collator(rows()[:8])).loss.backward()
        found.append(router_of(model).weight.grad)
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0])
