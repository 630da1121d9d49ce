"""SRe2L: its recovery loss, the bounds of its pixels, and labels that belong to the views they are trained on."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stillhouse.data import Batch, ObjectData, load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.losses.inversion import batch_norm_matching
from stillhouse.methods.datasets.sre2l import Recovered, SRe2L
from stillhouse.models import CNNSpec, Taps, fingerprint
from stillhouse.modules.crops import crop_resized
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.soft_views import Views, seen
from stillhouse.recipe import build_recipe

NET = {"kind": "cnn", "channels": [4, 4]}
TINY = {
    "method": "sre2l",
    "network": NET,
    "teacher": {"kind": "trained", "model": NET, "epochs": 1},
    "images_per_class": 2,
    "num_steps": 3,
    "batch_size": 8,
    "smallest": 0.5,
    "jitter": 1,
    "eval_networks": 2,
    "eval_epochs": 3,
    "eval_batch_size": 6,
    "run": {"threads": 1, "device": "cpu"},
}


class Setting:
    """A step of the recovery outside the engine."""

    def __init__(self, tmp_path, **fields):
        self.method = SRe2L(network=NET, **fields)
        self.run = Run(self.method, RunDirectory(tmp_path), seed=1)
        torch.manual_seed(0)
        self.teacher = CNNSpec(channels=(4, 4)).build(load_data("digits").facts).double()
        self.teacher(torch.randn(64, 1, 8, 8, dtype=torch.float64))
        self.teacher.eval().requires_grad_(False)
        self.set = Recovered(torch.randn(10, 1, 8, 8, dtype=torch.float64), torch.arange(10))
        self.taps = Taps(self.teacher, "blocks.*.norm", side="input")
        self.m = Modules(set=self.set, teacher=self.teacher)

    def terms(self):
        self.run.place("loss", "recover", 0, 0)
        return {name: term() for name, term in self.method.recover(self.taps, self.m, Batch(), self.run).items()}


def test_the_terms_are_the_papers_on_whole_images(tmp_path):
    s = Setting(tmp_path, multi_crop=False, jitter=0)
    found = s.terms()
    images = s.set.images
    first = s.teacher.blocks[0]
    layers = []
    for block, x in ((first, images), (s.teacher.blocks[1], first(images))):
        layers.append((block.conv(x), block.norm.running_mean, block.norm.running_var))
    torch.testing.assert_close(found["ce"], F.cross_entropy(s.teacher(images).float(), torch.arange(10)))
    torch.testing.assert_close(found["bn"], batch_norm_matching(layers, first=10))
    torch.testing.assert_close(found["l2"], images.flatten(1).norm(dim=1).mean())


def test_a_crop_is_shared_by_the_batch_as_released_or_each_images_own(tmp_path, monkeypatch):
    counts = []
    for shared in (True, False):
        boxes = []

        def spied(images, drawn, size=None, mirrored=None, boxes=boxes):
            boxes.append(drawn)
            return crop_resized(images, drawn, size, mirrored)

        monkeypatch.setattr("stillhouse.methods.datasets.sre2l.crop_resized", spied)
        Setting(tmp_path / str(shared), shared_crop=shared).terms()
        counts.append(len({tuple(box) for box in boxes[0].tolist()}))
    assert counts[0] == 1
    assert counts[1] > 1


def test_jitter_moves_pixels_around_and_loses_none(tmp_path):
    s = Setting(tmp_path, multi_crop=False, jitter=3, weight_l2=1.0)
    plain = Setting(tmp_path / "plain", multi_crop=False, jitter=0)
    torch.testing.assert_close(s.terms()["l2"], plain.terms()["l2"])


def test_pixels_stay_in_bounds_and_classes_in_order(tmp_path):
    result = run_recipe(build_recipe({**TINY, "lr_images": 5.0}), tmp_path / "run")
    found = result.artefacts["set"].distilled
    assert found.clipped == 0
    assert bool((found._unstandardised().amin((1, 2, 3)) < 1e-6).all())
    assert found.labels.tolist() == torch.arange(10).repeat_interleave(2).tolist()
    assert found.images_per_class == 2


def test_cutting_is_by_channel():
    two = DistilledSet(torch.full((1, 2, 1, 1), 9.0), torch.tensor([0]), mean=[0.5, 0.2], std=[0.5, 0.1])
    two.cut()
    assert two.images.flatten().tolist() == pytest.approx([1.0, 8.0])


def test_the_teacher_is_left_as_it_was(tmp_path):
    teacher = CNNSpec(channels=(4, 4)).build(load_data("digits").facts)
    before = fingerprint(teacher)
    run_recipe(build_recipe({**TINY, "teacher": teacher}), tmp_path / "run")
    assert fingerprint(teacher) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())


def test_stored_labels_are_the_teachers_of_just_these_pixels(tmp_path):
    teacher = CNNSpec(channels=(4, 4)).build(load_data("digits").facts).eval()
    recipe = build_recipe({**TINY, "teacher": teacher, "label_precision": "single"})
    result = run_recipe(recipe, tmp_path / "run")
    home = tmp_path / "run" / "result"
    views = Views(**load_file(home / "labels" / "views.safetensors"))
    stored = torch.from_numpy(np.load(home / "labels" / "logits.npy"))
    images = result.artefacts["set"].distilled.images.detach()
    assert len(views) == len(stored) == 3 * 20
    # Each pass has every image once as a first part, and mixes within batches of the training.
    for sources in views.sources.view(3, 20, 2):
        assert sources[:, 0].sort().values.tolist() == list(range(20))
        for batch in torch.split(sources, 6):
            assert set(batch[:, 0].tolist()) == set(batch.flatten().tolist())
    with torch.no_grad():
        torch.testing.assert_close(teacher(seen(images, views)), stored, rtol=1e-4, atol=1e-5)
    assert "3 passes over the 20 images" in (home / "labels" / "README.md").read_text()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    size = sum(tensor.numel() * tensor.element_size() for tensor in views.tensors.values())
    assert metrics["labels/bytes"] == size + (home / "labels" / "logits.npy").stat().st_size


def test_networks_train_on_the_stored_rows_in_order_and_processes_share_a_batch(tmp_path):
    method = SRe2L(network=NET, data="digits", eval_epochs=2, eval_batch_size=6, label_views={"smallest": 0.5})
    run = Run(method, RunDirectory(tmp_path), seed=0)
    teacher = CNNSpec(channels=(4, 4)).build(load_data("digits").facts).eval()
    distilled = DistilledSet(torch.randn(20, 1, 8, 8), torch.arange(10).repeat_interleave(2))
    compute = next(method.relabelled(run, distilled, teacher, "x"))
    made = compute.fn(tmp_path)
    for world in (1, 2):
        seen_rows = []
        for rank in range(world):
            run.world = replace(run.world, rank=rank, size=world)
            generator = method.relabelled(run, distilled, teacher, "x")
            next(generator)
            stage = generator.send(made)[0].build()
            assert stage.steps == 2 * 4
            rows = []
            for step in range(stage.steps):
                run.enter(stage.name, step, stage.steps)
                rows.append(stage.prepare(Modules(), Batch(), run)["soft"])
            seen_rows.append(rows)
        whole = torch.cat([torch.cat(step) for step in zip(*seen_rows, strict=True)])
        stored = torch.from_numpy(np.load(made["logits"]).astype(np.float32))
        assert torch.equal(whole, stored)


@pytest.mark.parametrize("relabel", ["online", "hard"])
def test_other_ways_to_label_hand_over_no_labels(tmp_path, relabel):
    result = run_recipe(build_recipe({**TINY, "relabel": relabel, "eval_architectures": ["mlp"]}), tmp_path / "run")
    assert set(result.artefacts) == {"set"}
    assert {"test/distilled/accuracy", "test/distilled/0-mlp/accuracy", "recovered/agreement"} <= set(result.metrics)


def test_the_soft_loss_is_a_divergence_without_the_squared_temperature(tmp_path):
    method = SRe2L(network=NET, temperature=5)
    run = Run(method, RunDirectory(tmp_path), seed=0)
    net = CNNSpec(channels=(4, 4)).build(load_data("digits").facts).eval()
    pixels, soft = torch.randn(6, 1, 8, 8), torch.randn(6, 10)
    found = method.soft_loss(Modules(net=net), Batch(pixel_values=pixels, soft=soft), run)["soft"]
    expected = F.kl_div(F.log_softmax(net(pixels) / 5, 1), F.softmax(soft / 5, 1), reduction="batchmean")
    torch.testing.assert_close(found, expected)
    own = method.soft_loss(Modules(net=net), Batch(pixel_values=pixels, soft=net(pixels)), run)["soft"]
    assert own.item() == pytest.approx(0, abs=1e-6)


def test_weight_decay_is_for_matrices_alone(tmp_path):
    method = SRe2L(network=NET, data="digits", relabel="online")
    run = Run(method, RunDirectory(tmp_path), seed=0)
    net = CNNSpec(channels=(4, 4)).build(load_data("digits").facts)
    stage = method._training(run, torch.randn(10, 1, 8, 8), net, 10, None, "score/x", net)
    decays = {name: optimizer.weight_decay for names, optimizer in stage.updates[0].trains.items() for name in names}
    assert decays["net.classifier.weight"] == decays["net.blocks.0.conv.weight"] == 0.01
    assert decays["net.classifier.bias"] == decays["net.blocks.0.norm.weight"] == 0
    assert set(decays) == {f"net.{name}" for name, _ in net.named_parameters()}


def test_no_batch_norm_is_refused_unless_its_weight_is_0(tmp_path):
    plain = {**NET, "norm": "none"}
    recipe = partial(build_recipe)
    values = {**TINY, "teacher": {"kind": "trained", "model": plain, "epochs": 1}}
    with pytest.raises(UserError, match="has no batch norm that remembers statistics"):
        run_recipe(recipe(values), tmp_path / "a")
    assert run_recipe(recipe({**values, "weight_bn": 0}), tmp_path / "b").metrics["test/accuracy"] >= 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"smallest": 0}, "smallest: expected more than 0, not 0"),
        ({"label_views": {"mix": "cutmx"}}, "did you mean 'cutmix'"),
        ({"temperature": 0}, "temperature: expected more than 0, not 0"),
        ({"label_limit": 1e-9}, "raise it, use fewer eval_epochs, or relabel=online"),
        ({"images_per_class": 5000}, "images_per_class is 5000, but class 0 has only"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({**TINY, **fields}), tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_numbers_are_refused(tmp_path):
    vectors = ObjectData.from_object((torch.rand(40, 4), torch.arange(40) % 2))
    with pytest.raises(UserError, match="needs images"):
        run_recipe(build_recipe({**TINY, "data": vectors}), tmp_path / "b")
