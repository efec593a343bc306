"""A report is a function of records: every number and every word on the page is computed from files that runs left."""

from saltflat.lab.report.page import render, write_report
from saltflat.lab.report.runs import Run, read_run

__all__ = ["Run", "read_run", "render", "write_report"]
