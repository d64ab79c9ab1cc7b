"""What is measured: predictions of labelled images, in one pass and averaged over sampled passes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from residrop.common.errors import ConfigError
from residrop.inference.evaluate import evaluate
from residrop.inference.sampled.predictions import Prediction
from residrop.inference.scores import check_labels
from residrop.inference.uncertainty.scores import ScoreName, uncertainty_scores

__all__ = ["Collector", "Predictions", "collect"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of n images, on the CPU. Keys are numbers of sampled passes, 0 for one pass in expectation.

    Attributes:
        labels: int64 Tensor[n].
        probabilities: Tensor[n, classes] of each kind of inference.
        scores: of each kind of inference its scores of uncertainty, Tensor[n] each; see `uncertainty_scores`.
    """

    labels: Tensor
    probabilities: dict[int, Tensor]
    scores: dict[int, dict[ScoreName, Tensor]]


class Collector:
    """Gathers predictions batch by batch: `add` is what `residrop.evaluate` takes as `on_predictions`."""

    def __init__(self) -> None:
        self._labels: list[Tensor] = []
        self._batches: list[dict[int, tuple[Tensor, dict[ScoreName, Tensor]]]] = []

    def add(self, labels: Tensor, expected: Prediction, sampled: Prediction | None) -> None:
        """Keep what is needed of a batch.

        Raises:
            ConfigError: it is not one decision between classes for each image.
        """
        if not isinstance(expected, Prediction) or expected.probabilities.ndim != 2:
            raise ConfigError("uncertainty is measured of one decision between classes for each image, logits [n, C]")
        check_labels(labels, expected.classes.shape, expected.probabilities.shape[1])
        self._labels.append(labels.cpu())
        both = (expected,) if sampled is None else (expected, sampled)
        self._batches.append(
            {
                one.samples: (
                    one.probabilities.float().cpu(),
                    {name: score.float().cpu() for name, score in uncertainty_scores(one).items()},
                )
                for one in both
            }
        )

    def predictions(self) -> Predictions:
        """All batches so far, in order; ConfigError without images."""
        if not sum(map(len, self._labels)):
            raise ConfigError("there were no images to predict; give at least one")
        first = self._batches[0]
        return Predictions(
            torch.cat(self._labels),
            {samples: torch.cat([batch[samples][0] for batch in self._batches]) for samples in first},
            {
                samples: {name: torch.cat([batch[samples][1][name] for batch in self._batches]) for name in scores}
                for samples, (_, scores) in first.items()
            },
        )


def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    samples: int = 30,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Predictions:
    """Predict labelled batches in one pass and, unless `samples` is 0, averaged over that many sampled passes.

    The passes are those of `residrop.evaluate`: batch b has passes b * samples, b * samples + 1, ...

    Args:
        model: an attached network, in any mode.
        batches: pairs (x Tensor[n, ...], labels int64 Tensor[n]), at least one image in all.
        samples: sampled passes for every batch.
        on_batch: called with the number of images done after every batch.

    Raises:
        ConfigError: no images, or a bad number.
    """
    collector = Collector()
    evaluate(model, batches, samples, kind="classes", on_batch=on_batch, on_predictions=collector.add)
    return collector.predictions()
