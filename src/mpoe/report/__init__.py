"""What a person looks at: tables of parameters, results and expert usage."""

from mpoe.report.parameters import parameter_table
from mpoe.report.results import metrics_table
from mpoe.report.usage import usage_table

__all__ = ["metrics_table", "parameter_table", "usage_table"]
