"""What the benchmarks share: interleaved timing, memory peaks, the command line, and the results file with its table.

A script times its ways with `compare`, turns them into `Row`s and hands those to `write_results`:

    args = parse(parser("What the script claims."))
    times = compare({"dense": dense, "ours": ours}, args.repeats)
    rows = [Row("512 tokens", way, times[way], ratio, "dense") for way, ratio in ratios(times).items()]
    write_results("layer", rows, args)
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mpoe
from mpoe.files import write_json

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MIN_SAMPLE_S = 0.01  # a call shorter than this is repeated within a sample, seconds
MIN_ROUNDS = 3
UNITS = {"ms": 1e3, "MiB": 2**-20, "GiB": 2**-30}  # of seconds and bytes, which is what is stored


@dataclass(frozen=True)
class Samples:
    """Numbers of one way, one a round: seconds a call, bytes, tokens a second, or ratios."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def max(self) -> float:
        """The greatest."""
        return max(self.values)

    def map(self, function: Callable[[float], float]) -> Samples:
        """The same of every number, for example seconds to tokens a second."""
        return Samples(tuple(map(function, self.values)))

    def over(self, other: Samples) -> Samples:
        """Round by round, this over the other."""
        return Samples(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: median, min, max and the rounds themselves."""
        return {"median": self.median, "min": self.min, "max": self.max, "values": list(self.values)}


@dataclass(frozen=True)
class Target:
    """What a median must be: at most `value`, or at least."""

    value: float
    at_most: bool = True

    def holds(self, samples: Samples) -> bool:
        """Whether the median reaches it."""
        return samples.median <= self.value if self.at_most else samples.median >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g}"


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Attributes:
        case: What was done, "forward, 512 tokens".
        way: By whom, "extended".
        value: As measured: seconds, bytes, or a rate.
        ratio: Over another way, round by round; None where there is none.
        over: That other way.
        target: What must hold of the ratio, or, without one, of the value in seconds or whatever it is.
        unit: How a person reads the value: "ms" and "s" of seconds, "MiB" and "GiB" of bytes, or the rate's name.
        note: Why a target was missed, or what else there is to say.
    """

    case: str
    way: str
    value: Samples
    ratio: Samples | None = None
    over: str = ""
    target: Target | None = None
    unit: str = "ms"
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the target was met; empty without one."""
        if self.target is None:
            return ""
        return "passed" if self.target.holds(self.ratio or self.value) else "missed"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        named = {"case": self.case, "way": self.way, "value": self.value.to_dict(), "unit": self._stored_unit}
        if self.ratio is not None:
            named |= {"ratio": self.ratio.to_dict(), "over": self.over}
        if self.target is not None:
            named |= {"target": str(self.target), "verdict": self.verdict}
        return named | ({"note": self.note} if self.note else {})

    def cells(self) -> list[str]:
        """What a table shows."""
        value = _spread(self.value.map(lambda v: v * UNITS.get(self.unit, 1.0)))
        ratio = "" if self.ratio is None else f"{_spread(self.ratio)} × {self.over}"
        colour = {"passed": "[green]", "missed": "[red]"}.get(self.verdict, "")
        target = "" if self.target is None else f"{self.target} {colour}{self.verdict}"
        return [self.case, self.way, f"{value} {self.unit}", ratio, target, self.note]

    @property
    def _stored_unit(self) -> str:
        return {"ms": "s", "MiB": "bytes", "GiB": "bytes"}.get(self.unit, self.unit)


def compare(
    ways: Mapping[str, Callable[[], object]], repeats: int = 9, warmup: int = 2, budget_s: float | None = None
) -> dict[str, Samples]:
    """Time several ways to do one thing, round-robin, so that a slow minute of the machine hits all of them alike.

    Every round starts with another way, so that none always follows the one that fills the caches.

    Args:
        ways: Functions without arguments, by name. Short ones are called several times a sample.
        repeats: Rounds, count.
        warmup: Untimed calls of each way before, count, >= 1.
        budget_s: Stop after the round that passes this many seconds, but not before 3 rounds; None is no limit.

    Returns:
        Seconds a call, by way.
    """
    calls = {name: _calibrate(way, warmup) for name, way in ways.items()}
    names, seconds = list(ways), {name: [] for name in ways}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for n in range(repeats):
            if budget_s is not None and n >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
                break
            for name in names[n % len(names) :] + names[: n % len(names)]:
                seconds[name].append(_time(ways[name], calls[name]))
    finally:
        gc.enable()
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def ratios(times: Mapping[str, Samples], over: str = "dense") -> dict[str, Samples]:
    """Every way's ratio to one of them, round by round; the median of the ratios, not the ratio of the medians."""
    return {name: samples.over(times[over]) for name, samples in times.items()}


def rows_over(
    case: str,
    values: Mapping[str, Samples],
    targets: Mapping[tuple[str, str], Target] | None = None,
    unit: str = "ms",
    over: str = "dense",
) -> list[Row]:
    """Return one row a way with its ratio over one of them, and one for every target over something else.

    Args:
        case: What was measured.
        values: By way.
        targets: By (way, over); those of ways or overs that were not measured are left out.
        unit: See `Row`.
        over: The way that all are compared with.
    """
    targets = targets or {}
    rows = [
        Row(case, way, values[way], ratio, over, targets.get((way, over)), unit)
        for way, ratio in ratios(values, over).items()
    ]
    return rows + [
        Row(case, way, values[way], values[way].over(values[other]), other, target, unit)
        for (way, other), target in targets.items()
        if other != over and way in values and other in values
    ]


def run_child(script: str, *flags: str) -> dict[str, Any]:
    """Run a benchmark in a fresh process and read the JSON object that it prints last.

    Args:
        script: Its path.
        flags: Its command line.

    Raises:
        RuntimeError: It failed; the message has what it wrote to its standard error.
    """
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(flags)} exited with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def parser(description: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks have; a script may add its own flags."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--short", dest="size", action="store_const", const="short", help="fewer cases, below a minute")
    made.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="shows that the script works")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch, count (all cores)")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default="float32", choices=DTYPES)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--repeats", type=int, help="rounds of every timing, count")
    keep = "keep: freed memory stays with the process, so that no page faults of fresh memory are timed; glibc only"
    made.add_argument("--malloc", choices=("keep", "default"), default="keep", help=keep)
    made.add_argument("--out", type=Path, help="folder of the results (benchmarks/results; short: build/benchmarks)")
    made.set_defaults(size="full")
    return made


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and set PyTorch's threads and seed by it."""
    args = made.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda must have a CUDA device; PyTorch sees none: leave the flag out")
    args.repeats = args.repeats or {"full": 15, "short": 5, "tiny": 1}[args.size]
    args.out = args.out or ROOT / ("benchmarks/results" if args.size == "full" else "build/benchmarks")
    if args.malloc == "keep" and (args.size == "tiny" or not _keep_memory()):
        args.malloc = "default"
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def write_results(name: str, rows: Sequence[Row], args: argparse.Namespace) -> Path:
    """Show the rows as a table, and write `<name>-<hardware>.json` into `args.out`.

    Args:
        name: Of the benchmark.
        rows: What was measured.
        args: From `parse`; they are written down too.

    Returns:
        The file.
    """
    machine = hardware(args.device)
    table = Table("case", "way", "median (min … max)", "ratio (min … max)", "target", "note", title=name)
    for row, following in zip_longest(rows, rows[1:]):
        table.add_row(*row.cells(), end_section=following is not None and following.case != row.case)
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}-{_slug(machine)}.json"
    write_json(
        path,
        {
            "benchmark": name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "settings": settings,
            "hardware": machine,
            "versions": versions(),
            "rows": [row.to_dict() for row in rows],
        },
    )
    print(f"{name}: {_summary(rows)}; results in {path}")
    return path


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine: CPU model, cores, RAM in bytes, and the GPU that was used, if one was."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def versions() -> dict[str, str]:
    """Of Python, the libraries that matter for speed, and this one's commit."""
    named = {"python": platform.python_version(), "mpoe": mpoe.__version__}
    named |= {library: metadata.version(library) for library in ("torch", "transformers", "numpy")}
    if shutil.which("git") is None:  # on a machine that only got the files
        return named | {"commit": "unknown"}
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=False)
    return named | {"commit": commit.stdout.strip() + (" with changes in src" if changed.stdout else "")}


def _keep_memory() -> bool:
    """Tell glibc to serve every size from its heap and never to give that back; False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(m_trim_threshold, 2**31 - 1) and mallopt(m_mmap_max, 0))


def _calibrate(way: Callable[[], object], warmup: int) -> int:
    """Calls a sample, so that a sample is long enough for the clock."""
    for _ in range(warmup):
        _time(way, 1)
    return max(1, round(MIN_SAMPLE_S / max(_time(way, 1), 1e-6)))


def _time(way: Callable[[], object], calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        way()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _spread(samples: Samples) -> str:
    return f"{_digits(samples.median)} ({_digits(samples.min)} … {_digits(samples.max)})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _slug(machine: dict[str, Any]) -> str:
    words = machine["gpu"] or f"{machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _summary(rows: Sequence[Row]) -> str:
    verdicts = [row.verdict for row in rows if row.target is not None]
    return f"{verdicts.count('passed')} of {len(verdicts)} targets reached" if verdicts else f"{len(rows)} rows"
