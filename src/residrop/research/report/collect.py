"""From the ledger and run directories to a report."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from residrop.common.errors import RunError
from residrop.research import ledger
from residrop.research.papers import PAPERS
from residrop.research.papers.status import Status, overview
from residrop.research.report.blocks import MISSING, Block, Grid, Report, Section, Text, slug
from residrop.research.report.measurements import section_of_document
from residrop.research.report.placing import belonging
from residrop.research.report.runs import section_of_runs
from residrop.research.report.tables import section_of_paper
from residrop.research.report.verdicts import grid_of_claims

__all__ = ["collect"]

Entries = Sequence[Mapping[str, Any]]

_RULES = (
    "Every number comes from a file of the ledger, as a command wrote it. Published is what the paper prints; measured "
    "is the mean over seeds at the full schedule, ± the standard deviation over seeds (of one seed: the standard "
    "error, se, over test images or of the instrument); the difference is measured less published. What nobody has run "
    f'here says "{MISSING}".'
)
_CLAIMS = (
    "What the papers say of their numbers, if any comparison that it stands on was measured. Seen: all comparisons "
    "come out as claimed; not seen: at least one comes out the other way; open: some are less than two standard errors "
    "apart, or not yet measured. A standard error is the larger of those over seeds and over test images; where "
    "neither is known, the sign alone counts."
)


def collect(folder: Path | None, runs: Sequence[Path] = ()) -> Report:
    """A report of a ledger, of run directories, or of both.

    Args:
        folder: the ledger; None for a report of runs only.
        runs: run directories.

    Returns:
        The report. It has no date of its own: the same ledger gives the same report.

    Raises:
        RunError: a ledger without documents, a document that is none, a run that cannot be read.
    """
    sections = [section_of_runs(runs)] if runs else []
    if folder is None:
        return Report("Runs", [], sections)
    every = ledger.read(folder)
    entries = ledger.pooled(every)
    if not entries:
        raise RunError(f"{folder} holds no document of the ledger; give --ledger the folder that has them, or run some")
    found = [one for one in overview(entries) if not one.drawing]
    known = {name: belonging(paper, entries) for name, paper in PAPERS.items()}
    blocks: list[Block] = [Text(_RULES), _summary(every, found)]
    sections.append(Section("How far it is", "status", list(_status(found))))
    claims = grid_of_claims(PAPERS, known, entries)
    if claims is not None:
        sections.append(Section("Claims", "claims", [Text(_CLAIMS, "aside"), claims]))
    sections += [section_of_paper(paper, entries, known[name]) for name, paper in PAPERS.items()]
    measured = _measurements(entries)
    if measured.sections:
        sections.append(measured)
    kept = {id(entry) for placed in known.values() for *_, entry in placed}
    sections.append(_sources(every, entries, kept))
    return Report("Results", blocks, sections)


def _summary(entries: Entries, found: Sequence[Status]) -> Text:
    every = [one for one in found if "/figure-" not in one.id]
    full, scaled, smaller = (sum(getattr(one, name) for one in every) for name in ("full", "short", "smaller"))
    dates = sorted({entry["date"] for entry in entries})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    files = len({entry["file"] for entry in entries})
    text = f"Of the papers' rows, {full} are measured in full and {scaled} with a shortened schedule"
    text += f", {smaller} on a smaller network" if smaller else ""
    left = sum(one.open for one in every)
    return Text(
        f"{text}; {left} are {MISSING} on the paper's network at any scale. {files} documents, measured {span}."
    )


def _status(found: Sequence[Status]) -> Iterator[Block]:
    yield Text(
        "Rows of tables and curves of figures: measured in full, measured with a shortened schedule (how many at which "
        "scale, on which smaller network), not yet measured at any scale, and quoted from other work. residrop "
        "reproduce measures more, such as residrop reproduce swapout/table-2.",
        "aside",
    )
    head = ("table or figure", "in full", "scaled", "not yet", "quoted", "what it shows")
    for paper in PAPERS.values():
        mine = [one for one in found if one.id.startswith(f"{paper.name}/")]
        links = {_name(one): slug(one.id) for one in mine if "/figure-" not in one.id or one.full or one.shortened}
        yield Text(f"{paper.authors} {paper.year}, {paper.name}/")
        yield Grid(head, tuple(map(_row_of, mine)), links=links, words=frozenset({2, 5}))


def _name(one: Status) -> str:
    return one.id.partition("/")[2]


def _row_of(one: Status) -> tuple[str, ...]:
    scaled = ", ".join(one.shortened)
    counts = (str(count) if count else "" for count in (one.open, one.quoted))
    return _name(one), str(one.full) if one.full else "", scaled, *counts, one.title


def _measurements(entries: Entries) -> Section:
    """What belongs to no paper's table or figure, document by document."""
    about = "Ratios are of one machine, measured side by side in one run; the command above each measures another's."
    section = Section("Measurements", "measurements", [Text(about, "aside")])
    for file in sorted({entry["file"] for entry in entries}):
        mine = [entry for entry in entries if entry["file"] == file]
        mine = [entry for entry in mine if entry["kind"] == "measurement" and "figure" not in entry]
        if mine:
            section.sections.append(section_of_document(file, mine))
    return section


def _sources(every: Entries, entries: Entries, kept: set[int]) -> Section:
    """Every document of the ledger, and what in it belongs to no row any more."""
    files = {entry["file"]: entry for entry in every}
    rows = tuple((file, one["what"], one["command"], one["date"], one["device"]) for file, one in sorted(files.items()))
    blocks: list[Block] = [Grid(("file", "what", "command", "date", "device"), rows, left=5, files=True)]
    stale = [entry for entry in entries if entry["kind"] == "paper" and id(entry) not in kept]
    if stale:
        names = sorted({f"{entry['id']} in {entry['file']}" for entry in stale})
        text = f"Left out, since no row has that recipe any more ({len(stale)} numbers): {'; '.join(names)}."
        blocks.append(Text(text, "aside"))
    return Section("Documents", "documents", blocks)
