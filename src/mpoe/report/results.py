"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from mpoe.report.plain import TITLE, plain

COUNTS = ("rows", "tokens", "words")


def metrics_table(metrics: Mapping[str, Mapping[str, float]], title: str, rows: str = "split") -> Table:
    """One row a split, or another measurement; one column a metric.

    Args:
        metrics: By row, then by metric; correlations and shares are dimensionless, cross-entropy is in nats.
        title: Above the table.
        rows: What the rows are, for the head of their column.
    """
    table = Table(title=plain(title, TITLE), title_justify="left")
    table.add_column(rows)
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    for name in names:
        table.add_column(plain(name.replace("_", " ")), justify="right")
    for split, values in metrics.items():
        numbers = (f"{values[n]:,.{0 if n in COUNTS else 4}f}" if n in values else "-" for n in names)
        table.add_row(plain(split), *numbers)
    return table
