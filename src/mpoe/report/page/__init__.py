"""The page of a run: one HTML file that needs nothing else."""

from mpoe.report.page.html import is_report, report_page
from mpoe.report.page.run import RunReport

__all__ = ["RunReport", "is_report", "report_page"]
