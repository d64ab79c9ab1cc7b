"""What became of the papers' claims, in full and at each scale alone."""

from collections.abc import Iterator, Mapping, Sequence

from residrop.papers.claims import Judged, judge
from residrop.papers.rows import Claim, Paper
from residrop.report.blocks import MISSING, Grid, Text, slug
from residrop.report.placing import Placed

__all__ = ["grid_of_claims", "verdicts_on"]


def verdicts_on(claim: Claim, found: Sequence[Placed], scales: Sequence[float]) -> Iterator[Text]:
    """What became of a claim in full and at each scale at which any of its comparisons was measured."""
    shown = False
    for scale in (1.0, *scales):
        judged = _judged(claim, found, scale)
        if judged is None:
            continue
        shown = True
        how = "in full" if scale == 1.0 else f"scale {scale:g}"
        single = any(pair.difference is not None and pair.error is None for pair in judged.pairs)
        about = _counted(judged) + ("; without standard errors (one seed)" if single else "")
        yield Text(f"Claim {judged.verdict} ({how}): {claim.text}. Comparisons: {about}.", judged.verdict)
    if not shown:
        yield Text(f"Claim, {MISSING}: {claim.text}.", "aside")


def grid_of_claims(papers: Mapping[str, Paper], known: Mapping[str, Sequence[Placed]]) -> Grid | None:
    """All claims of which a comparison was measured, in full or at a scale; None if there are none.

    Args:
        papers: by name.
        known: by name of the paper, entries that belong to its rows.
    """
    scales = sorted({entry["scale"] for found in known.values() for *_, entry in found} | {1.0}, reverse=True)
    rows: list[tuple[str, ...]] = []
    links: dict[str, str] = {}
    for name, paper in papers.items():
        tables = {table.name for table in paper.tables}
        for claim in paper.claims:
            links |= {claim.text: slug(f"{name}/{claim.where}")} if claim.where in tables else {}
            for scale in scales:
                judged = _judged(claim, known[name], scale)
                if judged is not None:
                    how = "in full" if scale == 1.0 else f"scale {scale:g}"
                    rows.append((claim.text, how, judged.verdict, _counted(judged), f"{name}/{claim.where}"))
    head = ("claim", "schedule", "verdict", "comparisons", "where")
    return Grid(head, tuple(rows), left=5, links=links) if rows else None


def _judged(claim: Claim, found: Sequence[Placed], scale: float) -> Judged | None:
    """None if no comparison was measured at that scale."""
    values = _values(found, scale)
    judged = judge(claim, lambda name: values.get(name, ()))
    return judged if any(pair.difference is not None for pair in judged.pairs) else None


def _counted(judged: Judged) -> str:
    """Verdicts of the comparisons that were measured, "2 seen, 1 open of 4"."""
    done = [pair.verdict for pair in judged.pairs if pair.difference is not None]
    counts = [f"{done.count(verdict)} {verdict}" for verdict in ("seen", "not seen", "open") if verdict in done]
    return f"{', '.join(counts)} of {len(judged.pairs)}"


def _values(placed: Sequence[Placed], scale: float) -> dict[str, Sequence[float]]:
    """Measured numbers of the rows, each in its own metric and recommended reading.

    They are those of the device that has most rows, errors also those of another; times of two devices never meet.
    """
    found: dict[str, dict[str, Sequence[float]]] = {}
    timed: set[str] = set()
    for table, row, variant, entry in placed:
        if variant is None and entry["metric"] == row.metric and entry["scale"] == scale:
            name = f"{table.name}/{row.key}"
            found.setdefault(entry["device"], {})[name] = entry["measured"]
            timed |= {name} if (row.instrument or "").startswith("timing") else set()
    ranked = sorted(found.values(), key=len)
    values = {name: one for known in ranked for name, one in known.items() if name not in timed}
    return values | {name: one for known in ranked[-1:] for name, one in known.items()}
