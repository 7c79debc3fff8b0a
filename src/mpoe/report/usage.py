"""Which experts are used: shares of tokens by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table


def usage_table(shares: Mapping[str, Sequence[float]], title: str = "Share of tokens per expert, %") -> Table:
    """One row a layer, one column an expert.

    Args:
        shares: By the layer's name; each row sums to 1.
        title: Above the table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("layer")
    for expert in range(max(map(len, shares.values()), default=0)):
        table.add_column(str(expert), justify="right")
    for name, layer in shares.items():
        # The module's own name is the same in every row and would cost the width of a terminal.
        table.add_row(
            name.rpartition(".")[0] or name,
            *(f"[red]{share:.0%}[/red]" if share < 0.01 else f"{share:.0%}" for share in layer),
        )
    return table
