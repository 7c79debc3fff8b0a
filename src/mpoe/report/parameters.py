"""Parameter tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mpoe.models import ParameterCount, mixtures
from mpoe.report.plain import TITLE, plain


def parameter_table(counts: Mapping[str, ParameterCount], title: str = "Parameters, millions") -> Table:
    """One column a model, one row a part.

    Args:
        counts: By the name of the column.
        title: Above the table.
    """
    table = Table(title=plain(title, TITLE), title_justify="left")
    table.add_column("")
    for name in counts:
        table.add_column(plain(name), justify="right")

    def row(label: str, attribute: str, style: str = "") -> None:
        table.add_row(label, *(_millions(getattr(count, attribute)) for count in counts.values()), style=style)

    row("the rest of the model", "other")
    row("central tensors (shared)", "central")
    row("auxiliary tensors (all experts)", "auxiliary")
    row("routers", "router")
    row("total", "total", style="bold")
    table.add_section()
    row("trained", "trained")
    row("met by one token", "active")
    row("dense model", "dense")
    row("same mixture, whole experts", "whole_experts")
    return table


def layers_of_stacks(model: Any) -> str:
    """How many layers of a model are mixtures, in words; where there are two stacks, of which.

    Args:
        model: A mixture, of Transformers.
    """
    names = list(mixtures(model))
    of_stack = {stack: sum(stack in name.split(".") for name in names) for stack in ("encoder", "decoder")}
    if not model.config.is_encoder_decoder:
        return f"{len(names)} feed-forward layers"
    if not all(of_stack.values()):
        return f"{len(names)} feed-forward layers ({' and '.join(s for s, n in of_stack.items() if n)} alone)"
    return f"{len(names)} feed-forward layers ({', '.join(f'{s} {n}' for s, n in of_stack.items())})"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f}" if 0 < count < 1e6 else f"{count / 1e6:,.1f}"
