"""The ledger and run directories as a report: Markdown for the docs, one HTML page that needs nothing else."""

from residrop.common.extras import extra

with extra("research"):
    from residrop.research.report.collect import collect
    from residrop.research.report.markdown import as_markdown
    from residrop.research.report.models import Model, publish
    from residrop.research.report.page import as_page

__all__ = ["Model", "as_markdown", "as_page", "collect", "publish"]
