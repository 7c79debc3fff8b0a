"""`mpoe compare`: finished runs side by side, printed and saved as one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpoe.cli.flags import read_flags
from mpoe.cli.runs import beside, name_runs
from mpoe.files import fits, read_json, write_bytes
from mpoe.report import PlainConsole, comparison_rows, comparison_table, comparison_text
from mpoe.report.comparison import FORMATS, SCORES
from mpoe.training.finetune import FinetuneResult
from mpoe.training.run_folder import RESULTS_FILE

SCORES_FILE = "scores.json"  # where `mpoe generate RUN ... --metrics RUN/scores.json` writes a run's


def run(argv: Sequence[str]) -> None:
    """Print the table and write it.

    Args:
        argv: What follows `mpoe compare`.

    Raises:
        ValueError: A folder without a finished run, an unknown format, a file that cannot be written.
    """
    parser = argparse.ArgumentParser(prog="mpoe compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a finished mpoe finetune")
    parser.add_argument(
        "-o", "--output", help="file for the table: .md, .csv or .json (default: comparison.md beside the runs)"
    )
    args = read_flags(parser, argv)
    named = name_runs(args.runs)
    results = {name: _result(path) for name, path in named.items()}
    scores = {name: _scores(path / SCORES_FILE) for name, path in named.items() if (path / SCORES_FILE).is_file()}
    output = beside(named, "comparison.md") if args.output is None else Path(args.output)
    if output.suffix not in FORMATS:
        raise ValueError(f"output must be a file {', '.join(FORMATS)}; got {output}")
    rows = comparison_rows(results, scores)
    console, table = PlainConsole(), comparison_table(rows)
    if not console.is_terminal:  # a file or pipe is as wide as it need be
        # measured on a console as wide as all of it, for a measure is never more than the console's own
        as_wide = console.options.update_width(sys.maxsize)
        console.width = max(console.width, console.measure(table, options=as_wide).maximum)
    console.print(table)
    write_bytes(output, comparison_text(rows, output.suffix).encode())
    console.print(f"written to {output}")


def _result(path: Path) -> FinetuneResult:
    if not (path / RESULTS_FILE).is_file():
        raise ValueError(f"a run must be the output folder of a finished mpoe finetune; {path} has no {RESULTS_FILE}")
    return FinetuneResult.read(path / RESULTS_FILE)


def _scores(file: Path) -> dict[str, float]:
    scores = read_json(file)
    if not all(fits(scores.get(key), float) for key in SCORES):
        raise ValueError(
            f"{file} must be what mpoe generate or mpoe score wrote with --metrics; got one without scores"
        )
    return scores
