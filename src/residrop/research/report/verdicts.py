"""What became of the papers' claims, in full and at each scale and on each smaller network alone."""

from collections.abc import Iterator, Mapping, Sequence

from residrop.research.papers.claims import Drawn, Judged, Measured, judge, judge_curves
from residrop.research.papers.rows import Claim, Paper
from residrop.research.report.blocks import MISSING, Grid, Text, slug
from residrop.research.report.placing import Entries, Entry, Placed, Setting, drawings

__all__ = ["grid_of_claims", "verdict_on_curves", "verdicts_on"]


def verdicts_on(claim: Claim, found: Sequence[Placed]) -> Iterator[Text]:
    """What became of a claim under each setting in which any of its comparisons was measured, in full first."""
    shown = False
    for setting in _settings(found):
        judged = _judged(claim, found, setting)
        if judged is None:
            continue
        shown = True
        single = any(pair.difference is not None and pair.error is None for pair in judged.pairs)
        about = _counted(judged) + ("; without standard errors (one seed)" if single else "")
        text = f"Claim {judged.verdict} ({_how(setting)}): {claim.text}. Comparisons: {about}."
        yield Text(text, judged.verdict)
    if not shown:
        yield Text(f"Claim, {MISSING}: {claim.text}.", "aside")


def verdict_on_curves(claim: Claim, lines: Sequence[Entry], setting: Setting) -> Text:
    """What became of a claim about a figure's curves under one setting; open where somebody has to look."""
    judged = judge_curves(claim, curves_of(lines))
    if not judged.pairs:
        return Text(f"Claim open ({_how(setting)}), look at the picture: {claim.text}.", "open")
    text = f"Claim {judged.verdict} ({_how(setting)}): {claim.text}. Positions: {_counted(judged)}."
    return Text(text, judged.verdict)


def curves_of(lines: Sequence[Entry]) -> dict[str, Drawn]:
    """Curves of the ledger by label."""
    return {line["curve"]: Drawn(line["x"], line["y"], line.get("error")) for line in lines}


def grid_of_claims(papers: Mapping[str, Paper], known: Mapping[str, Sequence[Placed]], entries: Entries) -> Grid | None:
    """All claims of which a comparison was measured, under any setting; None if there are none.

    Args:
        papers: by name.
        known: by name of the paper, entries that belong to its rows.
        entries: of the ledger, for the figures.
    """
    settings = _settings([one for found in known.values() for one in found])
    rows: list[tuple[str, ...]] = []
    links: dict[str, str] = {}
    for name, paper in papers.items():
        tables = {table.name for table in paper.tables}
        for claim in paper.claims:
            place = f"{name}/{claim.where}"
            figure = next((one for one in paper.figures if one.name == claim.where), None)
            found = [] if figure is None else drawings(figure, entries)
            links |= {claim.text: slug(place)} if claim.where in tables or found else {}
            every = [(setting, _judged(claim, known[name], setting)) for setting in settings]
            every += [(one.setting, judge_curves(claim, curves_of(one.lines))) for one in found]
            for setting, judged in every:
                if judged is not None and judged.pairs:
                    rows.append((claim.text, _how(setting), judged.verdict, _counted(judged), place))
    head = ("claim", "schedule", "verdict", "comparisons", "where")
    return Grid(head, tuple(rows), left=5, links=links) if rows else None


def _settings(found: Sequence[Placed]) -> list[Setting]:
    """Those that occur: the recommended readings before the variants, the longest schedule first."""
    every = {(entry["scale"], variant) for _, _, variant, entry in found} | {(1.0, None)}
    return sorted(every, key=lambda one: (one[1] or "", -one[0]))


def _how(setting: Setting) -> str:
    scale, variant = setting
    return ("in full" if scale == 1.0 else f"scale {scale:g}") + (f", variant {variant}" if variant else "")


def _judged(claim: Claim, found: Sequence[Placed], setting: Setting) -> Judged | None:
    """None if no comparison was measured under that setting."""
    values = _values(found, *setting)
    judged = judge(claim, lambda name: values.get(name, Measured()))
    return judged if any(pair.difference is not None for pair in judged.pairs) else None


def _counted(judged: Judged) -> str:
    """Verdicts of the comparisons that were measured, "2 seen, 1 open of 4"."""
    done = [pair.verdict for pair in judged.pairs if pair.difference is not None]
    counts = [f"{done.count(verdict)} {verdict}" for verdict in ("seen", "not seen", "open") if verdict in done]
    return f"{', '.join(counts)} of {len(judged.pairs)}"


def _values(placed: Sequence[Placed], scale: float, reading: str | None) -> dict[str, Measured]:
    """What is known of the rows, each in its own metric, under one reading.

    It is that of the device that has most rows, errors also those of another; times of two devices never meet.
    """
    found: dict[str, dict[str, Measured]] = {}
    timed: set[str] = set()
    for table, row, variant, entry in placed:
        if variant == reading and entry["metric"] == row.metric and entry["scale"] == scale:
            name = f"{table.name}/{row.key}"
            known = Measured(entry["measured"], entry.get("standard_errors", ()))
            found.setdefault(entry["device"], {})[name] = known
            timed |= {name} if (row.instrument or "").startswith("timing") else set()
    ranked = sorted(found.values(), key=len)
    values = {name: one for known in ranked for name, one in known.items() if name not in timed}
    return values | {name: one for known in ranked[-1:] for name, one in known.items()}
