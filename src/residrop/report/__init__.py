"""The ledger and run directories as a report: Markdown for the docs, one HTML page that needs nothing else."""

from residrop.report.collect import collect
from residrop.report.markdown import as_markdown
from residrop.report.page import as_page

__all__ = ["as_markdown", "as_page", "collect"]
