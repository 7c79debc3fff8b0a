"""Fine-tuned quality of mixtures and baselines: tasks × variants × seeds, every run one `mpoe finetune` of its own.

    python benchmarks/quality.py benchmarks/quality/main.yaml --path data=../shared/data [--workers 2 --threads 1]
    python benchmarks/quality.py benchmarks/quality/main.yaml --table

A grid (a YAML file, see `Grid`) says what is run. A finished run is a JSON file in `benchmarks/results/quality`, found
again by the hash of its flags, from any grid; an interrupted one resumes. `--table` runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

import yaml
from rich.console import Console

from harness import ROOT, hardware, versions
from mpoe.cli.assets import minilm_checkpoint, smollm2_checkpoint, t5_checkpoint
from mpoe.files import read_json, write_json
from quality_grid import Grid, Run, best_rate, headline
from quality_table import markdown, put_table, task_table

RESULTS = ROOT / "benchmarks" / "results" / "quality"
WORK = ROOT / "build" / "quality"
# Models that a grid may name without saying where they are.
CHECKPOINTS: dict[str, Callable[[], Path]] = {
    "t5": t5_checkpoint, "smollm2": smollm2_checkpoint, "minilm": minilm_checkpoint,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a grid, or show what its runs have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", type=Path, help="YAML files, see the class Grid; one after the other")
    parser.add_argument("--table", action="store_true", help="only show what finished runs have found")
    parser.add_argument("--markdown", action="store_true", help="write the table in Markdown")
    parser.add_argument("--update", type=Path, help="put the tables into a Markdown file, see `put_table`")
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
            if args.update is not None:
                put_table(args.update, f"{path.stem} {task}", table)
            else:
                console.print(f"{table.title}\n\n{markdown(table)}" if args.markdown else table, markup=False)


def run_grid(grid: Grid, args: argparse.Namespace, paths: Mapping[str, str], console: Console) -> None:
    """Run what has not been run: of each task first every rate, then the other seeds with the best one."""
    for task in grid.tasks:
        tuning = [grid.run(task, v, rate, grid.seeds[0]) for v in grid.variants for rate in grid.rates(task, v)]
        _run_all(tuning, args, paths, console)
        best = {variant: best_rate(grid, task, variant, args.out) for variant in grid.variants}
        others = [
            grid.run(task, variant, rate, seed)
            for seed in grid.seeds[1:]
            for variant, rate in best.items()
            if rate is not None
        ]
        _run_all(others, args, paths, console)


def _chosen(grid: Grid, tasks: Sequence[str] | None, variants: Sequence[str] | None) -> Grid:
    for kind, names, there in (("tasks", tasks, grid.tasks), ("variants", variants, grid.variants)):
        if unknown := set(names or ()) - set(there):
            raise ValueError(f"--{kind} must be of {', '.join(there)}; got {', '.join(sorted(unknown))}")
    return dataclasses.replace(
        grid,
        tasks={name: flags for name, flags in grid.tasks.items() if not tasks or name in tasks},
        variants={name: flags for name, flags in grid.variants.items() if not variants or name in variants},
    )


def _run_all(runs: Sequence[Run], args: argparse.Namespace, paths: Mapping[str, str], console: Console) -> None:
    """Run those without a result, some at a time; the first failure is raised when those beside it have ended."""
    left = {run.key: run for run in runs if run.result(args.out) is None}
    stop = threading.Event()

    def report(run: Run) -> str | None:
        if stop.is_set():
            return None
        try:
            found = execute(run, args, paths)
        except Exception:
            stop.set()
            raise
        if found is None:
            return f"{run.name}: another process is at it"
        name, value = headline(found, "test")
        at = datetime.datetime.now().strftime("%H:%M")
        return f"{at} {run.name}: {name} {value:.4f}, {found['seconds']:.0f} s"

    if left:
        console.print(f"{len(left)} runs, {len(runs) - len(left)} found finished")
    with ThreadPoolExecutor(args.workers) as pool:
        for future in as_completed([pool.submit(report, run) for run in left.values()]):
            if line := future.result():
                console.print(line, highlight=False)


def execute(run: Run, args: argparse.Namespace, paths: Mapping[str, str]) -> dict[str, Any] | None:
    """Run it in a process of its own and keep its result.

    Returns:
        The result; None if another process is at it.

    Raises:
        RuntimeError: The command failed; the message has the end of its log.
    """
    work = WORK / run.key
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        if not _locked(lock):
            return None
        flags = _with_paths({**run.flags, "disable_tqdm": True}, paths)
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
            raise RuntimeError(f"{run.name} exited with {done.returncode}; the end of {work / 'log'}:\n{end}")
        found = {
            "task": run.task,
            "variant": run.variant,
            "flags": run.flags,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "hardware": hardware(),
            "processes": {"workers": args.workers, "threads": args.threads},
            "versions": versions(),
            "seconds": time.perf_counter() - started,
            "results": read_json(work / "run" / "results.json"),
        }
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"{run.name}.{run.key}.json", found)
        shutil.rmtree(work / "run")
    return found


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


if __name__ == "__main__":
    main()
