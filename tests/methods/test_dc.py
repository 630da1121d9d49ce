"""DC and DSA over the engine: equal to the plain loop of their papers, one augmentation for both sides, what they refuse."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.losses.gradients import gradient_matching
from stillhouse.methods.datasets import dc
from stillhouse.methods.datasets.dc import DC, DSA
from stillhouse.models import ConvNetSpec
from stillhouse.modules.distilled import DistilledSet
from stillhouse.recipe import build_recipe

NET = {"kind": "convnet", "width": 4, "depth": 2}
TINY = {
    "network": NET,
    "images_per_class": 2,
    "num_steps": 2,
    "outer_loop": 3,
    "inner_loop": 2,
    "batch_real": 5,
    "lr_network": 0.5,
    "lr_images": 1.0,
    "eval_networks": 1,
    "eval_epochs": 2,
    "compare_start": False,
    "run": {"threads": 1, "device": "cpu"},
}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def first(split, count):
    return torch.stack([members[:count] for members in split.by_class().values()])


def net_of(seed, facts):
    torch.manual_seed(seed)
    return ConvNetSpec(width=4, depth=2).build(facts)


def test_the_run_is_the_papers_loop(tmp_path, monkeypatch, digits):
    split, drawn = digits.split("train"), []

    def fixed(net):
        drawn.append(len(drawn))
        net.load_state_dict(net_of(drawn[-1], digits.facts).state_dict())

    monkeypatch.setattr(dc, "initialise", fixed)
    monkeypatch.setattr(DC, "drawn", lambda self, run, count: first(split, count))
    result = run_recipe(build_recipe({"method": "dc", **TINY, "init": "random"}), tmp_path / "run")
    found = result.artefacts["set"].distilled
    assert drawn == [0, 1]

    chosen = torch.tensor(found.provenance["start"]["samples"])
    images = split.batch(chosen)["pixel_values"].view(10, 2, 1, 8, 8).requires_grad_()
    labels = torch.arange(10).repeat_interleave(2)
    optimizer = torch.optim.SGD([images], lr=1.0, momentum=0.5)
    for number in range(2):
        net = net_of(number, digits.facts)
        trainer = torch.optim.SGD(net.parameters(), lr=0.5)
        for outer in range(3):
            loss = 0.0
            for label, index in enumerate(first(split, 5)):
                real = F.cross_entropy(net(split.batch(index)["pixel_values"]), torch.full((5,), label))
                tiny = F.cross_entropy(net(images[label]), torch.full((2,), label))
                wanted = torch.autograd.grad(real, list(net.parameters()))
                loss = loss + gradient_matching(
                    torch.autograd.grad(tiny, list(net.parameters()), create_graph=True), wanted
                )
            optimizer.zero_grad()
            loss.backward(inputs=[images])
            optimizer.step()
            for _ in range(2 if outer < 2 else 0):
                trainer.zero_grad()
                F.cross_entropy(net(images.detach().flatten(0, 1)), labels).backward()
                trainer.step()
    torch.testing.assert_close(found.images.data, images.detach().flatten(0, 1), rtol=1e-4, atol=1e-5)


class Setting:
    """A matching step outside the engine, in double precision."""

    def __init__(self, method, tmp_path, digits, per_class=5):
        self.method = method
        self.run = Run(method, RunDirectory(tmp_path), seed=1, data=digits)
        split = digits.split("train")
        index = first(split, 5)
        self.m = Modules(net=net_of(0, digits.facts))
        images = split.batch(index[:, :per_class].flatten())["pixel_values"]
        self.m["set"] = DistilledSet(images, torch.arange(10).repeat_interleave(per_class))
        self.batch = {"index": index}

    def terms(self):
        self.run.place("loss", "match", 0, 0)
        return [piece["gradients"]() for piece in self.method.match(self.m, self.batch, self.run)]

    def gradient(self):
        return torch.autograd.grad(sum(self.terms()), self.m.set.images)[0]


@pytest.mark.parametrize("method", [DC, DSA])
def test_nothing_is_left_to_match_where_the_tiny_images_are_the_real_ones(method, tmp_path, digits):
    s = Setting(method(network=NET, distance="mse"), tmp_path, digits)
    assert all(term.item() < 1e-10 for term in s.terms())
    assert s.gradient().abs().max() < 1e-5


def test_the_augmentation_is_one_for_both_sides_and_only_dsas(tmp_path, digits):
    apart = Setting(DSA(network=NET, distance="mse", siamese=False), tmp_path / "a", digits)
    assert sum(apart.terms()) > 1e-3
    changed = DC(network=NET, augment="color_crop_cutout_flip_scale_rotate")
    plain, scored = (Setting(m, tmp_path / "b", digits, 1).terms() for m in (DC(network=NET), changed))
    assert torch.equal(torch.stack(plain), torch.stack(scored)), "DC augments in scoring alone"
    assert not torch.equal(
        torch.stack(Setting(DSA(network=NET), tmp_path / "c", digits, 1).terms()), torch.stack(plain)
    )


def test_the_networks_training_is_augmented_as_the_method_says(tmp_path, digits, monkeypatch):
    for method in (DC(network=NET, augment="crop"), DSA(network=NET, augment="crop")):
        seen = []
        monkeypatch.setattr(type(method.augment), "augment", lambda self, images, seen=seen: seen.append(1) or images)
        s = Setting(method, tmp_path / method.name, digits, 1)
        batch = {"index": torch.tensor([3, 1]), "labels": torch.tensor([3, 1])}
        batch = type("Rows", (dict,), {"labels": batch["labels"]})(batch)
        loss = method.fit_network(s.m, batch, s.run)["ce"]
        torch.testing.assert_close(loss, F.cross_entropy(s.m.net(s.m.set.images[[3, 1]]), torch.tensor([3, 1])))
        assert len(seen) == method.augmented
        assert torch.autograd.grad(loss, s.m.set.images, allow_unused=True) == (None,)
        monkeypatch.undo()


def test_processes_share_the_classes_and_their_mean_is_the_whole(tmp_path, digits):
    whole = Setting(DSA(network=NET), tmp_path / "whole", digits, 1)
    parts = []
    for rank in range(3):
        s = Setting(DSA(network=NET), tmp_path / str(rank), digits, 1)
        s.run.world = replace(s.run.world, rank=rank, size=3)
        parts.append((sum(s.terms()), s.gradient()))
    torch.testing.assert_close(sum(term for term, _ in parts) / 3, sum(whole.terms()))
    torch.testing.assert_close(sum(g for _, g in parts) / 3, whole.gradient(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "loops"),
    [
        ({"images_per_class": 1}, (1, 1)),
        ({"images_per_class": 10}, (10, 50)),
        ({"images_per_class": 40}, (40, 15)),
        ({"images_per_class": 5}, (5, 100)),
        ({"images_per_class": 100}, (50, 10)),
        ({"images_per_class": 10, "outer_loop": 4, "inner_loop": 7}, (4, 7)),
    ],
)
def test_loops_are_the_released_table(fields, loops):
    assert DC(**fields).loops() == loops


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"network": {**NET, "norm": "batch"}}, "with batch norm the few tiny images of a class"),
        ({"distance": "l1"}, "distance: "),
        ({"batch_real": 0}, "batch_real: expected at least 1"),
        ({"images_per_class": 5000}, "images_per_class is 5000, but class 0 has only"),
    ],
)
def test_bad_input_gives_one_sentence(fields, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        run_recipe(build_recipe({"method": "dc", **TINY, **fields}), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_more_processes_than_classes_are_refused(tmp_path, digits):
    s = Setting(DC(network=NET), tmp_path, digits)
    s.run.world = replace(s.run.world, size=11)
    with pytest.raises(UserError, match="11 processes cannot share 10 classes"):
        s.method.check_network(s.m.net, 10, s.run)
