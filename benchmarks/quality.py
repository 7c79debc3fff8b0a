"""Fine-tuned quality of mixtures and baselines: tasks × variants × seeds, every run one `mpoe finetune` of its own.

    python benchmarks/quality.py benchmarks/quality/main.yaml --path data=../shared/data [--workers 2 --threads 1]
    python benchmarks/quality.py benchmarks/quality/main.yaml --table

A grid (a YAML file, see `Grid`) says what is run. A finished run is a JSON file in `benchmarks/results/quality`, found
again by the hash of its flags, from any grid; an interrupted one resumes. `--table` runs nothing.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import yaml
from rich.console import Console
from rich.table import Table

from harness import ROOT, hardware, versions
from mpoe.cli.assets import minilm_checkpoint, smollm2_checkpoint, t5_checkpoint
from mpoe.files import read_json, write_json

RESULTS = ROOT / "benchmarks" / "results" / "quality"
WORK = ROOT / "build" / "quality"
# Models that a grid may name without saying where they are.
CHECKPOINTS: dict[str, Callable[[], Path]] = {
    "t5": t5_checkpoint, "smollm2": smollm2_checkpoint, "minilm": minilm_checkpoint,
}  # fmt: skip
PARTS = ("other", "central", "auxiliary", "router")  # that a model's parameters are counted in
LOWER_IS_BETTER = ("perplexity", "cross_entropy")


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
        learning_rates: Peak rates that every variant is tried with on every task, with the first seed; the one that is
            best on the validation rows is taken for all seeds. A variant, or else a task, may have its own
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
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"a grid must be a YAML file; {path} cannot be read: {error}") from None
        names = [field.name for field in fields(cls)]
        base = (
            cls.load(path.parent / str(values.pop("base"))) if isinstance(values, dict) and "base" in values else None
        )
        if base is not None:
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

    def execute(self, args: argparse.Namespace, paths: Mapping[str, str]) -> dict[str, Any] | None:
        """Run it in a process of its own and keep its result.

        Returns:
            The result; None if another process is at it.

        Raises:
            RuntimeError: The command failed; the message has the end of its log.
        """
        work = WORK / self.key
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            if not _locked(lock):
                return None
            flags = _with_paths({**self.flags, "disable_tqdm": True}, paths)
            (work / "flags.yaml").write_text(yaml.safe_dump(flags))
            command = [sys.executable, "-m", "mpoe.cli.main", "finetune", str(work / "flags.yaml")]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            started = time.perf_counter()
            with (work / "log").open("a") as log:
                done = subprocess.run(
                    [*command, "--output_dir", str(work / "run")],
                    stdout=log, stderr=subprocess.STDOUT, env=environment, check=False,
                )  # fmt: skip
            if done.returncode:
                end = "\n".join((work / "log").read_text().splitlines()[-8:])
                raise RuntimeError(f"{self.name} exited with {done.returncode}; the end of {work / 'log'}:\n{end}")
            found = {
                "task": self.task,
                "variant": self.variant,
                "flags": self.flags,
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "hardware": hardware(),
                "processes": {"workers": args.workers, "threads": args.threads},
                "versions": versions(),
                "seconds": time.perf_counter() - started,
                "results": read_json(work / "run" / "results.json"),
            }
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(args.out / f"{self.name}.{self.key}.json", found)
            shutil.rmtree(work / "run")
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a grid, or show what its runs have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", type=Path, help="YAML files, see the class Grid; one after the other")
    parser.add_argument("--table", action="store_true", help="only show what finished runs have found")
    parser.add_argument("--markdown", action="store_true", help="write the table in Markdown")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDER", help="what {NAME} stands for")
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, count (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each run, count (all cores)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results/quality)")
    args = parser.parse_args(arguments)
    try:
        paths = dict(pair.split("=", 1) for pair in args.path)
    except ValueError:
        parser.error(f"--path must be NAME=FOLDER; got {' '.join(args.path)}")
    console = Console(width=None if sys.stdout.isatty() else 220)
    for path in args.grid:
        try:
            grid = _chosen(Grid.load(path), args.tasks, args.variants)
            if not args.table:
                run_grid(grid, args, paths, console)
        except (ValueError, RuntimeError) as error:
            console.print(f"error: {error}", markup=False)
            raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
        for task in grid.tasks:
            table = task_table(grid, task, args.out)
            console.print(_markdown(table) if args.markdown else table, markup=False)


def run_grid(grid: Grid, args: argparse.Namespace, paths: Mapping[str, str], console: Console) -> None:
    """Run what has not been run: of each task first every rate, then the other seeds with the best one."""
    for task in grid.tasks:
        tuning = [grid.run(task, v, rate, grid.seeds[0]) for v in grid.variants for rate in grid.rates(task, v)]
        _run_all(tuning, args, paths, console)
        others = []
        for variant in grid.variants:
            rate = best_rate(grid, task, variant, args.out)
            if rate is not None:
                others += [(grid.seeds.index(seed), grid.run(task, variant, rate, seed)) for seed in grid.seeds[1:]]
        _run_all([run for _, run in sorted(others, key=lambda pair: pair[0])], args, paths, console)


def best_rate(grid: Grid, task: str, variant: str, folder: Path) -> float | None:
    """The rate with the best first metric on the validation rows; None before all of them have been tried."""
    rates = grid.rates(task, variant)
    found = [grid.run(task, variant, rate, grid.seeds[0]).result(folder) for rate in rates]
    if any(result is None for result in found):
        return None
    scores = [_signed(*_headline(result, "validation")) for result in found if result is not None]
    return rates[scores.index(max(scores))]


def task_table(grid: Grid, task: str, folder: Path) -> Table:
    """One row a variant: means and standard deviations over seeds, on the test rows of the best checkpoint."""
    table = Table(title=f"{task}: test rows", title_justify="left")
    columns: dict[str, None] = {}
    rows = []
    first: dict[int, float] | None = None
    for variant in grid.variants:
        rate = best_rate(grid, task, variant, folder)
        runs = {} if rate is None else {seed: grid.run(task, variant, rate, seed).result(folder) for seed in grid.seeds}
        found = {seed: result for seed, result in runs.items() if result is not None}
        row = {"variant": variant, "rate": "-" if rate is None else f"{rate:g}", "seeds": str(len(found))}
        if found:
            scores = {seed: _headline(result, "test")[1] for seed, result in found.items()}
            first = scores if first is None else first
            row |= _measured(list(found.values())) | {"difference": _difference(scores, first)}
        columns |= dict.fromkeys(row)
        rows.append(row)
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*(row.get(column, "-") for column in columns))
    return table


def _measured(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    results = [run["results"] for run in found]
    name = _headline(found[0], "test")[0]
    row = {name: _mean([_headline(run, "test")[1] for run in found])}
    row["cross-entropy"] = _mean([next(iter(r["tasks"].values()))["test"]["cross_entropy"] for r in results])
    row["parameters, M"] = f"{sum(results[0]['parameters'][part] for part in PARTS) / 1e6:.1f}"
    rates = [r["tokens_per_second"] for r in results if r["tokens_per_second"]]
    row["tokens/s"] = f"{statistics.median(rates):.0f}" if rates else "-"
    row["peak, GiB"] = f"{max(r['peak_memory'] for r in results) / 2**30:.1f}"
    if entropies := [_usage(r["routers"]) for r in results if r["routers"]]:
        row["usage"] = _mean(entropies)
    shuffled = [r for r in results if r["shuffled"] is not None]
    if shuffled:
        lost = [_metric(r["tasks"], "test")[1] - _metric(r["shuffled"], "test")[1] for r in shuffled]
        entropy = [
            next(iter(r["shuffled"].values()))["test"]["cross_entropy"]
            - next(iter(r["tasks"].values()))["test"]["cross_entropy"]
            for r in shuffled
        ]
        row["lost by shuffling"] = f"{_mean(lost)}; {_mean(entropy)} nats"
    return row


def _usage(routers: Mapping[str, Mapping[str, Any]]) -> float:
    """The entropy of the experts' shares of tokens over that of equal shares, mean over layers; 1 is balanced."""
    return statistics.fmean(
        sum(-s * math.log(s) for s in router["share"] if s > 0) / math.log(len(router["share"]))
        for router in routers.values()
    )


def _headline(run: Mapping[str, Any], split: str) -> tuple[str, float]:
    return _metric(run["results"]["tasks"], split)


def _metric(tasks: Mapping[str, Any], split: str) -> tuple[str, float]:
    """The first metric's name and value; of several tasks the mean of their first ones."""
    firsts = [next(iter(metrics[split].items())) for metrics in tasks.values()]
    return firsts[0] if len(firsts) == 1 else ("average", statistics.fmean(value for _, value in firsts))


def _signed(name: str, value: float) -> float:
    return -value if name in LOWER_IS_BETTER else value


def _mean(values: Sequence[float]) -> str:
    digits = 2 if max(map(abs, values)) >= 10 else 4
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _difference(scores: Mapping[int, float], first: Mapping[int, float]) -> str:
    """To the first variant, over the seeds that both have: the mean, and its standard error over these seeds."""
    pairs = [scores[seed] - first[seed] for seed in scores if seed in first]
    if not pairs:
        return "-"
    if not any(pairs):
        return "0"
    error = f" ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}" if len(pairs) > 1 else ""
    return f"{statistics.fmean(pairs):+.4f}{error}"


def _chosen(grid: Grid, tasks: Sequence[str] | None, variants: Sequence[str] | None) -> Grid:
    for kind, names, there in (("tasks", tasks, grid.tasks), ("variants", variants, grid.variants)):
        if unknown := set(names or ()) - set(there):
            raise ValueError(f"--{kind} must be of {', '.join(there)}; got {', '.join(sorted(unknown))}")
    return Grid(
        grid.flags,
        {name: flags for name, flags in grid.tasks.items() if not tasks or name in tasks},
        {name: flags for name, flags in grid.variants.items() if not variants or name in variants},
        grid.learning_rates,
        grid.seeds,
    )


def _run_all(runs: Sequence[Run], args: argparse.Namespace, paths: Mapping[str, str], console: Console) -> None:
    """Run those without a result, some at a time; the first failure is raised when those beside it have ended."""
    left = {run.key: run for run in runs if run.result(args.out) is None}
    stop = threading.Event()

    def execute(run: Run) -> str | None:
        if stop.is_set():
            return None
        try:
            found = run.execute(args, paths)
        except Exception:
            stop.set()
            raise
        if found is None:
            return f"{run.name}: another process is at it"
        name, value = _headline(found, "test")
        at = datetime.datetime.now().strftime("%H:%M")
        return f"{at} {run.name}: {name} {value:.4f}, {found['seconds']:.0f} s"

    if left:
        console.print(f"{len(left)} runs, {len(runs) - len(left)} found finished")
    with ThreadPoolExecutor(args.workers) as pool:
        for future in as_completed([pool.submit(execute, run) for run in left.values()]):
            if line := future.result():
                console.print(line, highlight=False)


def _with_paths(flags: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    def put(value: Any) -> Any:
        if not (isinstance(value, str) and value.startswith("{")) or value.startswith('{"'):
            return value
        name, _, rest = value[1:].partition("}")
        if name not in paths and name not in CHECKPOINTS:
            raise ValueError(f"{value} of the grid needs --path {name}=FOLDER")
        return str(paths.get(name) or CHECKPOINTS[name]()) + rest

    return {name: put(value) for name, value in flags.items()}


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _markdown(table: Table) -> str:
    columns = [list(column.cells) for column in table.columns]
    lines = [[str(column.header) for column in table.columns], ["---"] * len(columns), *zip(*columns, strict=True)]
    return f"{table.title}\n\n" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    main()
