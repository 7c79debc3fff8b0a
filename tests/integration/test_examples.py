import subprocess
import sys
from pathlib import Path

from tiny import tiny_t5, tiny_tokenizer

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
