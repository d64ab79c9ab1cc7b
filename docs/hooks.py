"""What the pages take from the repository when MkDocs builds them: files they link to, help texts, public names."""

import contextlib
import io
import os
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from residrop.cli import main

ROOT = Path(__file__).parents[1]
COLUMNS = 84  # of help texts, which should fit into a page without scrolling


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Files of the repository that pages link to (`../results/...`) become files of the site."""
    pages = [file.content_string for file in files.documentation_pages()]
    linked = {path for page in pages for path in re.findall(r"\]\(\.\./([^)#\s]+)", page)}
    for path in sorted(path for path in linked if (ROOT / path).is_file()):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them; `<!-- commands -->`, `<!-- help: COMMAND -->` and `::: residrop.NAME` filled in.

    Commands that the page of `<!-- commands -->` does not name are added to its end.
    """
    if "/" not in page.file.src_uri:
        markdown = markdown.replace("](../", "](")
    if "<!-- commands -->" in markdown:
        listed = commands()
        markdown = markdown.replace("<!-- commands -->", table_of(listed))
        shown = set(re.findall(r"<!-- help: ([a-z]+)", markdown))
        markdown += "".join(f"\n\n## {name}\n\n<!-- help: {name} -->" for name, _, _ in listed if name not in shown)
    markdown = re.sub(r"<!-- help: ([a-z ]+) -->", lambda found: f"```text\n{help_of(found[1])}\n```", markdown)
    return re.sub(r"^::: (\S+)((?:\n +.+)*)", lambda found: directive(found[1], found[2]), markdown, flags=re.MULTILINE)


def commands() -> list[tuple[str, str, str]]:
    """Name, purpose and example of every command, from `residrop --help`."""
    return re.findall(r"^  (\w+)  +(\S.*?)  +(residrop .*)$", printed("--help"), re.MULTILINE)


def table_of(listed: list[tuple[str, str, str]]) -> str:
    rows = [f"| [{name}](#{name}) | {what} | `{example}` |" for name, what, example in listed]
    return "\n".join(["| command | what it does | for example |", "| --- | --- | --- |", *rows])


def help_of(command: str) -> str:
    """What `residrop COMMAND --help` prints, without the boxes around it, and no wider than a page."""
    rows = [row for row in printed(*command.split(), "--help").splitlines() if not re.fullmatch(r"╰─+╯", row)]
    rows = [re.sub(r"^╭─ (.*?) ─+╮$", r"\n\1:", row) for row in rows]
    rows = [re.sub(r"^│ (.*?)\s*│$", r"  \1", row) for row in rows]
    return "\n".join(row if len(row) <= COLUMNS else textwrap.fill(row, COLUMNS) for row in rows).strip()


def printed(*arguments: str) -> str:
    """What the command line prints."""
    text, before = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(COLUMNS)
    try:
        with contextlib.redirect_stdout(text):
            main(arguments)
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    text.flush()
    return text.buffer.getvalue().decode()


def directive(name: str, options: str) -> str:
    """The mkdocstrings block of a public name, under the name that users import."""
    try:
        value: Any = pkgutil.resolve_name(name)
        path = f"{value.__module__}.{value.__qualname__}"
    except (ImportError, AttributeError):  # a constant, or a file whose optional package is not there
        path = name
    more = options.replace("\n    options:", "", 1)
    return f"::: {path}\n    options:\n      heading: {name}\n      toc_label: {name.rpartition('.')[2]}{more}"
