"""Networks of timm, torchvision and transformers in a training, and the weights it starts from."""

import json
import pickle
import shutil

import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import residrop
from residrop.common.errors import ConfigError, UsageError
from residrop.inference import evaluate
from residrop.training import Run, load_run, train
from residrop.training.foreign import own_input, plain
from residrop.training.networks import build_network, report_of
from residrop.training.setup import loader_of_run, prepare, resolve
from residrop.training.weights import give_weights

CLASSES = [str(digit) for digit in range(10)]
DATASET = {"classes": CLASSES, "channels": 3, "size": 32, "steps": 4}
VIT = "timm:vit_tiny_patch16_224?embed_dim=24&depth=3&num_heads=2&patch_size=4"
RESNET = "timm:test_resnet"


def vit_folder(path, **changes):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4,
        num_labels=5, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(path)
    return path


@pytest.fixture
def foreign(tiny):
    def make(network=RESNET, **changes):
        return tiny(network=network, **{"survival": "0.6", "limit": 96, "batch_size": 32, **changes})

    return make


# A training


@pytest.mark.parametrize(
    ("network", "granularity"),
    [(RESNET, "block"), (RESNET, "row"), ("torchvision:resnet18", "block"), (VIT, "block"), (VIT, "row")],
)
def test_trained_network_is_read_again_as_it_was(foreign, tmp_path, network, granularity):
    recipe = foreign(network, granularity=granularity, epochs=1, samples=2)
    outcome = train(recipe, tmp_path / "run", quiet=True)
    run, model = load_run(tmp_path / "run")
    assert run.normalization().mode == "model"
    assert run.normalization().mean.flatten().tolist() == pytest.approx(own_input(network).mean)
    assert run.dataset()["channels"] == 3  # although the digits are grey
    assert len(report_of(model).blocks) >= 3
    found = evaluate(model, loader_of_run(run).eval_batches(), 2)
    assert found.deterministic.nll == pytest.approx(outcome.evaluation.deterministic.nll, rel=1e-5)
    assert found.sampled.nll == pytest.approx(outcome.evaluation.sampled.nll, rel=1e-5)


def test_stopped_run_equals_the_uninterrupted(foreign, tmp_path, interrupt, assert_same_run):
    recipe = foreign(VIT, granularity="row", optimizer="adamw", lr=0.001, clip_grad=1.0, layer_decay=0.8)
    train(recipe, tmp_path / "whole", quiet=True)
    interrupt(recipe, tmp_path / "broken", 2)
    train(recipe, tmp_path / "broken", resume=True, quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_training_equals_that_of_the_model_by_hand(foreign, tmp_path):
    recipe = resolve(foreign(RESNET, epochs=1, momentum=0.0, weight_decay=0.0, lr=0.01, seed=4))
    ready = prepare(recipe)
    torch.manual_seed(4)
    model = timm.create_model("test_resnet", num_classes=10)
    residrop.apply(model, survival=0.6, seed=4)
    model.train().to(memory_format=torch.channels_last)
    for number, (x, y) in enumerate(ready.loaders["train"].train_batches(0)):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for one in model.parameters():
                one -= 0.0 if one.grad is None else recipe.lr_at(number / 3) * one.grad
    train(recipe, tmp_path / "run", quiet=True)
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert found.keys() == timm.create_model("test_resnet", num_classes=10).state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "changes"),
    [("constant", {"survival": "1"}), ("swapout", {"survival": "0.8"}), ("layer-dropout", {}), ("gaussian-depth", {})],
)
def test_every_rule_has_as_many_branches_as_the_network(foreign, tmp_path, rule, changes):
    recipe = foreign(VIT, rule=rule, epochs=1, limit=32, **changes)
    outcome = train(recipe, tmp_path / "run", quiet=True)
    report = report_of(load_run(tmp_path / "run")[1])
    assert sum(len(one.rates) for one in report.blocks) == 6
    assert outcome.expected_depth == pytest.approx(report.expected_depth)


def test_drop_path_rates_are_taken_from_the_model():
    network = f"{VIT}&drop_path_rate=0.4"
    recipe = resolve(residrop.training.Recipe(network=network, survival="from_model", lr=0.01))
    report = report_of(build_network(recipe, DATASET))
    assert [one.rates for one in report.blocks] == [(1.0, 1.0), (pytest.approx(0.8),) * 2, (pytest.approx(0.6),) * 2]
    assert {one.granularity for one in report.blocks} == {"row"}


def test_images_of_a_folder_have_the_size_of_the_model(tmp_path, foreign):
    for part in ("train", "test"):
        for kind in ("a", "b"):
            (tmp_path / "images" / part / kind).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (40, 50), (60 * number, 9, 9)).save(tmp_path / f"images/{part}/{kind}/{number}.png")
    recipe = resolve(foreign(data=str(tmp_path / "images"), limit=None))
    assert prepare(recipe).dataset["size"] == 160  # of timm's test_resnet
    recipe = resolve(foreign(data=f"folder:{tmp_path}/images?size=24", limit=None))
    assert prepare(recipe).dataset["size"] == 24


def test_configuration_of_transformers_is_kept_with_the_run(foreign, tmp_path):
    folder = vit_folder(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "size": {"height": 8, "width": 8}})
    )
    assert own_input(f"transformers:{folder}").size == 8
    recipe = foreign(f"transformers:{folder}", epochs=1, limit=32, lr=0.0, weight_decay=0.0)
    train(recipe, tmp_path / "run", quiet=True)
    before = transformers.ViTForImageClassification.from_pretrained(folder).state_dict()
    shutil.rmtree(folder)
    run, model = load_run(tmp_path / "run")
    assert run.normalization().mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    loaded = {name: one for name, one in model.model.state_dict().items() if not name.startswith("classifier")}
    assert len(loaded) == len(before) - 2
    for name, value in loaded.items():
        assert torch.equal(value, before[name]), name
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_what_was_done_to_the_network_is_told(foreign, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), weights)
    train(foreign(epochs=1, limit=32, weights=str(weights)), tmp_path / "run")
    told = capsys.readouterr().err
    assert "blocks, " in told
    assert "of the operations may be left out" in told
    assert f"weights: {weights}" in told
    assert "new, with random weights: fc.bias, fc.weight" in told


# What is refused


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("timm:resnet19", r"timm knows no model 'resnet19'; the names most like it: resnet1[08]"),
        ("torchvision:resnet17", r"torchvision knows no image classifier 'resnet17'; .*resnet1"),
        ("torchvision:fcn_resnet50", r"torchvision knows no image classifier 'fcn_resnet50'"),
        ("transformers:nowhere", r"nowhere has no config\.json; give the folder"),
        ("timm:resnet18?depth", r"'depth' is no option; write timm:resnet18\?drop_path_rate=0\.1"),
        ("timm:resnet18?colour=3", r"timm:resnet18\?colour=3 cannot be built \(TypeError"),
        ("timm:vit_tiny_patch16_224", r"cannot read images of 8x8 pixels .*--data folder:PATH\?size=N"),
        ("torchvision:inception_v3", r"torchvision:inception_v3 cannot"),
    ],
)
def test_networks_that_do_not_fit_are_refused_before_anything_is_written(foreign, tmp_path, network, message):
    with pytest.raises(UsageError, match=message):
        train(foreign(network), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_options_of_our_networks_are_refused(foreign, tmp_path):
    for option in ({"width": 2}, {"block": "v2"}, {"bn_gamma_init": "uniform"}):
        with pytest.raises(ConfigError, match=r"is for networks of residrop; timm:test_resnet takes --[a-z-]+ None"):
            train(foreign(**option), tmp_path / "run", quiet=True)


def test_networks_without_residual_blocks_are_refused():
    with pytest.raises(ConfigError, match="VGG has no residual blocks"):
        build_network(residrop.training.Recipe(network="torchvision:vgg11", survival="0.5"), DATASET)


def test_a_network_of_ours_has_no_normalisation_or_weights_of_its_own(tiny, tmp_path):
    with pytest.raises(ConfigError, match="normalization is 'model', which resnet-8 has none of"):
        train(tiny(normalization="model"), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="weights is 'pretrained', which resnet-8 has none of"):
        train(tiny(weights="pretrained"), tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match="weights nowhere is no file"):
        train(tiny(weights="nowhere"), tmp_path / "run", quiet=True)


# Weights


def small(classes=10):
    torch.manual_seed(classes)
    return timm.create_model("test_resnet", num_classes=classes)


def test_a_run_starts_from_the_weights_of_another(tiny, tmp_path):
    train(tiny(epochs=1), tmp_path / "one", quiet=True)
    train(tiny(epochs=1, lr=0.0, weight_decay=0.0, rule="constant", survival="1", weights=str(tmp_path / "one")),
          tmp_path / "two", quiet=True)  # fmt: skip
    one, two = (load_run(tmp_path / name)[1] for name in ("one", "two"))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_weights_of_a_finished_or_stopped_run_are_not_needed_to_go_on(foreign, tmp_path, interrupt):
    weights = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{name}": one for name, one in small().state_dict().items()}}, weights)
    recipe = foreign(weights=str(weights))
    interrupt(recipe, tmp_path / "run", 2)
    weights.unlink()
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert Run.open(tmp_path / "run").evaluation()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("inside", [None, "state_dict", "model"])
def test_forms_of_files(foreign, tmp_path, prefix, inside):
    model = small()
    saved = {f"{prefix}{name}": one for name, one in model.state_dict().items()}
    torch.save(saved if inside is None else {inside: saved, "epoch": 3}, tmp_path / "w.pth")
    train(foreign(epochs=1, lr=0.0, weight_decay=0.0, weights=str(tmp_path / "w.pth")), tmp_path / "run", quiet=True)
    for (name, one), other in zip(load_run(tmp_path / "run")[1].named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_files_that_hold_anything_else_are_refused_and_not_run(foreign, tmp_path, capsys):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "list.pt")
    refused = {"evil.pt": "weights .*evil.pt", "broken.safetensors": "cannot be read", "list.pt": "no table of tensors"}
    for name, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            train(foreign(weights=str(tmp_path / name)), tmp_path / "run", quiet=True)
    assert "run\n" not in capsys.readouterr().out


def test_only_the_classifier_may_differ():
    model, before = small(10), small(10).state_dict()
    lines = give_weights(model, small(7).state_dict(), "there")
    assert lines[1].startswith("new, with random weights: fc.bias, fc.weight (")
    for name, one in model.state_dict().items():
        assert torch.equal(one, (before if name.startswith("fc.") else small(7).state_dict())[name]), name
    headless = {name: one for name, one in small(10).state_dict().items() if not name.startswith("fc.")}
    assert len(give_weights(small(10), headless, "there")) == 2
    assert len(give_weights(small(10), small(10).state_dict(), "there")) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("bn1.weight"), "do not fit the network: bn1.weight is missing$"),
        (lambda w: w.update(more=torch.zeros(1)), "more is not in the network$"),
        (
            lambda w: w.update({"conv1.0.weight": torch.zeros(3, 3)}),
            r"conv1.0.weight has shape \(3, 3\), in the network \(",
        ),
        (lambda w: w.update({"fc.weight": torch.zeros(10, 3)}), r"fc.weight has shape \(10, 3\)"),
        (lambda w: w.pop("fc.bias"), "fc.bias is missing$"),
        (lambda w: (w.pop("bn1.weight"), w.pop("bn1.bias")), "and 1 more$"),
    ],
)
def test_other_differences_are_refused_and_nothing_is_loaded(change, message):
    weights, model = small(5).state_dict() | {"fc.weight": torch.zeros(10, 96), "fc.bias": torch.zeros(10)}, small(10)
    weights["fc.weight"] = torch.zeros_like(model.fc.weight)
    change(weights)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        give_weights(model, weights, "there")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_position_embeddings_of_timm_are_resampled():
    of_16 = plain("timm:test_vit?img_size=32", 10, 32)
    of_64 = plain("timm:test_vit?img_size=64", 10, 64)
    assert of_16.pos_embed.shape != of_64.pos_embed.shape
    assert len(give_weights(of_64, of_16.state_dict(), "there")) == 1
    assert torch.equal(of_64.blocks[0].attn.qkv.weight, of_16.blocks[0].attn.qkv.weight)


# MNASNet refuses weights without the version of its class
def test_pretrained_weights_are_the_librarys(monkeypatch, foreign, tmp_path):
    torch.manual_seed(0)
    wanted = torchvision.models.mnasnet0_5().state_dict()
    monkeypatch.setattr(torchvision.models.MNASNet0_5_Weights, "get_state_dict", lambda self, **options: wanted)
    recipe = foreign("torchvision:mnasnet0_5", weights="pretrained", epochs=1, lr=0.0, weight_decay=0.0, limit=32)
    train(recipe, tmp_path / "run", quiet=True)
    for name, one in load_run(tmp_path / "run")[1].named_parameters():
        assert name.startswith("classifier.") or torch.equal(one, wanted[name]), name

    def fail(self, **options):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.MNASNet0_5_Weights, "get_state_dict", fail)
    with pytest.raises(ConfigError, match=r"pretrained weights of .*mnasnet0_5 cannot be got \(OSError: no network"):
        train(recipe, tmp_path / "other", quiet=True)
