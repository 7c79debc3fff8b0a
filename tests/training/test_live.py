"""What training logs of a mixture: the right numbers, to whoever keeps them, in a file that no crash spoils."""

import json
from collections import defaultdict

import pytest
import torch
from transformers import TrainerCallback

import mpoe
from mpoe.cli.main import main
from mpoe.models import routers
from mpoe.nn import divergence
from mpoe.training import argument_checks
from mpoe.training.arguments import FinetuneTrainingArguments
from mpoe.training.live import LiveLog, cut_log, flat, read_log
from mpoe.training.run_folder import LOG_FILE
from mpoe.training.tasks import get_task, load_task
from mpoe.training.text_to_text import tokenize, trainer_parts
from mpoe.training.trainer import build_trainer
from tiny import FLAGS, assert_refused, run_and_kill, tiny_t5, tiny_tokenizer, write_sentiment

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")


class Witness(TrainerCallback):
    """Keeps what it is given, as a callback of `report_to` does."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def train(folder, callbacks=(), balancing="bias", **options):
    """A real Trainer with a LiveLog; its model and what every router decided in training, by logging step."""
    torch.manual_seed(0)
    model = mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=4, balancing=balancing))
    tokenizer, task = tiny_tokenizer(), get_task("sentiment")
    data = load_task(task, str(write_sentiment(folder / "data")), 0)
    train_rows, rows = tokenize(data.train, tokenizer, 128), tokenize(data.test, tokenizer, 128)
    args = FinetuneTrainingArguments(
        output_dir=str(folder / "run"), use_cpu=True, per_device_train_batch_size=4, save_strategy="no",
        **{"logging_steps": 2, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 3,
           "generation_max_length": 3, **options},
    )  # fmt: skip
    parts = trainer_parts(model, tokenizer, args, train_rows, [(task, rows)])
    trainer = build_trainer(model, tokenizer, args, parts, callbacks)
    LiveLog().attach(trainer)
    counted = defaultdict(lambda: torch.zeros(4, dtype=torch.long))
    weighed, losses = defaultdict(list), defaultdict(list)
    decided = []

    def count(name):
        def hook(router, inputs, route):
            if router.training:
                real = route.expert_index if route.mask is None else route.expert_index[route.mask]
                counted[name] += torch.bincount(real.flatten(), minlength=4)
                probabilities = route.probabilities if route.mask is None else route.probabilities[route.mask]
                weighed[name].append(probabilities * torch.eye(4)[real].sum(1))
                first = torch.bincount(real[:, 0], minlength=4) / len(real)
                losses[name].append(4 * first @ probabilities.mean(0))

        return hook

    class Collect(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                decided.append(
                    {
                        name: (counts.clone(), torch.cat(weighed[name]).mean(0), torch.stack(losses[name]).mean())
                        for name, counts in counted.items()
                    }
                )
                for kept in (counted, weighed, losses):
                    kept.clear()

    for name, router in routers(model).items():
        router.register_forward_hook(count(name))
    trainer.add_callback(Collect())
    trainer.train()
    return model, decided


@pytest.mark.parametrize("balancing", ["bias", "loss"])
def test_shares_are_those_of_training_alone(tmp_path, balancing):
    """Evaluations lie between the logging steps, and route other rows."""
    model, decided = train(tmp_path, balancing=balancing)
    lines = read_log(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    for line, counts in zip([line for line in lines if "loss" in line], decided, strict=True):
        assert line["layers"].keys() == counts.keys() == routers(model).keys()
        for name, values in line["layers"].items():
            of_layer, mass, loss = counts[name]
            assert values["share"] == pytest.approx((of_layer / of_layer.sum()).tolist(), rel=1e-5)
            assert values["gate_mass"] == pytest.approx(mass.tolist(), rel=1e-5)
            if balancing == "loss":
                assert values["balance_loss"] == pytest.approx(loss.item(), rel=1e-5)
            else:
                assert "balance_loss" not in values
            assert 0 < values["entropy"] <= torch.tensor(4).log() + 1e-6
    last = {name: values["divergence"] for name, values in lines[-2]["layers"].items()}
    for name in last:
        assert last[name] == pytest.approx(float(divergence(model.get_submodule(name))), rel=1e-5)
    assert not any("runtime" in name or "per_second" in name for line in lines for name in line)


def test_who_reports_gets_the_numbers_and_the_screen_does_not(tmp_path, capsys):
    witness = Witness()
    train(tmp_path, [witness], balancing="loss", max_steps=2, disable_tqdm=True)
    first = witness.logs[0]
    assert first["router/entropy"] > 0
    layer = "encoder.block.0.layer.1"
    assert sum(first[f"experts/share/{layer}/{e}"] for e in range(4)) == pytest.approx(1)
    assert 0 < sum(first[f"experts/gate_mass/{layer}/{e}"] for e in range(4)) < 1
    of_layers = [value for name, value in first.items() if name.startswith("router/balance_loss/")]
    assert first["router/balance_loss"] == pytest.approx(sum(of_layers) / len(of_layers))
    assert all(isinstance(value, float | int) for value in first.values())
    printed = capsys.readouterr().out
    assert "'loss'" in printed
    assert "router/entropy" not in printed


def test_tensorboard_gets_them(ground):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["finetune", *FLAGS, "--report_to", "tensorboard", "--gradient_mask_prob", "0.5"]) == 0
    (folder,) = (ground / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/router/entropy")]
    assert steps == [2, 4]
    lines = [line for line in read_log(ground / "run") if "loss" in line]
    discarded = [event.value for event in events.Scalars("train/mask/discarded")]
    assert discarded == [line["mask"]["discarded"] for line in lines]


def test_a_package_that_is_missing_is_one_clear_error(ground, capsys, monkeypatch):
    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", list)
    command = ["finetune", *FLAGS, "--report_to", "tensorboard"]
    assert_refused(command, "report_to tensorboard needs its package, which is not installed", ground, capsys)


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_logs_what_an_unbroken_one_does(ground, step):
    flags = [*FLAGS, "--gradient_mask_prob", "0.5", "--eval_strategy", "steps", "--eval_steps", "3"]
    assert main(["finetune", *flags]) == 0
    expected = (ground / "run" / LOG_FILE).read_bytes()
    weights = (ground / "run" / "model.safetensors").read_bytes()
    assert [line["step"] for line in map(json.loads, expected.splitlines())] == [2, 3, 4, 4]
    (ground / "run").rename(ground / "unbroken")
    run_and_kill(flags, step)
    if step == 3:
        with (ground / "run" / LOG_FILE).open("ab") as file:
            file.write(b'{"step": 4, "loss": 9.0}\n{"step": 4, "lo')  # what came after the checkpoint, and half a line
    assert main(["finetune", *flags]) == 0
    assert (ground / "run" / LOG_FILE).read_bytes() == expected
    assert (ground / "run" / "model.safetensors").read_bytes() == weights


def test_a_dense_run_logs_its_curves(ground):
    assert main(["finetune", *FLAGS, "--moe_type", "none", "--mpo_layers", "nompo", "--max_steps", "2"]) == 0
    lines = read_log(ground / "run")
    assert lines[0]["loss"] > 0
    assert lines[-1]["eval_loss"] > 0
    assert not any("layers" in line or "mask" in line for line in lines)


def test_numbers_that_json_has_not(tmp_path):
    train(tmp_path, max_steps=2, learning_rate=1e30, max_grad_norm=0.0, logging_steps=1)
    text = (tmp_path / "run" / LOG_FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [line["step"] for line in read_log(tmp_path / "run")][:2] == [1, 2]


def test_a_damaged_line_ends_what_is_read(tmp_path):
    assert read_log(tmp_path) == []
    lines = [b'{"step": 1, "loss": 2.0}\n', b'{"step": 2, "loss": 1.0}\n']
    for damage in (b"{", b"[]\n", b'{"loss": 1}\n', b"\xff\n", b'{"step": 3}'):
        (tmp_path / LOG_FILE).write_bytes(b"".join([*lines, damage]))
        assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    cut_log(tmp_path, 1)
    assert (tmp_path / LOG_FILE).read_bytes() == lines[0]
    cut_log(tmp_path, 0)
    assert (tmp_path / LOG_FILE).read_bytes() == b""
    cut_log(tmp_path / "new", 5)
    assert not (tmp_path / "new" / LOG_FILE).exists()


def test_means_and_layers_have_names():
    values = {"balance_loss": 1.0, "entropy": 0.5, "dropped_fraction": 0.0, "divergence": 0.2, "share": [0.75, 0.25]}
    other = {**values, "entropy": 1.5, "share": [0.5, 0.5]}
    numbers = flat({"layers": {"a.0.mlp": values, "a.1.mlp": other}, "mask": {"drawn": 4, "discarded": 2}})
    assert numbers["router/entropy"] == 1.0
    assert numbers["experts/largest_share"] == 0.625
    assert (numbers["router/entropy/a.1"], numbers["experts/share/a.0/1"]) == (1.5, 0.25)
    assert (numbers["mask/drawn"], numbers["mask/discarded"]) == (4, 2)
    assert flat({"loss": 1.0}) == {}
