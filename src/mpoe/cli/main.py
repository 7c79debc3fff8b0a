"""The command `mpoe`: finds the command's file, turns errors into one line and an exit status."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from mpoe.cli.commands import COMMANDS, help_text
from mpoe.cli.libraries import import_libraries
from mpoe.printable import did_you_mean, printable

RESUMED = ("demo", "finetune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Command and arguments; None is the process's own.

    Returns:
        The exit status: 0 done, 2 wrong input, 130 interrupted, 143 terminated.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        importlib.import_module("mpoe.cli.complete").complete()
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(importlib.import_module("mpoe").__version__)
        return 0
    if argv[0] not in COMMANDS:
        near = did_you_mean(argv[0], COMMANDS) or ";"
        return _fail(f"unknown command {argv[0]!r}{near} commands are {', '.join(COMMANDS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns in every worker process
    try:
        if not COMMANDS[argv[0]].is_light:
            import_libraries()
        importlib.import_module(f"mpoe.cli.{argv[0].replace('-', '_')}").run(argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("MPOE_DEBUG"):
            raise
        return _fail(f"mpoe {argv[0]}: {_reason(error)}")
    except ImportError as error:
        if os.environ.get("MPOE_DEBUG"):
            raise
        return _fail(f"mpoe {argv[0]}: {' '.join(str(error).split())}; mpoe doctor says what is missing or too old")
    except KeyboardInterrupt as error:
        number, saved = error.args or (signal.SIGINT, None)  # of `mpoe.training.stop_signals.Interrupted`
        advice = ""
        if argv[0] in RESUMED:
            last = "its last checkpoint, if it wrote one" if saved is None else f"step {saved}, which is saved"
            advice = f"; the same command goes on from {last}"
        print(f"\nmpoe {argv[0]}: stopped by {signal.Signals(number).name}{advice}", file=sys.stderr)
        return 128 + number
    return 0


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename} cannot be read or written: {error.strerror}"
    return " ".join(str(error).split())


def _fail(message: str) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
