import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from residrop.blocks.attach import sampler_of, using
from residrop.common.errors import ConfigError, NotFiniteWarning, PlanError
from residrop.inference import Sampled, predict, predict_adaptive
from residrop.models import create

RULES = ["constant", "stochastic-depth", "row", "swapout", "skipforward", "dropout", "depth-dropout"]


def network(rule, seed=0):
    """A small network in training mode whose batch norms have seen some data."""
    options = {"granularity": "row"} if rule == "row" else {}
    name = "stochastic-depth" if rule == "row" else rule
    model = create("resnet-8", rule=name, classes=5, channels=1, seed=seed, **options)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8))
    return model


@pytest.fixture
def x():
    return torch.randn(6, 1, 8, 8)


@torch.no_grad()
def single_passes(model, x, numbers):
    """Softmax of each sampled pass, made by hand from its plan: Tensor[N, n, classes] float64."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    passes = []
    for number in numbers:
        with using(model, sampler_of(model).plan(number, stream="sample")):
            passes.append(model(x).softmax(dim=1).double())
    for module, flag in flags.items():
        module.training = flag
    return torch.stack(passes)


@pytest.mark.parametrize("rule", RULES)
def test_no_samples_is_the_softmax_of_eval(rule, x):
    model = network(rule)
    found = predict(model, x, samples=0)
    with torch.no_grad():
        wanted = model.eval()(x).softmax(dim=1)
    assert torch.equal(found.probabilities, wanted)
    assert torch.equal(found.classes, wanted.argmax(dim=1))
    assert found.samples == 0
    assert found.sample_classes.shape == (0, 6)
    assert not found.standard_error.any()
    assert not found.mutual_information.any()
    assert not found.votes.any()
    assert not found.disagreement.any()


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("rule", RULES)
def test_samples_are_the_average_of_passes_made_one_by_one(rule, samples, x):
    model = network(rule)
    found = predict(model, x, samples, first=4, keep=True)
    passes = single_passes(model, x, range(4, 4 + samples))
    torch.testing.assert_close(found.probabilities.double(), passes.mean(0), rtol=0, atol=1e-6)
    assert torch.equal(found.sample_classes, passes.argmax(dim=2))
    votes = torch.stack([torch.bincount(one, minlength=5) for one in passes.argmax(dim=2).T])
    assert torch.equal(found.votes, votes.int())
    torch.testing.assert_close(found.disagreement, 1 - votes.amax(1) / samples)
    assert found.samples == samples
    assert found.standard_error.shape == (6, 5)


@pytest.mark.parametrize("samples", [2, 7])
@pytest.mark.parametrize("rule", RULES)
def test_standard_error_is_that_of_numpy(rule, samples, x):
    model = network(rule)
    found = predict(model, x, samples).standard_error.numpy()
    wanted = single_passes(model, x, range(samples)).numpy().std(axis=0, ddof=1) / np.sqrt(samples)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-7)


def test_entropies_are_the_textbook_s(x):
    def entropy(p):
        return -(p * np.log(p)).sum(axis=-1)

    model = network("swapout")
    found, passes = predict(model, x, samples=9), single_passes(model, x, range(9)).numpy()
    np.testing.assert_allclose(found.entropy.numpy(), entropy(passes.mean(0)), rtol=1e-5)
    np.testing.assert_allclose(found.sample_entropy.numpy(), entropy(passes).mean(0), rtol=1e-5)
    information = entropy(passes.mean(0)) - entropy(passes).mean(0)
    np.testing.assert_allclose(found.mutual_information.numpy(), information, rtol=1e-2, atol=2e-6)
    assert (found.mutual_information > 1e-5).all()
    assert (found.entropy <= np.log(5) + 1e-6).all()


def test_entropy_of_certainty_is_zero_not_nan():
    class Certain(nn.Module):
        def forward(self, x):
            return torch.tensor([[1e4, 0.0, -1e4]]).expand(len(x), 3)

    found = predict(Certain(), torch.zeros(2, 1), samples=0)
    assert torch.equal(found.entropy, torch.zeros(2))


def test_constant_depth_samples_agree_exactly_with_the_expectation(x):
    model = network("constant")
    once, sampled = predict(model, x, samples=0), predict(model, x, samples=5)
    assert torch.equal(once.probabilities, sampled.probabilities)
    assert not sampled.standard_error.any()
    assert not sampled.mutual_information.any()  # not even rounding, which would rank the inputs


@pytest.mark.parametrize("rule", ["stochastic-depth", "row", "swapout"])
def test_samples_repeat_and_first_makes_others(rule, x):
    model = network(rule)
    one, again, other = predict(model, x, 4), predict(model, x, 4), predict(model, x, 4, first=100)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], again[:3], strict=True))
    assert not torch.equal(one.probabilities, other.probabilities)
    assert not torch.equal(predict(network(rule, seed=1), x, 4).probabilities, one.probabilities)


def test_samples_do_not_read_or_move_the_global_random_state(x):
    model = network("swapout")
    before = torch.get_rng_state()
    one = predict(model, x, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(predict(model, x, 3).probabilities, one.probabilities)


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("rule", ["constant", "stochastic-depth", "swapout"])
def test_model_is_left_as_it_was(rule, samples, x):
    model = network(rule)
    model.blocks.block2.eval()  # a frozen part
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    step = sampler_of(model).step
    found = predict(model, x, samples)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert sampler_of(model).step == step
    assert not found.probabilities.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("samples", [0, 3])
def test_model_is_left_as_it_was_after_an_exception(samples, x):
    model = network("swapout")
    model.blocks.block2.eval()
    flags = [module.training for module in model.modules()]
    step = sampler_of(model).step

    def fail(module, arguments):
        raise RuntimeError("in the middle")

    hook = model.blocks.block3.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        predict(model, x, samples)
    hook.remove()
    assert [module.training for module in model.modules()] == flags
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))  # sampling is over
    assert sampler_of(model).step == step


def test_training_draws_are_the_same_with_and_without_predictions(x):
    outputs = []
    for looks in (0, 3):
        model = network("swapout")
        torch.manual_seed(0)
        for _ in range(looks):
            predict(model, x, 2)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)


def test_bfloat16_logits_give_float32_probabilities(x):
    model = network("swapout")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict(model, x, 3)
    assert found.probabilities.dtype == found.standard_error.dtype == torch.float32
    torch.testing.assert_close(found.probabilities.sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("samples", [-1, 1.5, True, "3"])
def test_bad_number_of_samples_is_refused(samples, x):
    with pytest.raises(ConfigError, match=r"samples is .*; give a whole number of at least 0"):
        predict(network("swapout"), x, samples)


def test_negative_first_is_refused(x):
    with pytest.raises(PlanError, match="first is -1"):
        predict(network("swapout"), x, 2, first=-1)


def test_model_without_draws_cannot_be_sampled(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert predict(model, x, 0).probabilities.shape == (6, 3)
    with pytest.raises(ConfigError, match=r"no sampler; call residrop\.attach"):
        predict(model, x, 2)


def test_variance_of_the_mean_falls_like_one_over_samples():
    n, groups, x = 8, 64, torch.randn(1, 1, 8, 8)
    model = network("swapout")
    singles = np.stack([predict(model, x, 1, first=k).probabilities[0, 0].item() for k in range(n * groups)])
    found = [predict(model, x, n, first=n * k) for k in range(groups)]
    means = np.array([one.probabilities[0, 0].item() for one in found])
    errors = np.array([one.standard_error[0, 0].item() for one in found])
    np.testing.assert_allclose(means, singles.reshape(groups, n).mean(1), rtol=1e-5)
    ratio = n * means.var(ddof=1) / singles.var(ddof=1)
    law = stats.f(groups - 1, n * groups - 1)
    assert law.ppf(1e-6) < ratio < law.isf(1e-6)  # about 0.3 to 2.3; a law of 1/sqrt(n) would give 2.8
    np.testing.assert_allclose(errors, singles.reshape(groups, n).std(1, ddof=1) / np.sqrt(n), rtol=1e-3)


def test_one_sample_has_no_standard_error(x):
    # one pass says nothing of the spread: 0 claims certainty (evaluate prints "standard error ... 0.0000")
    found = predict(network("swapout"), x, 1)
    assert found.standard_error.isnan().all()


# Quantiles


@pytest.mark.parametrize("samples", [1, 2, 7, 30])
@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout"])
def test_quantiles_are_those_of_numpy(rule, samples, x):
    levels = [0.0, 0.05, 0.31, 0.5, 0.95, 1.0]
    found = predict(network(rule), x, samples, keep=True)
    wanted = np.quantile(found.sample_probabilities.numpy(), levels, axis=0)
    assert found.quantiles(levels).shape == (6, 6, 5)
    np.testing.assert_allclose(found.quantiles(levels).numpy(), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(found.quantiles(), found.quantiles((0.05, 0.5, 0.95)))


def test_quantiles_of_the_expectation_are_itself(x):
    found = predict(network("swapout"), x, 0)
    assert torch.equal(found.quantiles([0.1, 0.9]), torch.stack([found.probabilities] * 2))


def test_quantiles_need_samples_and_levels(x):
    with pytest.raises(ConfigError, match=r"were not kept.*keep=True"):
        predict(network("swapout"), x, 3).quantiles()
    with pytest.raises(ConfigError, match="level is 5"):
        predict(network("swapout"), x, 3, keep=True).quantiles([5])


def test_samples_that_are_not_kept_change_nothing_else(x):
    model = network("swapout")
    kept, found = predict(model, x, 4, keep=True), predict(model, x, 4)
    assert found.sample_probabilities is None
    assert all(torch.equal(a, b) for a, b in zip(kept[:3], found[:3], strict=True))
    assert torch.equal(kept.votes, found.votes)
    with pytest.raises(ConfigError, match="were not kept"):
        _ = found.sample_classes
    assert torch.equal(kept.sample_probabilities.mean(0).argmax(1), kept.classes)


# The wrapper


def test_sampled_is_predict_as_a_module(x):
    model = network("swapout")
    wanted = predict(model, x, 4, first=2, keep=True)
    wrapper = Sampled(model, 4, first=2)
    assert torch.equal(wrapper(x), wanted.probabilities)
    assert torch.equal(wrapper(x), wrapper(x))
    details = Sampled(model, 4, first=2, details=True)(x)
    assert torch.equal(details.quantiles(), wanted.quantiles())
    assert torch.equal(Sampled(model, 0)(x), predict(model, x, 0).probabilities)
    assert repr(wrapper).startswith("Sampled(\n  samples=4, first=2, details=False")


def test_sampled_in_a_larger_network_leaves_the_flags_alone(x):
    model = network("swapout")
    whole = nn.Sequential(Sampled(model, 3), nn.Linear(5, 2)).train()
    step = sampler_of(model).step
    assert whole(x).shape == (6, 2)
    assert model.training
    assert sampler_of(model).step == step
    assert not whole[0](x).requires_grad
    assert {name.partition("model.")[2] for name in whole[0].state_dict()} == set(model.state_dict())


@pytest.mark.parametrize("given", [{"samples": -1}, {"first": -2}, {"samples": 1.5}])
def test_sampled_refuses_bad_numbers(given):
    with pytest.raises(ConfigError, match="give a whole number of at least 0"):
        Sampled(network("swapout"), **given)


def test_sampled_refuses_a_model_without_draws():
    with pytest.raises(ConfigError, match=r"no sampler; call residrop\.attach"):
        Sampled(nn.Linear(3, 3))


@pytest.mark.parametrize("how", ["expectation", "samples", "numbers", "adaptive"])
def test_inputs_without_a_finite_output_are_named(how):
    """The largest of NaNs is the first of them: class 0, of which all passes would be sure."""
    model = create("resnet-8", rule="stochastic-depth", survival=0.5)
    x = torch.randn(5, 3, 32, 32)
    x[[1, 3], 0, 0, 0] = torch.nan
    ways = {
        "expectation": lambda: predict(model, x, 0),
        "samples": lambda: predict(model, x, 3),
        "numbers": lambda: predict(model, x, 3, kind="numbers"),
        "adaptive": lambda: predict_adaptive(model, x, max_samples=8),
    }
    with pytest.warns(
        NotFiniteWarning, match=r"not finite for 2 of 5 inputs \(the first is number 1, counted from 0\)"
    ):
        found = ways[how]()
    values = found.mean if how == "numbers" else found.probabilities
    assert values[[0, 2, 4]].isfinite().all()
    assert values[[1, 3]].isnan().all()
