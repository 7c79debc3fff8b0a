"""What a person looks at: tables of parameters, of what trains, of results and of what routers do."""

from mpoe.report.comparison import comparison_rows, comparison_table, comparison_text
from mpoe.report.parameters import layers_of_stacks, parameter_table
from mpoe.report.plain import PlainConsole
from mpoe.report.results import metrics_table
from mpoe.report.routers import router_table
from mpoe.report.trained import trained_table

__all__ = [
    "PlainConsole",
    "comparison_rows",
    "comparison_table",
    "comparison_text",
    "layers_of_stacks",
    "metrics_table",
    "parameter_table",
    "router_table",
    "trained_table",
]
