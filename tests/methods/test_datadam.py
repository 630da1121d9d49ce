"""DataDAM over the engine: its loss, its ablations, its groups, what it refuses, what it hands over."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from stillhouse.data import Batch, ObjectData, load_data
from stillhouse.data.export import load_tensors
from stillhouse.engine import Modules, Run, RunDirectory, World
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.losses.features import attention_matching, mean_matching
from stillhouse.methods.datasets.datadam import DM, DataDAM
from stillhouse.models import ConvNetSpec, Taps
from stillhouse.modules.distilled import DistilledSet
from stillhouse.recipe import build_recipe

NET = {"kind": "convnet", "width": 4, "depth": 2}
TINY = {
    "network": NET,
    "augment": "crop_scale_rotate",
    "num_steps": 4,
    "batch_real": 5,
    "eval_networks": 2,
    "eval_epochs": 3,
    "run": {"threads": 1, "device": "cpu"},
}


class Setting:
    """A matching step outside the engine."""

    def __init__(self, method, tmp_path, synthetic=None):
        self.method = method
        self.run = Run(method, RunDirectory(tmp_path), seed=1)
        data = load_data("digits")
        split = data.split("train")
        members = [rows[:5] for rows in split.by_class().values()]
        index = torch.stack(members)
        real = split.batch(index.flatten())["pixel_values"].view(*index.shape, 1, 8, 8)
        torch.manual_seed(0)
        self.net = ConvNetSpec(width=4, depth=2).build(data.facts).requires_grad_(False)
        images = real[:, :1].flatten(0, 1) + 0.3 if synthetic is None else synthetic(real)
        labels = torch.arange(10).repeat_interleave(len(images) // 10)
        self.set = DistilledSet(images, labels)
        self.m = Modules(set=self.set, net=self.net)
        self.batch = Batch(real=real)
        self.taps = method._tapped(self.net)

    def terms(self, batch=None):
        self.run.place("loss", "match", 0, 0)
        total = {"attention": 0.0, "features": 0.0}
        for piece in self.method.match(self.taps, self.m, batch or self.batch, self.run):
            for name, term in piece.items():
                total[name] = total[name] + term()
        return total

    def double(self):
        self.net.double()
        self.set.double()
        self.batch = Batch(real=self.batch["real"].double())
        return self

    def gradient(self):
        loss = sum(weight * term for weight, term in zip((100, 1), self.terms().values(), strict=True))
        return torch.autograd.grad(loss, self.set.images)[0]


def test_the_loss_is_the_papers_without_augmentation(tmp_path):
    s = Setting(DataDAM(network=NET, augment="none"), tmp_path)
    maps = []
    with Taps(s.net, ["blocks.0.activation", "blocks"]) as taps:
        for images in (s.batch["real"], s.set.by_class):
            s.net(images.flatten(0, 1))
            maps.append([t.view(10, -1, *t.shape[1:]) for t in taps.take().values()])
    (real_map, real_features), (map_, features) = maps
    found = s.terms()
    torch.testing.assert_close(found["attention"], attention_matching(real_map, map_, power=4))
    torch.testing.assert_close(found["features"], mean_matching(real_features.flatten(2), features.flatten(2)))


def test_the_last_block_gives_no_attention(tmp_path):
    s = Setting(DataDAM(network=NET), tmp_path)
    assert list(s.taps.paths) == ["blocks.0.activation", "blocks"]


def test_loss_and_gradient_are_zero_when_the_set_is_the_real_batch(tmp_path):
    s = Setting(DataDAM(network=NET), tmp_path, synthetic=lambda real: real.flatten(0, 1))
    found = s.terms()
    assert found["attention"].item() == pytest.approx(0, abs=1e-10)
    assert found["features"].item() == pytest.approx(0, abs=1e-10)
    assert s.gradient().abs().max() < 1e-5


def test_the_siamese_seed_matters(tmp_path):
    s = Setting(DataDAM(network=NET, siamese=False), tmp_path, synthetic=lambda real: real.flatten(0, 1))
    assert s.terms()["features"] > 1e-3


@pytest.mark.parametrize("size", [1, 3, 10])
def test_groups_of_classes_are_exact(tmp_path, size):
    whole = Setting(DataDAM(network=NET), tmp_path / "a").double()
    grouped = Setting(DataDAM(network=NET, classes_per_group=size), tmp_path / "b").double()
    for name, term in whole.terms().items():
        torch.testing.assert_close(grouped.terms()[name], term, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grouped.gradient(), whole.gradient(), rtol=1e-10, atol=1e-12)


def test_images_may_change_places_within_a_class(tmp_path):
    s = Setting(DataDAM(network=NET), tmp_path)
    shuffled = Batch(real=s.batch["real"][:, torch.tensor([3, 1, 4, 0, 2])])
    for name, term in s.terms().items():
        torch.testing.assert_close(s.terms(shuffled)[name], term)


def test_a_class_does_not_feel_the_others(tmp_path):
    s = Setting(DataDAM(network=NET, classes_per_group=1), tmp_path)
    before = s.gradient()[0].clone()
    changed = s.batch["real"].clone()
    changed[5:] += 1
    s.batch = Batch(real=changed)
    torch.testing.assert_close(s.gradient()[0], before)


def test_dm_is_the_feature_term_alone(tmp_path):
    a = Setting(DM(network=NET), tmp_path / "a").terms()["features"]
    b = Setting(DataDAM(network=NET), tmp_path / "b").terms()["features"]
    torch.testing.assert_close(a, b)


def test_networks_are_fresh_in_each_step_unless_fixed_and_never_trained(tmp_path, monkeypatch):
    for fixed in (False, True):
        seen = []
        original = DataDAM.match

        def match(self, taps, m, batch, run, seen=seen, original=original):
            seen.append(m.net.blocks[0].conv.weight.detach().clone())
            yield from original(self, taps, m, batch, run)
            assert all(p.grad is None and not p.requires_grad for p in m.net.parameters())

        monkeypatch.setattr(DataDAM, "match", match)
        recipe = build_recipe({"method": "datadam", **TINY, "fixed_network": fixed, "compare_start": False})
        run_recipe(recipe, tmp_path / str(fixed))
        monkeypatch.undo()
        assert len({tuple(w.flatten().tolist()) for w in seen}) == (1 if fixed else 4)


def alive(kind):
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def test_no_hook_and_no_graph_outlives_the_stage(tmp_path):
    recipe = build_recipe({"method": "datadam", **TINY, "compare_start": False})
    run_recipe(recipe, tmp_path / "run")
    gc.collect()
    assert not [m for m in alive(nn.Module) if m._forward_hooks or m._forward_pre_hooks]


def test_a_step_leaves_nothing_behind(tmp_path, monkeypatch):
    tensors, hooks = [], []
    original = DataDAM.prepare

    def prepare(self, m, batch, run):
        gc.collect()
        tensors.append(len(alive(torch.Tensor)))
        hooks.append(sum(len(module._forward_hooks) for module in m.net.modules()))
        return original(self, m, batch, run)

    monkeypatch.setattr(DataDAM, "prepare", prepare)
    recipe = build_recipe({"method": "datadam", **TINY, "num_steps": 8, "compare_start": False})
    run_recipe(recipe, tmp_path / "run")
    assert len(set(tensors[2:])) == 1, tensors
    assert len(set(hooks)) == 1, hooks


def test_the_start_is_real_images_or_noise(tmp_path):
    images = {}
    for init in ("random", "noise", "herding", "k-center"):
        recipe = build_recipe({"method": "datadam", **TINY, "init": init, "lr_images": 1e-9, "features_epochs": 1})
        images[init] = run_recipe(recipe, tmp_path / init).artefacts["set"].distilled.images.detach()
    real = load_data("digits").split("train").tensors["pixel_values"]
    for init, found in images.items():
        nearest = torch.cdist(found.flatten(1), real.flatten(1)).min(1).values
        assert bool((nearest < 0.1).all()) is (init != "noise")


def test_the_set_is_handed_over_in_open_formats_with_its_card(tmp_path):
    datasets = pytest.importorskip("datasets")
    recipe = build_recipe({"method": "datadam", **TINY, "images_per_class": 2, "eval_architectures": ["mlp"]})
    result = run_recipe(recipe, tmp_path / "run")
    home = tmp_path / "run" / "result" / "set"
    again = load_tensors(home / "distilled.safetensors")
    assert torch.equal(again.images, result.artefacts["set"].distilled.images)
    stored = datasets.load_from_disk(str(home / "dataset"))
    assert len(stored) == 20
    assert len([p for p in (home / "images").iterdir() if p.is_dir()]) == 10
    card = (home / "README.md").read_text()
    for word in ("datadam", "digits", "epochs"):
        assert word in card
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"test/distilled/accuracy", "test/distilled/0-mlp/accuracy", "test/start/accuracy"} <= set(metrics)


def test_the_variant_sets_what_is_not_given():
    code, paper = DataDAM(variant="code"), DataDAM()
    assert (code.architecture().norm, paper.architecture().norm) == ("batch", "instance")
    assert (code.map_power(), code.num_steps, code.batch_real) == (1, 20000, 64)
    assert (paper.map_power(), paper.num_steps, paper.batch_real) == (4, 8000, 128)
    given = DataDAM(variant="code", power=2, num_steps=7)
    assert (given.map_power(), given.num_steps, given.batch_real) == (2, 7, 64)
    assert DataDAM.model_validate(code.dump()) == code


@pytest.mark.parametrize("init", ["random", "herding", "k-center"])
def test_a_set_knows_which_real_images_it_started_from(tmp_path, init):
    recipe = build_recipe({"method": "datadam", **TINY, "init": init, "images_per_class": 2, "features_epochs": 0})
    run_recipe(recipe, tmp_path / "run")
    again = load_tensors(tmp_path / "run" / "result" / "set" / "distilled.safetensors")
    chosen = torch.tensor(again.provenance["start"]["samples"])
    split = load_data("digits").split("train")
    assert torch.equal(split.labels[chosen], again.labels)
    before = build_recipe(
        {
            "method": "datadam",
            **TINY,
            "init": init,
            "images_per_class": 2,
            "features_epochs": 0,
            "lr_images": 1e-12,
            "num_steps": 1,
        }
    )
    start = run_recipe(before, tmp_path / "start").artefacts["set"].distilled.images
    torch.testing.assert_close(start.detach(), split.tensors["pixel_values"][chosen], rtol=0, atol=1e-6)


def test_features_come_from_the_named_network_trained_or_as_drawn(tmp_path):
    chosen = {}
    for name, fields in {
        "drawn": {"features_epochs": 0},
        "drawn again": {"features_epochs": 0},
        "trained": {"features_epochs": 2},
        "named": {"features_epochs": 0, "features_network": "mlp"},
    }.items():
        tiny = {key: TINY[key] for key in ("network", "augment", "eval_networks", "eval_epochs", "run")}
        recipe = build_recipe({"method": "herding", **tiny, **fields, "images_per_class": 5})
        result = run_recipe(recipe, tmp_path / name)
        chosen[name] = tuple(result.artefacts["set"].distilled.provenance["start"]["samples"])
    assert chosen["drawn"] == chosen["drawn again"]
    assert len(set(chosen.values())) == 3


def test_how_a_selection_chooses_is_its_name_and_no_field():
    with pytest.raises(UserError, match="how: there is no such field"):
        build_recipe({"method": "herding", "how": "noise"})


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_classes_and_their_mean_is_the_whole(tmp_path, size):
    whole = Setting(DataDAM(network=NET), tmp_path / "whole").double()
    parts = []
    for rank in range(size):
        s = Setting(DataDAM(network=NET), tmp_path / str(rank)).double()
        s.run.world = replace(s.run.world, rank=rank, size=size)
        # Only the draws that all processes share may matter here.
        parts.append((s.terms(), s.gradient()))
    for name, term in whole.terms().items():
        torch.testing.assert_close(
            torch.stack([terms[name] for terms, _ in parts]).mean(), term, rtol=1e-10, atol=1e-12
        )
    gradients = torch.stack([gradient for _, gradient in parts]).mean(0)
    torch.testing.assert_close(gradients, whole.gradient(), rtol=1e-10, atol=1e-12)


def test_classes_are_not_split_where_their_losses_are_not_separate(tmp_path):
    method = DataDAM(network=NET, variant="code")
    s = Setting(method, tmp_path)
    net = method.architecture().build(load_data("digits").facts)
    method.check_split(net, 10, s.run)
    s.run.world = replace(s.run.world, size=2)
    with pytest.raises(UserError, match="which 2 processes would split"):
        method.check_split(net, 10, s.run)
    s.run.world = replace(s.run.world, size=16)
    with pytest.raises(UserError, match="16 processes cannot share 10 classes"):
        method.check_split(s.net, 10, s.run)


def test_dm_needs_no_feature_maps(tmp_path):
    fields = {"network": "mlp", "feature_layer": "blocks.0", "compare_start": False}
    assert run_recipe(build_recipe({"method": "dm", **TINY, **fields}), tmp_path / "run").metrics["test/accuracy"] >= 0
    s = Setting(DM(network=NET), tmp_path / "terms")
    assert s.taps.paths == ("blocks",)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"network": {**NET, "norm": "batch"}}, "with batch norm the loss of a class depends on the other classes"),
        ({"variant": "code", "classes_per_group": 2}, "classes_per_group is 2, but with batch norm"),
        ({"network": {**NET, "depth": 1}}, "attention needs at least two, not one; use depth=2 or more"),
        ({"network": {**NET, "depth": 4}}, "halves images of 8x8 to nothing"),
        ({"images_per_class": 0}, "images_per_class: expected at least 1, not 0"),
        ({"power": 0}, "power: expected at least 1, not 0"),
        ({"images_per_class": 5000}, "images_per_class is 5000, but class 0 has only"),
        ({"network": "mlp"}, "have no spatial map, so choose a convolutional layer"),
        ({"augment": "crop_rotat"}, "did you mean 'rotate'"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({"method": "datadam", **TINY, "compare_start": False, **fields}), tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_without_images_and_data_without_classes_are_refused(tmp_path):
    images = torch.rand(12, 1, 8, 8)
    missing = ObjectData.from_object(
        {"train": (images, torch.arange(12) % 2 * 2), "test": (images, torch.arange(12) % 3)}
    )
    with pytest.raises(UserError, match=r"class 1 of .* has 0 training images"):
        run_recipe(build_recipe({"method": "datadam", **TINY, "data": missing}), tmp_path / "a")
    vectors = ObjectData.from_object((torch.rand(40, 4), torch.arange(40) % 2))
    with pytest.raises(UserError, match="needs images"):
        run_recipe(build_recipe({"method": "datadam", **TINY, "data": vectors}), tmp_path / "b")


def test_small_classes_are_drawn_with_replacement(tmp_path):
    images = torch.rand(60, 1, 8, 8)
    few = ObjectData.from_object({"train": (images, torch.arange(60) % 3), "test": (images, torch.arange(60) % 3)})
    recipe = build_recipe({"method": "datadam", **TINY, "batch_real": 50, "data": few, "compare_start": False})
    assert run_recipe(recipe, tmp_path / "run").metrics["test/accuracy"] >= 0


@pytest.mark.parametrize(
    ("batch_size", "processes", "each", "steps"),
    [(4, 1, 4, 9), (4, 2, 2, 9), (4, 3, 1, 9), (4, 8, 1, 3), (64, 1, 10, 3), (64, 2, 5, 3), (5, 2, 2, 9)],
)
def test_processes_share_the_batch_in_scoring(tmp_path, batch_size, processes, each, steps):
    method = DataDAM(network=NET, data="digits", eval_epochs=3, eval_batch_size=batch_size)
    s = Setting(method, tmp_path)
    s.run.world = World(0, processes, s.run.world.device)
    stage = next(method.scored(s.run, s.set, "distilled"))[0].build()
    assert (stage.batches.batch_size, stage.steps) == (each, steps), "10 images, 3 epochs"
