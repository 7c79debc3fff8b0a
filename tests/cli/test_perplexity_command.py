"""`mpoe perplexity`: a model as it is, or as the mixture that it would become."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mpoe
from mpoe.cli import perplexity
from mpoe.cli.main import main
from tiny import assert_refused, save_tiny_gpt2, tiny_tokenizer


@pytest.fixture
def ground(tmp_path, monkeypatch):
    """A folder with a GPT-2 and a text, and the working directory of a test."""
    monkeypatch.chdir(tmp_path)
    save_tiny_gpt2("model")
    Path("text.txt").write_text("the film is great .\nit was not very good .\n")
    return tmp_path


def test_a_text_of_one_window_is_one_forward(ground, capsys):
    found = perplexity.run(["model", "--test_file", "text.txt", "--output", "found.json"])
    ids = tiny_tokenizer()(Path("text.txt").read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained("model").eval()(input_ids=ids, labels=ids).loss.item()
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert (found["tokens"], found["words"]) == (10, 13)
    assert found["word_perplexity"] == pytest.approx(math.exp(loss * 10 / 13), rel=1e-4)
    written = json.loads(Path("found.json").read_text())
    assert written == {"model": "model", "text": "text.txt", "block_size": 32, "stride": 16, **found}
    assert "cross entropy" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--num_experts", "3"], ["--moe_type", "moe"], ["--layout", "balanced"]])
def test_a_mixture_predicts_as_the_model_that_it_came_from(ground, capsys, flags):
    windows = ["model", "--corpus", "text.txt", "--block_size", "8", "--stride", "2", "--batch_size", "2"]
    dense = perplexity.run(windows)
    assert "mixture" not in capsys.readouterr().out
    mixture = perplexity.run([*windows, *flags])
    assert "mixture" in capsys.readouterr().out
    assert mixture == {name: pytest.approx(value, rel=1e-4) for name, value in dense.items()}


def test_the_end_of_a_cut_text_does_not_count(ground):
    found = perplexity.run(["model", "--corpus", "text.txt", "--max_eval_tokens", "6"])
    assert (found["tokens"], found["words"]) == (4, 6)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["model"], "corpus must be given, or test_file"),
        (["model", "--train_file", "text.txt", "--corpus", "text.txt"], "train_file must be left out"),
        (["text.txt", "--corpus", "text.txt"], "text.txt must be a folder with a config.json"),
        (["model", "--corpus", "text.txt", "--batch_size", "0"], "batch_size must be >= 1; got 0"),
        (["model", "--corpus", "text.txt", "--output", "found.txt"], "output must be a .json file"),
        (["model", "--corpus", "text.txt", "--device", "nowhere"], "device"),
        (["mixture", "--corpus", "text.txt", "--num_experts", "4"], "has been upcycled before"),
    ],
)
def test_bad_input_is_one_line_exit_2(ground, capsys, command, message):
    mpoe.upcycle(AutoModelForCausalLM.from_pretrained("model"), mpoe.MPOEConfig(2)).save_pretrained("mixture")
    tiny_tokenizer().save_pretrained("mixture")
    assert_refused(["perplexity", *command], message, ground, capsys)


def test_a_saved_mixture_is_measured_as_it_is(ground):
    dense = perplexity.run(["model", "--corpus", "text.txt"])
    mpoe.upcycle(AutoModelForCausalLM.from_pretrained("model"), mpoe.MPOEConfig(2)).save_pretrained("mixture")
    tiny_tokenizer().save_pretrained("mixture")
    assert main(["perplexity", "mixture", "--corpus", "text.txt", "--output", "found.json"]) == 0
    assert json.loads(Path("found.json").read_text())["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)


def test_a_tokenizer_of_another_model_is_refused(ground, capsys):
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained("model")
    command = ["perplexity", "model", "--test_file", "text.txt"]
    message = f"has one of {len(tiny_tokenizer())} tokens, and the model's word embedding has 20 rows"
    assert_refused(command, message, ground, capsys)
