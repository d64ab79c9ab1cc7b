"""A report as one HTML page: style and charts inside, nothing loaded, light and dark, from phone to desktop."""

import re
from collections.abc import Sequence
from html import escape

from residrop.research.report.blocks import MISSING, QUOTED, Block, Chart, Dots, Grid, Report, Section, Text
from residrop.research.report.charts import dots, lines

__all__ = ["as_page"]

_STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --panel: #f6f7f8; --text: #1d2329; --soft: #59636e; --edge: #d5dae0; --link: #0b5cad;
  --good: #1a7f37; --bad: #b3261e; --open: #7a5b00; --apart: #fdf6e3; --grid: #e3e7eb;
  --c0: #1f6fb2; --c1: #d1571b; --c2: #2c8a4b; --c3: #9a3fa8; --c4: #a8862a; --c5: #c22f55; --c6: #2a8c94;
  --c7: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181c; --panel: #1c2227; --text: #e4e8ec; --soft: #a2adb8; --edge: #39424b; --link: #79b8ff;
    --good: #57c374; --bad: #ff8a80; --open: #e0bb55; --apart: #2a2618; --grid: #2c343b;
    --c0: #62aef0; --c1: #f79256; --c2: #62c987; --c3: #d18be0; --c4: #dcbb5e; --c5: #f4789a; --c6: #5cc5ce;
    --c7: #a2adb8;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--back); color: var(--text); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.frame { max-width: 1280px; margin: 0 auto; padding: 0 16px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.6rem 0 0.6rem; }
h2 {
  font-size: 1.4rem; line-height: 1.25; margin: 3.2rem 0 0.4rem; padding-top: 1rem; border-top: 2px solid var(--edge);
}
h3 { font-size: 1.08rem; line-height: 1.35; margin: 2.2rem 0 0.5rem; }
h2 a, h3 a { color: inherit; }
p { margin: 0.55rem 0; max-width: 78ch; }
.aside { color: var(--soft); font-size: 0.86rem; line-height: 1.45; }
.verdict { border-left: 4px solid var(--c7); padding: 0.1rem 0 0.1rem 0.7rem; font-size: 0.92rem; }
.verdict b { font-weight: 600; }
.seen { border-color: var(--good); } .seen b { color: var(--good); }
.not-seen { border-color: var(--bad); } .not-seen b { color: var(--bad); }
.open { border-color: var(--open); } .open b { color: var(--open); }
.scroll {
  overflow-x: auto; margin: 0.7rem 0; border: 1px solid var(--edge); border-radius: 6px; max-width: max-content;
}
table { border-collapse: collapse; font-size: 0.86rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 0.36rem 0.7rem; text-align: right; vertical-align: top; white-space: nowrap; }
th.word, td.word { text-align: left; white-space: normal; min-width: 7.5em; max-width: 30em; }
th { white-space: normal; background: var(--panel); font-weight: 600; vertical-align: bottom; }
thead th { border-bottom: 1px solid var(--edge); }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
.apart { background: var(--apart); }
.missing { color: var(--soft); font-style: italic; }
nav { font-size: 0.9rem; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav li li { padding-left: 0.9rem; font-size: 0.92em; }
nav a { display: block; padding: 0.14rem 0; }
nav summary { cursor: pointer; font-weight: 600; padding: 0.3rem 0; }
figure { margin: 1rem 0; max-width: 540px; }
figure > svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 0.86rem; line-height: 1.45; }
figcaption b { display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 0 2rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; font-size: 0.84rem; margin: 0.3rem 0; }
.legend span { display: inline-flex; align-items: center; gap: 0.4rem; }
.keep { white-space: nowrap; }
svg.key { width: 12px; height: 12px; flex: none; }
svg text { fill: var(--text); font-size: 12px; } svg .tick { fill: var(--soft); font-size: 11px; }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--grid); fill: none; } svg .rule { stroke: var(--edge); fill: none; }
svg .bound { stroke: var(--bad); stroke-width: 2.5; fill: none; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .predicted { fill: none; stroke-width: 1.8; stroke-dasharray: 2 3; }
svg .band { opacity: 0.18; } svg .hollow { fill: none; stroke-width: 2; }
@media (min-width: 1080px) {
  .half { display: inline-block; vertical-align: top; width: calc(50% - 1.2rem); margin-right: 1rem; }
  .frame { display: grid; grid-template-columns: 240px minmax(0, 1fr); gap: 0 40px; }
  nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding: 1.6rem 0; }
}
@media (max-width: 1079px) {
  nav { border: 1px solid var(--edge); border-radius: 6px; padding: 0.2rem 0.8rem; margin-top: 1rem; }
}
@media (max-width: 600px) {
  h1 { font-size: 1.55rem; } h2 { font-size: 1.25rem; }
  th, td { padding: 0.34rem 0.5rem; } table { font-size: 0.84rem; }
  th:first-child, td:first-child { position: sticky; left: 0; min-width: 8.5em; max-width: 10.5em; }
  td:first-child { background: var(--back); }
  td.word + td.word { min-width: 5em; } td.word:last-child { min-width: 11em; }
  nav a { padding: 0.3rem 0; }
}
@media print { nav { display: none; } }
"""
_COLOURS = "".join(
    f".line.c{i}, .predicted.c{i}, .hollow.c{i} {{ stroke: var(--c{i}); }} "
    f".band.c{i}, .mark.c{i} {{ fill: var(--c{i}); }}\n"
    for i in range(8)
)
_SCRIPT = 'if (matchMedia("(min-width: 1080px)").matches) document.querySelector("nav details").open = true;'


def as_page(report: Report) -> str:
    """The report as a page that needs no other file and no network."""
    body = "".join(_block(block) for block in report.blocks)
    body += "".join(_section(section, 2) for section in report.sections)
    title = escape(report.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{title}</title>\n<style>{_STYLE}{_COLOURS}</style>\n</head>\n<body>\n<div class="frame">\n'
        f"{_contents(report)}<main>\n<h1>{title}</h1>\n{body}</main>\n</div>\n<script>{_SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _contents(report: Report) -> str:
    def entry(section: Section) -> str:
        inner = "".join(entry(one) for one in section.sections)
        listed = f"<ul>{inner}</ul>" if inner else ""
        return f'<li><a href="#{section.anchor}">{escape(section.title)}</a>{listed}</li>\n'

    every = "".join(entry(section) for section in report.sections)
    return f'<nav aria-label="Contents"><details><summary>Contents</summary>\n<ul>{every}</ul></details></nav>\n'


def _section(section: Section, level: int) -> str:
    head = f'<a href="#{section.anchor}">{escape(section.title)}</a>'
    inner = "".join(_section(one, level + 1) for one in section.sections)
    half = any(isinstance(one, Chart) for one in section.blocks)
    half = half and not any(isinstance(one, Grid) for one in section.blocks)
    kind = ' class="half"' if half else ""
    blocks = _blocks(section.blocks, section.title)
    return f'<section id="{section.anchor}"{kind}>\n<h{level}>{head}</h{level}>\n{blocks}{inner}</section>\n'


def _blocks(blocks: Sequence[Block], heading: str) -> str:
    """Charts that follow one another stand side by side where there is room."""
    parts: list[str] = []
    row: list[str] = []
    for block in [*blocks, None]:
        if isinstance(block, (Chart, Dots)):
            row.append(_figure(block, heading))
            continue
        if row:
            parts.append(f'<div class="charts">{"".join(row)}</div>\n')
            row = []
        if block is not None:
            parts.append(_block(block))
    return "".join(parts)


def _block(block: Block) -> str:
    if isinstance(block, Grid):
        return _grid(block)
    if isinstance(block, Text):
        return _text(block)
    return _figure(block, "")


def _figure(block: Chart | Dots, heading: str) -> str:
    """A chart with its caption; a title that the heading above has is not repeated."""
    drawing = lines(block) if isinstance(block, Chart) else dots(block)
    title = "" if heading.endswith(block.title) else f"<b>{escape(block.title)}</b>"
    caption = f"<figcaption>{title}{escape(block.caption)}</figcaption>" if title or block.caption else ""
    return f"<figure>{drawing}{caption}</figure>\n"


def _text(text: Text) -> str:
    if text.tone in ("plain", "aside"):
        kind = ' class="aside"' if text.tone == "aside" else ""
        return f"<p{kind}>{_kept(text.text)}</p>\n"
    head, colon, rest = text.text.partition(":")
    return f'<p class="verdict {text.tone.replace(" ", "-")}"><b>{escape(head)}{colon}</b>{escape(rest)}</p>\n'


def _kept(text: str) -> str:
    """Escaped, with options that no line break divides."""
    return re.sub(r"(?<=\s)--[\w-]+", r'<span class="keep">\g<0></span>', escape(text))


def _grid(grid: Grid) -> str:
    words = {column for column in range(len(grid.headings)) if column < grid.left or column in grid.words}

    def cell(tag: str, text: str, column: int) -> str:
        kinds = ["word"] if column in words else []
        kinds += ["apart"] if column in grid.apart else []
        kinds += ["missing"] if text in (MISSING, QUOTED) else []
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        shown = _kept(text)
        if tag == "td" and column == 0 and text in grid.links:
            shown = f'<a href="#{grid.links[text]}">{shown}</a>'
        return f"<{tag}{kind}>{shown}</{tag}>"

    head = "".join(cell("th", text, column) for column, text in enumerate(grid.headings))
    rows = "".join(
        f"<tr>{''.join(cell('td', text, column) for column, text in enumerate(row))}</tr>\n" for row in grid.rows
    )
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>\n{body}\n</table></div>\n'
