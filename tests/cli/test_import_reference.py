"""`mpoe import-reference`."""

import json

import pytest
import torch

import mpoe
from mpoe.cli.import_reference import run
from mpoe.models import load_tokenizer, mixtures
from mpoe.models.reference import read_checkpoint
from reference_checkpoint import base, write
from tiny import tiny_tokenizer


@pytest.fixture
def reference_ground(tmp_path, monkeypatch):
    """A folder with a checkpoint, and one with its base."""
    monkeypatch.chdir(tmp_path)
    dense = base()
    dense.config.save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    (tmp_path / "run").mkdir()
    torch.save(write(dense, parts=("attention",)), "run/pytorch_model.bin")
    return tmp_path


def test_the_command_writes_a_mixtures_folder(reference_ground, capsys):
    run(["run/pytorch_model.bin", "--config", "base", "--output_dir", "new/out", "--is_scale_prob"])
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("mixtures │ 4", "experts in each │ 3", "Square matrices (32×32) were read like the other matrices"):
        assert text in printed
    assert "mpoe predict new/out 'a text'" in printed
    model = mpoe.from_pretrained("new/out")
    stored = sum(t.numel() for t in read_checkpoint(reference_ground / "run" / "pytorch_model.bin").values())
    once_more = 2 * sum(e.central.numel() for layer in mixtures(model).values() for e in (layer.up, layer.down))
    assert f"millions │ {stored / 1e6:,.3f}" in printed
    assert f"parameters here, millions │ {(stored - once_more) / 1e6:,.3f}" in printed
    assert model.config.quantization_config.is_scale_prob
    assert load_tokenizer("new/out").get_vocab() == tiny_tokenizer().get_vocab()
    assert [path.name for path in (reference_ground / "new").iterdir()] == ["out"]


def test_the_command_finds_the_config_beside_the_checkpoint(reference_ground, capsys):
    (reference_ground / "base" / "config.json").rename(reference_ground / "run" / "config.json")
    (reference_ground / "out").mkdir()
    run(["run/pytorch_model.bin", "--output_dir", "out", "--orientation", "out-in"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "were read as out-in" in printed
    assert "No tokenizer was at hand" in printed
    config = json.loads((reference_ground / "out" / "config.json").read_text())
    assert config["quantization_config"]["gauge"] == "sqrt"


def test_the_commands_errors_leave_nothing_behind(reference_ground):
    with pytest.raises(ValueError, match=r"no config.json is beside run/pytorch_model.bin: name the dense base"):
        run(["run/pytorch_model.bin", "--output_dir", "out"])
    with pytest.raises(ValueError, match="base must be new or an empty folder"):
        run(["run/pytorch_model.bin", "--config", "base", "--output_dir", "base"])
    with pytest.raises(ValueError, match="Is it the config of this checkpoint's base"):
        run(["run/pytorch_model.bin", "--config", "t5-small", "--output_dir", "out"])
    assert sorted(path.name for path in reference_ground.iterdir()) == ["base", "run"]
