"""Predictions of a randomly present network: in expectation (one pass), or averaged over sampled passes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from residrop.attach import sampling
from residrop.survival import check_whole

__all__ = ["Prediction", "predict"]


class Prediction(NamedTuple):
    """Class probabilities of n inputs, and what sampling says of them.

    Attributes:
        probabilities: Tensor[n, classes] float32, softmax probabilities; the mean over samples.
        standard_error: Tensor[n, classes] float32, standard error of that mean; zeros for deterministic
            inference, NaN for one sample.
        sample_entropy: Tensor[n] float32, mean entropy (nats) of the single passes' predictions.
        samples: number of sampled passes; 0 for deterministic inference.
        sample_classes: Tensor[samples, n] int64, the class each single pass decides for.
    """

    probabilities: Tensor
    standard_error: Tensor
    sample_entropy: Tensor
    samples: int
    sample_classes: Tensor

    @property
    def classes(self) -> Tensor:
        """Tensor[n] int64, the most probable class."""
        return self.probabilities.argmax(dim=1)

    @property
    def entropy(self) -> Tensor:
        """Tensor[n], entropy of the prediction in nats: the whole uncertainty."""
        return _entropy(self.probabilities)

    @property
    def mutual_information(self) -> Tensor:
        """Tensor[n] in nats, the part of `entropy` that the randomness of the network explains (0 if not sampled)."""
        return (self.entropy - self.sample_entropy).clamp_min(0.0)


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim=1)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, samples: int = 30, *, first: int = 0) -> Prediction:
    """Predict class probabilities for a batch.

    `samples=0` is deterministic inference: every coin is replaced by its mean (Swapout section 3, Huang eq. 5).
    `samples=N` averages the softmax probabilities of N passes with coins tossed and batch norm in eval mode; the paper
    takes 30. The model's training flags are left as they were.

    Args:
        model: an attached network, Tensor[n, ...] to logits Tensor[n, classes].
        x: Tensor[n, ...], the batch.
        samples: number of sampled passes, 0 for deterministic.
        first: number of the first sampled pass; the same number and seed give the same samples.
    """
    if check_whole("samples", samples, least=0) == 0:
        flags = {module: module.training for module in model.modules()}
        model.eval()
        try:
            p = model(x).float().softmax(dim=1)
        finally:
            for module, flag in flags.items():
                module.training = flag
        return Prediction(
            p, torch.zeros_like(p), _entropy(p), 0, torch.empty(0, len(p), dtype=torch.long, device=p.device)
        )
    mean = square = entropy = torch.zeros((), device=x.device)
    classes: list[Tensor] = []
    with sampling(model, first=first):
        for number in range(1, samples + 1):
            p = model(x).float().softmax(dim=1)
            step = p - mean  # Welford's update: stable when the passes hardly differ
            mean = mean + step / number
            square = square + step * (p - mean)
            entropy = entropy + _entropy(p)
            classes.append(p.argmax(dim=1))
    variance = square / (samples - 1) if samples > 1 else torch.full_like(square, torch.nan)
    return Prediction(mean, (variance / samples).sqrt(), entropy / samples, samples, torch.stack(classes))
