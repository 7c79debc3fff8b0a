"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table


def metrics_table(metrics: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """One row a split, one column a metric.

    Args:
        metrics: By split, then by metric; correlations and shares are dimensionless, cross-entropy is in nats.
        title: Above the table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("split")
    names = list(next(iter(metrics.values())))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for split, values in metrics.items():
        table.add_row(split, *(f"{values[n]:,.0f}" if n == "rows" else f"{values[n]:.4f}" for n in names))
    return table
