"""Whether the planner chooses well: every way to compute a layer of experts is timed, cell by cell of a grid.

    python benchmarks/plan.py [--short] [--budget SECONDS]

A cell is a matrix shape, bonds, experts, tokens, and forward or training step, of the balanced layout. Cells are taken
in a random order, so that the first few are a fair sample; each is appended to `plan-cells.jsonl` in the results'
folder when it is done. The full form goes on where it was stopped, and reports on all cells that are there: delete that
file after a change of the ways. The planner is asked when the report is made, so its constants may change without
timing anew.

Regret: the time of the way that the planner chooses over that of the fastest. A way that it expects to take more than
4 times the fastest is not timed, nor is a cell whose fastest it expects to take a second. Without gradients two choices
are judged, with memory for cached matrices and without. A choice with nothing to choose from is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from harness import DTYPES, Row, Samples, Target, compare, hardware, parse, parser, write_results
from mpoe.mpo import Plan, machine_of, plan, site_dims
from mpoe.nn import MPOExperts
from mpoe.nn.matrix_cache import MatrixCache

GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "full": {
        "shape": ((3072, 768), (768, 3072), (512, 1024), (4096, 1024)),
        "max_bond_dim": (None, 16, 64),
        "num_experts": (2, 8, 64),
        "tokens": (1, 8, 32, 128, 512, 2048, 8192),
        "is_step": (False, True),
    },
    "tiny": {
        "shape": ((24, 36),),
        "max_bond_dim": (None,),
        "num_experts": (3,),
        "tokens": (5,),
        "is_step": (False, True),
    },
}
GRIDS["short"] = GRIDS["full"] | {"tokens": (1, 32, 512)}
GOOD = 1.15  # a regret that is good enough
HOPELESS = 4.0  # times the cheapest way's modelled time
MAX_S = 1.0
MAX_CACHE_BYTES = 2**31
CELL_BUDGET_S = 0.6
SHORT_BUDGET_S = 40.0


@dataclass(frozen=True)
class Cell:
    """One place of the grid, and what it was timed on."""

    shape: tuple[int, int]
    max_bond_dim: int | None
    num_experts: int
    tokens: int
    is_step: bool
    device: str
    dtype: str
    threads: int

    @property
    def counts(self) -> list[int]:
        """Tokens of every expert; the same in every run."""
        experts = random.Random(repr(self)).choices(range(self.num_experts), k=self.tokens)
        return [experts.count(e) for e in range(self.num_experts)]

    def plan(self, has_cache: bool) -> Plan:
        """What the planner says."""
        dims = site_dims(*self.shape)
        cache_bytes = MAX_CACHE_BYTES if has_cache else 0
        active = sum(count > 0 for count in self.counts)
        return plan(
            dims, self.max_bond_dim, self.num_experts, self.tokens, active, DTYPES[self.dtype].itemsize,
            self.is_step, cache_bytes, machine_of(self.device),
        )  # fmt: skip

    def __str__(self) -> str:
        bonds = "full bonds" if self.max_bond_dim is None else f"bonds of {self.max_bond_dim}"
        shape, what = "×".join(map(str, self.shape)), "step" if self.is_step else "forward"
        return f"{shape}, {bonds}, {self.num_experts} experts, {self.tokens} tokens, {what}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    made = parser("How good the planner's choices are, over a grid of cells.")
    made.add_argument("--budget", type=float, help="start no cell after so many seconds; run again to go on")
    args = parse(made, arguments)
    budget = args.budget
    if budget is None:
        budget = SHORT_BUDGET_S if args.size == "short" else float("inf")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "plan-cells.jsonl"
    if args.size != "full":
        path.unlink(missing_ok=True)
    path.touch()
    done = _read(path)
    todo = [cell for cell in _grid(args) if cell not in done]
    start = time.perf_counter()
    for cell in tqdm(todo, unit="cell", disable=None):
        if time.perf_counter() - start > budget:
            break
        done[cell] = _measure(cell, args.repeats)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"cell": asdict(cell), "seconds": done[cell]}) + "\n")
    write_results("plan", _report({cell: done[cell] for cell in _grid(args) if cell in done}), args)


def _grid(args: argparse.Namespace) -> list[Cell]:
    """All cells, in the order in which they are measured."""
    grid = GRIDS[args.size]
    device = hardware(args.device)["gpu"] or args.device
    cells = [
        Cell(*values, device=device, dtype=args.dtype, threads=args.threads)
        for values in itertools.product(*grid.values())
    ]
    random.Random(args.seed).shuffle(cells)
    return [cell for cell in cells if min(cost.seconds for cost in cell.plan(has_cache=False).costs.values()) < MAX_S]


def _read(path: Path) -> dict[Cell, dict[str, list[float]]]:
    done = {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        done[Cell(**line["cell"] | {"shape": tuple(line["cell"]["shape"])})] = line["seconds"]
    return done


def _measure(cell: Cell, repeats: int) -> dict[str, list[float]]:
    """Seconds a call of every way that is not hopeless, by round."""
    expected = {way: cost.seconds for way, cost in cell.plan(has_cache=True).costs.items()}
    limit = HOPELESS * min(seconds for way, seconds in expected.items() if way != "cached")
    dtype = DTYPES[cell.dtype]
    device = torch.device("cpu" if cell.device == "cpu" else "cuda")
    experts = MPOExperts(site_dims(*cell.shape), cell.num_experts, cell.max_bond_dim)
    for tensor in (*experts.parameters(), *experts.buffers()):
        nn.init.normal_(tensor, std=0.02)  # times do not depend on the values
    experts = experts.to(device, dtype)
    experts.cache = MatrixCache(MAX_CACHE_BYTES)
    x = torch.randn(cell.tokens, cell.shape[1], device=device, dtype=dtype, requires_grad=cell.is_step)
    run = _step if cell.is_step else _forward
    ways = {way: partial(run, experts, x, cell.counts, way) for way, seconds in expected.items() if seconds <= limit}
    samples = compare(ways, repeats, warmup=1, budget_s=CELL_BUDGET_S)
    return {way: list(of_way.values) for way, of_way in samples.items()}


def _forward(experts: MPOExperts, x: Tensor, counts: list[int], way: str) -> None:
    with torch.no_grad():
        experts(x, counts, way=way)


def _step(experts: MPOExperts, x: Tensor, counts: list[int], way: str) -> None:
    y = experts(x, counts, way=way)
    torch.autograd.grad(y, [x, *experts.parameters()], torch.ones_like(y))


@dataclass(frozen=True)
class _Choice:
    """What the planner chose in one cell."""

    cell: Cell
    has_cache: bool
    chosen: str
    seconds: dict[str, float]

    @property
    def regret(self) -> float:
        return self.seconds[self.chosen] / min(self.seconds.values())

    def __str__(self) -> str:
        times = ", ".join(f"{way} {1e3 * seconds:.3g} ms" for way, seconds in self.seconds.items())
        return f"{self.cell}{', cache' * self.has_cache}: {self.chosen} of {times}"


def _report(done: dict[Cell, dict[str, list[float]]]) -> list[Row]:
    choices = list(_choices(done))
    groups: dict[str, Callable[[_Choice], bool]] = {
        what: lambda choice, what=what: (
            what == ("step" if choice.cell.is_step else "forward, cache" if choice.has_cache else "forward")
        )
        for what in ("forward", "forward, cache", "step")
    }
    rows = []
    for name, belongs in {"all": lambda _: True, **groups}.items():
        group = [choice for choice in choices if belongs(choice)]
        if group:
            rows += _group_rows(f"{name} ({len(group)} choices)", group)
    return rows


def _choices(done: dict[Cell, dict[str, list[float]]]) -> Iterable[_Choice]:
    for cell, by_way in done.items():
        for has_cache in (False,) if cell.is_step else (False, True):
            made = cell.plan(has_cache)
            seconds = {way: Samples(tuple(values)).median for way, values in by_way.items() if way in made.costs}
            chosen = min(seconds, key=lambda way: made.costs[way].seconds)
            if len(seconds) > 1:
                yield _Choice(cell, has_cache, chosen, seconds)


def _group_rows(case: str, choices: list[_Choice]) -> list[Row]:
    good = sum(choice.regret <= GOOD for choice in choices) / len(choices)
    worst = max(choices, key=lambda choice: choice.regret)
    regrets = Samples(tuple(choice.regret for choice in choices))
    return [
        Row(
            case, f"choices within {GOOD:.2f}", Samples((good,)), unit="of all",
            target=Target(1.0, at_most=False) if case.startswith("all") else None,
        ),
        Row(case, "regret", regrets, unit="× fastest", note=f"worst: {worst}" if worst.regret > GOOD else ""),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
