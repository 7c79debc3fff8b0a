"""Several runs side by side: what they reached, and what it cost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence

from rich.table import Table

from mpoe.printable import markdown
from mpoe.report.plain import TITLE, plain
from mpoe.report.results import COUNTS
from mpoe.training.finetune import FinetuneResult

FORMATS = (".md", ".csv", ".json")


SCORES = {"bleu_2": "BLEU-2", "bleu_4": "BLEU-4", "self_bleu_2": "Self-BLEU-2"}


def comparison_rows(
    results: Mapping[str, FinetuneResult], scores: Mapping[str, Mapping[str, float]] | None = None
) -> list[dict[str, float | str | None]]:
    """One row a run, the same columns in all; None where a run has no such number.

    Args:
        results: By the run's name. Metrics are those of the test rows (of the validation rows, and said so, where there
            is no test), and of several tasks the average of their first ones; cross-entropy in nats a row, of a corpus
            a token; parameters in millions, time in seconds, memory in GiB.
        scores: Of texts that a run has generated, by its name: see `TextScores`. None, or no such name, is no such
            text.
    """
    columns: dict[str, None] = {}
    rows: list[dict[str, float | str | None]] = []
    for name, result in results.items():
        row: dict[str, float | str | None] = {"run": name}
        for task, splits in result.tasks.items():
            split, where = ("test", "") if "test" in splits else ("validation", " (validation)")
            metrics = {metric: value for metric, value in splits[split].items() if metric not in COUNTS}
            row |= {f"{task} {metric.replace('_', ' ')}{where}": value for metric, value in metrics.items()}
        if len(result.tasks) > 1:
            row["average"] = result.average["test"]
        row |= {
            shown: of_text[key] for of_text in [(scores or {}).get(name)] if of_text for key, shown in SCORES.items()
        }
        columns |= dict.fromkeys(row)
        rows.append(
            row
            | {
                "parameters, M": result.parameters.total / 1e6,
                "trained, M": sum(part.trained for part in result.trained) / 1e6,
                "steps": float(result.steps),
                "s a step": result.seconds_per_step,
                "peak memory, GiB": result.peak_memory / 2**30,
            }
        )
    columns |= dict.fromkeys(rows[0]) if rows else {}
    return [{column: row.get(column) for column in columns} for row in rows]


def comparison_table(rows: Sequence[Mapping[str, float | str | None]], title: str = "Test rows") -> Table:
    """The rows for a terminal, one column a run: there are more numbers than runs, as a rule.

    Args:
        rows: From `comparison_rows`.
        title: Above the table.
    """
    table = Table(title=plain(title, TITLE), title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(plain(str(row["run"])), justify="right")
    for column in list(rows[0])[1:] if rows else ():
        table.add_row(plain(column), *(plain(shown_value(column, row[column])) for row in rows))
    return table


def comparison_text(rows: Sequence[Mapping[str, float | str | None]], suffix: str) -> str:
    """The rows for a file.

    Args:
        rows: From `comparison_rows`.
        suffix: Of FORMATS: a Markdown table, rounded; CSV and JSON in full.
    """
    columns = list(rows[0]) if rows else []
    if suffix == ".json":
        return json.dumps(rows, indent=2) + "\n"
    if suffix == ".csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()
    lines = [columns, ["---"] * len(columns), *([shown_value(c, v) for c, v in row.items()] for row in rows)]
    return "".join(f"| {' | '.join(map(markdown, line))} |\n" for line in lines)


def shown_value(column: str, value: float | str | None) -> str:
    """A value as a table shows it.

    Args:
        column: Of `comparison_rows`.
        value: There.
    """
    if value is None or isinstance(value, str):
        return value or "-"
    digits = {"steps": 0, "s a step": 2, "peak memory, GiB": 1, **dict.fromkeys(SCORES.values(), 2)}
    digits = 1 if column.endswith(", M") else digits.get(column, 4)
    return f"{value:,.{digits}f}"
