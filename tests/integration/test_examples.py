import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from documented import prepare
from tiny import files, tiny_t5, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(tmp_path, name):
    tiny_t5().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, str(EXAMPLES / name), "model", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_loop(tmp_path):
    printed = run(tmp_path, "plain_loop.py")
    losses = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0]
    assert "its logits are bitwise equal" in printed


def test_adapters(tmp_path):
    printed = run(tmp_path, "adapters.py")
    assert printed.count("logits are bitwise equal") == 2
    assert (tmp_path / "out" / "sentiment" / "adapter_model.safetensors").is_file()


def test_quantized(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("the film is good .\n" * 100)
    command = [sys.executable, str(EXAMPLES / "quantized.py"), "model", "text", "3", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on a fresh base, in a new process, logits are equal") == 2


def new_gpt2(corpus, out, *flags):
    command = [sys.executable, str(EXAMPLES / "new_gpt2.py"), str(corpus), str(out), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_new_gpt2(tmp_path):
    corpus, out = tmp_path / "corpus", tmp_path / "gpt2"
    corpus.mkdir()
    (corpus / "train.txt").write_text("the film is good .\nthe film is very bad .\n" * 50)
    (corpus / "test.txt").write_text("zebra " * 50)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 48}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    done = new_gpt2(corpus, out, "--vocab_size", "280", *flags)
    assert done.returncode == 0, done.stderr

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    config = model.config
    assert config.model_type == "gpt2"
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert config.vocab_size == len(tokenizer) <= 280
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == tokenizer.eos_token == "<|endoftext|>"
    unseen = "  the film: Amélie, 漢字 🙂\n\tx"
    assert tokenizer.decode(tokenizer(unseen).input_ids) == unseen
    assert len(tokenizer(" film").input_ids) == 1
    assert len(tokenizer(" zebra").input_ids) == len(" zebra")  # the test part was not read
    block = 2 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + 2 * 32 + (32 * 128 + 128) + (128 * 32 + 32)
    assert model.num_parameters() == len(tokenizer) * 32 + 48 * 32 + 2 * block + 2 * 32

    again = tmp_path / "again"
    assert new_gpt2(corpus, again, "--vocab_size", "280", *flags).returncode == 0
    assert files(out) == files(again)


def test_new_gpt2_without_a_corpus(tmp_path):
    done = new_gpt2(tmp_path, tmp_path / "gpt2")
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1] == f"error: CORPUS must be a text file, or a folder with train.txt; got {tmp_path}"
    )


def test_the_notebooks_cells_run_one_after_the_other(tmp_path):
    prepare(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    environment = {**os.environ, "MPOE_CACHE": "cache"}
    command = [sys.executable, "-c", "\n".join(cells)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[0].removeprefix("largest difference of logits: ")) < 1e-4
    assert "held-out sentences right" in done.stdout
    shown = [line for cell in notebook["cells"] for out in cell.get("outputs", ()) for line in out["text"]]
    assert any("held-out sentences right" in line for line in shown)  # kept from a run on the real T5
