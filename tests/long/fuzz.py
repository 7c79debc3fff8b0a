"""`make fuzz`: random shapes, configs and damaged files, for a given time in all.

    make fuzz [ARGS='--minutes 10 --seed 0']
    make fuzz ARGS='--property "saved mixtures" --seed 0 --case 123'      one case again, with its traceback

Every case follows from the seed, the property's name and its number. A case that fails is printed with what it tried.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzzing import checkpoints, documents, numbers, runs
from fuzzing.cases import SECONDS, Case, Hang, Property, time_limit
from rich.console import Console
from rich.table import Table

PROPERTIES = (*numbers.PROPERTIES, *documents.PROPERTIES, *checkpoints.PROPERTIES, *runs.PROPERTIES)
PROCESSES = 2
MEMORY = 6 * 2**30  # bytes of address space that a process may take beyond what it begins with
SHOWN = 5  # failures that are printed of a property; the others are counted


@dataclass
class Outcome:
    """What has become of a property.

    Attributes:
        cases: Tried, count.
        failures: By what was raised and where: a first case and its story.
        repeated: How often each of them came.
    """

    cases: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    repeated: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, story: str) -> None:
        """One more failure."""
        self.failures.setdefault(kind, story)
        self.repeated[kind] += 1


def main() -> None:
    """Try every property, print the table; exit 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="time in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--property", nargs="*", choices=[p.name for p in PROPERTIES], help="only these")
    parser.add_argument("--case", type=int, help="only this one, with its traceback")
    args = parser.parse_args()
    chosen = [p for p in PROPERTIES if args.property is None or p.name in args.property]
    torch.set_num_threads(1)
    if args.case is not None:
        for prop in chosen:
            _again(prop, args.seed, args.case)
        return
    console = Console()
    a_share = args.minutes * 60 * min(PROCESSES, len(chosen)) / sum(p.share for p in chosen)
    outcomes = _try_all(chosen, args.seed, a_share, console)
    table = Table("property", title=f"seed {args.seed}, {args.minutes:g} minutes", title_justify="left")
    table.add_column("cases", justify="right")
    table.add_column("failures", justify="right")
    for prop in chosen:
        outcome = outcomes[prop.name]
        failed = outcome.repeated.total()
        table.add_row(prop.name, f"{outcome.cases:,}", f"{failed:,}", style="red" if failed else "")
        for kind, story in list(outcome.failures.items())[:SHOWN]:
            console.print(f"[{prop.name}] {outcome.repeated[kind]:,} like this: {story}", markup=False, soft_wrap=True)
    console.print(table)
    sys.exit(any(outcome.failures for outcome in outcomes.values()))


def _again(prop: Property, seed: int, number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        case = Case(f"{seed}/{prop.name}/{number}")
        try:
            with time_limit(SECONDS):
                prop.prepare(Path(folder))(case)
        finally:
            Console().print(f"tried: {case.tried}", markup=False)
            os.chdir("/")


def _try_all(chosen: list[Property], seed: int, a_share: float, console: Console) -> dict[str, Outcome]:
    """Each property in a process of its own, some at a time: it may hang, or die, without the others."""
    waiting = sorted(chosen, key=lambda prop: -prop.share)
    outcomes = {prop.name: Outcome() for prop in chosen}
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            running.append(_Running(waiting[0], seed, 0, time.monotonic() + waiting.pop(0).share * a_share))
        wait([one.failures for one in running], timeout=1)
        for one in list(running):
            outcome = outcomes[one.prop.name]
            ended = one.has_ended()
            while one.failures.poll():
                try:
                    outcome.add(*one.failures.recv())
                except EOFError:
                    break
            outcome.cases = one.number.value
            if not ended:
                continue
            running.remove(one)
            if one.process.exitcode:  # it crashed, or we killed it because it hung
                story = f"case {outcome.cases}: the process ended with {one.process.exitcode}"
                outcome.add(f"exit {one.process.exitcode}", story)
                running.append(_Running(one.prop, seed, outcome.cases + 1, one.until))
            else:
                console.print(f"{one.prop.name}: {outcome.cases:,} cases, {outcome.repeated.total():,} failures")
    return outcomes


class _Running:
    """A process that tries a property's cases until some time."""

    def __init__(self, prop: Property, seed: int, first: int, until: float) -> None:
        context = multiprocessing.get_context("fork")  # importing torch and Transformers takes seconds
        self.prop, self.until = prop, until
        self.number = context.Value("q", first, lock=False)  # of the case that it is at
        self.failures, there = context.Pipe(duplex=False)
        self.process = context.Process(target=_child, args=(prop, seed, until, self.number, there), daemon=True)
        self.process.start()
        there.close()
        self._seen = time.monotonic(), first

    def has_ended(self) -> bool:
        """Whether the process is over; one that has hung so that no alarm stops it is killed."""
        if self._seen[1] != self.number.value:
            self._seen = time.monotonic(), self.number.value
        elif time.monotonic() - self._seen[0] > 2 * SECONDS + 30:
            self.process.kill()
            self.process.join()
        return not self.process.is_alive()


def _child(prop: Property, seed: int, until: float, number: Any, failures: Connection) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="mpoe-fuzz-") as folder:
        os.chdir(folder)
        attempt = prop.prepare(Path(folder))
        while time.monotonic() < until:
            case = Case(f"{seed}/{prop.name}/{number.value}")
            try:
                with time_limit(SECONDS):
                    attempt(case)
            except (Exception, Hang, SystemExit) as error:  # whatever it is, it is what we look for
                failures.send(_story(case, number.value, error))
            number.value += 1
        os.chdir("/")


def _story(case: Case, number: int, error: BaseException) -> tuple[str, str]:
    """What was raised and where; and the case with what it tried."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [frames[-1], *(frame for frame in frames if "/src/mpoe/" in frame.filename)]
    kind = f"{type(error).__name__} at {' in '.join(f'{f.filename}:{f.lineno}' for f in (places[-1], places[0]))}"
    tried = " ".join(case.tried.split())[:600]
    return kind, f"case {number}, {tried!r}: {str(error)[:600]!r} ({kind})"


if __name__ == "__main__":
    main()
