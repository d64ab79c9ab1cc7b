"""A variant that computes something else is found before it is timed."""

import sys

import pytest
import torch

from residrop.common.errors import ConfigError
from residrop.research.bench.found import FOUND
from residrop.research.bench.networks import has_timm, network
from residrop.research.bench.peers import IndexGather, live_network, narrow_network
from residrop.research.bench.verify import verify
from residrop.rules import StochasticDepth
from small_networks import small_found

NAMES = ["resnet-8", "resnet-14/v2", "resnet-ours-8", "depth-dropout-resnet-8", "torchvision/resnet18"]
NAMES += ["timm/test_vit"] if has_timm() else []
ROOM = sys.modules["residrop.research.bench.verify"]  # its function has the same name


@pytest.mark.parametrize("name", [*NAMES, *FOUND])
def test_variants_compute_what_they_should(name, monkeypatch):
    pytest.importorskip(name.partition("/")[0] if name in FOUND else "torch")
    small_found(monkeypatch)
    verify(name, "0.5")
    with pytest.raises(ConfigError, match="survival"):
        verify(name, "half")


def test_every_schedule():
    for survival in ("linear_decay(0.5)", "1,0,0.7", "0.1"):
        verify("resnet-8", survival)
    with pytest.raises(ConfigError, match="2 survival rates were given for 3"):
        verify("resnet-8", "1,0")


def test_an_ideal_with_other_blocks_is_found(monkeypatch):
    monkeypatch.setattr(ROOM, "live_network", lambda chain, alive: live_network(chain, [not coin for coin in alive]))
    with pytest.raises(ConfigError, match="ours and the ideal, by block do not"):
        verify("resnet-8", "0.5")


def test_an_ideal_that_computes_absent_blocks_is_found(monkeypatch):
    """The same numbers, but gradients where there should be none."""

    def lazy(chain, alive):
        left = iter(alive)
        units = [u._replace(present=_times(u, next(left))) for u in chain.units]
        return live_network(chain._replace(units=units), [True] * len(alive))

    monkeypatch.setattr(ROOM, "live_network", lazy)
    with pytest.raises(ConfigError, match="ours and the ideal, by block do not leave out the same parameters"):
        verify("resnet-14/v2", "0.5")


def _times(unit, coin):
    def run(x):
        y = x if unit.absent is None else unit.absent(x)
        return unit.present(x) if coin else y + 0.0 * unit.present(x)

    return run


def test_an_ideal_with_other_rows_is_found(monkeypatch):
    monkeypatch.setattr(
        ROOM, "narrow_network", lambda chain, counts, spares: narrow_network(chain, [c + 1 for c in counts], spares)
    )
    with pytest.raises(ConfigError, match=r"ours and the ideal, by row have \d+ and \d+ FLOPs"):
        verify("resnet-8", "0.5")


def test_a_gather_of_other_rows_is_found(monkeypatch):
    class Shifted(IndexGather):
        def draw(self):
            draw = super().draw()
            return draw._replace(key=draw.key + 1)

    monkeypatch.setattr(ROOM, "IndexGather", Shifted)
    with pytest.raises(ConfigError, match="ours and index gather, by row do not compute the same"):
        verify("resnet-8", "0.5")


def test_a_rule_that_computes_what_it_drops_is_found(monkeypatch):
    class Masked(StochasticDepth):
        def forward(self, x, shortcut, branch, *, post=None, along=()):
            skip = shortcut(x)
            y = skip + float(self.draw().alive) * branch(x)
            return y if post is None else post(y)

    make = StochasticDepth
    monkeypatch.setattr(
        ROOM, "StochasticDepth", lambda rate, level, rescale: (Masked if level == "block" else make)(rate, level)
    )
    with pytest.raises(ConfigError, match="by block do not leave out the same parameters"):
        verify("resnet-8", "0.5")


@pytest.mark.skipif(not has_timm(), reason="timm is not installed")
def test_rows_are_compared_with_masks_where_rows_are_independent(monkeypatch):
    net = network("timm/test_vit")
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in net.model.modules())
    monkeypatch.setattr(type(net), "masked", lambda self, make, survival: [make(0.5) for _ in range(2)] and self.model)
    with pytest.raises(ConfigError, match="ours and masks, by block do not compute the same"):
        verify("timm/test_vit", "0.5")
