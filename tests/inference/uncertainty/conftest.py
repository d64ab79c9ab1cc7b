"""Made-up predictions."""

import pytest
import torch


@pytest.fixture
def predictions():
    """Return a function from (images, classes, seed) to probabilities and labels that they are too sure about."""

    def make(images=300, classes=5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(images, classes, generator=generator, dtype=torch.float64)
        labels = torch.multinomial((0.6 * logits).softmax(1), 1, generator=generator).squeeze(1)
        return logits.softmax(1), labels

    return make
