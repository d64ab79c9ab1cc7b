import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import residrop
from residrop.blocks.attach import sampler_of, using
from residrop.common.errors import ConfigError
from residrop.inference import export
from residrop.inference.deploy.sampled_graph import SampledGraph

KINDS = {
    "v1": ("resnet-8", "stochastic-depth", {}),
    "v2": ("resnet-ours-8", "swapout", {"block": "v2"}),
    "transform": ("depth-dropout-resnet-14", "depth-dropout", {}),
    "general": ("resnet-20", "mix", {"block": "v2", "repeat": 2, "earlier": 0.5}),
    "flat": ("stable-vanilla-4", "dropout-residual", {"in_features": 192, "width": 16}),
}
FILES = ["v1", "v2", "transform", "flat"]  # those that are written in every format
FACTS = {"classes": ["cat", "dog"], "mean": [0.5, 0.25, 0.125], "note": "as it is"}


def network(kind="v2", **more):
    name, rule, options = KINDS[kind]
    model = residrop.create(name, rule=rule, classes=5, survival=0.6, **{**options, **more})
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 8, 8) + 0.3)
    return model


def expectation(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def by_onnx(path, **inputs):
    return torch.from_numpy(session(path).run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def by_torch(path, **inputs):
    with torch.no_grad():
        return torch.export.load(path).module()(*inputs.values())


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("ending", "run"), [("onnx", by_onnx), ("pt2", by_torch)])
def test_files_predict_as_the_model_at_any_batch_size(ending, run, kind, tmp_path):
    model, path = network(kind), tmp_path / f"model.{ending}"
    done = export(model, path, torch.randn(2, 3, 8, 8))
    assert done.path == path
    assert done.format == ending
    assert 0.0 <= done.difference < 1e-5
    for rows in (1, 2, 7):
        x = torch.randn(rows, 3, 8, 8)
        torch.testing.assert_close(run(path, images=x), expectation(model, x), rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_onnx_has_names_facts_and_a_free_batch(tmp_path):
    export(network(), tmp_path / "model.onnx", torch.randn(1, 3, 8, 8), metadata=FACTS)
    found = session(tmp_path / "model.onnx")
    (images,), (logits,) = found.get_inputs(), found.get_outputs()
    assert (images.name, logits.name) == ("images", "logits")
    assert isinstance(images.shape[0], str)
    assert images.shape[1:] == [3, 8, 8]
    facts = found.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == FACTS["classes"]
    assert json.loads(facts["mean"]) == FACTS["mean"]
    assert facts["note"] == "as it is"


def test_pt2_has_facts(tmp_path):
    export(network(), tmp_path / "model.pt2", torch.randn(2, 3, 8, 8), metadata=FACTS)
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(json.loads(extra["metadata.json"])["classes"]) == FACTS["classes"]


@pytest.mark.parametrize("kind", FILES)
def test_a_network_is_rebuilt_from_safetensors_alone(kind, tmp_path):
    """By a Python that cannot import residrop, as the page says."""
    model, x, path = network(kind), torch.randn(3, 3, 8, 8), tmp_path / "model.safetensors"
    done = export(model, path, x, metadata=FACTS)
    assert done.difference == 0.0
    torch.save({"x": x, "wanted": expectation(model, x)}, tmp_path / "wanted.pt")
    script = f"""
import sys, json, torch
from safetensors import safe_open
sys.modules["residrop"] = None
file = safe_open({str(path)!r}, "pt")
facts = file.metadata()
net = torch.nn.Module()
for name, layer in json.loads(facts["modules"]).items():
    place, _, last = name.rpartition(".")
    where = net
    for part in filter(None, place.split(".")):
        if not hasattr(where, part):
            where.add_module(part, torch.nn.Module())
        where = getattr(where, part)
    where.add_module(last, eval(layer, vars(torch.nn)))
net.load_state_dict({{name: file.get_tensor(name) for name in file.keys()}})
names = {{"torch": torch, "device": torch.device}}
exec(facts["code"], names)
found = torch.load({str(tmp_path / "wanted.pt")!r})
with torch.no_grad():
    y = names["forward"](net.eval(), found["x"])
torch.testing.assert_close(y, found["wanted"], rtol=1e-4, atol=1e-5)
assert json.loads(facts["classes"]) == ["cat", "dog"]
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
def test_the_model_is_left_as_it_was(ending, tmp_path):
    model = network()
    model.blocks.block2.eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    step = sampler_of(model).step
    export(model, tmp_path / f"model.{ending}", torch.randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert sampler_of(model).step == step


def test_applied_models_are_exported(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5)
    residrop.apply(model, survival=0.7, rescale="test")
    export(model, tmp_path / "model.pt2", torch.randn(2, 3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(by_torch(tmp_path / "model.pt2", images=x), expectation(model, x), rtol=1e-4, atol=1e-4)


# Sampled passes

SAMPLED = {
    "swapout": {"kind": "v2"},
    "skipforward": {"kind": "v2", "rule": "skipforward"},
    "dropout-sum": {"kind": "v2", "rule": "dropout-sum"},
    "block": {"kind": "v1"},
    "rescaled": {"kind": "v1", "rescale": "train"},
    "row": {"kind": "v1", "granularity": "row"},
    "bernoulli": {"kind": "v1", "granularity": "row", "rows": "bernoulli"},
    "transform": {"kind": "transform"},
    "mix": {"kind": "general"},
}


def sampled_network(kind, rule=None, **more):
    name, own, options = KINDS[kind]
    model = residrop.create(name, rule=rule or own, classes=5, survival=0.6, **{**options, **more})
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 8, 8) + 0.3)
    return model.eval()


def sampled_passes(model, run):
    """Outputs of `run`, a function of images and coins, under four plans, compared with those of the model."""
    graph, outputs = SampledGraph.of(model), []
    for number, rows in enumerate((3, 3, 3, 6)):
        x = torch.ones(rows, 3, 8, 8) + torch.arange(rows).view(-1, 1, 1, 1)
        plan = sampler_of(model).plan(number, stream="sample")
        with torch.no_grad(), using(model, plan):
            wanted = model(x)
        outputs.append(run(images=x, **graph.coins_of(plan, rows)))
        torch.testing.assert_close(outputs[-1], wanted, rtol=1e-4, atol=1e-5)
    assert not all(torch.equal(outputs[0], other) for other in outputs[1:3])


@pytest.mark.parametrize("case", SAMPLED)
def test_a_sampled_graph_is_the_pass_of_the_same_plan(case):
    model = sampled_network(**SAMPLED[case])
    graph = SampledGraph.of(model)
    with torch.no_grad():
        sampled_passes(model, lambda **inputs: graph.module(*inputs.values()))
    assert graph.module is not model


@pytest.mark.parametrize(
    ("case", "ending"), [("swapout", "onnx"), ("row", "onnx"), ("skipforward", "pt2"), ("block", "pt2")]
)
def test_a_sampled_pass_from_a_file_is_that_of_the_same_plan(case, ending, tmp_path):
    model, path = sampled_network(**SAMPLED[case]), tmp_path / f"sampled.{ending}"
    done = export(model, path, torch.randn(2, 3, 8, 8), sampled=True)
    sampled_passes(model, lambda **inputs: {"onnx": by_onnx, "pt2": by_torch}[ending](path, **inputs))
    assert done.difference < 1e-5


def test_sampled_files_say_what_their_inputs_are(tmp_path):
    export(sampled_network("v1"), tmp_path / "one.onnx", torch.randn(2, 3, 8, 8), sampled=True)
    facts = json.loads(session(tmp_path / "one.onnx").get_modelmeta().custom_metadata_map["sampled_inputs"])
    assert facts["alive"]["probabilities"] == [0.6] * 3
    assert facts["alive"]["one_coin_per"] == ["pass"] * 3
    assert facts["alive"]["coupling"] == "independent"
    assert "keys" not in facts
    assert [one.name for one in session(tmp_path / "one.onnx").get_inputs()] == ["images", "alive"]
    graph = SampledGraph.of(sampled_network("v2"))
    assert list(graph.facts()["sampled_inputs"]) == ["keys"]
    assert {name: (x.dtype, tuple(x.shape)) for name, x in graph.coins(5).items()} == {"keys": (torch.int32, (3, 2))}


def test_sampled_graph_of_blocks_under_the_generic_rule():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5)
    residrop.apply(model, survival=0.5, branches=False, blocks="layer*.1")
    model.eval()
    graph, x = SampledGraph.of(model), torch.randn(3, 3, 32, 32)
    plan = sampler_of(model).plan(1, stream="sample")
    with torch.no_grad(), using(model, plan):
        wanted = model(x)
    with torch.no_grad():
        found = graph.module(x, *graph.coins_of(plan, 3).values())
        other = graph.module(x, 1.0 - graph.coins_of(plan, 3)["alive"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, wanted)


def test_a_network_without_draws_has_no_sampled_pass(tmp_path):
    model = residrop.create("resnet-8", classes=5)
    with pytest.raises(ConfigError, match="CifarResNet has no rule that draws"):
        export(model, tmp_path / "model.onnx", torch.randn(2, 3, 8, 8), sampled=True)


def test_a_rule_of_a_user_has_no_sampled_graph(tmp_path):
    class Own(residrop.Rule):
        def forward(self, x, shortcut, branch, *, post=None, along=()):
            return shortcut(x) + branch(x)

    model = residrop.create("resnet-8", rule=lambda rate: Own((rate,)), survival=0.5)
    with pytest.raises(ConfigError, match="has a Own, a rule of your own, so there is no graph of a sampled pass"):
        export(model, tmp_path / "model.onnx", torch.randn(2, 3, 8, 8), sampled=True)


# Bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.txt", {}, r"ends in '\.txt'; choose one of \.onnx, \.pt2, \.safetensors"),
        ("model", {}, "ends in 'nothing'"),
        ("missing/model.pt2", {}, "is no directory"),
        ("model.safetensors", {"sampled": True}, r"\.safetensors cannot hold; write \.onnx or \.pt2"),
    ],
)
def test_bad_places_are_refused(name, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export(network(), tmp_path / name, torch.randn(2, 3, 8, 8), **options)
    assert list(tmp_path.iterdir()) == []


def test_an_example_that_is_no_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"example has shape \(3,\)"):
        export(network(), tmp_path / "model.pt2", torch.randn(3))


def test_a_model_that_returns_no_tensor_is_refused(tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return {"logits": self.inner(x)}

    with pytest.raises(ConfigError, match=r"Pair returns a dict; .* put it into a module that returns the logits"):
        export(Pair(), tmp_path / "model.pt2", torch.randn(2, 3, 8, 8))


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"ONNX files need onnxruntime: pip install 'residrop\[export\]'"):
        export(network(), tmp_path / "model.onnx", torch.randn(2, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_predicts_something_else_is_not_kept(tmp_path, monkeypatch):
    from residrop.inference import export as function

    module = sys.modules[function.__module__]
    monkeypatch.setattr(module, "_differences", lambda *args: 0.5)
    with pytest.raises(ConfigError, match=r"was not kept: its outputs differ from the model's by 5\.0e-01"):
        export(network(), tmp_path / "model.pt2", torch.randn(2, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_safetensors_header_is_plain(tmp_path):
    export(network(), tmp_path / "model.safetensors", torch.randn(2, 3, 8, 8), metadata=FACTS)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        facts = file.metadata()
        layers = json.loads(facts["modules"])
        assert all(hasattr(nn, layer.partition("(")[0]) for layer in layers.values())
        assert "residrop" not in facts["code"]


def test_a_temperature_divides_logits_in_every_format(tmp_path):
    model = residrop.create("resnet-8", rule="swapout", seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    residrop.export(model, tmp_path / "a.pt2", x, temperature=1.6)
    with torch.no_grad():
        found = torch.export.load(tmp_path / "a.pt2").module()(x)
        torch.testing.assert_close(found, model(x) / 1.6, rtol=1e-4, atol=1e-5)
    residrop.export(model, tmp_path / "a.safetensors", x, temperature=1.6)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert "/ 1.6" in file.metadata()["code"]


def test_a_model_without_a_graph_has_its_temperature_in_graphs_alone(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(2, 3, 2, 2)
    residrop.export(model, tmp_path / "a.pt2", x, temperature=2.0)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "a.pt2").module()(x), model(x) / 2)
    with pytest.raises(ConfigError, match=r"no graph in which \.safetensors could hold a temperature"):
        residrop.export(model, tmp_path / "a.safetensors", x, temperature=2.0)
    with pytest.raises(ConfigError, match="temperature is 0; give a finite number"):
        residrop.export(model, tmp_path / "b.pt2", x, temperature=0)
