"""`mpoe doctor`: whether mpoe can work here, and what would be slow; for a person, and for a bug report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess  # nosec B404  # for this interpreter alone
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpoe.cli import checks
from mpoe.cli.checks import Check
from mpoe.cli.flags import read_flags
from mpoe.printable import printable

STYLES = {"ok": "green", "note": "cyan", "slow": "yellow", "broken": "bold red"}
_PROBE = "import mpoe_command; from mpoe.cli.probe import main; main()"


def run(argv: Sequence[str]) -> None:
    """Print the tables, or JSON; the exit status is 1 if mpoe cannot work here.

    Args:
        argv: What follows `mpoe doctor`.

    Raises:
        ValueError: Wrong flags.
        SystemExit: With 1, something makes mpoe unusable.
    """
    parser = argparse.ArgumentParser(
        prog="mpoe doctor",
        description="Print versions, devices, what can be reached, and what would be slow, each with what to do. The "
        "exit status is 0 if mpoe can work here, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables, for a bug report")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="for importing torch (default: %(default)s)"
    )
    args = read_flags(parser, argv)
    if not args.timeout > 0:
        raise ValueError(f"--timeout must be > 0 seconds; got {args.timeout}")
    console = Console(stderr=True)
    with console.status("Importing torch and Transformers in a process of its own ..."):
        probe, failure = _probe(args.timeout)
    with console.status("Asking the network ..."):
        found = [
            *checks.versions(probe.get("libraries", {})),
            *([failure] if failure else []),
            *checks.devices(probe if "threads" in probe else {}),
            *checks.storage(),
            *checks.network(),
            *checks.optional(),
        ]
    broken = [check for check in found if check.verdict == "broken"]
    if args.json:
        print(json.dumps({"usable": not broken, "checks": [dataclasses.asdict(check) for check in found]}, indent=2))
    else:
        _print(found)
    if broken:
        raise SystemExit(1)


def _probe(timeout: float) -> tuple[dict[str, Any], Check | None]:
    """What `mpoe.cli.probe` printed, or nothing and what went wrong."""
    command = [sys.executable, "-c", _PROBE]
    try:
        # a list of words, no shell
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)  # nosec B603
    except subprocess.TimeoutExpired:
        advice = "a slow disk, or a driver that hangs: try again with a longer --timeout"
        return {}, Check("Versions", "import torch", f"not done in {timeout:g} s", "broken", advice)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), None
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    found = f"the process that imports torch ended with status {done.returncode} and said: {last}"
    return {}, Check("Versions", "import torch", found, "broken", "install torch anew")


def _print(found: Sequence[Check]) -> None:
    console = Console(markup=False, emoji=False)
    for about, of_table in groupby(found, key=lambda check: check.about):
        rows = []
        for check in of_table:
            mark = Text("" if check.verdict == "ok" else check.verdict, STYLES[check.verdict])
            rows.append([Text(printable(check.name)), Text(printable(check.found)), mark, Text(check.advice)])
        table = Table(title=about, title_justify="left", show_header=False)
        filled = [column for column in range(4) if any(row[column].plain for row in rows)]
        for column in filled:
            table.add_column("", overflow="fold" if column > 1 else "ellipsis")
        for row in rows:
            table.add_row(*(row[column] for column in filled))
        console.print(table)
    broken = [check.name for check in found if check.verdict == "broken"]
    slow = [check.name for check in found if check.verdict == "slow"]
    console.print(
        f"mpoe cannot work here; to be mended: {', '.join(broken)}" if broken else "mpoe can work here.",
        style=STYLES["broken" if broken else "ok"],
    )
    if slow:
        console.print(f"It would be slow because of: {', '.join(slow)}.")
