"""Tables of the cost model: what the variants of a model are, and what a step of each costs on n devices."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mpoe.report.plain import plain
from mpoe.report.scaling import Hardware, Step, StepCost, step_cost
from mpoe.report.variants import Variant

SCALE_DEVICES = (1, 8, 64, 1000)


SCALE_LEGEND = (
    "DDP: everything is copied to every device. FSDP: weights, gradients and optimizer state are sharded over all "
    "devices. EP: every device has a part of the experts. adapter: extended, with only experts and routers "
    "trained. !: does not fit. reduce: gradients, and FSDP's gathers. in turn: nothing is sent while computing, at "
    "once: all of it is. Times follow from data sheets; nothing here was measured on such devices."
)


def variant_table(variants: Sequence[Variant], step: Step, title: str) -> Table:
    """One row a variant: parameters, those that train (their gradients are summed over devices), FLOPs; over dense too.

    Args:
        variants: From `mpoe.report.variants.variants`, dense first.
        step: Its tokens, over which the cost of matrices that are multiplied out is spread.
        title: Above the table.
    """
    columns = ("parameters\nM", "trained\nM", "trained\n/ dense", "GFLOP\na token", "FLOPs\n/ dense")
    table = _table(title, columns)
    dense = variants[0]
    for variant in variants:
        flops = variant.flops_per_token(step.tokens_per_device)
        table.add_row(
            variant.name,
            f"{variant.total / 1e6:,.1f}",
            f"{variant.total_trained / 1e6:,.1f}",
            f"{variant.total_trained / dense.total_trained:.3f}",
            _digits(flops / 1e9),
            f"{flops / dense.flops_per_token(step.tokens_per_device):.3f}",
        )
    return table


def step_table(variants: Sequence[Variant], devices: int, step: Step, hardware: Hardware) -> Table:
    """One row a variant, first with copies of everything on every device, then sharded: memory, bytes, times.

    Args:
        variants: From `mpoe.report.variants.variants`.
        devices: n, count, >= 1.
        step: Its tokens and dtypes.
        hardware: The cluster.

    Raises:
        ValueError: No device.
    """
    columns = (
        "memory\nGB", "reduce\nGB", "all-to\nall GB", "compute\nms", "send\nms", "in turn\nk tok/s", "at once\nk tok/s",
    )  # fmt: skip
    table = _table(f"{devices:,} device{'s' * (devices > 1)}", columns)
    for way, is_sharded in (("DDP", False), ("FSDP", True)):
        if is_sharded and devices == 1:
            break  # one shard is a copy
        table.add_row(way, style="bold")
        for variant in variants:
            table.add_row(
                f" {variant.name}", *_cells(step_cost(variant, devices, is_sharded, step, hardware), hardware)
            )
    return table


def _cells(cost: StepCost, hardware: Hardware) -> list[str]:
    fits = cost.memory <= hardware.device_memory
    return [
        _digits(cost.memory / 1e9) + "!" * (not fits),
        _digits(cost.reduced.total / 1e9),
        _digits(cost.exchanged.total / 1e9),
        _digits(cost.compute_s * 1e3),
        _digits(cost.communication_s * 1e3),
        *(_digits(rate / 1e3) if fits else "-" for rate in (cost.in_turn, cost.at_once)),
    ]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=plain(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _digits(value: float) -> str:
    """Three digits, or all before the point: 0, 0.012, 1.23, 12.3, 1,234; beyond that 1.2e+06 and 1.2e-04."""
    if value and not 1e-3 <= value < 1e6:
        return f"{value:.1e}"
    decimals = 0 if value >= 100 or not value else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:,.{decimals}f}"
