"""The table of a plan: which way the planner would compute a matrix of a layer, and what it chose from."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mpoe.mpo.machine import Machine
from mpoe.mpo.plan import PlanRow, plan_rows
from mpoe.nn import MPOExperts

PLAN_TOKENS = (1, 32, 512, 4096)
DTYPE_BYTES = 4  # float32
PLAN_LEGEND = (
    "→: chosen, as the cheapest or as --compute says. time: modelled, over one dense matrix. apply: nothing is "
    "multiplied out; rebuild: the matrices of active experts are, in every call; cached: they are there from an "
    "earlier call, which takes memory (--matrix_cache_gib) and is for evaluation alone."
)


def rows_of_plan(experts: MPOExperts, token_counts: Sequence[int], machine: Machine, needs_grad: bool) -> list[PlanRow]:
    """One row a way, for several numbers of tokens; the chosen one first.

    Args:
        experts: One matrix of a mixture; its `way` is what was asked for, its `cache` the memory for the cached way.
        token_counts: Tokens, each once for every expert that it goes to, count.
        machine: Its constants.
        needs_grad: A training step; otherwise evaluation.

    Raises:
        ValueError: No tokens.
    """
    if min(token_counts, default=1) < 1:
        raise ValueError(f"tokens must be >= 1; got {min(token_counts)}")
    cache = 0 if needs_grad or experts.cache is None else experts.cache.limit_bytes
    way = None if needs_grad and experts.way == "cached" else experts.way
    return plan_rows(
        experts.dims, experts.max_bond_dim, experts.num_experts, token_counts, DTYPE_BYTES, needs_grad, cache, machine,
        way,
    )  # fmt: skip


def plan_table(experts: MPOExperts, token_counts: Sequence[int], machine: Machine, needs_grad: bool) -> Table:
    """The rows of `rows_of_plan`, whose arguments it takes, with the chosen way marked."""
    dims, bond, num_experts = experts.dims, experts.max_bond_dim, experts.num_experts
    rows = rows_of_plan(experts, token_counts, machine, needs_grad)
    what = "a training step" if needs_grad else "evaluation"
    title = f"{dims.out_features}×{dims.in_features}, {what}\n{num_experts} experts, bonds {dims.bond_dims(bond)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("tokens", "way", "time\n/ dense", "GFLOP", "moved\nMiB", "memory\nMiB"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.tokens:,}" if row.is_chosen else "",
            f"{'→' if row.is_chosen else ' '} {row.way}",
            f"{row.over_dense:.2f}",
            f"{row.flops / 1e9:,.3f}",
            f"{row.bytes_moved / 2**20:,.1f}",
            f"{row.memory / 2**20:,.1f}",
            style="bold" if row.is_chosen else "",
        )
    return table
