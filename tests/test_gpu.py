"""What must hold on a CUDA device; run with -m gpu."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

import residrop
from residrop.blocks.attach import rules_of
from residrop.engines.graphs import record_blocks
from residrop.functional import skip_forward, swapout, unit_mask, use_compiler
from residrop.training import Recipe, loop, run, setup, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_masks_equal_those_of_the_cpu(dtype, memory):
    x = torch.randn(33, 7, 9, 5).to(dtype).contiguous(memory_format=memory)
    f = torch.randn(33, 7, 9, 5).to(dtype).contiguous(memory_format=memory)
    for theta, key in ((0.5, 1), (0.9, 2**63 + 5)):
        assert torch.equal(unit_mask(x.cuda(), theta, key).cpu(), unit_mask(x, theta, key))
        assert torch.equal(swapout(x.cuda(), f.cuda(), theta, 0.3, key).cpu(), swapout(x, f, theta, 0.3, key))
        assert torch.equal(skip_forward(x.cuda(), f.cuda(), theta, key).cpu(), skip_forward(x, f, theta, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_compiled_masks_equal_those_of_the_cpu(dtype, memory):
    """One source for both devices, forward and backward."""
    x = torch.randn(32, 16, 16, 16).to(dtype).contiguous(memory_format=memory).requires_grad_()
    f = torch.randn(32, 16, 16, 16).to(dtype).contiguous(memory_format=memory).requires_grad_()
    there = [one.detach().cuda().requires_grad_() for one in (x, f)]
    y = swapout(x, f, 0.5, 0.3, 77)
    use_compiler(True)
    z = swapout(*there, 0.5, 0.3, 77)
    expected = torch.autograd.grad(y, (x, f), torch.ones_like(y))
    found = torch.autograd.grad(z, there, torch.ones_like(z))
    assert torch.equal(z.cpu(), y)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout", "depth-dropout"])
@pytest.mark.parametrize("decay_dropped", [False, True])
def test_training_learns_and_resumes(rule, decay_dropped, tmp_path):
    recipe = Recipe(
        network="resnet-8", rule=rule, epochs=6, batch_size=64, decay_dropped=decay_dropped, device="cuda", samples=5
    )
    outcome = train(recipe, tmp_path / "run", quiet=True)
    assert outcome.history[-1]["train_loss"] < 0.5 * outcome.history[0]["train_loss"]
    again = train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert again.evaluation.deterministic.error == pytest.approx(outcome.evaluation.deterministic.error, abs=1.0)


def _losses(**changes):
    recipe = Recipe(
        **{
            "network": "resnet-8",
            "epochs": 4,
            "batch_size": 256,
            "limit": 1000,
            "lr": 0.02,
            "precision": "fp32",
            "lr_drops": (0.5,),
        }
        | {"device": "cuda", **changes}
    )
    ready = setup.prepare(recipe)
    state = run.start(recipe, ready)
    batches = ready.loaders["train"]
    found = [float(state.sums[0]) for epoch in range(4) for _ in loop.updates(recipe, state, batches, epoch)]
    assert len(found) == 16
    return state.model, found


@pytest.mark.parametrize(
    "changes", [{}, {"micro_batches": 2}, {"graphs": "none"}, {"graphs": "passes"}, {"compile": False}]
)
@pytest.mark.parametrize("rule", ["constant", "swapout", "stochastic-depth"])
def test_compiled_training_obeys_its_draws(rule, changes):
    """A draw frozen into a CUDA graph, or a gradient overwritten by its next replay, would give other losses."""
    torch._dynamo.reset()
    _, expected = _losses(rule=rule, graphs="none", micro_batches=changes.get("micro_batches", 1))
    _, found = _losses(**{"rule": rule, "compile": True, **changes})
    assert found == pytest.approx(expected, rel=0.02)


def test_a_draw_as_data_is_no_new_graph(monkeypatch):
    """With CUDA graphs of torch.compile, too: keys and thetas lie where they lay when it was recorded."""
    torch._dynamo.reset()
    counters.clear()
    recorded = []
    begin = torch.cuda.graph.__enter__
    monkeypatch.setattr(torch.cuda.graph, "__enter__", lambda self: (recorded.append(step), begin(self)))
    model = residrop.create("resnet-8", rule="swapout").cuda().train()
    residrop.compile(model, mode="reduce-overhead")
    x = torch.randn(64, 3, 32, 32, device="cuda")
    for step in range(10):  # noqa: B007
        model.zero_grad()
        model(x).sum().backward()
    assert 0 < len(recorded) <= 4
    assert max(recorded) < 6
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("graphs", ["passes", "updates"])
@pytest.mark.parametrize("rule", ["constant", "stochastic-depth"])
def test_a_resumed_training_goes_on_in_the_tensors_that_its_graphs_know(rule, graphs):
    """Half of a training, saved and restored into another one that was recorded before, against the whole of it."""
    recipe = Recipe(
        network="resnet-8", rule=rule, epochs=2, batch_size=128, limit=1000, lr=0.02, device="cuda", graphs=graphs
    )
    ready = setup.prepare(recipe)
    batches, found = ready.loaders["train"], []
    saved = {}
    states = [run.start(recipe, ready) for _ in range(2)]
    for _ in loop.updates(recipe, states[0], batches, 0):
        pass
    states[0].save(SimpleNamespace(save_state=saved.update))
    states[1].restore(copy.deepcopy(saved), Path("last.pt"))
    for state in states:
        for _ in loop.updates(recipe, state, batches, 1):
            pass
        found.append(state.sums.tolist())
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert state.update == 16


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("changes", [{}, {"rule": "depth-dropout", "network": "resnet-14"}, {"decay_dropped": True}])
def test_recorded_blocks_train_as_blocks_that_are_not(changes, compiled):
    torch._dynamo.reset()
    changes = {"rule": "stochastic-depth", **changes}
    _, expected = _losses(graphs="none", **changes)
    model, found = _losses(compile=compiled, **changes)
    recorded = [rule for rule in rules_of(model) if hasattr(rule.executor, "segment")]
    assert len(recorded) == (6 if "network" in changes else 3)
    assert found == pytest.approx(expected, rel=0.02)


def test_graphs_share_memory_and_overwrite_nothing(monkeypatch):
    """Every draw of a deep network: outputs and gradients equal those of a copy without graphs."""
    # TF32 rounds by 1e-3, and cuDNN's choice of kernel may differ between the two
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = residrop.create("resnet-56", rule="stochastic-depth", survival="uniform(0.5)").cuda().train()
    plain = residrop.create("resnet-56", rule="stochastic-depth", survival="uniform(0.5)").cuda().train()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(32, 3, 32, 32, device="cuda")
    assert record_blocks(model, x) == 27
    for step in range(20):
        x = torch.randn(32, 3, 32, 32, device="cuda")
        for one in (model, plain):
            one.zero_grad()
            with residrop.using(one, residrop.sampler_of(one).plan(step)):
                one(x).square().sum().backward()
        for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) is (its.grad is None)
            a, b = (torch.zeros(()) if grad is None else grad for grad in (mine.grad, its.grad))
            assert float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-6


def test_a_dead_block_launches_nothing():
    model = residrop.create("resnet-20", rule="stochastic-depth").cuda()
    with residrop.using(model, residrop.Plan.of([False] * 9)):
        model(torch.randn(4, 3, 32, 32, device="cuda")).sum().backward()
    branches = [block.branch for block in model.modules() if isinstance(block, residrop.Residual)]
    assert len(branches) == 9
    assert all(parameter.grad is None for branch in branches for parameter in branch.parameters())


def test_prediction_stays_on_the_device():
    model = residrop.create("resnet-8", rule="swapout").cuda()
    found = residrop.predict(model, torch.randn(3, 3, 32, 32, device="cuda"), samples=4, keep=True)
    assert all(part.device.type == "cuda" for part in (found.probabilities, found.standard_error, found.sample_classes))
    assert residrop.predict(model, torch.randn(3, 3, 32, 32, device="cuda"), samples=0).sample_classes.is_cuda
