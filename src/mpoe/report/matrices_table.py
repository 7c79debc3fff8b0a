"""The matrices of a mixture: sites, bonds, parameters, what truncation lost; those that are alike in one row."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mpoe.models.truncation import MatrixFacts
from mpoe.mpo import SiteDims
from mpoe.report.plain import TITLE, plain


def matrices_table(matrices: Sequence[MatrixFacts], title: str) -> Table:
    """One row for all matrices of the same name in their module, of the same sites and bonds.

    Args:
        matrices: Of one mixture.
        title: Above the table.
    """
    table = Table(title=plain(title, TITLE), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("matrix", "", "size", "sites", "bonds", "param., M", "error"):
        is_number = column in ("", "param., M", "error")
        can_fold = column in ("sites", "bonds")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=not can_fold, overflow="fold")
    groups: dict[tuple[str, SiteDims, tuple[int, ...]], list[MatrixFacts]] = {}
    for matrix in matrices:
        name = ".".join(matrix.name.split(".")[-2:])
        groups.setdefault((name, matrix.dims, matrix.bonds), []).append(matrix)
    for (name, dims, bonds), group in groups.items():
        parameters = sum(matrix.central + matrix.auxiliary for matrix in group)
        table.add_row(
            plain(name), f"{len(group)}×", f"{dims.out_features}×{dims.in_features}",
            " ".join(f"{o}·{i}" for o, i in zip(dims.out_dims, dims.in_dims, strict=True)),
            " ".join(map(str, bonds[1:-1])), f"{parameters / 1e6:,.2f}", _errors([matrix.error for matrix in group]),
        )  # fmt: skip
        if dims.note:
            table.add_row(plain(f"  {dims.note}"), style="dim")
    return table


MATRICES_LEGEND = (
    "sites: outputs·inputs of each. error: relative, in the Frobenius norm, the largest of the row; 0 is exact, - is "
    "unknown (--base DENSE measures it)."
)


def _errors(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.2g}" if known else "-"
