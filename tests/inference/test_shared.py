"""Sampled passes that share work are the passes of the slow loop."""

import pytest
import torch
import torchvision
from torch import nn

import residrop
from residrop.blocks.attach import sampler_of, sampling
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.inference import predict
from residrop.inference.sampled.batch import Batch
from residrop.inference.sampled.outputs import Reader
from residrop.inference.sampled.pieces import pieces_of
from residrop.inference.sampled.shared import passes
from residrop.rules import ConstantDepth, StochasticDepth
from residrop.rules.units import Swapout

N, SAMPLES, FIRST = 6, 9, 4
BLOCK = {"stochastic-depth": {}, "train": {"rescale": "train"}, "depth-dropout": {}, "layer-dropout": {}}
UNIT = {"swapout": {}, "skipforward": {}, "dropout": {}, "dropout-residual": {}, "dropout-sum": {}}
ROW = {"row": {"granularity": "row"}, "bernoulli": {"granularity": "row", "rows": "bernoulli", "rescale": "train"}}
NAMES = {"train": "stochastic-depth", "row": "stochastic-depth", "bernoulli": "stochastic-depth"}
FORMS = {**BLOCK, **UNIT, **ROW, "constant": {}}
NETWORKS = {
    "v1": ("resnet-14", {}),
    "v2": ("resnet-14", {"block": "v2"}),
    "ours": ("resnet-ours-14", {"block": "v1"}),
    "trainable shortcuts": ("depth-dropout-resnet-14", {}),
}


def warmed(model, shape=(16, 1, 8, 8)):
    """The model in training mode; its batch norms have seen some data."""
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(shape))
    return model


def network(form, name="resnet-14", **options):
    rule = NAMES.get(form, form)
    if form != "constant":
        options["survival"] = "linear(1, 0.5)"
    return warmed(residrop.create(name, rule=rule, classes=5, channels=1, **FORMS[form], **options))


@torch.no_grad()
def loop(model, x, samples=SAMPLES, first=FIRST):
    """What `predict` did before it shared anything: Tensor[samples, n, classes]."""
    with sampling(model, first=first):
        return torch.stack([model(x).float().softmax(dim=1) for _ in range(samples)])


@pytest.fixture
def x():
    return torch.randn(N, 1, 8, 8)


def assert_same_prediction(found, every, exactly):
    tolerance = {"rtol": 0.0, "atol": 0.0 if exactly else 2e-6}
    torch.testing.assert_close(found.sample_probabilities, every, **tolerance)
    torch.testing.assert_close(found.probabilities, every.mean(0), rtol=0.0, atol=2e-6)
    assert torch.equal(found.sample_classes, found.sample_probabilities.argmax(2))


# Equality


@pytest.mark.parametrize("form", [*BLOCK, *UNIT, "constant"])
@pytest.mark.parametrize("network_of", NETWORKS)
def test_unstacked_samples_are_those_of_the_loop_bit_for_bit(form, network_of, x):
    name, options = NETWORKS[network_of]
    model = network(form, name, **options)
    every = loop(model, x)
    assert pieces_of(model, x) is not None
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, stack=1, keep=True), every, exactly=True)
    assert form == "constant" or every.std(0).max() > 1e-4


@pytest.mark.parametrize("stack", [1, N, 7, 2 * N, 20, 1000, None])
@pytest.mark.parametrize("form", FORMS)
def test_samples_do_not_depend_on_the_stack(form, stack, x):
    model = network(form)
    assert_same_prediction(
        predict(model, x, SAMPLES, first=FIRST, stack=stack, keep=True), loop(model, x), exactly=False
    )


@pytest.mark.parametrize("form", ["stochastic-depth", "row", "swapout"])
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("imagenet-resnet-18", {}, (3, 3, 32, 32)),
        ("vanilla-6", {"in_features": 12, "width": 16}, (5, 12)),
    ],
)
def test_the_other_networks_are_sequences_too(form, name, options, shape):
    rule = NAMES.get(form, form)
    model = residrop.create(name, rule=rule, survival="linear(1, 0.5)", classes=5, **FORMS[form], **options)
    x = torch.randn(shape)
    warmed(model, (8, *shape[1:]))
    assert pieces_of(model, x) is not None
    assert_same_prediction(
        predict(model, x, 5, first=1, stack=1, keep=True), loop(model, x, 5, 1), exactly=form != "row"
    )


@pytest.mark.parametrize("form", ["stochastic-depth", "row", "swapout"])
def test_channels_last_networks(form, x):
    model = network(form).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), loop(model, x), exactly=False)


@pytest.mark.parametrize("form", ["stochastic-depth", "row", "swapout"])
def test_autocast(form, x):
    model = network(form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        every, found = loop(model, x), predict(model, x, SAMPLES, first=FIRST, keep=True)
    torch.testing.assert_close(found.sample_probabilities, every, rtol=0.0, atol=0.02)
    torch.testing.assert_close(found.probabilities, every.mean(0), rtol=0.0, atol=0.005)


@pytest.mark.parametrize("form", ["stochastic-depth", "row", "swapout"])
def test_one_image_and_none(form):
    model = network(form)
    one, none = torch.randn(1, 1, 8, 8), torch.randn(0, 1, 8, 8)
    assert_same_prediction(predict(model, one, SAMPLES, first=FIRST, keep=True), loop(model, one), exactly=False)
    assert predict(model, none, 3).probabilities.shape == (0, 5)


def test_the_rates_of_a_timing_are_those_it_ends_with(x):
    model = warmed(
        residrop.create("resnet-14", rule="stochastic-depth", survival=0.5, timing="early(100)", classes=5, channels=1)
    )
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, stack=1, keep=True), loop(model, x), exactly=True)


@pytest.mark.parametrize("form", ["stochastic-depth", "row", "swapout"])
def test_compiled_branches(form, x):
    model = network(form)
    every = loop(model, x)
    residrop.compile_branches(model, backend="eager")
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), every, exactly=False)


# What is shared


class Counts:
    """Rows that entered a module, call by call."""

    def __init__(self, module):
        self.rows = []
        module.register_forward_hook(lambda _, inputs, __: self.rows.append(len(inputs[0])))


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, Residual)]


@pytest.mark.parametrize("stack", [1, 30])
@pytest.mark.parametrize("form", ["stochastic-depth", "row", "bernoulli"])
def test_every_branch_is_computed_once_per_set_of_coins_before_it(form, stack, x):
    model = network(form)
    plans = [sampler_of(model).plan(FIRST + k, stream="sample") for k in range(SAMPLES)]
    counts = [Counts(block.branch) for block in blocks_of(model)]
    stem = Counts(model.stem)
    predict(model, x, SAMPLES, first=FIRST, stack=stack, keep=True)
    assert stem.rows == [N]
    assert counts[0].rows == [N]  # linear(1, 0.5): always present
    coins = torch.stack([coins_of(plan, blocks_of(model)) for plan in plans])  # [samples, blocks, rows]
    for number, count in enumerate(counts):
        wanted = sum(
            len({tuple(sample[:number, row].tolist()) for sample in coins if sample[number, row]}) for row in range(N)
        )
        assert sum(count.rows) == wanted, f"block {number + 1}"
        assert max(count.rows) <= max(stack, N)
    assert sum(sum(count.rows) for count in counts) < 0.75 * float(coins.sum())


def test_thirty_samples_of_linear_decay_share_much_of_their_branches():
    model = residrop.create("resnet-56", rule="stochastic-depth", survival="linear_decay(0.5)")
    sampler, present, computed = sampler_of(model), [], []
    for start in range(0, 600, 30):
        coins = [[draw.alive for draw in sampler.plan(start + k, stream="sample").draws] for k in range(30)]
        present.append(sum(map(sum, coins)) / (27 * 30))
        calls = [len({tuple(one[:block]) for one in coins if one[block]}) for block in range(27)]
        computed.append(sum(calls) / (27 * 30))
    assert sum(present) / 20 == pytest.approx(0.741, abs=0.01)
    assert sum(computed) / 20 == pytest.approx(0.42, abs=0.01)
    assert max(computed) < 0.5


def coins_of(plan, blocks):
    found = []
    for draw, block in zip(plan.draws, blocks, strict=True):
        if draw.alive is not None:
            found.append(torch.full((N,), draw.alive))
        elif block.rule.rows == "bernoulli":
            found.append(residrop.functional.row_mask(N, draw.rates[0], draw.key))
        else:
            start, live = draw.rows(N)
            found.append(torch.tensor([(row - start) % N < live for row in range(N)]))
    return torch.stack(found)


@pytest.mark.parametrize(("stack", "together"), [(1, 1), (2 * N, 2), (1000, SAMPLES)])
def test_unit_masks_part_samples_behind_the_first_random_branch(stack, together, x):
    model = network("swapout")
    counts = [Counts(block.branch) for block in blocks_of(model)]
    stem, tail = Counts(model.stem), Counts(model.tail)
    predict(model, x, SAMPLES, stack=stack)
    assert stem.rows == counts[0].rows == counts[1].rows == [N]
    passes_of = [N * together] * (SAMPLES // together) + [N * (SAMPLES % together)] * (SAMPLES % together > 0)
    assert counts[2].rows == counts[-1].rows == passes_of
    assert sum(tail.rows) in (0, N * SAMPLES)  # a tail is taken apart


def test_constant_depth_is_one_pass(x):
    model = network("constant")
    stem, last = Counts(model.stem), Counts(blocks_of(model)[-1].branch)
    assert predict(model, x, 30).samples == 30
    assert stem.rows == last.rows == [N]


# Parts of a batch


@pytest.mark.parametrize("form", FORMS)
def test_some_rows_have_the_samples_they_have_in_the_whole_batch(form, x):
    model = network(form)
    with passes(model, Batch(x), Reader(), first=FIRST) as sampled:
        (every,) = sampled.draw(range(FIRST, FIRST + SAMPLES))
        for rows in ([0, 1, 3, 5], [4], list(range(N))):
            (some,) = sampled.draw(range(FIRST + 2, FIRST + 5), torch.tensor(rows))
            torch.testing.assert_close(some, every[2:5][:, rows], rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("stack", [0, -3, 1.5, True])
def test_bad_stacks_are_refused(stack, x):
    with pytest.raises(ConfigError, match=r"stack is .*; give a whole number of at least 1"):
        predict(network("swapout"), x, 2, stack=stack)


# Other models


class Foreign(nn.Module):
    """A network that nobody here knows, with rules of any kind."""

    def __init__(self, *rules):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(nn.Conv2d(4, 4, 3, padding=1), rule=rule) for rule in rules)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))


def attached(model):
    residrop.attach(model, seed=3)
    return model


def test_other_models_are_called_whole_and_equal_draws_once(x):
    model = attached(Foreign(StochasticDepth(0.5), StochasticDepth(0.8)))
    every = loop(model, x, 30)
    different = len({sampler_of(model).plan(FIRST + k, stream="sample").draws for k in range(30)})
    model.calls = 0
    assert_same_prediction(predict(model, x, 30, first=FIRST, keep=True), every, exactly=True)
    assert model.calls == different <= 4


def blocks_computed(plans):
    """Calls of every block if each is made once per set of coins up to its own."""
    depth = len(plans[0].draws)
    return [len({tuple(draw.alive for draw in plan.draws[: block + 1]) for plan in plans}) for block in range(depth)]


def test_blocks_of_other_models_are_computed_once_per_set_of_coins(x):
    model = attached(Foreign(*[StochasticDepth(p) for p in (1.0, 0.9, 0.8, 0.6, 0.5)]))
    every = loop(model, x, 30)
    counts = [Counts(block.shortcut) for block in model.blocks]
    assert_same_prediction(predict(model, x, 30, first=FIRST, keep=True), every, exactly=True)
    plans = [sampler_of(model).plan(FIRST + k, stream="sample") for k in range(30)]
    assert [len(count.rows) for count in counts] == blocks_computed(plans)
    assert sum(len(count.rows) for count in counts) < 0.6 * 30 * 5
    assert not any("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_applied_models_give_the_samples_of_the_loop(granularity):
    # its blocks work in place, on tensors that other blocks gave
    model = torchvision.models.resnet18(num_classes=5)
    residrop.apply(model, survival="linear_decay(0.5)", granularity=granularity, seed=1)
    warmed(model, (4, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    every = loop(model, x, 12)
    count = Counts(model.layer4[1].conv1)
    assert_same_prediction(predict(model, x, 12, first=FIRST, keep=True), every, exactly=True)
    assert 0 < sum(count.rows) < 12 * 2
    assert_same_prediction(predict(model, x, 12, first=FIRST, stack=1, keep=True), every, exactly=True)


def test_outputs_that_somebody_writes_into_are_not_given_again(x):
    class InPlace(Foreign):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x).mul_(0.9).add_(0.1)
            return x.mean((2, 3))

    model = attached(InPlace(*[StochasticDepth(p) for p in (0.9, 0.8, 0.6, 0.5)]))
    assert_same_prediction(predict(model, x, 30, first=FIRST, keep=True), loop(model, x, 30), exactly=True)


def test_blocks_that_write_into_their_input_are_computed_every_time(x):
    class Overwriting(Residual):
        def forward(self, x):
            return super().forward(x.mul_(0.9))

    class ReadAgain(Foreign):
        def __init__(self, *rules):
            super().__init__(*rules)
            self.blocks[0] = Overwriting(nn.Conv2d(4, 4, 1), rule=rules[0])

        def forward(self, x):
            outputs = [self.stem(x)]
            for block in self.blocks:
                outputs.append(block(outputs[-1]))
            return sum(outputs).mean((2, 3))

    model = attached(ReadAgain(*[StochasticDepth(p) for p in (0.9, 0.8, 0.6, 0.5)]))
    assert_same_prediction(predict(model, x, 30, first=FIRST, keep=True), loop(model, x, 30), exactly=True)


def test_blocks_that_are_given_more_than_numbers_are_computed_every_time(x):
    class Log:
        calls = 0

    class Logging(Residual):
        def forward(self, x, log):
            log.calls += 1
            return super().forward(x)

    class Logged(Foreign):
        def __init__(self, *rules):
            super().__init__(*rules)
            self.blocks = nn.ModuleList(Logging(nn.Conv2d(4, 4, 1), rule=rule) for rule in rules)
            self.logs = []

        def forward(self, x):
            y, log = self.stem(x), Log()
            for block in self.blocks:
                y = block(y, log)
            self.logs.append(log.calls)
            return y.mean((2, 3))

    model = attached(Logged(StochasticDepth(0.9), StochasticDepth(0.5)))
    every = loop(model, x)
    model.logs.clear()
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), every, exactly=True)
    assert len(model.logs) > 1
    assert set(model.logs) == {2}


def test_inference_mode(x):
    model = attached(Foreign(StochasticDepth(0.5), StochasticDepth(0.8)))
    every = loop(model, x)
    with torch.inference_mode():
        assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), every, exactly=True)


def test_blocks_are_themselves_again_after_an_exception(x):
    model = attached(Foreign(StochasticDepth(0.5), StochasticDepth(0.5)))
    with pytest.raises(RuntimeError):
        predict(model, x.expand(N, 2, 8, 8), SAMPLES)
    assert not any("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize(
    "rules", [(Swapout(0.5),), (StochasticDepth(0.5, "row"),), (ConstantDepth(), Swapout(0.7), StochasticDepth(0.5))]
)
def test_other_models_give_the_samples_of_the_loop(rules, x):
    model = attached(Foreign(*rules))
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), loop(model, x), exactly=True)


def test_a_wrapper_counts_passes_as_before(x):
    root = network("swapout")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.root = root

        def forward(self, x):
            return self.root(x) + self.root(x.flip(3))

    model = Twice()
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), loop(model, x), exactly=True)


@pytest.mark.parametrize("granularity", ["block", "row"])
def test_sequences_of_many_kinds_of_rules(granularity, x):
    def conv():
        return nn.Conv2d(4, 4, 3, padding=1)

    model = attached(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Sequential(Residual(conv()), Residual(conv(), rule=StochasticDepth(0.6, granularity))),
            Residual(conv(), rule=Swapout(0.5), post=nn.ReLU()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )
    stem = Counts(model[0])
    every = loop(model, x)
    stem.rows.clear()
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), every, exactly=True)
    assert stem.rows == [N]


@pytest.mark.parametrize("options", [{}, {"repeat": 2}, {"earlier": 0.5}, {"repeat": 2, "earlier": 0.5}])
def test_networks_of_mix(options, x):
    model = warmed(residrop.create("resnet-20", rule="mix", classes=5, channels=1, **options))
    stem = Counts(model.stem)
    every = loop(model, x)
    stem.rows.clear()
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, stack=1, keep=True), every, exactly=True)
    assert stem.rows == [N]
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), every, exactly=False)


@pytest.mark.parametrize("rule", [StochasticDepth(0.5), StochasticDepth(0.5, "row"), Swapout(0.5)])
def test_a_block_that_comes_twice_lives_or_dies_as_one(rule, x):
    block = Residual(nn.Conv2d(1, 1, 3, padding=1), rule=rule)
    model = attached(nn.Sequential(block, block, nn.Flatten(), nn.Linear(64, 3)))
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), loop(model, x), exactly=False)
    counts = Counts(block.branch)
    predict(model, x[:1], SAMPLES, first=FIRST, stack=1, keep=True)
    assert 0 < len(counts.rows) <= 2 * SAMPLES


def test_a_hook_of_the_root_sees_every_sample(x):
    model = network("stochastic-depth")
    every, seen = loop(model, x), []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), every, exactly=True)
    plans = {sampler_of(model).plan(FIRST + k, stream="sample").draws for k in range(SAMPLES)}
    assert len(seen) == len(plans)


def test_a_hook_of_a_block_sees_all_its_rows(x):
    model = network("stochastic-depth")
    every = loop(model, x)
    block = Counts(blocks_of(model)[3])
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), every, exactly=True)
    assert sum(block.rows) == N * SAMPLES


def test_work_in_place_is_never_shared(x):
    branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
    model = attached(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), Residual(branch, rule=StochasticDepth(0.5)), nn.Flatten(), nn.Linear(256, 3)
        )
    )
    assert pieces_of(model, x) is None
    assert_same_prediction(predict(model, x, SAMPLES, first=FIRST, keep=True), loop(model, x), exactly=True)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 3, 8), (2, 64)])
def test_inputs_that_a_network_refuses_are_refused_in_its_words(shape):
    model = network("stochastic-depth")
    with pytest.raises(ConfigError) as said:
        model(torch.randn(shape))
    with pytest.raises(ConfigError) as found:
        predict(model, torch.randn(shape), 3)
    assert str(found.value) == str(said.value)


@pytest.mark.parametrize("form", ["stochastic-depth", "row", "swapout"])
def test_the_model_is_left_as_it_was_after_an_exception_inside(form, x):
    model = network(form)
    model.blocks.block2.eval()
    sampler = sampler_of(model)
    flags, force = [module.training for module in model.modules()], sampler.in_force

    def fail(module, arguments):
        raise RuntimeError("in the middle")

    hook = model.blocks.block6.branch.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        predict(model, x, SAMPLES)
    hook.remove()
    assert [module.training for module in model.modules()] == flags
    assert sampler.in_force is force
    assert torch.is_grad_enabled()
