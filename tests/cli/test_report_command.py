"""`mpoe report` on runs of the real command: of every objective, and with parts missing."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from mpoe.cli.main import main
from mpoe.training.live import read_log
from mpoe.training.run_folder import LOG_FILE
from tiny import FLAGS, assert_refused, tiny_t5, tiny_tokenizer, write_cola, write_sentiment

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")

DENSE = ["--moe_type", "none", "--mpo_layers", "nompo"]
TEXT = "the film is </script><script>alert(1)</script> great"


def finetune(out, *flags):
    torch.manual_seed(0)
    assert main(["finetune", *FLAGS, "--max_steps", "2", "--logging_steps", "1", "--output_dir", out, *flags]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two mixtures and a dense run."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_t5().save_pretrained("model")
        tiny_tokenizer().save_pretrained("model")
        write_cola(write_sentiment(folder / "data"))
        finetune("runs/mpoe", "--stacks", "encoder,decoder")
        finetune("runs/balanced", "--layout", "balanced")
        finetune("runs/dense", *DENSE)
    return folder


@pytest.fixture
def ground(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_side_by_side(ground, capsys):
    runs = ["runs/mpoe", "runs/balanced", "runs/dense"]
    assert main(["report", *runs, "--text", TEXT]) == 0
    page = (ground / "runs" / "report.html").read_text()
    assert "written to runs/report.html" in capsys.readouterr().out
    for words in (
        "encoder 0", "decoder 1", "expert 1:", "Entanglement entropy of bond 1", "Validation accuracy", "Gate mass",
    ):  # fmt: skip
        assert words in page, words
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    assert page.count("<script>") == 1
    assert str(ground) not in page
    assert main(["report", *runs, "--no_spectra"]) == 0, "a report may be written anew"
    page = (ground / "runs" / "report.html").read_text()
    assert "No text was given" in page
    assert "Entanglement entropy of bond" not in page


def test_one_runs_page_is_in_its_folder_and_the_run_stays_resumable(ground):
    (ground / "text.txt").write_text(TEXT)
    assert main(["report", "runs/mpoe", "--text_file", "text.txt"]) == 0
    assert (ground / "runs" / "mpoe" / "report.html").is_file()
    finetune("runs/mpoe", "--stacks", "encoder,decoder")


@pytest.mark.parametrize("name", ["mpoe", "balanced"])
def test_the_log_agrees_with_the_weights(ground, name):
    """What training logged at its last step is what is read from the saved model."""
    from mpoe.cli.report import _read

    found = _read("m", ground / "runs" / name, None, with_spectra=True)
    last = [line for line in read_log(ground / "runs" / name) if "layers" in line][-1]
    assert bool(found.spectra) == (name == "balanced"), "extended matrices are no chain of sites"
    assert found.divergence.keys() == last["layers"].keys()
    for name, value in found.divergence.items():
        assert value == pytest.approx(last["layers"][name]["divergence"], rel=1e-4)


def lose_results(run):
    (run / "results.json").unlink()


def lose_log(run):
    (run / LOG_FILE).unlink()


def lose_all_but_the_checkpoint(run):
    lose_results(run)
    lose_log(run)


def lose_weights(run):
    (run / "model.safetensors").unlink()


def damage_weights(run):
    (run / "model.safetensors").write_bytes(b"nothing")


def lose_tokenizer(run):
    for file in run.glob("token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("lose", "note", "still"),
    [
        (lose_results, "Not finished", "Training loss"),
        (lose_log, "or a run of an older version", "Training loss"),
        (lose_all_but_the_checkpoint, "its last checkpoint", "Training loss"),
        (lose_weights, "Weights not read", "Router entropy"),
        (damage_weights, "Weights not read", "Router entropy"),
        (lose_tokenizer, "Weights not read", "Router entropy"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_missing_is_said(ground, capsys, lose, note, still):
    lose(ground / "runs" / "mpoe")
    assert main(["report", "runs/mpoe", "--text", "the film"]) == 0
    page = (ground / "runs" / "mpoe" / "report.html").read_text()
    assert "What is missing" in page
    assert note in page
    assert still in page
    assert note in capsys.readouterr().out.replace("\n", " ")


def test_a_run_that_has_only_begun(ground):
    (ground / "begun").mkdir()
    (ground / "begun" / "run.json").write_text("{}")
    assert main(["report", "begun"]) == 0
    assert "no curves" in (ground / "begun" / "report.html").read_text()


def test_a_classifier_and_a_language_model(ground):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=64, **sizes)).save_pretrained("bert")
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)).save_pretrained("gpt2")
    for model in ("bert", "gpt2"):
        tiny_tokenizer().save_pretrained(model)
    finetune("runs/bert", "--model_name_or_path", "bert", "--objective", "classification")
    (ground / "book.txt").write_text("the film is very good .\n" * 200)
    command = [word for word in FLAGS if word not in ("--task", "sentiment", "--data_dir", "data")]
    more = ["--objective", "causal-lm", "--corpus", "book.txt", "--block_size", "16", "--model_name_or_path", "gpt2"]
    assert main(["finetune", *command, "--max_steps", "2", "--output_dir", "runs/gpt2", *more]) == 0
    assert main(["report", "runs/bert", "runs/gpt2", "-o", "both.html", "--text", "the film"]) == 0
    page = (ground / "both.html").read_text()
    assert page.count("data-tokens=") == 2
    assert "perplexity" in page


def test_wrong_input(ground, capsys):
    (ground / "other.html").write_text("<p>mine</p>")
    (ground / "folder.html").mkdir()
    (ground / "latin.txt").write_bytes(b"\xe9")
    for arguments, message in (
        (["nowhere"], "nowhere has no run.json"),
        (["model"], "model has no run.json"),
        (["runs/mpoe", "-o", "x.pdf"], "output must be a .html file; got x.pdf"),
        (["runs/mpoe", "-o", "other.html"], "other.html is another page"),
        (["runs/mpoe", "-o", "folder.html"], "folder.html is a folder"),
        (["runs/mpoe", "-o", "no/x.html"], "no is none: make it first"),
        (["runs/mpoe", "--text", " "], "got an empty one"),
        (["runs/mpoe", "--text_file", "none.txt"], "none.txt"),
        (["runs/mpoe", "--text_file", "latin.txt"], "readable UTF-8 file; latin.txt"),
        (["runs/mpoe", "--text", "a", "--text_file", "b"], "not allowed with"),
        ([], "RUN"),
    ):
        assert_refused(["report", *arguments], message, ground, capsys)
    results = ground / "runs" / "mpoe" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "steps": "many"}))
    assert_refused(["report", "runs/mpoe"], "must be what this version of mpoe wrote", ground, capsys)
