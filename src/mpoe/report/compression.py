"""What a compression did: in all, beside the singular value decomposition, and matrix by matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from mpoe.models.compress import CompressedMatrix
from mpoe.report.plain import TITLE, plain
from mpoe.report.results import COUNTS

SHOWN = 12  # matrices; a model has hundreds


@dataclass(frozen=True)
class CompressionRow:
    """One model of the table.

    Attributes:
        name: What it is.
        parameters: All of it, count.
        auxiliary: Of these, auxiliary tensors, count.
        predicted: Root mean square of the matrices' relative errors, as `mpoe.models.compress.Compressed`; None for the
            model before.
        error: The same, measured.
        metrics: On the text or the task; empty if nothing was asked.
    """

    name: str
    parameters: int
    auxiliary: int
    predicted: float | None
    error: float | None
    metrics: Mapping[str, float]


def compression_table(rows: Sequence[CompressionRow], title: str) -> Table:
    """One column a model, the first of them the model before.

    Args:
        rows: As above.
        title: Above the table.
    """
    table = Table(title=plain(title, TITLE), title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(plain(row.name), justify="right")
    table.add_row("parameters, M", *(f"{row.parameters / 1e6:,.2f}" for row in rows))
    table.add_row("share", *(f"{row.parameters / rows[0].parameters:.3f}" for row in rows))
    for name, attribute in (("error predicted", "predicted"), ("error measured", "error")):
        errors = [getattr(row, attribute) for row in rows]
        table.add_row(name, *("-" if error is None else f"{error:.4f}" for error in errors))
    table.add_section()
    for name in (name for name in dict.fromkeys(n for row in rows for n in row.metrics) if name not in COUNTS):
        table.add_row(plain(name.replace("_", " ")), *(f"{row.metrics[name]:,.4f}" for row in rows))
    return table


def most_lost_table(matrices: Sequence[CompressedMatrix]) -> Table:
    """The matrices that lost most, one row each.

    Args:
        matrices: Of one model.
    """
    worst = sorted(matrices, key=lambda matrix: -matrix.error)[:SHOWN]
    whole = sum(len(matrix.bonds) == 2 for matrix in matrices)
    title = f"{len(worst)} of {len(matrices)} matrices, those that lost most; {whole} stayed whole"
    table = Table(title=plain(title, TITLE), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("matrix", "size", "bonds", "share", "predicted", "error"):
        is_name = column == "matrix"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for matrix in worst:
        table.add_row(
            plain(matrix.name), f"{matrix.dims.out_features}×{matrix.dims.in_features}",
            " ".join(map(str, matrix.bonds[1:-1])), f"{matrix.after / matrix.before:.2f}",
            f"{matrix.predicted:.4f}", f"{matrix.error:.4f}",
        )  # fmt: skip
    return table
