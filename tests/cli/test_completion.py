"""What the shell's Tab key offers: asked as the shell's own hook asks, in a process with argcomplete's variables."""

import json
import os
import subprocess
import sys

import pytest

from mpoe.cli.commands import COMMANDS
from mpoe.cli.complete import FILE, describe, known_flags


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Shared, so that torch is imported for the first question only."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ask(cache, tmp_path):
    """A function from a line to what could follow; files are those of `tmp_path`."""

    def asked(line, torch=False):
        answer = tmp_path / "answer"
        environment = {
            **os.environ, "MPOE_CACHE": str(cache), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9",
            "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        }  # fmt: skip
        without = "" if torch else "import sys; sys.modules['torch'] = None\n"
        program = f"{without}import mpoe_command; mpoe_command.main()"
        (tmp_path / "work").mkdir(exist_ok=True)
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "work", env=environment, check=False)
        assert done.returncode == 0
        return [word.strip() for word in answer.read_text().split("\n")]

    return asked


def test_commands_need_no_torch(ask):
    assert set(COMMANDS) <= set(ask("mpoe "))
    assert ask("mpoe fi") == ["finetune"]
    assert ask("mpoe --v") == ["--version"]


def test_flags_choices_and_files(ask, cache, tmp_path):
    assert ask("mpoe finetune --num_e", torch=True) == ["--num_experts"]
    written = (cache / FILE).read_bytes()
    # from here on by the cache's file, without torch
    assert ask("mpoe finetune --layout ") == ["extended", "balanced"]
    assert ask("mpoe finetune --tasks col") == ["cola"]
    assert ask("mpoe finetune run.yaml --dataloader_pin") == ["--dataloader_pin_memory"]
    assert ask("mpoe finetune --freeze_model ") == ["true", "false"]
    assert ask("mpoe fetch ") == ["t5", "smollm2", "minilm", "sentiment"]
    assert ask("mpoe doctor --j") == ["--json"]
    folder = tmp_path / "work"
    for name in ("run.yaml", "run.json", "notes.txt", ".hidden.yaml"):
        (folder / name).write_text("")
    (folder / "runs" / "a").mkdir(parents=True)
    assert ask("mpoe finetune ") == ["run.json", "run.yaml", "runs/"]
    assert ask("mpoe finetune --corpus n") == ["notes.txt"]
    assert ask("mpoe compare runs/") == ["runs/a/"]
    assert ask("mpoe compare nowhere/") == [""]
    assert (cache / FILE).read_bytes() == written


def test_an_old_or_damaged_file_is_made_anew(cache, monkeypatch):
    monkeypatch.setenv("MPOE_CACHE", str(cache / "another"))
    (cache / "another").mkdir()
    for content in ("{", json.dumps({"key": "of another version", "commands": {}})):
        (cache / "another" / FILE).write_text(content)
        known = known_flags()
        assert known.keys() == COMMANDS.keys()
        assert json.loads((cache / "another" / FILE).read_text())["commands"] == known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_itself(command):
    flags = describe(command)
    names = [name for flag in flags for name in flag["options"]]
    assert len(names) == len(set(names))
    assert {"--help", "-h"} <= set(names)
    assert json.loads(json.dumps(flags)) == flags
