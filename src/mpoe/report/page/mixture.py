"""What the page says of a mixture's routers, experts and tensors, as plain values for the templates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpoe.models import BondSpectrum
from mpoe.printable import printable
from mpoe.report.page.charts import Chart, Series, line_chart, number, thin
from mpoe.report.page.run import RunReport, stack_of

MOST_HEATS = 80  # steps that the heat map's slider stops at
MOST_SPECTRA = 200  # matrices that the spectra's slider stops at


def usage_charts(runs: Sequence[RunReport]) -> list[Chart]:
    """What routers and mask did by step: means over layers, with the range of the layers around them."""
    found = [
        _over_layers(runs, "Router entropy, nats", lambda values: values.get("entropy")),
        _over_layers(runs, "Load-balancing loss, 1 when balanced", lambda values: values.get("balance_loss")),
        _over_layers(runs, "Largest load of an expert, share", lambda values: max(values["share"])),
        _over_layers(runs, "Smallest load of an expert, share", lambda values: min(values["share"])),
        _over_layers(runs, "Smallest gate mass of an expert", lambda values: min(values.get("gate_mass", [None]))),
    ]
    if any(values.get("dropped_fraction") for run in runs for e in run.routed for values in e["layers"].values()):
        found.append(_over_layers(runs, "Dropped assignments, share", lambda values: values.get("dropped_fraction")))
    masked = [
        Series(run.name, [(e["step"], e["mask"]["discarded"]) for e in run.training if e.get("mask")], style)
        for style, run in enumerate(runs)
    ]
    found.append(line_chart("Updates that the gradient mask discarded, count", "step", masked, from_zero=True))
    return [one for one in found if one is not None]


def _over_layers(
    runs: Sequence[RunReport], title: str, value_of: Callable[[Mapping[str, Any]], float | None]
) -> Chart | None:
    series = []
    for style, run in enumerate(runs):
        points, band = [], []
        for entry in run.routed:
            values = [value for of_layer in entry["layers"].values() if (value := value_of(of_layer)) is not None]
            if values:
                points.append((entry["step"], statistics.fmean(values)))
                band.append((entry["step"], min(values), max(values)))
        series.append(Series(run.name, points, style, band))
    return line_chart(title, "step", series)


@dataclass(frozen=True)
class Heat:
    """Load and gate mass by layer and expert, over training.

    Attributes:
        layers: Label and full name.
        experts: Count.
        times: What each stop of the slider is called.
        tables: Load, and gate mass if it is known.
    """

    layers: Sequence[tuple[str, str]]
    experts: int
    times: Sequence[str]
    tables: Sequence[HeatTable]


@dataclass(frozen=True)
class HeatTable:
    """One of a run's heat maps; numbers are in thousandths of a per cent.

    Attributes:
        title: What is shown.
        even: What each expert would have if all had as much as each other.
        values: By stop, layer and expert; None where it was not logged.
    """

    title: str
    even: float
    values: Sequence[Sequence[Sequence[int | None]]]


def heat(run: RunReport) -> Heat | None:
    """The heat map of a run; None of one without experts."""
    labels = run.labels()
    stops: list[tuple[str, Mapping[str, Mapping[str, Any]]]] = [
        (f"step {entry['step']:,}", entry["layers"]) for entry in thin(run.routed, MOST_HEATS)
    ]
    if run.result is not None and run.result.routers:
        stops.append(("evaluation at the end", {name: vars(router) for name, router in run.result.routers.items()}))
    layers = list(dict.fromkeys(name for _, of_layers in stops for name in of_layers))
    experts = max((len(of["share"]) for _, of_layers in stops for of in of_layers.values()), default=0)
    if not experts:
        return None
    found = [
        _heat_table(title, key, [of_layers for _, of_layers in stops], layers, experts)
        for title, key in (("Load", "share"), ("Gate mass", "gate_mass"))
    ]
    return Heat(
        [(printable(labels[name]), printable(name)) for name in layers],
        experts,
        [time for time, _ in stops],
        [table for table in found if table is not None],
    )


def _heat_table(
    title: str, key: str, stops: Sequence[Mapping[str, Mapping[str, Any]]], layers: Sequence[str], experts: int
) -> HeatTable | None:
    values: list[list[list[int | None]]] = [
        [
            [None if value is None else round(100_000 * value) for value in of.get(name, {}).get(key, [None] * experts)]
            for name in layers
        ]
        for of in stops
    ]
    sums = [sum(known) for of in values for row in of if (known := [value for value in row if value is not None])]
    return HeatTable(title, statistics.fmean(sums) / experts, values) if sums else None


@dataclass(frozen=True)
class Divergence:
    """How far a run's experts have moved apart.

    Attributes:
        chart: By step; None without a log.
        layers: At the end: label, full name, number as shown, and its share of the largest in per cent.
    """

    chart: Chart | None
    layers: Sequence[tuple[str, str, str, float]]


def divergence(run: RunReport) -> Divergence | None:
    """The divergence of a run's experts; None if nobody knows it."""
    by_layer: dict[str, list[tuple[float, float]]] = {}
    for entry in run.routed:
        for name, values in entry["layers"].items():
            if values.get("divergence") is not None:
                by_layer.setdefault(name, []).append((entry["step"], values["divergence"]))
    labels = run.labels()
    stacks = list(dict.fromkeys(map(stack_of, by_layer)))
    series = [
        Series(labels[name], points, stacks.index(stack_of(name)), is_faint=True) for name, points in by_layer.items()
    ]
    for style, stack in enumerate(stacks):
        of_stack = [dict(points) for name, points in by_layer.items() if stack_of(name) == stack]
        steps = sorted(set[float]().union(*of_stack))
        means = [(step, statistics.fmean(points[step] for points in of_stack if step in points)) for step in steps]
        series.append(Series(f"{stack}, mean of {len(of_stack)} layers", means, style))
    last = run.divergence or {name: points[-1][1] for name, points in by_layer.items()}
    if not last:
        return None
    largest = max(last.values()) or 1.0
    return Divergence(
        line_chart("Relative distance of experts from their mean", "step", series, from_zero=True),
        [(labels[name], name, number(value), 100 * value / largest) for name, value in last.items()],
    )


@dataclass(frozen=True)
class Spectra:
    """A run's singular values and entropies.

    Attributes:
        names: What each stop of the slider shows.
        charts: One a stop.
        entropies: Charts by layer, one a bond.
    """

    names: Sequence[str]
    charts: Sequence[Chart]
    entropies: Sequence[Chart]


def spectra(run: RunReport) -> Spectra | None:
    """The spectra of a run's MPOs; None if it has none."""
    labels = run.labels()
    by_matrix: dict[str, list[BondSpectrum]] = {}
    for spectrum in run.spectra:
        by_matrix.setdefault(spectrum.matrix, []).append(spectrum)
    named = {matrix: _matrix_name(matrix, labels) for matrix in thin(list(by_matrix), MOST_SPECTRA)}
    charts = {named[matrix]: _spectrum_chart(by_matrix[matrix]) for matrix in named}
    found = {name: chart for name, chart in charts.items() if chart is not None}
    bonds = sorted({spectrum.bond for spectrum in run.spectra})
    entropies = [_entropy_chart([s for s in run.spectra if s.bond == bond], bond) for bond in bonds]
    if not found:
        return None
    return Spectra(
        [printable(name) for name in found], list(found.values()), [chart for chart in entropies if chart is not None]
    )


def _matrix_name(matrix: str, labels: Mapping[str, str]) -> str:
    layer = next((name for name in labels if matrix.startswith(f"{name}.")), None)
    return matrix if layer is None else f"{labels[layer]}, {matrix.removeprefix(f'{layer}.')}"


def _spectrum_chart(of_bonds: Sequence[BondSpectrum]) -> Chart | None:
    series, apart = [], 0.0
    for style, spectrum in enumerate(of_bonds):
        first, *others = spectrum.values
        of_others = zip(spectrum.index, *others, strict=True) if others else ()
        band = [(x, min(values), max(values)) for x, *values in of_others]
        pairs = [pair for values in others for pair in zip(first, values, strict=True)]
        apart = max([apart, *(abs(value / own - 1) for own, value in pairs if own)])
        shown = f"bond {spectrum.bond}" + (", expert 0" if others else "")
        series.append(Series(shown, list(zip(map(float, spectrum.index), first, strict=True)), style, band))
    note = ""
    if any(len(spectrum.values) > 1 for spectrum in of_bonds):
        note = (
            f"The area reaches over the other experts; their values differ from expert 0's by up to {100 * apart:.2g}%."
        )
    title = "Singular values, relative to the largest"
    return line_chart(title, "number of the singular value", series, is_log=True, note=note)


def _entropy_chart(of_bond: Sequence[BondSpectrum], bond: int) -> Chart | None:
    kinds: dict[str, list[BondSpectrum]] = {}
    for spectrum in of_bond:
        kinds.setdefault(spectrum.matrix.rpartition(".")[2], []).append(spectrum)
    series = [
        Series(
            kind,
            [(float(n), statistics.fmean(spectrum.entropy)) for n, spectrum in enumerate(found)],
            style,
            [(float(n), min(spectrum.entropy), max(spectrum.entropy)) for n, spectrum in enumerate(found)],
        )
        for style, (kind, found) in enumerate(kinds.items())
    ]
    largest = math.log(max(spectrum.bond_dim for spectrum in of_bond))
    note = f"The line is the mean over experts, the area reaches over all of them; ln D is at most {largest:.2f}."
    return line_chart(f"Entanglement entropy of bond {bond}, nats", "layer, in the model's order", series, note=note)


@dataclass(frozen=True)
class TokenMap:
    """A text's tokens and their experts.

    Attributes:
        title: "Text" or "Answer".
        pieces: Spaces before each token, and the token.
        left_out: Tokens that the model did not read, count.
        experts: Count.
        layers: Labels.
        choices: By layer and token: the experts, most probable first, and that one's probability in per cent.
    """

    title: str
    pieces: Sequence[tuple[str, str]]
    left_out: int
    experts: int
    layers: Sequence[str]
    choices: Sequence[Sequence[tuple[Sequence[int], int]]]

    @property
    def counts(self) -> list[int]:
        """Tokens of each expert in the first layer."""
        first = [experts[0] for experts, _ in self.choices[0] if experts]
        return [first.count(expert) for expert in range(self.experts)]


def token_maps(run: RunReport) -> list[TokenMap]:
    """The user's text as a run's mixture sees it, and the answer."""
    labels = run.labels()
    return [
        TokenMap(
            text.title,
            text.pieces,
            text.left_out,
            text.num_experts,
            [printable(labels[name]) for name in text.layers],
            [
                [(experts, round(100 * p)) for experts, p in zip(choice.experts, choice.probability, strict=True)]
                for choice in text.layers.values()
            ],
        )
        for text in run.texts
    ]
