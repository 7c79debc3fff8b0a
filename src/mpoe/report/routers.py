"""Which experts are used: load and gate mass by layer, and how sure the routers are."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from mpoe.nn import RouterStatistics
from mpoe.report.plain import TITLE as TITLE_STYLE
from mpoe.report.plain import plain
from mpoe.training.live import short_name

TITLE = "Load of each expert, % of a layer's assignments; entropy of a router's probabilities, nats"
GATES = "gates: the mean weight of each expert over all tokens, %; 0 where it is not selected."
SAME = 0.005  # differences that the table does not show


def router_table(routers: Mapping[str, RouterStatistics], title: str = TITLE) -> Table:
    """One row a layer, one column an expert, how undecided its router is; a column of dropped assignments if any are.

    Where the weights of the experts are not their load, a second row has the gate mass: an expert that its bias selects
    with a tiny probability has load, and learns nothing.

    Args:
        routers: By the layer's name.
        title: Above the table.
    """
    shows_gates = any(_has_gates(router) for router in routers.values())
    table = Table(
        title=plain(title, TITLE_STYLE), title_justify="left", caption=GATES if shows_gates else None,
        caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,  # eight experts fit
    )  # fmt: skip
    table.add_column("layer")
    for expert in range(max((len(router.share) for router in routers.values()), default=0)):
        table.add_column(str(expert), justify="right")
    with_drops = any(router.dropped_fraction for router in routers.values())
    for column in ("entropy", "drop")[: 1 + with_drops]:
        table.add_column(column, justify="right")
    for name, router in routers.items():
        last = [f"{router.entropy:.2f}", f"{router.dropped_fraction:.0%}"][: 1 + with_drops]
        # The module's own name is the same in every row and would cost the width of a terminal.
        table.add_row(
            plain(short_name(name)),
            *(Text(f"{share:.0%}", "red" if share < 0.01 else "") for share in router.share),
            *last,
        )
        if _has_gates(router):
            table.add_row("  gates", *(f"{mass:.0%}" for mass in router.gate_mass), style="dim")
    return table


def _has_gates(router: RouterStatistics) -> bool:
    pairs = zip(router.share, router.gate_mass, strict=True)
    return any(abs(share - mass) > SAME for share, mass in pairs)
