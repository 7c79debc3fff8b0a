"""The HTML of a report: templates filled with what the sections say, every text escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import mpoe
from mpoe.printable import printable
from mpoe.report.page import mixture, sections
from mpoe.report.page.run import RunReport

_FOLDER = Path(__file__).parent
_MARK = '<meta name="generator" content="mpoe'


def report_page(runs: Sequence[RunReport], text: str | None = None) -> str:
    """One page of some runs, side by side.

    It loads nothing: styles and script are in it, and its own policy forbids everything else, so that no name and no
    text in it can become code.

    Args:
        runs: At least one.
        text: The user's text, if there is one.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("script.js").render()  # as the page includes it
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        version=mpoe.__version__,
        script_hash=f"sha256-{digest}",
        title=" · ".join(run.name for run in runs),
        text=text,
        runs=runs,
        notes=[(run.name, note) for run in runs for note in run.notes],
        cards=sections.cards(runs),
        table=sections.comparison(runs),
        curves=sections.curves(runs),
        bars=sections.parameter_bars(runs),
        usage_charts=mixture.usage_charts(runs),
        heats=[mixture.heat(run) for run in runs],
        divergences=[mixture.divergence(run) for run in runs],
        spectra=[mixture.spectra(run) for run in runs],
        tokens=[mixture.token_maps(run) for run in runs],
    )


def is_report(start: str) -> bool:
    """Whether a file is a page of ours, which may be written anew.

    Args:
        start: Its first thousand characters.
    """
    return _MARK in start


def _finalize(value: object) -> object:
    """Control characters, and those that turn the direction of writing, are spelt in a page too."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value
