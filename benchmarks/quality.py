"""Fine-tuned quality of mixtures and baselines: tasks × variants × seeds, every run one `mpoe finetune` of its own.

    python benchmarks/quality.py benchmarks/quality/main.yaml --path data=FOLDER --workers 2 --threads 1
    python benchmarks/quality.py benchmarks/quality/main.yaml --table

A grid is a YAML file that says what is run: flags, tasks, variants, learning rates and seeds. A finished run is a JSON
file in benchmarks/results/quality, found again by the hash of its flags, from any grid; an interrupted one resumes.
benchmarks/README.md says what the files of FOLDER are, and what the columns mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fcntl
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
_PLACE = re.compile(r"\{(\w+)\}(.*)", re.DOTALL)  # of a flag: the {NAME} that --path names, and what is in it


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a grid, or show what its runs have found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="+", type=Path, help="YAML files, one after the other")
    parser.add_argument("--table", action="store_true", help="run nothing, show what finished runs have found")
    parser.add_argument("--markdown", action="store_true", help="the same in Markdown")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE",
        help="the same, put into a Markdown file where it has the lines <!-- table GRID TASK --> and <!-- end -->",
    )  # fmt: skip
    parser.add_argument(
        "--path", action="append", default=[], metavar="NAME=FOLDER", help="what {NAME} in a grid stands for"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these, of the grids that have them")
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="VARIANT",
        help="only these, of the grids that have them all; differences are to the one that a grid has first",
    )
    parser.add_argument("--workers", type=_count, default=1, help="runs at a time, count (default: 1)")
    parser.add_argument("--threads", type=_count, default=os.cpu_count(), help="of each run, count (all cores)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results/quality)")
    args = parser.parse_args(arguments)
    args.table = args.table or args.markdown or args.update is not None
    console = Console(width=None if sys.stdout.isatty() else 220)
    try:
        if args.update is not None and args.variants:
            raise ValueError("--update writes whole tables; leave --variants out")
        if args.update is not None and not args.update.is_file():
            raise ValueError(f"--update must be a Markdown file that there is; got {args.update}")
        grids = _chosen({path: Grid.load(path) for path in args.grid}, args.tasks, args.variants)
        paths = _paths(args.path, grids.values(), needed=not args.table)
        if args.table and not any(args.out.glob("*.json")):
            raise ValueError(f"--out must be a folder with results of runs; {args.out} has none")
        written = 0
        for path, grid in grids.items():
            if not args.table:
                run_grid(grid, args, paths, console)
            for task in grid.tasks:
                table = task_table(grid, task, args.out)
                table.title = f"{path.stem} {task}: test rows"
                if args.update is not None:
                    written += put_table(args.update, f"{path.stem} {task}", table)
                else:
                    console.print(f"{table.title}\n\n{markdown(table)}" if args.markdown else table, markup=False)
        if args.update is not None:
            if not written:
                raise ValueError(f"--update: {args.update} has no line <!-- table GRID TASK --> of these grids")
            console.print(f"{written} tables in {args.update}")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, RuntimeError) else 2) from None


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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a count >= 1; got {text}")
    return int(text)


def _chosen(
    grids: Mapping[Path, Grid], tasks: Sequence[str] | None, variants: Sequence[str] | None
) -> dict[Path, Grid]:
    """What the flags name of each grid, without the grids that have nothing of it."""
    for kind, names in (("tasks", tasks), ("variants", variants)):
        there = list(dict.fromkeys(name for grid in grids.values() for name in getattr(grid, kind)))
        if unknown := set(names or ()) - set(there):
            raise ValueError(f"--{kind} must be of {there}; got {sorted(unknown)}")
    chosen = {
        path: dataclasses.replace(
            grid,
            tasks={task: flags for task, flags in grid.tasks.items() if not tasks or task in tasks},
            variants={
                variant: flags for variant, flags in grid.variants.items() if not variants or variant in variants
            },
        )
        for path, grid in grids.items()
    }
    chosen = {path: grid for path, grid in chosen.items() if grid.tasks and set(variants or ()) <= set(grid.variants)}
    if not chosen:
        raise ValueError(f"no grid has a task of {tasks} and all variants of {variants}")
    return chosen


def _paths(pairs: Sequence[str], grids: Iterable[Grid], needed: bool) -> dict[str, str]:
    """What `--path` names, checked before the first run: used by a grid, and there; if `needed`, nothing is missing."""
    paths = {name: folder for name, _, folder in (pair.partition("=") for pair in pairs)}
    places = {(found[1], found[2]) for grid in grids for value in grid.values() if (found := _PLACE.fullmatch(value))}
    used = {name for name, _ in places}
    if unknown := {name for name, folder in paths.items() if name not in used or not folder}:
        raise ValueError(
            f"--path must be NAME=FOLDER, NAME of {', '.join(sorted(used))}; got {', '.join(sorted(unknown))}"
        )
    if needed and (missing := used - set(paths) - set(CHECKPOINTS)):
        raise ValueError(f"the grid needs {' '.join(f'--path {name}=FOLDER' for name in sorted(missing))}")
    for name, rest in sorted(places):
        if name in paths and not Path(paths[name] + rest).exists():
            raise ValueError(
                f"--path {name} must be a folder with what the grid names, {{{name}}}{rest}; "
                f"there is no {paths[name]}{rest}"
            )
    return paths


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
        found = _PLACE.fullmatch(value) if isinstance(value, str) else None
        return value if found is None else str(paths.get(found[1]) or CHECKPOINTS[found[1]]()) + found[2]

    return {name: put(value) for name, value in flags.items()}


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main()
