"""The grids of `quality.py`: which runs there are, and what a finished one has found."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mpoe.files import read_json


@dataclass(frozen=True)
class Grid:
    """What is compared.

    A file that has `base: FILE`, beside it, takes from that grid the keys that it has not, and the flags of a task or
    variant that it names without any.

    Attributes:
        flags: Of `mpoe finetune`, for all runs. `{name}` in a text is the folder that `--path name=folder` names, or
            one of CHECKPOINTS: where things lie is not part of a run's hash.
        tasks: Flags of every task, by its name in the table.
        variants: Flags of every variant; the first one is what the others are compared with.
        learning_rates: Peak rates that every variant is tried with on every task, with the first seed; the one that
            `best_rate` finds is taken for all seeds. A variant, or else a task, may have its own
            `learning_rate`, and then is not tuned.
        seeds: Of the runs.
    """

    flags: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    learning_rates: list[float]
    seeds: list[int]

    @classmethod
    def load(cls, path: Path) -> Grid:
        """Read a grid.

        Raises:
            ValueError: A file that cannot be read, or with other keys or types.
        """
        try:
            values = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ValueError(f"a grid must be a file that can be read; {path}: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"a grid must be YAML; {path} is not: {error}") from None
        names = [field.name for field in fields(cls)]
        base = None
        if isinstance(values, dict) and "base" in values:
            base = cls.load(path.parent / str(values.pop("base")))
            values = {**vars(base), **values}
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"a grid must have the keys {', '.join(names)}; {path} has {got}")
        for name in ("flags", "tasks", "variants"):
            value = values[name]
            if not (isinstance(value, dict) and value and (name == "flags" or all(map(_is_flags, value.values())))):
                raise ValueError(f"{name} of a grid must be names with flags; got {value!r} in {path}")
            if name != "flags":
                of_base = {} if base is None else getattr(base, name)
                values[name] = {key: flags or of_base.get(key, {}) for key, flags in value.items()}
        for name, kinds in (("learning_rates", (int, float)), ("seeds", int)):
            value = values[name]
            if not (isinstance(value, list) and value and all(isinstance(v, kinds) for v in value)):
                raise ValueError(f"{name} of a grid must be a list of numbers (1.0e-3, not 1e-3); got {value!r}")
        return cls(**values)

    def values(self) -> Iterator[str]:
        """All values of flags that are texts."""
        for flags in (self.flags, *self.tasks.values(), *self.variants.values()):
            yield from (value for value in flags.values() if isinstance(value, str))

    def rates(self, task: str, variant: str) -> list[float]:
        """The learning rates that a variant is tried with on a task."""
        own = {**self.flags, **self.tasks[task], **self.variants[variant]}.get("learning_rate")
        return self.learning_rates if own is None else [own]

    def run(self, task: str, variant: str, rate: float, seed: int) -> Run:
        """One run. Whether the routing does anything is tested with the first seed: it is a second evaluation."""
        flags = {**self.flags, **self.tasks[task], **self.variants[variant], "learning_rate": rate, "seed": seed}
        if flags.get("moe_type") != "none" and seed == self.seeds[0]:
            flags["test_routing"] = True
        return Run(task, variant, flags)


def _is_flags(value: object) -> bool:
    return value is None or isinstance(value, dict)


@dataclass(frozen=True)
class Run:
    """One `mpoe finetune`.

    Attributes:
        task: Its name in the grid.
        variant: Its name in the grid.
        flags: Of the command.
    """

    task: str
    variant: str
    flags: dict[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """A hash of the flags."""
        return hashlib.sha256(json.dumps(self.flags, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """For people; the hash is what counts."""
        words = f"{self.task} {self.variant} {self.flags['learning_rate']:g} seed {self.flags['seed']}"
        return "".join(c if c.isalnum() or c in ".-+" else "-" for c in words).lower()

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What it found; None if it has not finished."""
        found = sorted(folder.glob(f"*.{self.key}.json"))
        return read_json(found[0]) if found else None


def best_rate(grid: Grid, task: str, variant: str, folder: Path) -> float | None:
    """The rate with the least cross-entropy on the validation rows; None before all of them have been tried.

    The metric on a few hundred rows does not tell rates apart that the cross-entropy does.
    """
    rates = grid.rates(task, variant)
    found = [grid.run(task, variant, rate, grid.seeds[0]).result(folder) for rate in rates]
    losses = [cross_entropy(result["results"]["tasks"], "validation") for result in found if result is not None]
    return rates[losses.index(min(losses))] if len(losses) == len(rates) else None


def cross_entropy(tasks: Mapping[str, Any], split: str) -> float:
    """Nats a row, or a token of a corpus; the mean of several tasks'; arguments as in `first_metric`."""
    return statistics.fmean(metrics[split]["cross_entropy"] for metrics in tasks.values())


def headline(run: Mapping[str, Any], split: str) -> tuple[str, float]:
    """The name and value of what a run is judged by.

    Args:
        run: From `Run.result`.
        split: "validation" or "test".
    """
    return first_metric(run["results"]["tasks"], split)


def first_metric(tasks: Mapping[str, Any], split: str) -> tuple[str, float]:
    """The first metric's name and value; of several tasks the mean of their first ones.

    Args:
        tasks: Of a `FinetuneResult`.
        split: "validation" or "test".
    """
    firsts = [next(iter(metrics[split].items())) for metrics in tasks.values()]
    return firsts[0] if len(firsts) == 1 else ("average", statistics.fmean(value for _, value in firsts))
