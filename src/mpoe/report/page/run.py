"""What the page knows of one run, and how its layers are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpoe.models import BondSpectrum, TokenRouting
from mpoe.training.finetune import FinetuneResult
from mpoe.training.live import short_name


@dataclass(frozen=True)
class RunReport:
    """One run's numbers; what it has not is empty, and its note says why.

    Attributes:
        name: As it is called on the page.
        model: The base model, as the run was told it.
        result: What the finished run wrote; None if it has not finished.
        log: Lines of its log, see `mpoe.training.live`.
        divergence: Of the experts of every layer at the end, by the layer's name, dimensionless.
        spectra: Of every MPO.
        texts: The user's text, and what the model answered.
        notes: What is missing, in words.
    """

    name: str
    model: str
    result: FinetuneResult | None = None
    log: Sequence[dict[str, Any]] = ()
    divergence: dict[str, float] = field(default_factory=dict)
    spectra: Sequence[BondSpectrum] = ()
    texts: Sequence[TokenRouting] = ()
    notes: Sequence[str] = ()

    @property
    def training(self) -> list[dict[str, Any]]:
        """The lines of logging steps."""
        return [entry for entry in self.log if isinstance(entry.get("loss"), float | int)]

    @property
    def routed(self) -> list[dict[str, Any]]:
        """The lines that say what the mixture did."""
        return [entry for entry in self.log if entry.get("layers")]

    @property
    def layers(self) -> list[str]:
        """The names of the mixture's layers, in the model's order; none of a dense run, or of one without a log."""
        of_lines = [entry["layers"] for entry in self.routed[-1:]]
        of_result = [] if self.result is None else [self.result.routers]
        found = [*of_lines, *of_result, self.divergence, *(text.layers for text in self.texts)]
        return list(dict.fromkeys(name for layers in found for name in layers))

    def labels(self) -> dict[str, str]:
        """Short names of the layers, see `layer_labels`."""
        return layer_labels(self.layers)


def layer_labels(names: Iterable[str]) -> dict[str, str]:
    """Names of layers that fit beside a row: "encoder 3", "layer 11"; the module's own where these would be the same.

    Args:
        names: Of modules.
    """
    names = list(names)
    short = {name: _label(name) for name in names}
    times = Counter(short.values())
    return {name: label if times[label] == 1 else short_name(name) for name, label in short.items()}


def stack_of(name: str) -> str:
    """The stack of a layer: "encoder", "decoder", or "layers" where a model has one.

    Args:
        name: Of a module.
    """
    parts = name.split(".")
    return next((stack for stack in ("encoder", "decoder") if stack in parts), "layers")


def _label(name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    stack = stack_of(name)
    return f"{'layer' if stack == 'layers' else stack} {numbers[0]}" if numbers else short_name(name)
