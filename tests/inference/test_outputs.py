"""Prediction of what models give besides logits [n, C]: each kind against a loop made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import residrop
from residrop.blocks.attach import attach, sampling
from residrop.blocks.residual import Residual
from residrop.common.errors import ConfigError
from residrop.inference import Sampled, predict, predict_adaptive
from residrop.rules.catalogue import make_rule

FIRST, SAMPLES = 3, 7


class Wrapped(nn.Module):
    """A network whose output is changed by a function; not known to be a sequence."""

    def __init__(self, body, change):
        super().__init__()
        self.body, self.change = body, change

    def forward(self, x, **along):
        return self.change(self.body(x), **along)


def blocks(layer, rule, count=3, **options):
    return [Residual(layer(), rule=make_rule(rule, survival=0.5, **options)) for _ in range(count)]


def dense(rule="stochastic-depth", classes=4, change=None):
    """Tensor[n, 3, H, W] to [n, classes, H, W]."""
    parts = [nn.Conv2d(3, 8, 3, padding=1), *blocks(lambda: nn.Conv2d(8, 8, 3, padding=1), rule)]
    body = nn.Sequential(*parts, nn.Conv2d(8, classes, 1))
    model = body if change is None else Wrapped(body, change)
    attach(model, seed=1)
    return model


def flat(rule="stochastic-depth", outputs=4, change=None):
    """Tensor[n, 6] to [n, outputs]."""
    body = nn.Sequential(nn.Linear(6, 8), *blocks(lambda: nn.Linear(8, 8), rule), nn.Linear(8, outputs))
    model = body if change is None else Wrapped(body, change)
    attach(model, seed=1)
    return model


@torch.no_grad()
def loop(model, x, read, samples=SAMPLES):
    """What `read` gives of single passes, made one by one: Tensor[samples, ...]."""
    args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
    with sampling(model, first=FIRST):
        return torch.stack([read(model(*args, **kwargs)) for _ in range(samples)])


def assert_classes(found, every, dim=1):
    """`found` has these passes, bit for bit, and what they say: Tensor[samples, ...]."""
    assert torch.equal(found.sample_probabilities, every)
    passes = every.double().numpy()
    np.testing.assert_allclose(found.probabilities.numpy(), passes.mean(0), atol=1e-6)
    error = passes.std(0, ddof=1) / np.sqrt(len(passes))
    np.testing.assert_allclose(found.standard_error.numpy(), error, rtol=1e-3, atol=1e-7)
    entropy = -(passes * np.log(passes)).sum(dim + 1).mean(0)
    np.testing.assert_allclose(found.sample_entropy.numpy(), entropy, rtol=1e-5)
    assert torch.equal(found.classes, found.probabilities.argmax(dim))
    decided = every.argmax(dim + 1)
    votes = torch.stack([(decided == number).sum(0) for number in range(every.shape[dim + 1])], dim)
    assert torch.equal(found.votes, votes.int())
    assert found.entropy.shape == found.mutual_information.shape == found.disagreement.shape == found.classes.shape


@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout"])
@pytest.mark.parametrize("change", [None, lambda y: {"out": y, "aux": -y}], ids=["tensor", "torchvision"])
def test_dense_logits_are_those_of_the_loop(rule, change):
    model, x = dense(rule, change=change), torch.randn(2, 3, 5, 6)
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, stack=1)
    every = loop(model, x, lambda y: (y if change is None else y["out"]).softmax(1))
    assert found.probabilities.shape == (2, 4, 5, 6)
    assert_classes(found, every)
    assert found.quantiles([0.0, 1.0]).shape == (2, 2, 4, 5, 6)
    once = predict(model, x, 0)
    with torch.no_grad():
        y = model.eval()(x)
    assert torch.equal(once.probabilities, (y if change is None else y["out"]).softmax(1))


def test_large_outputs_are_made_a_few_at_a_time_and_change_nothing(monkeypatch):
    model, x = dense("swapout"), torch.randn(2, 3, 5, 6)
    wanted = predict(model, x, SAMPLES, first=FIRST, stack=1)
    monkeypatch.setattr("residrop.inference.sampled.shared._SMALL", 0)
    monkeypatch.setattr("residrop.inference.sampled.shared._MEMORY", 2 * wanted.probabilities.nbytes)
    found = predict(model, x, SAMPLES, first=FIRST, stack=1)
    assert all(torch.equal(a, b) for a, b in zip(wanted[:3], found[:3], strict=True))


def test_an_output_like_its_input_is_not_taken_for_classes():
    model = dense(classes=3)
    with pytest.raises(ConfigError, match=r"has shape \[2, 3, 5, 6\], which does not tell .*'classes'.*'numbers'"):
        predict(model, torch.randn(2, 3, 5, 6), 2)
    assert predict(model, torch.randn(2, 3, 5, 6), 2, kind="classes").probabilities.shape == (2, 3, 5, 6)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_one_logit_is_two_classes(shape):
    model, x = flat("swapout", 1, change=lambda y: y.view(-1, *shape[1:])), torch.randn(5, 6)
    with pytest.raises(ConfigError, match=r"which does not tell what it means; give kind= one of .*'binary'"):
        predict(model, x, 2)
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, stack=1, kind="binary")

    def read(y):
        return torch.stack([torch.sigmoid(-y.view(5)), torch.sigmoid(y.view(5))], 1)

    assert_classes(found, loop(model, x, read))
    assert found.probabilities.shape == (5, 2)
    assert (found.entropy > 0).all()


def test_independent_questions_are_two_classes_each():
    model, x = flat("swapout", 3), torch.randn(5, 6)
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, stack=1, kind="binary")
    assert found.probabilities.shape == (5, 2, 3)
    assert_classes(found, loop(model, x, lambda y: torch.stack([torch.sigmoid(-y), torch.sigmoid(y)], 1)))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("form", ["mean", "pair"])
def test_numbers_have_mean_and_variance(form, double):
    model, x = flat("swapout", 2), torch.randn(5, 6)
    if double:
        model, x = model.double(), x.double()
    outputs = None if form == "mean" else lambda y: (y[:, 0], y[:, 1].exp())
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, stack=1, kind="numbers", outputs=outputs)
    every = loop(model, x, lambda y: y if form == "mean" else y[:, 0])
    assert torch.equal(found.sample_values, every)
    assert found.mean.dtype == x.dtype
    passes = every.double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), passes.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.variance.numpy(), passes.var(0, ddof=1), rtol=1e-3)
    noise = 0.0 if form == "mean" else loop(model, x, lambda y: y[:, 1].exp()).double().mean(0).numpy()
    np.testing.assert_allclose(found.total_variance.numpy(), passes.var(0, ddof=1) + noise, rtol=1e-3)
    low, high = found.interval(0.95)
    np.testing.assert_allclose((high - low).numpy(), 2 * 1.959964 * np.sqrt(found.total_variance.numpy()), rtol=1e-5)
    np.testing.assert_allclose(
        found.quantiles([0.3])[0].numpy(), np.quantile(passes, 0.3, axis=0), rtol=1e-4, atol=1e-6
    )


def test_numbers_of_one_pass_have_no_interval_without_a_predicted_variance():
    model, x = flat("swapout", 2), torch.randn(5, 6)
    pair = {"outputs": lambda y: (y[:, 0], y[:, 1] ** 2)}
    for samples, options in ((0, {}), (1, {}), (1, pair)):
        with pytest.raises(ConfigError, match="one pass without a predicted variance tells no interval"):
            predict(model, x, samples, kind="numbers", **options).interval()
    with pytest.raises(ConfigError, match="coverage is 1"):
        predict(model, x, 2, kind="numbers").interval(1.0)
    low, high = predict(model, x, 0, kind="numbers", outputs=lambda y: (y[:, 0], y[:, 1] ** 2)).interval()
    assert (high >= low).all()


def test_a_negative_variance_is_refused():
    with pytest.raises(ConfigError, match=r"is a variance, but holds -\d"):
        predict(flat("swapout", 2), torch.randn(5, 6), 2, kind="numbers", outputs=lambda y: (y[:, 0], -(y[:, 1] ** 2)))


def test_several_heads_are_predicted_together():
    model = flat("swapout", 4, change=lambda y: {"age": y[:, :1], "sex": y[:, 1:3], "smokes": y[:, 3]})
    x = torch.randn(5, 6)
    kinds = {"age": "numbers", "sex": "classes", "smokes": "binary"}
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, stack=1, outputs=list(kinds), kind=kinds)
    assert list(found) == list(kinds)
    assert torch.equal(found["age"].sample_values, loop(model, x, lambda y: y["age"]))
    assert_classes(found["sex"], loop(model, x, lambda y: y["sex"].softmax(1)))
    assert found["smokes"].probabilities.shape == (5, 2)
    assert Sampled(model, 3, outputs=list(kinds), kind=kinds)(x)["age"].shape == (5, 1)
    with pytest.raises(ConfigError, match=r"'age' \[5, 1\], 'sex' \[5, 2\], 'smokes' \[5\]; say which"):
        predict(model, x, 2)
    with pytest.raises(ConfigError, match=r"kind has \['smoke'\], which outputs= does not; it has 'age', 'sex'"):
        predict(model, x, 2, outputs=list(kinds), kind={**kinds, "smoke": "binary"})
    with pytest.raises(ConfigError, match="kind has no entry for output 'smokes'"):
        predict(model, x, 2, outputs=list(kinds), kind={"age": "numbers", "sex": "classes"})
    with pytest.raises(ConfigError, match="has no 'agee'; it is 'age'"):
        predict(model, x, 2, outputs="agee")


def test_parts_of_a_tuple_and_of_an_object_are_taken_by_name_or_index():
    model, x = flat("swapout", 4, change=lambda y: (y.mean(), y)), torch.randn(5, 6)
    wanted = predict(model, x, 3, outputs=lambda o: o[1])
    for index in (1, -1):
        assert torch.equal(predict(model, x, 3, outputs=index).probabilities, wanted.probabilities)
    with pytest.raises(ConfigError, match="has no 2"):
        predict(model, x, 3, outputs=2)
    model.change = lambda y: SimpleNamespace(scores=y)
    assert torch.equal(predict(model, x, 3, outputs="scores").probabilities, wanted.probabilities)
    with pytest.raises(ConfigError, match="returns SimpleNamespace; say which"):
        predict(model, x, 3)


@pytest.mark.parametrize("kind", ["classes", "tokens", "binary", "numbers"])
def test_integers_are_no_prediction(kind):
    model = flat("swapout", 6, change=lambda y: y.view(-1, 2, 3).long())
    with pytest.raises(ConfigError, match=r"torch\.int64"):
        predict(model, torch.randn(5, 6), 2, kind=kind)


def test_probabilities_are_not_taken_for_logits():
    model, x = flat("swapout", 4, change=lambda y: y.softmax(1)), torch.randn(5, 6)
    with pytest.raises(ConfigError, match=r"probabilities, not logits; .*outputs=torch\.log"):
        predict(model, x, 2)
    found = predict(model, x, 3, outputs=torch.log, keep=True, first=FIRST)
    torch.testing.assert_close(found.sample_probabilities, loop(model, x, lambda p: p, 3))


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match="kind is 'class'; choose one of 'classes', 'tokens'"):
        predict(flat(), torch.randn(2, 6), kind="class")
    with pytest.raises(ConfigError, match="only kind='numbers' takes"):
        predict(flat(), torch.randn(2, 6), kind="classes", outputs=lambda y: (y, y))


# Inputs


@pytest.mark.parametrize("name", ["tokens", "sentences"])
def test_transformers_take_their_arguments_by_name(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    form = {"tokens": transformers.BertForTokenClassification, "sentences": transformers.BertForSequenceClassification}
    model = form[name](config)
    residrop.apply(model, rule="stochastic-depth", survival=0.5, seed=2)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    x = {"input_ids": torch.randint(0, 30, (4, 9)), "attention_mask": mask}
    found = predict(model, x, SAMPLES, first=FIRST, keep=True)
    assert found.probabilities.shape == ((4, 9, 3) if name == "tokens" else (4, 3))
    assert_classes(found, loop(model, x, lambda o: o.logits.softmax(-1)), dim=2 if name == "tokens" else 1)
    adaptive = predict_adaptive(model, x, max_samples=20, confidence=0.8)
    assert adaptive.classes.shape == found.classes.shape
    assert Sampled(model, 2)(**x).shape == found.probabilities.shape
    with pytest.raises(ConfigError, match=r"has no 'loss'; it is 'logits' \[4,"):
        predict(model, x, 2, outputs="loss")


def test_a_tuple_is_the_arguments_of_the_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = flat("swapout")

        def forward(self, x, y, scale=1.0):
            return self.body(x * scale + y)

    model = Two()
    attach(model, seed=1)
    x = torch.randn(5, 6), torch.randn(5, 6), 0.5
    found = predict(model, x, SAMPLES, first=FIRST, keep=True)
    assert_classes(found, loop(model, x, lambda y: y.softmax(1)))
    with pytest.raises(ConfigError, match="the inputs have 4 and 5 rows; give every tensor with the batch first"):
        predict_adaptive(model, (x[0], x[1][:4]))


# Models that a loop runs as they are


def assert_by_hand(model, x, **options):
    """All passes are those of the loop, to 1e-6."""
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, **options).sample_probabilities
    torch.testing.assert_close(found, loop(model, x, lambda y: y.softmax(1)), rtol=0, atol=1e-6)


class Windows(nn.Module):
    """Rows of 4 to single rows, and back."""

    def __init__(self, back):
        super().__init__()
        self.back = back

    def forward(self, x):
        return x.view(-1, 4 * x.shape[1]) if self.back else x.reshape(-1, x.shape[1] // 4)


@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout"])
def test_sequences_whose_number_of_rows_changes(rule):
    def layer():
        return nn.Linear(8, 8)

    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 8), *blocks(layer, rule, 2), nn.Linear(8, 3))
    attach(model, seed=0)
    assert_by_hand(model, torch.randn(6, 4, 5))
    with pytest.raises(ConfigError, match="the output has 24 rows for 6 inputs"):
        predict_adaptive(model, torch.randn(6, 4, 5))
    parts = [nn.Linear(32, 32), *blocks(lambda: nn.Linear(32, 32), rule, 1), Windows(False), *blocks(layer, rule, 2)]
    model = nn.Sequential(*parts, Windows(True), nn.Linear(32, 3))
    attach(model, seed=0)
    assert_by_hand(model, torch.randn(6, 32))


@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout"])
def test_sequences_whose_rows_depend_on_one_another(rule):
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    model = nn.Sequential(nn.Linear(6, 8), *blocks(lambda: nn.Linear(8, 8), rule), norm, nn.Linear(8, 3))
    attach(model, seed=0)
    assert_by_hand(model, torch.randn(6, 6))


def test_models_that_write_into_their_input_or_reuse_their_output():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = flat("swapout")
            self.register_buffer("kept", torch.zeros(6, 4))

        def forward(self, x):
            x -= 1.0
            return self.kept.copy_(self.body(x))

    model, x = Writes(), torch.randn(6, 6)
    attach(model, seed=0)
    before = x.clone()
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, kind="numbers").sample_values
    assert torch.equal(x, before)
    wanted = loop(model, x, lambda y: y.clone(), 1)  # the loop moves x
    assert torch.equal(found[0], wanted[0])
    assert len(found.unique(dim=0)) == SAMPLES


def test_a_block_inside_another_that_is_also_called_by_itself():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            (self.inner,) = blocks(lambda: nn.Linear(6, 6), "stochastic-depth", 1)
            branch = nn.Sequential(self.inner, nn.Linear(6, 6))
            self.outer = Residual(branch, rule=make_rule("stochastic-depth", 0.7))
            (self.last,) = blocks(lambda: nn.Linear(6, 6), "stochastic-depth", 1)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.last(self.inner(self.outer(x))))

    model, x = Nested(), torch.randn(5, 6)
    attach(model, seed=0)
    found = predict(model, x, 30, first=FIRST, keep=True).sample_probabilities
    assert torch.equal(found, loop(model, x, lambda y: y.softmax(1), 30))


def test_inputs_made_in_inference_mode():
    model = flat(change=lambda y: y)
    with torch.inference_mode():
        x = torch.randn(5, 6)
    assert_by_hand(model, x)


def test_the_expectation_is_that_inside_of_sampling_too():
    model, x = flat("swapout"), torch.randn(5, 6)
    wanted = predict(model, x, 0).probabilities
    with sampling(model):
        assert torch.equal(predict(model, x, 0).probabilities, wanted)


# What is recognised


def three_dimensional(name):
    """A model that gives logits [n, 3, 4] as an instance of a class of this name."""
    maker = type(name, (dict,), {})
    return flat("swapout", 12, change=lambda y: maker(logits=y.view(-1, 3, 4)))


def test_three_dimensional_logits_are_tokens_where_their_class_says_so():
    x = torch.randn(5, 6)
    for name in ("CausalLMOutput", "MaskedLMOutput", "Seq2SeqLMOutput", "TokenClassifierOutput"):
        assert predict(three_dimensional(name), x, 2).class_dim == 2
    with pytest.raises(ConfigError, match="does not tell what it means"):
        predict(three_dimensional("CLIPSegImageSegmentationOutput"), x, 2)


def test_the_only_tensor_of_a_mapping_is_not_taken_for_logits():
    model, x = flat("swapout", 4, change=lambda y: {"pooler_output": y}), torch.randn(5, 6)
    with pytest.raises(ConfigError, match=r"returns 'pooler_output' \[5, 4\]; say which"):
        predict(model, x, 2)
    assert predict(model, x, 2, outputs="pooler_output").probabilities.shape == (5, 4)


@pytest.mark.parametrize(("problem", "kind"), [("regression", "numbers"), ("multi_label_classification", "binary")])
def test_the_configuration_of_a_model_says_what_its_logits_are(problem, kind):
    model, x = flat("swapout", 4, change=lambda y: {"logits": y}), torch.randn(5, 6)
    model.config = SimpleNamespace(problem_type=problem)
    found, wanted = predict(model, x, 3), predict(model, x, 3, kind=kind)
    assert type(found) is type(wanted)
    assert torch.equal(found[0], wanted[0])


def test_outputs_of_the_shape_of_any_input_are_not_recognised():
    model = dense(classes=3)
    with pytest.raises(ConfigError, match="does not tell what it means"):
        predict(model, {"input": torch.randn(2, 3, 5, 6)}, 2)


def test_one_number_for_all_inputs_and_no_outputs_are_refused():
    with pytest.raises(ConfigError, match="is one number for all inputs"):
        predict(flat(change=lambda y: y.sum()), torch.randn(5, 6), 2, kind="binary")
    with pytest.raises(ConfigError, match=r"outputs is \[\]; name at least one"):
        predict(flat(change=lambda y: {"a": y}), torch.randn(5, 6), 2, outputs=[])


# Adaptive sampling


def test_dense_inputs_leave_when_all_their_places_are_settled():
    model, x = dense("swapout"), torch.randn(3, 3, 4, 4)
    found = predict_adaptive(model, x, max_samples=20, first=FIRST, confidence=0.8)
    every = predict(model, x, 20, first=FIRST, keep=True).sample_probabilities
    for row, count in enumerate(found.used.tolist()):
        torch.testing.assert_close(found.probabilities[row], every[:count, row].mean(0), rtol=0, atol=2e-6)
    # an input that has one place needs as many passes as its place alone
    column = predict_adaptive(model, x, max_samples=20, first=FIRST, confidence=0.8, outputs=lambda y: y[:, :, 0, 0])
    assert (column.used <= found.used).all()
    assert found.classes.shape == (3, 4, 4)


def test_only_one_decision_can_be_settled():
    x = torch.randn(5, 6)
    with pytest.raises(ConfigError, match="numbers are no decision"):
        predict_adaptive(flat(), x, kind="numbers")
    with pytest.raises(ConfigError, match=r"which of \['a', 'b'\] it is"):
        predict_adaptive(flat(), x, outputs=lambda y: {"a": y, "b": y})


# Mirror images


@pytest.mark.parametrize("rule", ["stochastic-depth", "swapout"])
def test_passes_of_odd_numbers_see_mirror_images(rule):
    model, x = dense(rule), torch.randn(2, 3, 5, 6)
    found = predict(model, x, SAMPLES, first=FIRST, keep=True, stack=1, flips=True)
    plain = predict(model, x, SAMPLES, first=FIRST, keep=True, stack=1).sample_probabilities
    mirrored = predict(model, x.flip(-1), SAMPLES, first=FIRST, keep=True, stack=1).sample_probabilities.flip(-1)
    for number, p in enumerate(found.sample_probabilities):
        assert torch.equal(p, (mirrored if (FIRST + number) % 2 else plain)[number])
    once, other = predict(model, x, 0), predict(model, x.flip(-1), 0)
    both = predict(model, x, 0, flips=True)
    torch.testing.assert_close(both.probabilities, (once.probabilities + other.probabilities.flip(-1)) / 2)
    assert not both.standard_error.any()


def test_mirror_images_in_adaptive_sampling_and_in_the_module():
    model = residrop.create("resnet-8", rule="swapout", channels=1, classes=4)
    x = torch.randn(12, 1, 8, 8)
    every = predict(model, x, 20, keep=True, flips=True).sample_probabilities
    adaptive = predict_adaptive(model, x, max_samples=20, confidence=0.8, flips=True)
    wanted = torch.stack([every[:count, row].mean(0) for row, count in enumerate(adaptive.used.tolist())])
    torch.testing.assert_close(adaptive.probabilities, wanted, rtol=0, atol=2e-6)
    assert torch.equal(Sampled(model, 4, flips=True)(x), predict(model, x, 4, flips=True).probabilities)


def test_what_has_no_known_mirror_image_is_refused():
    with pytest.raises(ConfigError, match="flips=True needs images"):
        predict(flat(), torch.randn(5, 6), 2, flips=True)
    with pytest.raises(ConfigError, match="takes classes of images or pixels, not numbers"):
        predict(dense(), torch.randn(2, 3, 5, 6), 2, flips=True, kind="numbers")
    with pytest.raises(ConfigError, match="neither with dropout=True nor with a wrapper"):
        predict(dense(), torch.randn(2, 3, 5, 6), 2, flips=True, dropout=True)
    with pytest.raises(ConfigError, match="nor with a wrapper"):
        predict(nn.Sequential(dense()), torch.randn(2, 3, 5, 6), 2, flips=True)


# Defaults


@pytest.mark.parametrize(("rule", "samples"), [("stochastic-depth", 0), ("swapout", 30), ("constant", 0)])
def test_the_default_number_of_passes_goes_by_the_rule(rule, samples):
    model = residrop.create("resnet-8", rule=rule, channels=1)
    assert predict(model, torch.randn(2, 1, 8, 8)).samples == samples
