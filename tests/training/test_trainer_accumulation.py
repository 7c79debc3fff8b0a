"""The real Trainer trains the same model with matrices multiplied out once per step as with plain accumulation."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import mpoe
from mpoe.nn import MPOExperts
from mpoe.nn.accumulation import Accumulation
from mpoe.training.accumulation import AccumulationCallback
from tiny import tiny_batch, tiny_t5

ROWS = 14  # 7 batches of 2: with 3 micro-batches a step, the last step of an epoch has 1


def make_model():
    torch.manual_seed(0)
    config = mpoe.MPOEConfig(num_experts=3, layout="balanced", expert_noise=0.1, layers=[0])
    return mpoe.upcycle(tiny_t5(), config).double()


def make_rows(rows=ROWS):
    torch.manual_seed(1)
    batch = tiny_batch(rows)
    return [{name: values[n] for name, values in batch.items()} for n in range(rows)]


def train(model, folder, callbacks=(), **options):
    """Every parameter as it is in the end."""
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", seed=0,
        per_device_train_batch_size=2, num_train_epochs=2, learning_rate=1e-2,
        **{"gradient_accumulation_steps": 3, "max_grad_norm": 0.1, **options},
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=make_rows(), eval_dataset=make_rows(2), callbacks=list(callbacks),
        data_collator=default_data_collator,
    )  # fmt: skip
    trainer.train()
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(make_model(), tmp_path_factory.mktemp("plain"))


def assert_same(found, expected):
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-7, atol=1e-8)


class Watch(TrainerCallback):
    """Sees that gradients wait between micro-batches, and that none does when the Trainer has clipped them."""

    def __init__(self, accumulation):
        self.accumulation, self.steps, self.waited = accumulation, 0, 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.waited += self.accumulation.pending

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        assert not self.accumulation.pending
        self.steps += 1


class OnSubstepEnd(TrainerCallback):
    """Does something between micro-batches."""

    def __init__(self, action):
        self.action = action

    def on_substep_end(self, args, state, control, **kwargs):
        self.action(state, control)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_trains_as_plain_accumulation(plain, checkpointed, tmp_path):
    model = make_model()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if checkpointed:  # under the name that this version of Transformers has for it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    watch = Watch(Accumulation(model))
    found = train(model, tmp_path, [AccumulationCallback(watch.accumulation), watch])
    assert_same(found, plain)
    assert (watch.steps, watch.waited) == (6, 8)
    assert not watch.accumulation.is_active
    moved = [name for name, parameter in found.items() if "offsets" in name and not torch.equal(parameter, start[name])]
    assert len(moved) == 24  # four of each of the three matrices of both layers


def test_with_evaluation_between_steps_and_another_optimizer(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "optim": "adafactor"}
    expected = train(make_model(), tmp_path / "plain", **options)
    model = make_model()
    assert_same(train(model, tmp_path, [AccumulationCallback(Accumulation(model))], **options), expected)


def test_nothing_is_kept_without_accumulation(tmp_path):
    model = make_model()
    accumulation = Accumulation(model)

    class Refuse(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            assert not accumulation.is_active

    train(model, tmp_path, [AccumulationCallback(accumulation), Refuse()], gradient_accumulation_steps=1, max_steps=2)


def test_an_epoch_that_is_stopped_within_a_step(tmp_path):
    """After its second micro-batch; the Trainer leaves such gradients to the next step."""

    def stop(state, control):
        control.should_epoch_stop = state.global_step == 0

    expected = train(make_model(), tmp_path / "plain", [OnSubstepEnd(stop)])
    model = make_model()
    found = train(model, tmp_path, [AccumulationCallback(Accumulation(model)), OnSubstepEnd(stop)])
    assert_same(found, expected)


def test_after_an_exception_training_starts_anew(plain, tmp_path):
    model = make_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    callback = AccumulationCallback(Accumulation(model))

    def fail(state, control):
        if state.global_step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, [callback, OnSubstepEnd(fail)])
    assert callback.accumulation.pending
    model.load_state_dict(start)
    assert_same(train(model, tmp_path, [callback]), plain)


def test_a_layer_left_out_of_the_last_micro_batch_is_an_error(tmp_path):
    """Its gradients could only come after clipping."""
    model = make_model()
    layer = next(module for module in model.modules() if isinstance(module, MPOExperts))
    callback = AccumulationCallback(Accumulation(model))

    def leave_out(state, control):
        layer.accumulation = None

    with pytest.raises(RuntimeError, match="a layer was left out"):
        train(model, tmp_path, [callback, OnSubstepEnd(leave_out)])
    callback.accumulation.clear()
