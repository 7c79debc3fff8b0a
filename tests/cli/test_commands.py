"""The commands as a user types them, on a tiny model and a tiny task."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

import mpoe
from mpoe.cli import finetune
from mpoe.cli.main import COMMANDS, main
from mpoe.models import mixtures
from tiny import FLAGS, assert_refused, files, tiny_t5

# Two experts and a dozen tokens: one of them goes hungry.
pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")


def test_finetune_writes_everything_and_predict_reads_it(ground, capsys):
    assert main(["finetune", *FLAGS]) == 0
    printed = capsys.readouterr().out
    for text in ("central tensors (shared)", "Load of each expert", "sentiment after 4 steps", "cross entropy"):
        assert text in printed
    results = json.loads((ground / "run" / "results.json").read_text())
    metrics = results["tasks"]["sentiment"]
    assert metrics["test"]["rows"] == 12
    assert metrics["dev"] == metrics["test"]
    assert results["average"]["test"] == metrics["test"]["accuracy"]
    assert results["steps"] == 4
    assert list(results["routers"]) == [f"encoder.block.{b}.layer.1.DenseReluDense" for b in (0, 1)]
    assert results["seconds_per_step"] > 0
    assert results["train_loss"] > 0
    assert len(mixtures(mpoe.from_pretrained("run"))) == 2

    assert main(["predict", "run", "--task", "sentiment", "the film is great", "the film is awful"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["the film is great", "the film is awful"]


def test_the_same_command_again_finds_a_finished_run(ground, capsys):
    assert main(["finetune", *FLAGS]) == 0
    before = files(ground)
    capsys.readouterr()
    assert main(["finetune", *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert "Found a finished run" in printed
    assert "sentiment after 4 steps" in printed
    assert files(ground) == before
    (ground / "run" / "results.json").write_text('{"metrics": {}}')
    assert_refused(["finetune", *FLAGS], "must be what this version of mpoe wrote", ground, capsys)


def test_an_interrupted_run_resumes_to_the_same_end(ground, capsys, monkeypatch):
    assert main(["finetune", *FLAGS]) == 0
    unbroken = files(ground / "run")
    shutil.rmtree(ground / "run")

    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    from mpoe.training import finetune as training

    original = training.build_trainer

    def interrupted(*args):
        trainer = original(*args)
        trainer.add_callback(Interrupt())
        return trainer

    monkeypatch.setattr(training, "build_trainer", interrupted)
    assert main(["finetune", *FLAGS]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(ground)
    assert main(["finetune", *FLAGS]) == 0
    assert "resuming from run/checkpoint-2" in capsys.readouterr().out
    weights = next(name for name in unbroken if name.name == "model.safetensors")
    assert (ground / "run" / weights).read_bytes() == unbroken[weights]


def test_a_run_that_died_in_its_final_save_trains_no_step_more(ground):
    flags = [*FLAGS, "--eval_strategy", "steps", "--eval_steps", "2", "--gradient_mask_prob", "0.5"]
    assert main(["finetune", *flags]) == 0
    unbroken = {name: data for name, data in files(ground / "run").items() if len(name.parts) == 1}
    for name in ("results.json", "model.safetensors", "generation_config.json"):
        (ground / "run" / name).unlink()
    assert main(["finetune", *flags]) == 0
    for name, data in unbroken.items():
        again = (ground / "run" / name).read_bytes()
        if name.name == "results.json":
            first, second = json.loads(data), json.loads(again)
            clocks = ("seconds_per_step", "tokens_per_second", "peak_memory")
            assert {k: v for k, v in first.items() if k not in clocks} == {
                k: v for k, v in second.items() if k not in clocks
            }
        else:
            assert again == data, name
    assert not (ground / "run" / "checkpoint-5").exists()


def test_config_file_and_flags(ground):
    values = {
        "model_name_or_path": "model", "task": "sentiment", "data_dir": "data", "num_experts": 2, "max_steps": 2,
        "learning_rate": "1e-4", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "output_dir": "run",
        "layout": "balanced", "site_dims": {"64x32": [[16, 4, 1], [1, 4, 8]]},
    }  # fmt: skip
    (ground / "run.yaml").write_text(yaml.safe_dump(values))
    (ground / "run.json").write_text(json.dumps(values))
    from_yaml = finetune.run(["run.yaml", "--num_experts", "3", "--output_dir", "a"])
    from_json = finetune.run(["run.json", "--num_experts", "3", "--output_dir", "b"])
    assert from_yaml.tasks == from_json.tasks
    assert from_yaml.parameters == from_json.parameters
    layer = next(iter(mixtures(mpoe.from_pretrained("a")).values()))
    assert layer.router.num_experts == 3
    assert layer.up.dims.out_dims == (16, 4, 1)
    assert torch.load("a/training_args.bin", weights_only=False).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (["--mpo_layers", "nompo"], 2),
        (["--layout", "balanced", "--linear_trunc", "6", "--expert_noise", "0.01", "--stacks", "encoder,decoder"], 4),
        (["--layout=balanced", "--stacks=encoder", "--layers=1", "--max_auxiliary_bond=8", "--is_scale_prob"], 1),
        (["--expert_rank", "2", "--expert_scale", "0.5", "--expert_activation", "gelu", "--frozen_router"], 2),
        (["--moe_type", "none", "--mpo_layers", "nompo", "--freeze_embeds", "--dropout", "0.0"], 0),
        (["--gradient_accumulation_steps", "2", "--label_smoothing_factor", "0.1", "--n_train", "10"], 2),
    ],
)
def test_flags_reach_the_model(ground, flags, count):
    assert main(["finetune", *FLAGS, "--max_steps", "1", "--save_strategy", "no", *flags]) == 0
    loaded = mpoe.from_pretrained("run") if count else None
    assert count == 0 or len(mixtures(loaded)) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert_count: 8\n", "unknown config key 'expert_count'"),
        ("- 8\n", "must hold flags and their values, as a mapping; got list"),
        ("task: [", "must be a readable yaml file"),
        ("task: sentiment\n", "the following arguments are required"),
        (
            "num_experts: 0\nmodel_name_or_path: model\ntask: sentiment\noutput_dir: run\ndata_dir: data\n",
            "num_experts",
        ),
    ],
)
def test_bad_config_files(ground, capsys, text, message):
    (ground / "run.yaml").write_text(text)
    assert_refused(["finetune", "run.yaml"], message, ground, capsys)


def test_a_saved_mixture_is_trained_on(ground):
    assert main(["finetune", *FLAGS, "--layers", "1"]) == 0
    assert (
        main(["finetune", *FLAGS, "--model_name_or_path", "run", "--output_dir", "more", "--learning_rate", "0.1"]) == 0
    )
    first, second = mpoe.from_pretrained("run"), mpoe.from_pretrained("more")
    assert list(mixtures(second)) == list(mixtures(first)) == ["encoder.block.1.layer.1.DenseReluDense"]
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing_under_the_references_name(ground):
    plain = finetune.run([*FLAGS, "--max_steps", "2", "--save_strategy", "no"])
    flags = ["--gradient_checkpointing", "--output_dir", "other", "--max_steps", "2", "--save_strategy", "no"]
    assert finetune.run([*FLAGS, *flags]).train_loss == pytest.approx(plain.train_loss, rel=1e-5)


def test_another_runs_folder_is_left_alone(ground, capsys):
    assert main(["finetune", *FLAGS]) == 0
    before = files(ground)
    assert main(["finetune", *FLAGS, "--learning_rate", "0.5"]) == 2
    assert "holds another run (learning_rate: the default there, 0.5 now)" in capsys.readouterr().err
    assert files(ground) == before


def test_a_bad_line_in_the_data_is_named(ground, capsys):
    with (ground / "data/sentiment/train.tsv").open("a") as file:
        file.write("a film without a label\n")
    assert main(["finetune", *FLAGS]) == 2
    assert "train.tsv:42: a line must have 2 tab-separated columns; got 1" in capsys.readouterr().err
    assert not (ground / "run").exists()


def test_inspect_counts_t5_base_without_building_it(capsys):
    assert main(["inspect", "--config", "t5-base", "--num_experts", "4", "8", "16"]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if "total" in line)
    assert [cell.strip() for cell in total.strip("│ ").split("│")] == ["total", "222.9", "228.9", "234.8", "246.8"]


def test_inspect_reads_a_saved_mixture(ground, capsys):
    mpoe.upcycle(tiny_t5(), mpoe.MPOEConfig(num_experts=2)).save_pretrained("mixture")
    assert main(["inspect", "--config", "mixture"]) == 0
    assert "saved mixture" in capsys.readouterr().out
    assert main(["inspect", "--config", "nothing/there"]) == 2
    assert "nothing/there must be a folder with a config.json" in capsys.readouterr().err


def test_inspect_counts_the_head_of_an_untied_model(ground, capsys):
    model = mpoe.upcycle(tiny_t5(d_model=512, vocab_size=32000), mpoe.MPOEConfig(num_experts=2))
    model.save_pretrained("untied")
    assert main(["inspect", "--config", "untied"]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if "total" in line)
    assert total.strip("│ ").split("│")[-1].strip() == f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"


def test_a_missing_tokenizer_is_an_error(ground, capsys):
    (ground / "model" / "tokenizer.json").unlink()
    assert main(["finetune", *FLAGS]) == 2
    assert "model must hold its model's tokenizer" in capsys.readouterr().err
    assert not (ground / "run").exists()


def test_predict_refuses_what_it_cannot_do(ground, capsys):
    assert main(["predict", "data", "a text"]) == 2
    assert "data must be a folder with a config.json" in capsys.readouterr().err
    assert main(["predict", "./nowhere", "a text"]) == 2
    assert "./nowhere must be a folder with a config.json; there is no such folder" in capsys.readouterr().err
    assert main(["predict", "model", "a text"]) == 0, "a dense model answers too"
    assert main(["predict", "model", "--task", "mrpc", "a text"]) == 2
    assert "task mrpc takes several texts (sentence1, sentence2)" in capsys.readouterr().err


def test_damaged_and_foreign_models_are_named(ground, capsys):
    weights = ground / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["finetune", *FLAGS]) == 2
    assert "the weights in model must be complete and undamaged" in capsys.readouterr().err.splitlines()[-1]
    (ground / "model" / "config.json").write_text('{"model_type": "bert"}')
    assert main(["finetune", *FLAGS]) == 2
    error = capsys.readouterr().err
    assert "Unrecognized configuration class" in error
    assert error.count("\n") == 1
    assert not (ground / "run").exists()


def test_progress_is_shown(ground, capfd):
    flags = [flag for flag in FLAGS if flag not in ("--disable_tqdm", "True")]
    assert main(["finetune", *flags, "--save_strategy", "no"]) == 0
    error = capfd.readouterr().err
    assert "4/4" in error
    assert "Evaluating sentiment: 100%" in error


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mpoe.__version__
    assert main(["fintune"]) == 2
    message = f"unknown command 'fintune': did you mean finetune? commands are {', '.join(COMMANDS)}"
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    assert "--max_auxiliary_bond" in capsys.readouterr().out


def test_demo_end_to_end(ground, capfd):
    """With its own flags for weights and data, so that nothing is downloaded; the last step is a real new process."""
    flags = "--model_name_or_path model --data_dir data --output_dir demo --num_experts 2 --max_steps 2 --batch_size 4"
    assert main(["demo", "--compare", *flags.split()]) == 0
    printed = capfd.readouterr().out
    for text in ("What this does", "before fine-tuning", "whole experts", "Load of each expert", "in a new process"):
        assert text in printed
    assert printed.count("A warm and witty film") == 1
    assert main(["demo", *flags.split()]) == 0
    assert "Found a finished run in demo/mpoe" in capfd.readouterr().out
    assert main(["demo", "--num_experts", "0"]) == 2
    assert main(["demo", "--max_steps", "0"]) == 2


def test_the_installed_command(ground):
    done = subprocess.run(
        [sys.executable, "-m", "mpoe.cli.main", "inspect", "--config", "model"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "8 experts" in done.stdout
