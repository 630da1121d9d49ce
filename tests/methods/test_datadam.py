"""DataDAM over the engine: its loss, its ablations, its groups, what it refuses, what it hands over."""

import gc
import json

import pytest
import torch
from torch import nn

from stillhouse.data import Batch, ObjectData, load_data
from stillhouse.data.export import load_tensors
from stillhouse.engine import Modules, Run, RunDirectory
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
    whole = Setting(DataDAM(network=NET), tmp_path / "a")
    grouped = Setting(DataDAM(network=NET, classes_per_group=size), tmp_path / "b")
    for name, term in whole.terms().items():
        torch.testing.assert_close(grouped.terms()[name], term, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grouped.gradient(), whole.gradient(), rtol=1e-5, atol=1e-6)


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


def test_no_hook_and_no_graph_outlives_the_stage(tmp_path):
    recipe = build_recipe({"method": "datadam", **TINY, "compare_start": False})
    run_recipe(recipe, tmp_path / "run")
    gc.collect()
    hooked = [m for m in gc.get_objects() if isinstance(m, nn.Module) and (m._forward_hooks or m._forward_pre_hooks)]
    assert not hooked


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


def test_variant_code_is_batch_norm_and_power_1():
    code = DataDAM(variant="code")
    assert code.matched_network().norm == "batch"
    assert code.map_power() == 1
    assert DataDAM().map_power() == 4
    assert DataDAM(power=2).map_power() == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"network": {**NET, "norm": "batch"}}, "with batch norm the loss of a class depends on the other classes"),
        ({"network": {**NET, "depth": 4}}, "halves images of 8x8 to nothing"),
        ({"images_per_class": 0}, "images_per_class: input should be greater than or equal to 1, not 0"),
        ({"power": 0}, "power: input should be greater than or equal to 1, not 0"),
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
