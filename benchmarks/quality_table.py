"""The tables of `quality.py`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mpoe.files import write_bytes
from quality_grid import Grid, best_rate, cross_entropy, first_metric, headline

PARTS = ("other", "central", "auxiliary", "router")  # that a model's parameters are counted in


def task_table(grid: Grid, task: str, folder: Path) -> Table:
    """One row a variant: means and standard deviations over seeds, on the test rows of the best checkpoint."""
    table = Table(title_justify="left")
    columns: dict[str, None] = {}
    rows = []
    first: Mapping[int, Mapping[str, Any]] | None = None
    for variant in grid.variants:
        rate = best_rate(grid, task, variant, folder)
        runs = {} if rate is None else {seed: grid.run(task, variant, rate, seed).result(folder) for seed in grid.seeds}
        found = {seed: result for seed, result in runs.items() if result is not None}
        row = {"variant": variant, "rate": "-" if rate is None else f"{rate:g}", "seeds": str(len(found))}
        if found:
            first = found if first is None else first
            row |= (
                _measured([*found.values()]) | {"difference": _difference(found, first)} | _routing([*found.values()])
            )
        columns |= dict.fromkeys(row)
        rows.append(row)
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*(row.get(column, "-") for column in columns))
    return table


def _measured(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    results = [run["results"] for run in found]
    name = headline(found[0], "test")[0]
    row = {name: _mean([headline(run, "test")[1] for run in found])}
    row["cross-entropy"] = _mean([_nats(run) for run in found])
    row["parameters, M"] = f"{sum(results[0]['parameters'][part] for part in PARTS) / 1e6:.1f}"
    rates = [r["tokens_per_second"] for r in results if r["tokens_per_second"]]
    row["tokens/s"] = f"{statistics.median(rates):.0f}" if rates else "-"
    row["peak, GiB"] = f"{max(r['peak_memory'] for r in results) / 2**30:.1f}"
    return row


def _routing(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How evenly experts are used, and what it costs to shuffle them; nothing for a dense model."""
    results = [run["results"] for run in found]
    row: dict[str, str] = {}
    if entropies := [_usage(r["routers"]) for r in results if r["routers"]]:
        row["usage"] = _mean(entropies)
    shuffled = [r for r in results if r["shuffled"] is not None]
    if shuffled:
        pairs = [(first_metric(r["tasks"], "test")[1], first_metric(r["shuffled"], "test")[1]) for r in shuffled]
        name = headline(found[0], "test")[0]
        lost = [other - own if name == "perplexity" else own - other for own, other in pairs]
        entropy = [cross_entropy(r["shuffled"], "test") - cross_entropy(r["tasks"], "test") for r in shuffled]
        row["lost by shuffling"] = f"{_mean(lost)}; {_mean(entropy)} nats"
    return row


def _usage(routers: Mapping[str, Mapping[str, Any]]) -> float:
    """The entropy of the experts' shares of tokens over that of equal shares, mean over layers; 1 is balanced."""
    return statistics.fmean(
        sum(-s * math.log(s) for s in router["share"] if s > 0) / math.log(len(router["share"]))
        for router in routers.values()
    )


def _mean(values: Sequence[float]) -> str:
    digits = 2 if max(map(abs, values)) >= 10 else 4
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _difference(found: Mapping[int, Mapping[str, Any]], first: Mapping[int, Mapping[str, Any]]) -> str:
    """To the first variant, over the seeds that both have: means, and their standard errors over these seeds."""
    pairs = [(found[seed], first[seed]) for seed in found if seed in first]
    if not pairs:
        return "-"
    if found is first:
        return "0"
    metric = [headline(run, "test")[1] - headline(other, "test")[1] for run, other in pairs]
    nats = [_nats(run) - _nats(other) for run, other in pairs]
    return f"{_signed(metric)}; {_signed(nats)} nats"


def _nats(run: Mapping[str, Any]) -> float:
    return cross_entropy(run["results"]["tasks"], "test")


def _signed(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{error}"


def put_table(path: Path, name: str, table: Table) -> int:
    """Put a table into a Markdown file, between `<!-- table NAME -->` and `<!-- end -->`, if it has these lines.

    Args:
        path: The file.
        name: Of the grid's file and the task: "main cola".
        table: From `task_table`.

    Returns:
        How often it has them, count.
    """
    before = path.read_text()
    block = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    after, count = block.subn(lambda found: f"{found[1]}\n{markdown(table)}\n{found[2]}", before)
    if after != before:
        write_bytes(path, after.encode())
    return count


def markdown(table: Table) -> str:
    """A table's lines in Markdown."""
    columns = [list(column.cells) for column in table.columns]
    lines = [[str(column.header) for column in table.columns], ["---"] * len(columns), *zip(*columns, strict=True)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
