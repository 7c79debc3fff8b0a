"""Two processes beside one; `make distributed` has more of it."""

import json
import subprocess
import sys

from safetensors.torch import load_file

from tiny import FLAGS, tiny_t5, tiny_tokenizer, write_sentiment

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
COMMAND = ["-m", "mpoe.cli.main", "finetune", *FLAGS]


def test_two_processes_train_as_one_with_two_micro_batches_and_go_on_from_its_checkpoint(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_sentiment(tmp_path / "data")

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(sys.executable, *COMMAND, "--gradient_accumulation_steps", "2", "--gradient_mask_prob", "0.5")
    assert done.returncode == 0, done.stderr
    one = tmp_path / "run"
    one.rename(tmp_path / "one")
    # two processes, from the checkpoint of one
    one.mkdir()
    for name in ("run.json", "checkpoint-2"):
        (tmp_path / "one" / name).rename(one / name)
    done = run(*TWO, *COMMAND, "--gradient_mask_prob", "0.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming from run/checkpoint-2") == 1
    expected, got = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", one))
    assert max((got[name] - weight).abs().max().item() for name, weight in expected.items()) <= 1e-5
    results = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "one", one)]
    for of_one, of_two in zip(*(r["tasks"]["sentiment"].values() for r in results), strict=True):
        assert of_one["accuracy"] == of_two["accuracy"]
        assert of_one["rows"] == of_two["rows"]
    assert results[0]["gradient_mask"] == results[1]["gradient_mask"]
    # four rows a step instead of eight are another run
    done = run(sys.executable, *COMMAND, "--gradient_mask_prob", "0.5")
    assert done.returncode == 2
    assert "rows_a_step: 8 there, 4 now" in done.stderr


def test_sharding_needs_accelerators(tmp_path, monkeypatch, capsys):
    from mpoe.cli.main import main

    monkeypatch.chdir(tmp_path)
    tiny_t5().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_sentiment(tmp_path / "data")
    assert main(["finetune", *FLAGS, "--fsdp"]) == 2
    assert "fsdp needs several processes with an accelerator each; got 1 on the cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
