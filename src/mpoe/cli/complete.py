"""What could come next on the command line, for the shell's Tab key; argcomplete speaks with the shell.

The flags are known to the commands themselves, and most of these import torch. So what they know is kept in a file of
the cache, which a change of mpoe, of Transformers or of Python makes old.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpoe.cli.commands import COMMANDS
from mpoe.cli.flags import CONFIG_FILES, DESCRIBE, Described
from mpoe.files import cache_dir, read_json, write_json

FILE = "completion.json"


def complete() -> None:
    """Answer the shell, as argcomplete's environment variables ask, and end the process."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    words = os.environ.get("COMP_LINE", "").split()
    command = words[1] if len(words) > 1 and words[1] in COMMANDS else None
    parser = argparse.ArgumentParser(prog="mpoe", add_help=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    for name, (_, purpose, *_) in COMMANDS.items():
        of_command = commands.add_parser(name, help=purpose, add_help=False)
        if name == command:
            _add_flags(of_command, known_flags().get(name, []))
    # flags once a dash is typed; else files, of which the config file is one
    paths: Any = Paths()
    argcomplete.autocomplete(parser, always_complete_options=False, default_completer=paths)


class Paths:
    """Completes files and folders.

    Args:
        suffixes: Of the files that are shown; none of them is all files.
    """

    def __init__(self, suffixes: tuple[str, ...] = ()) -> None:
        self.suffixes = suffixes

    def __call__(self, prefix: str, **_: object) -> list[str]:
        """The paths that begin so, folders with a slash at their end; none that is hidden, unless a dot was typed.

        Args:
            prefix: What was typed of the word.
        """
        before, slash, start = prefix.rpartition("/")
        try:
            found = sorted(Path(before + slash or ".").expanduser().iterdir())
        except OSError:
            return []
        shown = [path for path in found if path.name.startswith(start) and (start or not path.name.startswith("."))]
        return [
            f"{before}{slash}{path.name}{'/' * path.is_dir()}"
            for path in shown
            if path.is_dir() or not self.suffixes or path.suffix in self.suffixes
        ]


def describe(command: str) -> list[dict[str, Any]]:
    """A command's flags and arguments, JSON-ready.

    Args:
        command: One of `COMMANDS`.

    Returns:
        For each, `options` (none is a positional argument), `nargs`, `values` that can be named, `suffixes` of files.
    """
    try:
        importlib.import_module(f"mpoe.cli.{command.replace('-', '_')}").run([DESCRIBE])
    except Described as answer:
        actions = answer.parser._actions
        usage = answer.parser.usage or ""
    else:
        raise TypeError(f"mpoe {command} must read its flags with mpoe.cli.flags.read_flags or mpoe.cli.parsing.parse")
    config = (
        [{"options": [], "nargs": "?", "values": [], "suffixes": list(CONFIG_FILES)}] if "CONFIG.yaml" in usage else []
    )
    return config + [
        {
            "options": list(action.option_strings),
            "nargs": action.nargs,
            "values": _values(action),
            "suffixes": [],
        }
        for action in actions
        if action.help != argparse.SUPPRESS
    ]


def _values(action: argparse.Action) -> list[str]:
    if action.choices is not None:
        return [str(choice) for choice in action.choices if str(choice)]
    if action.dest in ("task", "tasks", "eval_tasks"):
        from mpoe.training.tasks import TASKS

        return sorted(TASKS)
    return ["true", "false"] if action.const is True and action.nargs == "?" else []


def _add_flags(parser: argparse.ArgumentParser, flags: Iterable[dict[str, Any]]) -> None:
    for number, flag in enumerate(flags):
        where = flag["options"] or [f"argument_{number}"]
        if flag["nargs"] == 0:
            parser.add_argument(*where, action="store_true")
            continue
        action: Any = parser.add_argument(*where, nargs=flag["nargs"])
        values = flag["values"]
        if values:
            action.completer = lambda values=values, **_: values
        elif flag["suffixes"]:
            action.completer = Paths(tuple(flag["suffixes"]))


def known_flags() -> dict[str, list[dict[str, Any]]]:
    """Every command's flags as `describe` has them, from the cache's file if it is of today."""
    path, key = cache_dir() / FILE, _key()
    try:
        known = read_json(path)
    except ValueError:  # it is not there, or damaged
        known = {}
    if known.get("key") == key:
        return known["commands"]
    importlib.import_module("mpoe").import_names()
    commands = {name: describe(name) for name in COMMANDS}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "commands": commands})
    except OSError:  # the next time takes as long as this one
        pass
    return commands


def _key() -> str:
    """Changes with everything that flags depend on."""
    files: Sequence[Path] = sorted(Path(__file__).parents[1].rglob("*.py"))
    parts = [sys.version, importlib.metadata.version("transformers")]
    parts += [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
