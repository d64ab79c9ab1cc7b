"""A paper of trainings that take a second: digits, three blocks."""

from contextlib import contextmanager

from residrop.common.lazy import Lazy
from residrop.research import papers
from residrop.research.papers import Claim, Curve, Figure, Paper, Point, Row, Table, Variant
from residrop.training import Recipe, train

RANDOM = Recipe(
    network="resnet-8",
    rule="stochastic-depth",
    data="digits",
    limit=200,
    epochs=4,
    batch_size=64,
    lr=0.05,
    precision="fp32",
    device="cpu",
    samples=2,
)
PLAIN = RANDOM.replace(rule="constant")
_TIMED = {
    "network": "resnet-8",
    "baseline": "resnet-8",
    "rule": "stochastic-depth",
    "survival": "uniform(0.5)",
    "data": "digits",
    "batch_size": 8,
    "updates": 6000,
}


def paper() -> Paper:
    """One table of trainings, one of times, one figure of each kind."""
    errors = Table(
        paper="toy",
        name="table-1",
        title="Errors",
        kind="training",
        rows=(
            Row(key="quoted", label="Others", published=9.0, own=False),
            Row(key="plain", label="Plain", published=20.0, recipe=PLAIN),
            Row(key="random", label="Random", published=10.0, recipe=RANDOM, also=("sampled_error",), spread=0.5),
        ),
        note="of digits",
    )
    again = Table(
        paper="toy",
        name="table-3",
        title="The same training, sampled",
        kind="training",
        rows=(Row(key="sampled", label="Random", metric="sampled_error", published=8.0, recipe=RANDOM),),
    )
    times = Table(
        paper="toy",
        name="table-2",
        title="Times",
        kind="timing",
        rows=(
            Row(key="constant", label="Constant", metric="minutes", published=100.0, instrument="timing.training",
                setting={**_TIMED, "rule": "constant", "survival": None}),
            Row(key="minutes", label="Random", metric="minutes", published=75.0, instrument="timing.training",
                setting=_TIMED),
            Row(key="saved", label="Saved", metric="share_saved", published=25.0, theory=25.5,
                instrument="timing.training", setting=_TIMED),
            Row(key="forward", label="Forward", metric="milliseconds", published=5.0, instrument="timing.update",
                setting={**_TIMED, "part": "forward"}),
            Row(key="blocks", label="Blocks", metric="blocks", published=40.0, instrument="counts",
                setting={"blocks": 54, "survival": "linear_decay(0.5)"}),
        ),
    )  # fmt: skip
    learning = Figure(
        paper="toy",
        name="figure-1",
        title="Learning",
        x="epoch",
        y="test error (%)",
        curves=(
            Curve(label="plain", plotted="test_error", recipe=PLAIN),
            Curve(label="random", plotted="test_error", recipe=RANDOM),
        ),
    )
    relative = Figure(
        paper="toy",
        name="figure-2",
        title="Relative error",
        x="ratio",
        y="relative error (%)",
        curves=(
            Curve(
                label="both",
                plotted="relative_error",
                points=(Point(x=0.0, row="table-1/plain"), Point(x=0.5, row="table-1/random")),
            ),
        ),
    )
    samples = Figure(
        paper="toy",
        name="figure-3",
        title="Error by samples",
        x="samples",
        y="error (%)",
        curves=(
            Curve(
                label="random",
                plotted="error_by_samples",
                recipe=RANDOM,
                setting={"repetitions": 2, "samples": 3},
            ),
        ),
    )
    law = Figure(
        paper="toy",
        name="figure-4",
        title="Depth",
        x="blocks",
        y="probability",
        curves=(
            Curve(
                label="uniform",
                plotted="instrument",
                instrument="depth.law",
                setting={"blocks": 4, "survival": "uniform(0.5)"},
            ),
        ),
    )
    rates = Figure(
        paper="toy",
        name="figure-6",
        title="Error by survival rate",
        x="p_L",
        y="error (%)",
        curves=(
            Curve(
                label="uniform",
                plotted="error",
                points=(
                    Point(x=0.5, recipe=RANDOM.replace(survival="uniform(0.5)")),
                    Point(x=0.8, recipe=RANDOM.replace(survival="uniform(0.8)")),
                    Point(x=1.0, recipe=PLAIN),
                ),
            ),
        ),
    )
    return Paper(
        name="toy",
        title="Toys",
        authors="Nobody",
        year=2026,
        venue="here",
        arxiv=None,
        tables=(errors, times, again),
        figures=(
            learning,
            relative,
            samples,
            law,
            rates,
            Figure(paper="toy", name="figure-5", title="A", note="a drawing"),
        ),
        variants=(
            Variant(name="slower", changes={"lr": 0.02}, why="not stated", concerns=("table-1/random",)),
            Variant(
                name="smaller",
                networks={"resnet-8": "resnet-14"},
                why="takes another network",
                concerns=("table-1", "figure-1", "figure-2", "figure-6"),
            ),
            Variant(name="milder", changes={"survival": "0.9"}, why="not stated", concerns=("table-3",)),
        ),
        claims=(
            Claim(text="random is better", where="table-1", pairs=(("table-1/random", "table-1/plain"),)),
            Claim(text="random is faster", where="table-2", pairs=(("table-2/minutes", "table-2/constant"),)),
        ),
    )


@contextmanager
def installed():
    """Inside, the toy is the only paper."""
    toy = paper()
    before = dict(vars(papers.PAPERS))
    vars(papers.PAPERS).update(vars(Lazy(lambda: ("toy",), {"toy": toy}.__getitem__)))
    try:
        yield toy
    finally:
        vars(papers.PAPERS).update(before)


def train_here(recipes, out, *, workers=2, console=None, on_finished=lambda name, found: None, quiet=False):
    """`train_all` in this process, one after the other: nothing to start."""
    found = {}
    for name, recipe in recipes.items():
        found[name] = train(recipe, out / name, resume=True, quiet=True).to_dict()
        on_finished(name, found[name])
    return found
