"""`mpoe compress` as a user types it."""

import json
from pathlib import Path

import pytest

import mpoe
from mpoe.cli import compress, finetune
from mpoe.cli.main import main
from mpoe.models import count_parameters
from tiny import FLAGS, assert_refused, save_tiny_gpt2, tiny_t5, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*experts got under 1%:UserWarning")


@pytest.fixture
def language_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_gpt2("gpt2")
    Path("text.txt").write_text("the film is great .\nit was not very good .\n" * 8)
    return tmp_path


def numbers(folder):
    return {row["name"]: row for row in json.loads((Path(folder) / "compression.json").read_text())["rows"]}


@pytest.mark.parametrize("calibration", [[], ["--calibration_data", "text.txt", "--calibration_tokens", "64"]])
def test_a_language_model_before_after_and_beside_the_svd(language_model, capsys, calibration):
    flags = ["--layout", "balanced", "--test_file", "text.txt", *calibration]
    compress.run(["gpt2", "--budget", "0.8", "-o", "small", *flags])
    rows = numbers("small")
    assert rows.keys() == {"before", "MPO (balanced)", "SVD (low_rank)"}
    assert rows["MPO (balanced)"]["parameters"] <= 0.8 * rows["before"]["parameters"]
    assert all(row["metrics"]["perplexity"] > 1 for row in rows.values())
    assert count_parameters(mpoe.from_pretrained("small")).total == rows["MPO (balanced)"]["parameters"]
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "those that lost most" in out
    measured = rows["MPO (balanced)"]["metrics"]["perplexity"]
    assert main(["perplexity", "small", "--test_file", "text.txt"]) == 0  # the saved model, in one more loading
    assert f"{measured:,.4f}" in capsys.readouterr().out


def test_the_svd_is_the_default_and_loads_again(language_model, capsys):
    assert main(["compress", "gpt2", "--budget", "0.8", "-o", "small", "--test_file", "text.txt"]) == 0
    rows = numbers("small")
    assert rows.keys() == {"before", "SVD (low_rank)"}
    config = json.loads(Path("small/config.json").read_text())["quantization_config"]
    assert (config["layout"], config["auxiliary_start"]) == ("balanced", False)
    assert all(len(of["site_dims"][0]) in (1, 3) for of in config["matrices"].values())
    measured = rows["SVD (low_rank)"]["metrics"]["perplexity"]
    capsys.readouterr()
    assert main(["perplexity", "small", "--test_file", "text.txt"]) == 0
    assert f"{measured:,.4f}" in capsys.readouterr().out


def test_an_extended_mixture_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mpoe.upcycle(tiny_t5()).save_pretrained("mixture")
    tiny_tokenizer().save_pretrained("mixture")
    message = "experts extend the matrices of its base. Compress its dense base instead"
    assert_refused(["compress", "mixture", "--budget", "0.8", "-o", "out"], message, tmp_path, capsys)


def test_a_finished_run_and_its_task(ground, capsys):
    finetune.run([*FLAGS, "--layout", "balanced", "--max_steps", "2", "--save_strategy", "no"])
    task = ["--task", "sentiment", "--data_dir", "data"]
    compress.run(["run", "--budget", "0.9", "--expert_budget", "0.6", "--calibration_data", "task", "-o", "out", *task])
    rows = numbers("out")
    assert rows.keys() == {"before", "after"}
    assert rows["after"]["auxiliary"] <= 0.6 * rows["before"]["auxiliary"]
    results = json.loads(Path("run/results.json").read_text())["tasks"]["sentiment"]["test"]
    assert rows["before"]["metrics"] == {name: pytest.approx(value) for name, value in results.items()}


def test_a_task_of_ones_own_and_a_wrong_one(ground, capsys):
    rows = Path("data/sentiment/train.tsv").read_text()
    Path("rows.tsv").write_text(rows)
    labels = "labels: [negative, positive]" if "positive" in rows else "labels: ['0', '1']"
    Path("films.yaml").write_text(
        f"name: films\ntemplate: '{{sentence}}'\nlabel: label\n{labels}\nmetrics: [accuracy]\ntrain: rows.tsv\n"
    )
    tiny_t5().save_pretrained("t5")
    tiny_tokenizer().save_pretrained("t5")
    words = ["compress", "t5", "--budget", "0.9", "-o", "out", "--n_test", "4"]
    assert_refused([*words, "--task", "films"], "'films' is not known: did you mean films.yaml?", ground, capsys)
    assert_refused([*words, "--task", "cola", "--data_dir", "no"], "data_dir must be a folder", ground, capsys)
    assert main([*words, "--task", "films.yaml", "--calibration_data", "task"]) == 0
    assert all("accuracy" in row["metrics"] for row in numbers("out").values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "2"], "budget must be a share in (0, 1]"),
        (["--budget", "0.8", "--task", "cola"], "task must be left out: gpt2 goes on with texts"),
        (["--budget", "0.8", "--calibration_data", "task"], "so --task must be given"),
        (["--budget", "0.8", "--test_file", "no.txt"], "there is no no.txt"),
        (["--budget", "0.8", "--calibration_data", "no.txt"], "there is no no.txt"),
        (["--budget", "0.8", "--mpo_layers", "ffn"], "mpo_layers must be a list of"),
        (["--budget", "0.8", "--layout", "flat"], "invalid choice: 'flat'"),
        (["--budget", "0.8", "--batch_size", "0"], "batch_size must be >= 1"),
        (["--budget", "0.001"], "must leave room for bonds of 1"),
        ([], "the following arguments are required: --budget"),
    ],
)
def test_bad_input_writes_nothing(language_model, capsys, flags, message):
    assert_refused(["compress", "gpt2", "-o", "small", *flags], message, language_model, capsys)


def test_a_folder_with_files_is_left_alone(language_model, capsys):
    command = ["compress", "gpt2", "-o", "gpt2", "--budget", "0.8"]
    assert_refused(command, "gpt2 must be new or an empty folder", language_model, capsys)
