"""`train` on several ranks: shares of batches, agreed stops and errors, sharded evaluation."""

import json
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common import Traffic, everywhere, run
from residrop.common.errors import ConfigError, UsageError
from residrop.data import Loader, augmentation, fit, load
from residrop.training import Interrupted, Recipe, loop, setup, train
from residrop.training.distributed import Ranks, Votes, process_group

PLACE = Path(sys.argv[1]).parent
RECIPE = Recipe(**json.loads((PLACE / "recipe.json").read_text()))
QUIET = {"quiet": True}


def after_update(number, action):
    """Do something on this rank right after an update, once."""
    original = loop._update

    def update(recipe, state, *args):
        original(recipe, state, *args)
        if state.update == number:
            loop._update = original
            action()

    loop._update = update


def uninterrupted():
    """A whole training; what every rank returns, and what only rank 0 may write."""
    written = []
    original = Path.write_text
    Path.write_text = lambda self, *args, **kwargs: written.append(self.name) or original(self, *args, **kwargs)
    outcome = train(RECIPE, PLACE / "two", **QUIET)
    Path.write_text = original
    evaluations = everywhere(outcome.evaluation.to_dict())
    errors = everywhere([line["test_error"] for line in outcome.history])
    return {"evaluations": evaluations, "errors": errors, "written": [len(each) > 0 for each in everywhere(written)]}


def stopped():
    """Rank 1 gets SIGTERM after update 5, and once more; all ranks stop after the same update, with the state saved."""
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        after_update(5, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
    try:
        train(RECIPE, PLACE / "stopped", **QUIET)
        said = ""
    except Interrupted as error:
        said = str(error).replace(str(PLACE), "")
    state = torch.load(PLACE / "stopped" / "last.pt", weights_only=True)
    return {"said": everywhere(said), "update": state["update"], "seen": float(state["sums"][2])}


def stopped_at_the_end_of_an_epoch():
    """And resumed on as many ranks."""
    if dist.get_rank() == 0:
        after_update(4, lambda: signal.raise_signal(signal.SIGINT))
    try:
        train(RECIPE, PLACE / "epoch", **QUIET)
        said = ""
    except Interrupted as error:
        said = str(error).replace(str(PLACE), "")
    train(RECIPE, PLACE / "epoch", resume=True, **QUIET)
    return everywhere(said)


def checkpoints():
    """A state is saved at every update if so asked, and training is not changed by it."""
    saved = []
    original = loop.State.save
    loop.State.save = lambda self, run: saved.append(self.update) or original(self, run)
    train(RECIPE.replace(checkpoint_minutes=0.0), PLACE / "often", **QUIET)
    loop.State.save = original
    return everywhere(saved)


def errors():
    """A UsageError on any rank ends all: one rank says it."""
    ranks, found = Ranks(dist.get_rank(), dist.get_world_size()), {}

    def fail_on(rank):
        def work():
            if ranks.rank == rank:
                raise ConfigError(f"rank {rank} cannot")
            return 7

        return work

    def tell(name, call):
        try:
            result = call()
            found[name] = everywhere(["", result if isinstance(result, int) else "went through"])
        except UsageError as error:
            found[name] = everywhere([type(error).__name__, str(error)])

    tell("agree", lambda: ranks.agree(lambda: 7))
    tell("agree_rank1", lambda: ranks.agree(fail_on(1)))
    tell("from_main", lambda: ranks.from_main(lambda: 10 + ranks.rank))
    tell("from_main_fails", lambda: ranks.from_main(fail_on(0)))
    tell("in_turn", lambda: ranks.in_turn(lambda: 10 + ranks.rank))
    tell("in_turn_fails_late", lambda: ranks.in_turn(fail_on(1)))
    tell("existing_run", lambda: train(RECIPE, PLACE / "two", **QUIET))
    tell("small_batch", lambda: train(RECIPE.replace(batch_size=1, micro_batches=1), PLACE / "small", **QUIET))
    tell("lost", lambda: train(RECIPE.replace(lr=1e30), PLACE / "lost", **QUIET))
    setup.data_digest = lambda splits: f"images of rank {ranks.rank}"
    tell("other_data", lambda: train(RECIPE, PLACE / "other", **QUIET))
    return found


def votes():
    """A request of any rank is known to all after the next update; the highest counts; settle knows at once."""
    box = Votes(Ranks(dist.get_rank(), dist.get_world_size()))
    rank = dist.get_rank()
    heard = [box.cast(request) for request in (0, rank, 2 * (1 - rank), 0, 0)]
    heard.append(box.settle(0))
    heard += [box.cast(2 if rank else 0), box.settle(0), box.settle(0), box.settle(rank)]
    return everywhere(heard)


def shares():
    """Batches of all ranks, put together, are those of one process; also where images are fewer than ranks."""
    splits = load("digits", limit=130)
    normalization = fit(splits.train, "channel")
    found = {}
    for name in ("none", "shift", "crop", "batch-crop"):
        options = {
            "batch_size": 64,
            "normalization": normalization,
            "augmentation": augmentation(name) if name != "none" else None,
        }
        single = Loader(splits.train, **options)
        mine = Loader(splits.train, **options, share=(dist.get_rank(), dist.get_world_size()))
        same = []
        for number, ((x, y), (all_x, all_y)) in enumerate(
            zip(mine.train_batches(1), single.train_batches(1), strict=True)
        ):
            parts = everywhere((x, y))
            joined = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            same.append(torch.equal(joined[0], all_x) and torch.equal(joined[1], all_y))
            same.append(mine.images_in(number) == len(all_y))
        found[name] = [all(same), everywhere(len(y))]
    return found


def joined():
    """A group that exists is used and left; sums are those of all ranks."""
    with process_group("cpu") as ranks, Traffic() as traffic:
        total = ranks.total(torch.tensor([1.0, float(ranks.rank)]))
        ranks.wait_for_all()
    return [
        total.tolist(),
        dist.is_initialized(),
        ranks == Ranks(dist.get_rank(), dist.get_world_size()),
        traffic.names,
    ]


def patience():
    """Rank 0 takes longer than the default group waits."""
    limit = dist.distributed_c10d._set_pg_timeout
    try:
        limit(timedelta(seconds=0.5))
        with process_group("cpu") as ranks:
            return everywhere(ranks.in_turn(lambda: time.sleep(2.0 * ranks.main) or 7))
    finally:
        limit(timedelta(minutes=30))


def budget():
    """Rates measured on rank 0 are those of all, in training and in the evaluation of the best epoch."""
    recipe = RECIPE.replace(survival=None, budget="0.5", spend="sensitivity", refresh=1, validation=40, select="best")
    outcome = train(recipe, PLACE / "budget", **QUIET)
    return {
        "rates": everywhere(outcome.rates),
        "depths": everywhere([line["realised_depth"] for line in outcome.history]),
        "evaluations": everywhere(outcome.evaluation.to_dict()),
    }


def recent():
    """Clipped gradients, learning rates by layer, smoothed labels and an average of weights; and a network of timm."""
    changes = json.loads((PLACE / "recent.json").read_text())
    train(RECIPE.replace(**changes), PLACE / "recent", **QUIET)
    outcome = train(
        RECIPE.replace(network="timm:test_resnet", width=None, optimizer="adamw", ema=0.9, limit=96, batch_size=33),
        PLACE / "foreign",
        **QUIET,
    )
    return {"evaluations": everywhere(outcome.evaluation.to_dict())}


CHECKS = {
    "recent": recent,
    "uninterrupted": uninterrupted,
    "stopped": stopped,
    "epoch": stopped_at_the_end_of_an_epoch,
    "checkpoints": checkpoints,
    "errors": errors,
    "votes": votes,
    "shares": shares,
    "joined": joined,
    "patience": patience,
    "budget": budget,
}

if __name__ == "__main__":
    run(CHECKS)
