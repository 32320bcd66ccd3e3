"""Results → pages and tables. Pure: data in, text out."""

from cnnedge.report.benchmark import as_csv, as_markdown
from cnnedge.report.bundle import doubt_of, guesses, render_report, variant_rows
from cnnedge.report.page import render_page, require_page_packages

__all__ = [
    "as_csv",
    "as_markdown",
    "doubt_of",
    "guesses",
    "render_page",
    "render_report",
    "require_page_packages",
    "variant_rows",
]
