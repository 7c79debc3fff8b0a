import subprocess
import sys
from pathlib import Path

from tiny import tiny_t5, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_plain_loop(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, str(EXAMPLES / "plain_loop.py"), "model", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0]
    assert "its logits are bitwise equal" in done.stdout
