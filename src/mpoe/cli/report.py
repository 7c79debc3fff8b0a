"""`mpoe report`: runs on one page of HTML, with their curves, their experts and a text seen through these."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpoe.cli.flags import read_flags
from mpoe.cli.loading import load_finished
from mpoe.cli.runs import beside, name_runs
from mpoe.files import read_json, write_bytes
from mpoe.models import bond_spectra, is_upcycled, mixtures, route_text, routers
from mpoe.nn import divergence
from mpoe.report import PlainConsole
from mpoe.report.page import RunReport, is_report, report_page
from mpoe.training.checkpoint_files import LAST_FILE, finished_checkpoints
from mpoe.training.finetune import FinetuneResult
from mpoe.training.live import read_log
from mpoe.training.run_folder import LOG_FILE, RESULTS_FILE, RUN_FILE

REPORT_FILE = "report.html"


def run(argv: Sequence[str]) -> None:
    """Write the page.

    Args:
        argv: What follows `mpoe report`.

    Raises:
        ValueError: A folder without a run, a text that cannot be read, a file that is something else than a report.
    """
    parser = argparse.ArgumentParser(prog="mpoe report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of mpoe finetune, finished or not")
    parser.add_argument(
        "-o", "--output", help=f"the page, .html (default: {REPORT_FILE} in the run's folder, or beside several)"
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--text", help="a text: which expert each of its tokens goes to, layer by layer")
    texts.add_argument("--text_file", metavar="FILE", help="the same from a file, UTF-8")
    parser.add_argument(
        "--no_spectra", action="store_true", help="leave singular values out: they take minutes for a large model"
    )
    args = read_flags(parser, argv)
    runs = name_runs(args.runs)
    for path in runs.values():
        if not (path / RUN_FILE).is_file():
            raise ValueError(f"a run must be the output folder of mpoe finetune; {path} has no {RUN_FILE}")
    default = next(iter(runs.values())) / REPORT_FILE if len(runs) == 1 else beside(runs, REPORT_FILE)
    output = default if args.output is None else Path(args.output)
    _check_output(output)
    text = _text(args)
    console = PlainConsole()
    reports = []
    for name, path in runs.items():
        console.print(f"Reading {path} ...")
        report = _read(name, path, text, not args.no_spectra)
        reports.append(report)
        for note in report.notes:
            console.print(f"  {note}")
    page = report_page(reports, text).encode()
    write_bytes(output, page)
    console.print(f"written to {output}, {len(page) / 1e6:.1f} MB; open it in a browser")


def _check_output(output: Path) -> None:
    """Refuse what is no page of ours before anything is computed."""
    if output.suffix != ".html":
        raise ValueError(f"output must be a .html file; got {output}")
    if not output.parent.is_dir():
        raise ValueError(f"output must be in a folder that is there; {output.parent} is none: make it first")
    if output.is_dir():
        raise ValueError(f"output must be a file; {output} is a folder: name another")
    if output.exists():
        with output.open(encoding="utf-8", errors="replace") as file:
            if not is_report(file.read(1000)):
                raise ValueError(f"output must be new or an earlier report; {output} is another page: name another")


def _text(args: argparse.Namespace) -> str | None:
    text = args.text
    if args.text_file is not None:
        try:
            text = Path(args.text_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text_file must be a readable UTF-8 file; {args.text_file}: {error}") from error
    if text is not None and not text.strip():
        raise ValueError("text must have a word; got an empty one: leave it out, or give some")
    return text


def _read(name: str, path: Path, text: str | None, with_spectra: bool) -> RunReport:
    """All that is known of a run; what is not there becomes a note."""
    arguments = read_json(path / RUN_FILE)
    model = str(arguments.get("model_name_or_path", ""))
    result, log, notes = None, read_log(path), []
    if (path / RESULTS_FILE).is_file():
        result = FinetuneResult.read(path / RESULTS_FILE)
    else:
        notes.append(f"Not finished: no {RESULTS_FILE}, so no metrics, parameters or times.")
    if not log:
        log = _log_of_checkpoint(path)
        then = "the curves are those of its last checkpoint" if log else "no curves"
        notes.append(
            f"No {LOG_FILE} (fewer steps than --logging_steps, or a run of an older version): no shares over training, "
            f"and {then}."
        )
    found: dict[str, Any] = {}
    if result is not None:
        try:
            found = _from_weights(path, text, with_spectra)
        except ValueError as error:
            notes.append(f"Weights not read, so no spectra and no tokens: {' '.join(str(error).split())}")
    return RunReport(
        name=name,
        model=Path(model).name if Path(model).is_absolute() else model,  # a page is shown to others
        result=result,
        log=log,
        notes=notes,
        **found,
    )


def _log_of_checkpoint(path: Path) -> list[dict[str, Any]]:
    for checkpoint in finished_checkpoints(path)[:1]:
        history = read_json(checkpoint / LAST_FILE).get("log_history")
        if isinstance(history, list):
            return [entry for entry in history if isinstance(entry, dict) and isinstance(entry.get("step"), int)]
    return []


def _from_weights(path: Path, text: str | None, with_spectra: bool) -> dict[str, Any]:
    """What the finished model itself tells, of those that are not dense."""
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"{path} holds no *.safetensors")
    if "quantization_config" not in read_json(path / "config.json"):
        return {}
    model, tokenizer = load_finished(str(path))
    if not is_upcycled(model):
        return {}
    return {
        "divergence": {name: float(divergence(layer)) for name, layer in mixtures(model).items()},
        "spectra": bond_spectra(model) if with_spectra else [],
        "texts": route_text(model, tokenizer, text) if text is not None and routers(model) else [],
    }
