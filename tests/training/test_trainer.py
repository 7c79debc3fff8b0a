"""The Trainer's loss: the same gradients however a step is cut up, with the routers' part in all of them."""

import warnings

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState
from transformers.modeling_outputs import Seq2SeqLMOutput

import mpoe
from mpoe.models import mixtures, sharing_experts
from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.tasks import get_task, load_task
from mpoe.training.text_to_text import Evaluation, evaluate, parse, tokenize, trainer_parts
from mpoe.training.trainer import DeadExpertWarning, StepTimer, build_trainer, step_loss, summed_cross_entropy
from tiny import tiny_batch, tiny_t5, tiny_tokenizer, write_sentiment


def make_model(coef=0.5, **options):
    torch.manual_seed(0)
    config = mpoe.MPOEConfig(**{"num_experts": 4, "balancing": "loss", "load_balancing_coef": coef, **options})
    model = mpoe.upcycle(tiny_t5(), config).train()
    with torch.no_grad():
        for experts in sharing_experts(model).values():
            for tensor in experts.auxiliary.values():
                tensor.add_(torch.randn_like(tensor) * 0.1)  # experts that differ
    return model


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trainer_step(model, batch, tmp_path, micro_batches=1, **options):
    """The gradients of one optimizer step of the real Trainer over `batch`, repeated as often as it is cut."""
    args = FinetuneTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        gradient_accumulation_steps=micro_batches,
        disable_tqdm=True,
        eval_strategy="no",
        **options,
    )
    trainer = build_trainer(model, tiny_tokenizer(), args, trainer_parts(model, tiny_tokenizer(), args, None, []))
    trainer.current_gradient_accumulation_steps = micro_batches
    batch = {**batch, "decoder_input_ids": model._shift_right(batch["labels"])}  # as the data collator does
    batches, num_items = trainer.get_batch_samples(
        iter([dict(batch) for _ in range(micro_batches)]), micro_batches, "cpu"
    )
    for micro_batch in batches:
        trainer.training_step(model, micro_batch, num_items)
    return gradients(model)


def test_it_is_the_models_own_loss():
    model, batch = make_model(), tiny_batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    output = model(
        **{k: v for k, v in batch.items() if k != "labels"}, decoder_input_ids=model._shift_right(batch["labels"])
    )
    step_loss(model, summed_cross_entropy())(output, batch["labels"]).backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_accumulation_is_one_plain_batch(tmp_path):
    """Equal micro-batches have the balance loss of one of them, so every gradient must come out the same."""
    model, batch = make_model(), tiny_batch()
    plain = trainer_step(model, batch, tmp_path / "1")
    accumulated = trainer_step(model, batch, tmp_path / "4", micro_batches=4)
    for name, gradient in plain.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-6)


def test_unequal_micro_batches_weigh_by_target_tokens(tmp_path):
    model, batch = make_model(coef=0.0), tiny_batch(rows=4)
    batch["labels"][0, 1:] = -100
    whole = trainer_step(model, batch, tmp_path)
    halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    loss, num_items = step_loss(model, summed_cross_entropy()), (batch["labels"] != -100).sum()
    for half in halves:
        labels = half.pop("labels")
        loss(model(**half, decoder_input_ids=model._shift_right(labels)), labels, num_items).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-6)


def test_the_routers_gradient_is_the_same_with_smoothing(tmp_path):
    """The part of the balance loss alone: the difference between two coefficients."""

    def balance_part(folder, **smoothing):
        found = []
        for coef in (0.0, 1.0):
            model = make_model(coef)
            torch.manual_seed(1)
            found.append(trainer_step(model, tiny_batch(), folder, **smoothing))
        routers = [name for name in found[0] if ".router." in name]
        return torch.cat([(found[1][name] - found[0][name]).flatten() for name in routers])

    plain, other = balance_part(tmp_path / "a"), balance_part(tmp_path / "b", label_smoothing_factor=0.1)
    assert plain.norm() > 0
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-6)


def test_label_smoothing_is_transformers(tmp_path):
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    labels[1, 2:] = -100
    ours = step_loss(tiny_t5(), summed_cross_entropy(0.1))(Seq2SeqLMOutput(logits=logits), labels)
    assert ours.item() == pytest.approx(LabelSmoother(0.1)({"logits": logits}, labels).item(), rel=1e-5)


def test_evaluation_is_clean_and_row_by_row(tmp_path):
    tokenizer, task = tiny_tokenizer(), get_task("sentiment")
    data = load_task(task, str(write_sentiment(tmp_path / "data")), 0)
    rows = tokenize(data.test, tokenizer, 128)
    model = make_model().eval()
    args = FinetuneTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=5, generation_max_length=3
    )
    trainer = build_trainer(model, tokenizer, args, trainer_parts(model, tokenizer, args, rows, [(task, rows)]))
    found = evaluate(trainer, rows, task, tokenizer)
    expected = []
    for row in rows:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        expected.append((task.parse(tokenizer.decode(row["labels"][:-1])), output.loss.item() * len(row["labels"])))
    # in an order of its own
    pairs = zip(found.targets, found.target_nll, strict=True)
    for (target, nll), (expected_target, expected_nll) in zip(sorted(pairs), sorted(expected), strict=True):
        assert target == expected_target
        assert nll == pytest.approx(expected_nll, rel=1e-4)
    assert found.metrics(task)["rows"] == 12


def test_parse_and_join():
    tokenizer, task = tiny_tokenizer(), get_task("sentiment")
    ids = tokenizer(["positive", "negative", "film film"], padding=True, return_tensors="np")["input_ids"]
    padded = np.where(ids == tokenizer.pad_token_id, -100, ids)
    assert parse(task, tokenizer, padded).tolist() == [1, 0, -1]
    half = Evaluation(np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([0.5, 1.5]))
    both = half + half
    assert both.metrics(task) == {"accuracy": 0.5, "cross_entropy": 1.0, "rows": 4}


def test_tokenize_cuts_and_ends():
    tokenizer, task = tiny_tokenizer(), get_task("sentiment")
    assert task.source({"sentence": "a film"}) == "sentiment sentence: a film"
    rows = load_rows(["the film is great . very good film"], ["positive"])
    encoded = tokenize(rows, tokenizer, 4)
    assert len(encoded[0]["input_ids"]) == 4
    assert encoded[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert encoded[0]["labels"][-1] == tokenizer.eos_token_id


def load_rows(sources, targets):
    import datasets

    return datasets.Dataset.from_dict({"source": sources, "target": targets})


def test_step_timer():
    timer, state = StepTimer(), TrainerState(num_input_tokens_seen=50)  # of a checkpoint that is resumed
    assert (timer.median, timer.tokens_per_second) == (None, None)
    timer.on_train_begin(None, state, None)
    for _ in range(3):
        timer.on_step_begin(None, state, None)
        state.num_input_tokens_seen += 10
        timer.on_step_end(None, state, None)
    assert len(timer.seconds) == 3
    assert timer.median >= 0
    assert timer.tokens == 30
    assert timer.tokens_per_second == 30 / sum(timer.seconds)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"balancing": "bias", "load_balancing_coef": None}, "A larger balancing_step, or"),
        ({"layout": "balanced"}, "A higher load_balancing_coef, or"),
    ],
)
def test_dead_experts_are_named(options, advice):
    model = make_model(**options)
    for layer in mixtures(model).values():
        if layer.router.balancing is None:
            layer.router.bias.data = torch.tensor([9.0, 9.0, -9.0, -9.0])
        else:
            layer.router.balancing.steps.copy_(torch.tensor([900, 900, -900, -900]))
    callback = DeadExpertWarning()
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    model(**tiny_batch(8, 20))
    with pytest.warns(UserWarning, match=rf"8 of 16 experts got under 1%.*\[2, 3\]\. {advice}"):
        callback.on_epoch_end(None, TrainerState(epoch=1.0), TrainerControl(), model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback.on_epoch_end(None, TrainerState(epoch=2.0), TrainerControl(), model=model)
