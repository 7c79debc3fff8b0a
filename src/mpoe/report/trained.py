"""The table of what trains, and how fast."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mpoe.report.plain import TITLE, plain
from mpoe.training.optimizer import TrainedPart


def trained_table(parts: Sequence[TrainedPart], title: str = "What trains, millions of parameters") -> Table:
    """One row a part of the model.

    Args:
        parts: From `mpoe.training.optimizer.trained_parts`.
        title: Above the table.
    """
    table = Table(title=plain(title, TITLE), title_justify="left")
    table.add_column("")
    for column in ("trained", "frozen", "learning rate"):
        table.add_column(column, justify="right")
    for part in parts:
        rate = f"{part.learning_rate:g}" if part.trained else "-"
        table.add_row(plain(part.name), _millions(part.trained), _millions(part.total - part.trained), rate)
    trained, total = sum(part.trained for part in parts), sum(part.total for part in parts)
    table.add_section()
    table.add_row("total", _millions(trained), _millions(total - trained), "", style="bold")
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f}"
