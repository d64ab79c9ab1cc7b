"""A report as Markdown: its texts and tables; charts are left to the page."""

import re

from residrop.research.report.blocks import Chart, Dots, Grid, Report, Section, Text

__all__ = ["as_markdown", "escaped"]


def as_markdown(report: Report, page: str | None = None, folder: str | None = None) -> str:
    """The report as Markdown, for GitHub and MkDocs.

    Args:
        report: what to write.
        page: link to the report as a page, which has the charts; None if there is none.
        folder: link to the folder of the ledger; None if files are not to be linked.
    """
    parts = [f"# {escaped(report.title)}"]
    parts += ["<!-- Written by `residrop report`; changes are made in results/ and in the papers' data, not here. -->"]
    parts += [part for block in report.blocks for part in _block(block, page, folder)]
    if page is not None:
        parts.append(f"The same with charts, as one page that needs no network: [report]({page}).")
    for section in report.sections:
        parts += _section(section, 2, page, folder)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int, page: str | None, folder: str | None) -> list[str]:
    parts = [f'<a id="{section.anchor}"></a>', f"{'#' * level} {escaped(section.title)}"]
    parts += [part for block in section.blocks for part in _block(block, page, folder)]
    for inner in section.sections:
        parts += _section(inner, level + 1, page, folder)
    return parts


def _block(block: object, page: str | None, folder: str | None) -> list[str]:
    if isinstance(block, Text):
        if block.tone not in ("seen", "not seen", "open"):
            return [escaped(block.text)]
        head, colon, rest = block.text.partition(": ")
        return [f"**{escaped(head + colon)}** {escaped(rest)}".rstrip()]
    if isinstance(block, Grid):
        return [_grid(block, folder)]
    if isinstance(block, (Chart, Dots)) and page is not None:
        return [f"Chart in the [report]({page}): {escaped(block.title)}."]
    return []


def _grid(grid: Grid, folder: str | None) -> str:
    def cell(text: str, column: int) -> str:
        shown = escaped(text)
        if column == 0 and text in grid.links:
            return f"[{shown}](#{grid.links[text]})"
        return f"[{shown}]({folder}/{text})" if column == 0 and grid.files and folder is not None else shown

    rule = ["---" if column in grid.wordy else "---:" for column in range(len(grid.headings))]
    rows = [list(map(escaped, grid.headings)), rule]
    rows += [[cell(text, column) for column, text in enumerate(row)] for row in grid.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)
