"""`mpoe export` as a user types it: what it writes loads in a process that never imports mpoe."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

import mpoe
from mpoe.cli.export import EXPORT_FILE, run
from mpoe.cli.main import main
from mpoe.models import routers
from tiny import V1_0, V1_1, assert_refused, files, logits_of, moved, save_tiny_adapter, tiny_t5, tiny_tokenizer
from tiny_families import tiny_model

TEXT = "the film is good\n\nnot very fun : a dull sentence\nbad\n"
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
folder, kind, expected = sys.argv[1:]
batch, logits = torch.load(expected)
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    got = getattr(sys.modules["transformers"], kind).from_pretrained(folder)(**batch).logits
print((got - logits).abs().max().item())
assert not any(name.split(".")[0] == "mpoe" for name in sys.modules)
"""


def save(name, folder, bias=0.0, **options):
    """A mixture whose experts differ, with a tokenizer."""
    model = tiny_t5(V1_0 if name == "t5-v1.0" else V1_1) if name.startswith("t5") else tiny_model(name)
    options = {"num_experts": 3, "layout": "balanced", "expert_noise": 0.3, **options}
    moved(mpoe.upcycle(model, mpoe.MPOEConfig(**options)))
    with torch.no_grad():
        for router in routers(model).values():
            router.bias.copy_(torch.randn_like(router.bias) * bias)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)


def difference_without_mpoe(folder, kind, batch, logits):
    """Largest difference of logits in a process of its own."""
    torch.save((batch, logits), "expected.pt")
    command = [sys.executable, "-W", "error", "-c", LOAD, folder, kind, "expected.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_routed_export_is_the_mixture_without_mpoe(capsys):
    model = save("t5-v1.0", "mixture")
    found = run(["mixture", "-o", "out", "--routed", "--text_file", "text.txt"])
    batch = dict(tiny_tokenizer()(["the film is good"], return_tensors="pt"))
    batch["labels"] = batch["input_ids"]
    assert difference_without_mpoe("out", "AutoModelForSeq2SeqLM", batch, logits_of(model, batch)) < 1e-5
    assert found.largest < 1e-5
    assert found.same_choice == 1
    printed = capsys.readouterr().out
    for text in ("SwitchTransformersForConditionalGeneration", "15 tokens of text.txt", "same most probable choice"):
        assert text in " ".join(printed.split())


def test_the_difference_that_is_reported_is_what_others_get():
    model = save("llama", "mixture", bias=0.1, top_k=2)
    Path("one.txt").write_text("the film is not very good\n")
    batch = dict(tiny_tokenizer()(["the film is not very good"], return_tensors="pt"))
    for n, flags in enumerate((["--average"], ["--expert", "2"], ["--routed", "--approximate"])):
        found = run(["mixture", "-o", f"out{n}", *flags, "--text_file", "one.txt"])
        there = difference_without_mpoe(f"out{n}", "AutoModelForCausalLM", batch, logits_of(model, batch))
        assert there == pytest.approx(found.largest, rel=1e-3)
        record = json.loads(Path(f"out{n}", EXPORT_FILE).read_text())
        assert record["logits"]["largest"] == found.largest
        assert record["from"] == "LlamaForCausalLM of 3 experts"
    assert record["to"] == "MixtralForCausalLM"


def test_one_expert_and_the_mean_are_those_of_merge():
    model = save("t5-v1.1", "mixture")
    batch = {"input_ids": torch.randint(2, 64, (2, 7)), "labels": torch.randint(2, 64, (2, 4))}
    for flags, expert in (([], None), (["--average"], None), (["--expert", "1"], 1)):
        out = f"out{len(flags)}{expert}"
        assert main(["export", "mixture", "-o", out, *flags]) == 0
        dense = AutoModelForSeq2SeqLM.from_pretrained(out)
        torch.testing.assert_close(logits_of(dense, batch), logits_of(mpoe.merge(model, expert), batch))
    assert set(map(str, files(Path("out0None")))) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        EXPORT_FILE,
    }  # fmt: skip
    assert Path("out0None").stat().st_mode & 0o777 == Path("mixture").stat().st_mode & 0o777


def test_mpos_without_a_mixture_are_multiplied_out_exactly():
    save("t5-v1.0", "mpo", num_experts=1, mpo_layers=("mlp", "attention", "word_embed"), expert_noise=0.0)
    found = run(["mpo", "-o", "out"])
    assert found.largest < 1e-4
    assert main(["export", "mpo", "-o", "other", "--routed"]) == 2
    assert main(["export", "mpo", "-o", "other", "--expert", "1"]) == 2


def test_a_classifier_and_an_adapter(capsys):
    save("bert", "classifier")
    assert run(["classifier", "-o", "out"]).places == 8
    assert "8 texts of 8 built-in sentences" in " ".join(capsys.readouterr().out.split())
    model = save_tiny_adapter(0.1)
    Path("one.txt").write_text("the film is not very good\n")
    assert main(["export", "adapter", "-o", "dense", "--text_file", "one.txt"]) == 0
    read = dict(tiny_tokenizer()(["the film is not very good"], return_tensors="pt"))
    measured = mpoe.merge(model.eval(), batches=[{**read, "labels": read["input_ids"]}])
    batch = {"input_ids": torch.randint(2, 64, (2, 7)), "labels": torch.randint(2, 64, (2, 4))}
    dense = AutoModelForSeq2SeqLM.from_pretrained("dense")
    torch.testing.assert_close(logits_of(dense, batch), logits_of(measured, batch))


def test_max_tokens_cuts_the_text():
    save("llama", "mixture")
    assert run(["mixture", "-o", "out", "--text_file", "text.txt", "--max_tokens", "7"]).places == 7


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out must have room; its disk is full"),
        (RuntimeError("SafetensorError: No space left on device (os error 28)"), "out must have room"),
        (KeyboardInterrupt(), "stopped by SIGINT"),
    ],
)
def test_nothing_half_written_is_left(tmp_path, capsys, monkeypatch, error, message):
    save("llama", "mixture")
    Path("out").mkdir()
    before = sorted(tmp_path.iterdir())

    def broken(self, folder, **options):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    assert main(["export", "mixture", "-o", "out"]) in (2, 130)
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert not any(Path("out").iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mixture", "-o", "mixture"], "mixture must be new or an empty folder"),
        (["mixture", "-o", "text.txt"], "text.txt must be new or an empty folder"),
        (["mixture", "-o", "text.txt/out"], "text.txt is none"),
        (["mixture"], "the following arguments are required: -o/--output"),
        (["mixture", "-o", "out", "--average", "--routed"], "not allowed with argument"),
        (["mixture", "-o", "out", "--approximate"], "--approximate is about --routed"),
        (["mixture", "-o", "out", "--expert", "3"], "expert must be None or in 0..2; got 3"),
        (["mixture", "-o", "out", "--max_tokens", "0"], "--max_tokens must be >= 1; got 0"),
        (["mixture", "-o", "out", "--routed"], "its routers have biases, and those there have none. --approximate"),
        (["mixture", "-o", "out", "--text_file", "nowhere.txt"], "nowhere.txt must be a readable text file"),
        (["mixture", "-o", "out", "--text_file", "empty.txt"], "empty.txt must hold a text a line; it holds none"),
        (["gated", "-o", "out", "--routed"], "whose feed-forward networks are gated has no sparse format"),
        (["dense", "-o", "out"], "dense is a dense model: it loads without mpoe as it is"),
        (["nowhere/at/all", "-o", "out"], "must be a folder with a config.json"),
        (["unfinished", "-o", "out"], "must be a finished run"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, argv, message):
    save("llama", "mixture", bias=0.1)
    save("t5-v1.1", "gated")
    tiny_t5().save_pretrained("dense")
    tiny_tokenizer().save_pretrained("dense")
    Path("empty.txt").write_text("\n\n")
    save("llama", "unfinished")
    Path("unfinished/run.json").write_text("{}")
    assert_refused(["export", *argv], message, tmp_path, capsys)
