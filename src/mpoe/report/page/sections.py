"""What the page says of every run, dense or mixture, as plain values for the templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpoe.models import ParameterCount
from mpoe.report.comparison import comparison_rows, shown_value
from mpoe.report.page.charts import Chart, Series, line_chart, number
from mpoe.report.page.run import RunReport
from mpoe.report.results import COUNTS


@dataclass(frozen=True)
class Card:
    """A run's headline.

    Attributes:
        name: Of the run.
        kind: Dense, or which mixture.
        model: The base.
        metrics: Label and number, the first one large.
        facts: Label, number and what explains it.
    """

    name: str
    kind: str
    model: str
    metrics: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str, str]]


def cards(runs: Sequence[RunReport]) -> list[Card]:
    """One card a run."""
    return [_card(run) for run in runs]


def _card(run: RunReport) -> Card:
    result, experts = run.result, _experts_of(run)
    kind = f"{experts} experts in {len(run.layers)} layers" if experts else "dense, or MPOs without a router"
    if result is None:
        last = run.log[-1]["step"] if run.log else 0
        return Card(run.name, kind if experts else "not finished", run.model, [], [("Steps so far", f"{last:,}", "")])
    if not experts and result.parameters.central == 0:
        kind = "dense"
    metrics = []
    for task, splits in result.tasks.items():
        split = "test" if "test" in splits else "validation"
        of_split = [(name, value) for name, value in splits[split].items() if name not in COUNTS]
        metrics += [(f"{task}: {name.replace('_', ' ')}, {split} rows", number(value)) for name, value in of_split]
    count = result.parameters
    facts = [
        ("Parameters", f"{_millions(count.total)} M", f"dense {_millions(count.dense)} M"),
        ("Trained", f"{_millions(sum(part.trained for part in result.trained))} M", ""),
        ("Met by one token", f"{_millions(count.active)} M", ""),
        (
            "Steps",
            f"{result.steps:,}",
            f"the model is of {result.best_step:,}" if result.best_step else "",
        ),
        ("Peak memory", f"{result.peak_memory / 2**30:.1f} GiB", ""),
    ]
    if result.seconds_per_step is not None:
        in_all = _duration(result.seconds_per_step * result.steps)
        facts.insert(4, ("Time a step", f"{result.seconds_per_step:.2f} s", f"{in_all} in all, without evaluations"))
    return Card(run.name, kind, run.model, metrics, facts)


def _experts_of(run: RunReport) -> int:
    shares = [values["share"] for entry in run.routed[-1:] for values in entry["layers"].values()]
    shares += [router.share for router in run.result.routers.values()] if run.result is not None else []
    return max(map(len, shares), default=0)


def comparison(runs: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """All numbers of the finished runs: what, and of each run; nothing if fewer than two have finished."""
    results = {run.name: run.result for run in runs if run.result is not None}
    if len(results) < 2:
        return []
    of_run = {str(row["run"]): row for row in comparison_rows(results)}
    for name, row in of_run.items():
        count = results[name].parameters
        row |= {"dense model, M": count.dense / 1e6, "met by one token, M": count.active / 1e6}
    columns = list(dict.fromkeys(column for row in of_run.values() for column in row if column != "run"))
    return [
        (column, [shown_value(column, of_run[run.name][column]) if run.name in of_run else "-" for run in runs])
        for column in columns
    ]


def curves(runs: Sequence[RunReport]) -> list[Chart]:
    """Loss and metrics by step, all runs in each chart."""

    def chart(title: str, name: str, note: str = "") -> Chart | None:
        series = [
            Series(
                run.name,
                [(entry["step"], entry[name]) for entry in run.log if isinstance(entry.get(name), float | int)],
                style,
            )
            for style, run in enumerate(runs)
        ]
        return line_chart(title, "step", series, note=note)

    names = dict.fromkeys(name for run in runs for entry in run.log for name in entry if name.startswith("eval_"))
    if sum(name.endswith("average_metrics") for name in names) and len(names) < 6:
        names = {name: None for name in names if not name.endswith("average_metrics")}  # one task is its own average
    found = [
        chart("Training loss, nats a target", "loss", "The routers' losses are part of it."),
        *(chart(f"Validation {name.removeprefix('eval_').replace('_', ' ')}", name) for name in names),
        chart("Learning rate", "learning_rate"),
    ]
    return [one for one in found if one is not None]


@dataclass(frozen=True)
class Bar:
    """Parameters of one model.

    Attributes:
        label: Which model.
        total: Millions, as shown.
        parts: Of each part its kind (a class of style.css), what it is, millions as shown, and its share of the widest
            bar in per cent.
        is_reference: Whether it is no run, but what a run is compared with.
    """

    label: str
    total: str
    parts: Sequence[tuple[str, str, str, float]]
    is_reference: bool


def parameter_bars(runs: Sequence[RunReport]) -> list[Bar]:
    """Parameters of the runs, of their dense models and of the same mixtures with whole experts."""
    counts = [(run.name, run.result.parameters) for run in runs if run.result is not None]
    models = [(name, _of_count(count), False) for name, count in counts]
    for name, count in counts:
        if count.total == count.dense:
            continue
        whole = count.whole_experts - count.other - count.router
        models.append((f"the dense model of {name}", _parts(count.other, count.dense - count.other, 0, 0), True))
        if count.whole_experts != count.dense:
            models.append((f"{name} with whole experts", _parts(count.other, whole, 0, count.router), True))
    bars: list[tuple[str, dict[str, int], bool]] = []
    for label, parts, is_reference in models:  # what a run or another reference shows already is shown once
        if not is_reference or sum(parts.values()) not in [sum(shown.values()) for _, shown, _ in bars]:
            bars.append((label, parts, is_reference))
    widest = max((sum(parts.values()) for _, parts, _ in bars), default=0)
    names = {"other": "the rest", "central": "matrices, or central tensors", "auxiliary": "auxiliary tensors"}
    return [
        Bar(
            label,
            _millions(sum(parts.values())),
            [
                (kind, names.get(kind, "routers"), _millions(size), 100 * size / widest)
                for kind, size in parts.items()
                if size
            ],
            is_reference,
        )
        for label, parts, is_reference in bars
    ]


def _of_count(count: ParameterCount) -> dict[str, int]:
    dense = count.dense - count.other  # a dense run's feed-forward matrices are not told apart
    return (
        _parts(count.other, count.central, count.auxiliary, count.router)
        if count.central
        else _parts(count.other, dense, 0, 0)
    )


def _parts(other: int, central: int, auxiliary: int, router: int) -> dict[str, int]:
    return {"other": other, "central": central, "auxiliary": auxiliary, "router": router}


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}" if count >= 1e6 or not count else f"{count / 1e6:,.3f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
