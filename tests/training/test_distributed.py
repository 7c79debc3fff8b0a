"""Two processes beside one; `make distributed` has more of it."""

import json
import shutil
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from mpoe.cli.main import main
from mpoe.training.live import read_log
from tiny import FLAGS, tiny_t5, tiny_tokenizer, write_sentiment

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
COMMAND = ["-m", "mpoe.cli.main", "finetune", *FLAGS, "--gradient_mask_prob", "0.5"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a model, data and the run of one process."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny_t5().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_sentiment(folder / "data")
    finish(folder, sys.executable, *COMMAND, "--gradient_accumulation_steps", "2")
    (folder / "run").rename(folder / "one")
    return folder


def finish(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_equal_logs(one, other):
    """The processes' tokens are counted together, each of them once."""
    first, second = map(read_log, (one, other))
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for line, of_other in zip(first, second, strict=True):
        assert line.get("mask") == of_other.get("mask")
        for name, values in line.get("layers", {}).items():
            assert of_other["layers"][name] == {
                key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in values.items()
            }


def assert_equal_runs(one, other):
    expected, got = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert max((got[name] - weight).abs().max().item() for name, weight in expected.items()) <= 1e-5
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    assert first["gradient_mask"] == second["gradient_mask"]
    for split, of_one in first["tasks"]["sentiment"].items():
        of_two = second["tasks"]["sentiment"][split]
        assert (of_one["accuracy"], of_one["rows"]) == (of_two["accuracy"], of_two["rows"])


def test_two_processes_train_as_one_with_two_micro_batches(ground):
    printed = finish(ground, *TWO, *COMMAND)
    assert printed.count("Load of each expert") == 1
    assert_equal_runs(ground / "one", ground / "run")
    assert_equal_logs(ground / "one", ground / "run")
    shutil.rmtree(ground / "run")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="this Trainer puts optimizers on cpu:0, which torch refuses",
)
def test_two_processes_go_on_from_a_checkpoint_of_one(ground):
    (ground / "run").mkdir()
    shutil.copy(ground / "one" / "run.json", ground / "run")
    shutil.copytree(ground / "one" / "checkpoint-2", ground / "run" / "checkpoint-2")
    assert finish(ground, *TWO, *COMMAND).count("resuming from run/checkpoint-2") == 1
    assert_equal_runs(ground / "one", ground / "run")


def test_a_run_keeps_its_rows_a_step(ground, monkeypatch, capsys):
    monkeypatch.chdir(ground)
    assert main([*COMMAND[2:], "--output_dir", "one"]) == 2
    assert "rows_a_step: 8 there, 4 now" in capsys.readouterr().err


def test_sharding_needs_accelerators(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_t5().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_sentiment(tmp_path / "data")
    assert main(["finetune", *FLAGS, "--fsdp"]) == 2
    assert "fsdp needs several processes with an accelerator each; got 1 on the cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
