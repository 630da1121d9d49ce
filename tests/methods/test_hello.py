"""HeLlO: labels are made for just the pixels that are seen, teachers are steps of one training, what is stored labels alike."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse as sh
from stillhouse.data import Batch, load_data
from stillhouse.engine import Modules, Result, Run, RunDirectory, Stage, Update, frozen, sgd
from stillhouse.errors import UserError
from stillhouse.methods.datasets.hello import HeLlO, LabellerExport, Tiles, built, load_labeller, seen_both
from stillhouse.models import ModelSpec
from stillhouse.modules.crops import crop_resized

IMAGE = {"kind": "cnn", "channels": [6, 8], "strides": [1, 2]}
FOUNDATION = {
    "kind": "two-towers",
    "model": {"kind": "two-towers", "image": IMAGE, "width": 8, "text_hidden": 8},
    "data": {"kind": "characters", "size": 8, "per_class": 10},
    "epochs": 1,
    "batch_size": 16,
}
TINY = {
    "data": "digits",
    "images_per_class": 2,
    "foundation": FOUNDATION,
    "encoder_rank": 2,
    "head_rank": 3,
    "teacher": "cnn:4",
    "teacher_epochs": 1,
    "teacher_batch_size": 64,
    "checkpoints": 3,
    "labeller_epochs": 1,
    "labeller_batch_size": 64,
    "pool": 12,
    "crops": 2,
    "update_steps": 3,
    "network": "cnn:4",
    "eval_networks": 1,
    "eval_epochs": 2,
}


class Setting:
    """A step outside the engine."""

    def __init__(self, tmp_path, **fields):
        self.method = HeLlO.model_validate({**TINY, **fields})
        self.run = Run(self.method, RunDirectory(tmp_path), data=load_data("digits"))
        torch.manual_seed(0)
        self.towers = ModelSpec.parse(FOUNDATION["model"]).build(self.run.data.facts).eval()
        self.about = self.method.about(self.towers, self.run)
        self.labeller = built(copy.deepcopy(self.towers), self.about).eval()
        self.teachers = [ModelSpec.parse("cnn:4").build(self.run.data.facts).eval() for _ in range(3)]
        named = {f"teacher-{number}": net for number, net in enumerate(self.teachers)}
        self.m = Modules(labeller=self.labeller, **named)
        self.batch = self.run.data.split("train").batch(range(12))
        self.run.enter("s", 0, 4)
        self.run.place("loss", "s", 0, 0)

    def randomised(self):
        for parameter in self.labeller.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        return self.labeller


def test_the_start_is_zero_shot_by_the_class_names(tmp_path):
    s = Setting(tmp_path)
    data, x = s.run.data, s.batch["pixel_values"]
    own = (data.to_unit(x) - s.towers.mean) / s.towers.std
    texts = s.towers.encode_texts([f"a photo of a {digit}" for digit in range(10)])
    wanted = s.towers.scale * s.towers.encode_images(own) @ texts.T
    torch.testing.assert_close(s.labeller(x), wanted, rtol=1e-5, atol=1e-4)


def test_the_objective_is_the_mean_of_the_weak_teachers_and_the_labels(tmp_path):
    s = Setting(tmp_path)
    found = {name: term() for name, term in s.method.lighten(s.m, s.batch, s.run).items()}
    own, x = s.labeller(s.batch["pixel_values"]), s.batch["pixel_values"]
    mean = sum(teacher(x) for teacher in s.teachers) / 3
    torch.testing.assert_close(found["match"], F.mse_loss(own, mean))
    torch.testing.assert_close(found["label"], F.cross_entropy(own, s.batch.labels))
    one = HeLlO.model_validate({**TINY, "combine": "sample"})
    drawn = one.weak(s.m, s.batch, s.run)
    assert sum(torch.equal(drawn, teacher(x)) for teacher in s.teachers) == 1


def test_weak_teachers_are_steps_of_one_training(tmp_path):
    out = tmp_path / "run"
    sh.distil("hello", **TINY, out=out)
    rows = torch.tensor([])
    recorded = sorted((out / "records" / "weak-teachers" / "net").glob("*weight.npy"))
    assert recorded
    for path in recorded:
        rows = torch.from_numpy(np.array(np.load(path, mmap_mode="r")))
        assert len(rows) == 4
        assert all(not torch.equal(rows[i], rows[i + 1]) for i in range(3))


def test_the_label_is_of_the_pixels_that_the_student_sees(tmp_path):
    s = Setting(tmp_path)
    s.randomised()
    seen = []

    class Spy(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixel_values):
            seen.append(pixel_values)
            return self.inner(pixel_values)

    tiny = Batch(pixel_values=s.batch["pixel_values"], labels=s.batch.labels)
    s.run.place("prepare", "", 0, "")
    view = s.method.view(s.m, tiny, s.run)
    assert not torch.equal(view["pixel_values"], tiny["pixel_values"])
    torch.testing.assert_close(view.labels.sum(1), torch.ones(12))
    net = ModelSpec.parse("cnn:4").build(s.run.data.facts)
    terms = s.method.student_loss(Modules(net=Spy(net), labeller=Spy(s.labeller)), view, s.run)
    soft = terms["soft"]()
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(soft, F.mse_loss(net(view["pixel_values"]), s.labeller(view["pixel_values"])))
    torch.testing.assert_close(terms["hard"](), F.cross_entropy(net(view["pixel_values"]), view.labels))


def test_labels_of_an_image_are_blended_like_its_classes(tmp_path):
    s = Setting(tmp_path, labels="per-image")
    soft = F.one_hot(s.batch.labels, 10).float()
    tiny = Batch(pixel_values=s.batch["pixel_values"], labels=s.batch.labels, soft=soft)
    s.run.place("prepare", "", 0, "")
    view = s.method.view(s.m, tiny, s.run)
    torch.testing.assert_close(view["soft"], view.labels)


def test_an_update_makes_small_crops_look_as_before_step_by_step(tmp_path):
    s = Setting(tmp_path)
    s.randomised()
    patches = s.batch["pixel_values"]
    boxes = torch.tensor([[0, 0, 8, 8]]).expand(12, 4)
    low, high = patches.amin((0, 2, 3)).view(-1, 1, 1), patches.amax((0, 2, 3)).view(-1, 1, 1)
    tiles = Tiles(crop_resized(patches, boxes, (4, 4)), patches, low, high)
    optimizer = torch.optim.SGD([tiles.images], lr=1.0)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = sum(
            piece["look"] for piece in s.method.look_alike(Modules(labeller=s.labeller, tiles=tiles), Batch(), s.run)
        )
        loss.backward()
        optimizer.step()
        tiles.after_step(s.run)
        values.append(loss.item())
    assert all(after < before for before, after in pairwise(values))
    assert (tiles.images >= low).all()
    assert (tiles.images <= high).all()
    torch.testing.assert_close(
        F.mse_loss(*seen_both(s.labeller, tiles, torch.arange(12))), torch.tensor(values[-1]), rtol=0.2, atol=0
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("hello") / "run"
    return sh.distil("hello", **TINY, out=out), out


def test_what_is_stored_labels_bit_for_bit_alike(made, tmp_path):
    result, out = made
    home = out / "result" / "labeller"
    about = json.loads((home / "labeller.json").read_text())
    assert about["class_names"] == [str(digit) for digit in range(10)]
    assert json.loads((home / "adapter_config.json").read_text())["r"] == 2
    kept = result.artefacts["labeller"].labeller
    foundation = sh.distil("clip", **{name: FOUNDATION[name] for name in ("model", "data", "epochs", "batch_size")},
        optimizer={"name": "adamw", "lr": 3e-3, "weight_decay": 0.01, "schedule": "cosine"})  # fmt: skip
    again = load_labeller(home, foundation.model.cpu())
    x = load_data("digits").split("test").batch(range(20))["pixel_values"]
    with torch.no_grad():
        assert torch.equal(again(x), kept.eval()(x))
    other = ModelSpec.parse(FOUNDATION["model"]).build(load_data("digits").facts)
    with pytest.raises(UserError, match="labels would be others in silence"):
        load_labeller(home, other)
    with pytest.raises(UserError, match="holds no labeller"):
        load_labeller(tmp_path, other)


def test_bytes_are_measured_on_the_files(made):
    result, out = made
    files = sum(path.stat().st_size for path in (out / "result" / "labeller").iterdir())
    assert result.metrics["labels/bytes"] == result.metrics["labeller/bytes"] == files
    assert result.metrics["labels/full_bytes"] == 2 * 2 * 20 * 10
    assert result.metrics["labels/share"] == files / 800
    assert result.artefacts["set"].distilled.images.shape == (20, 1, 8, 8)


@pytest.mark.parametrize("labels", ["teacher", "per-image", "hard"])
def test_other_labels_are_arms_of_the_same_run(labels):
    result = sh.distil("hello", **TINY, labels=labels, weight_hard=1.0)
    assert "labeller" not in result.artefacts
    assert result.metrics["labels/bytes"] == {"teacher": 800, "per-image": 400, "hard": 0}[labels]


def test_a_probe_has_a_whole_head_and_no_text():
    probe = {"encoder_rank": 0, "head_rank": None, "text_init": False}
    result = sh.distil("hello", **{**TINY, **probe})
    assert result.metrics["labeller/numbers"] == 80
    assert not result.artefacts["labeller"].labeller.base.any()


def test_a_label_call_leaves_no_graph(tmp_path):
    s = Setting(tmp_path / "one")
    found = []

    class Watching(HeLlO):
        name = "hello"

        def stages(self, run):
            net = ModelSpec.parse("cnn:4").build(run.data.facts)

            def loss(m, batch, run):
                found.append(m.labeller(batch["pixel_values"]))
                return self.student_loss(m, batch.replace(labels=F.one_hot(batch.labels, 10).float()), run)

            yield Stage(
                "s",
                {"net": net, "labeller": frozen(s.randomised())},
                [Update(loss, {"net": sgd(0.1)})],
                steps=2,
                batches=run.data.split("train").batches(8),
            )
            return Result(artefacts={"net": net}, metrics={"one": 1.0})

    Run(Watching.model_validate(TINY), RunDirectory(tmp_path / "two"), data=load_data("digits")).execute()
    assert len(found) == 2
    assert not any(label.requires_grad for label in found)
    assert all(p.grad is None for p in s.labeller.parameters())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pool": 7}, "only 7 images for the 8"),
        ({"factor": 5}, "less than 2 pixels"),
        ({"head_rank": 11}, "head_rank is 11, but the head is 10 classes by 8"),
        ({"encoder_rank": 9}, "encoder_rank is 9, but the layer"),
        ({"prompt": "a photo"}, "has no place for a class name"),
        ({"text_init": False}, "set head_rank to null"),
        ({"foundation": "clap:x"}, "there is no foundation model"),
        ({"data": (torch.rand(400, 1, 8, 8), torch.arange(400) % 4)}, "no class names to ask for"),
    ],
)
def test_bad_input_gives_a_sentence(fields, words):
    with pytest.raises(UserError, match=words):
        sh.distil("hello", **{**TINY, **fields})


def test_an_export_names_what_it_needs(tmp_path):
    s = Setting(tmp_path / "run")
    (tmp_path / "out").mkdir()
    LabellerExport(s.labeller, s.about, torch.float32).save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "labeller.json",
    }
    again = load_labeller(tmp_path / "out", s.towers)
    assert torch.equal(again(s.batch["pixel_values"]), s.labeller(s.batch["pixel_values"]))
