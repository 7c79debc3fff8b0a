"""The matrices of a mixture: size, rank or sites and bonds, parameters; those that are alike in one row."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mpoe.models.truncation import MatrixFacts
from mpoe.mpo import SiteDims
from mpoe.report.plain import TITLE, plain


def matrices_table(matrices: Sequence[MatrixFacts], title: str) -> Table:
    """One row for all matrices of the same name in their module, of the same size and rank, or sites and bonds.

    Args:
        matrices: Of one mixture, at least one.
        title: Above the table.
    """
    groups: dict[tuple[object, ...], list[MatrixFacts]] = {}
    for matrix in matrices:
        name = ".".join(matrix.name.split(".")[-2:])
        alike = (name, matrix.out_features, matrix.in_features, matrix.expert_rank, matrix.dims, matrix.bonds)
        groups.setdefault(alike, []).append(matrix)
    is_extended = matrices[0].expert_rank is not None
    columns = ("experts", "rank", "added, M", "added") if is_extended else ("sites", "bonds", "param., M", "error")
    table = Table(title=plain(title, TITLE), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("matrix", "", "size", *columns):
        can_fold = column in ("sites", "bonds")
        is_number = column not in ("matrix", "size") and not can_fold
        table.add_column(column, justify="right" if is_number else "left", no_wrap=not can_fold, overflow="fold")
    for (name, *_), group in groups.items():
        first = group[0]
        size = f"{first.out_features}×{first.in_features}"
        cells = _of_extended(group) if first.dims is None else _of_mpos(group, first.dims)
        table.add_row(plain(str(name)), f"{len(group)}×", size, *cells)
        if first.dims is not None and first.dims.note:
            table.add_row(plain(f"  {first.dims.note}"), style="dim")
    return table


def matrices_legend(matrices: Sequence[MatrixFacts]) -> str:
    """The explanation of the table's columns.

    Args:
        matrices: Of one mixture, at least one.
    """
    if matrices[0].expert_rank is not None:
        return "rank: of each expert. added: parameters of all experts, and their share of the matrix's own."
    return (
        "sites: outputs·inputs of each. error: relative, in the Frobenius norm, the largest of the row; 0 is exact, - "
        "is unknown (--base DENSE measures it)."
    )


def _of_extended(group: Sequence[MatrixFacts]) -> tuple[str, ...]:
    first, added = group[0], sum(matrix.auxiliary for matrix in group)
    share = added / sum(matrix.central for matrix in group)
    return str(first.num_experts), str(first.expert_rank), f"{added / 1e6:,.2f}", f"{share:.1%}"


def _of_mpos(group: Sequence[MatrixFacts], dims: SiteDims) -> tuple[str, ...]:
    sites = " ".join(f"{o}·{i}" for o, i in zip(dims.out_dims, dims.in_dims, strict=True))
    parameters = sum(matrix.central + matrix.auxiliary for matrix in group)
    known = [matrix.error for matrix in group if matrix.error is not None]
    error = f"{max(known):.2g}" if known else "-"
    return sites, " ".join(map(str, group[0].bonds[1:-1])), f"{parameters / 1e6:,.2f}", error
