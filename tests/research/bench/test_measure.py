import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from residrop.research.bench.measure import median_ratio, peak_bytes, quiet_collector, saved_bytes, seconds_of

X = torch.randn(10, 8, requires_grad=True)


@pytest.mark.parametrize(
    ("forward", "numbers"),
    [
        (lambda: X + 1.0, 0),
        (lambda: X.exp(), 80),  # its result
        (lambda: X * X, 80),  # one storage, twice
        (lambda: X.exp().exp(), 160),
        (lambda: (X.exp()[:3] * 2.0).exp(), 80 + 24),
        (lambda: X.exp()[:3].square(), 80),  # three rows of a batch keep all of it
        (lambda: X.exp().detach() + X, 0),
    ],
)
def test_saved_bytes(forward, numbers):
    assert saved_bytes(forward) == 4 * numbers


def test_parameters_do_not_count():
    linear, conv = nn.Linear(8, 4), nn.Conv1d(10, 3, 1)
    hidden = X.detach()
    assert saved_bytes(lambda: linear(hidden.exp()), linear.parameters()) == 4 * 80
    assert saved_bytes(lambda: conv(hidden.exp()), conv.parameters()) == 4 * 80
    shared = nn.Parameter(torch.randn(8))
    assert saved_bytes(lambda: X * shared, [shared]) == 4 * 80
    assert saved_bytes(lambda: X * shared) == 4 * 88


def test_copies_of_parameters_by_autocast_do_not_count():
    linear = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear(X)

    activations = 2 * (10 * 8 + 10 * 16)  # the input in bf16, and what the ReLU gave
    assert saved_bytes(forward, linear.parameters(), casts=True) == activations
    weights = 2 * (8 * 16 + 16 * 4)
    assert saved_bytes(forward, linear.parameters()) == activations + weights


def test_saved_bytes_leaves_gradients_as_they_are():
    linear = nn.Linear(8, 4)
    saved_bytes(lambda: F.relu(linear(X)), linear.parameters())
    assert linear.weight.grad is None


def test_median_of_ratios_is_no_ratio_of_medians():
    assert median_ratio([1.0, 20.0, 300.0], [1.0, 10.0, 100.0]) == 2.0
    assert median_ratio([4.0, 1.0, 100.0], [1.0, 2.0, 100.0]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0], [1.0, 2.0])


def test_seconds_are_those_of_the_clock(monkeypatch):
    ticks = iter([3.0, 5.5])
    monkeypatch.setattr("residrop.research.bench.measure.time.perf_counter", lambda: next(ticks))
    called = []
    assert seconds_of(lambda: called.append(1), torch.device("cpu")) == 2.5
    assert called == [1]


def test_collector_rests_and_comes_back():
    with quiet_collector():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    with quiet_collector():
        pass
    assert not gc.isenabled()
    gc.enable()


def test_peak_is_beyond_what_was_allocated_before(monkeypatch):
    """Of CUDA's counters, which stand in here: only the highest since the step began counts."""
    memory = {"now": 100, "most": 900}
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: memory.update(most=memory["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["most"])
    assert peak_bytes(lambda: memory.update(now=120, most=350), torch.device("cuda")) == 250


@pytest.mark.gpu
def test_peak_of_a_gpu():
    x = torch.ones(1 << 20, device="cuda")
    assert peak_bytes(lambda: x.exp().log(), torch.device("cuda")) == 2 * 4 * (1 << 20)
