"""AST: perturbed starts, targets on the way, the weight of late starts, images near the centres of their class."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stillhouse.data import Batch, load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.datasets.experts import Trajectories
from stillhouse.methods.datasets.smooth_trajectories import SmoothTrajectories, balance, perturbed, representatives
from stillhouse.models import ConvNetSpec
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.distilled import DistilledSet
from stillhouse.recipe import build_recipe

NET = {"kind": "convnet", "width": 4, "depth": 2, "norm": "group"}
TINY = {
    "method": "smooth-trajectories",
    "network": NET,
    "augment": "none",
    "experts": {"count": 2, "epochs": 4, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}},
    "num_steps": 2,
    "inner_steps": 4,
    "max_start_epoch": 3,
    "lr_images": 1.0,
    "step_size": 0.02,
    "eval_networks": 1,
    "eval_epochs": 2,
    "compare_start": False,
    "run": {"threads": 1, "device": "cpu"},
}


@pytest.fixture
def flat():
    torch.manual_seed(0)
    return FlatNetwork(ConvNetSpec(**{k: v for k, v in NET.items() if k != "kind"}).build(load_data("digits").facts))


def test_the_loss_is_the_papers(flat, tmp_path):
    method = SmoothTrajectories(
        augment="none",
        inner_steps=7,
        expert_epochs=3,
        max_start_epoch=1,
        batch_syn=None,
        intermediate="adaptive",
        perturbation=0,
    )
    run = Run(method, RunDirectory(tmp_path), seed=1)
    run.enter("matching", 0, 10)
    run.place("loss", "match", 0, 0)
    path = np.cumsum(0.1 * np.random.default_rng(0).normal(size=(5, flat.size)), 0).astype(np.float32)
    split = load_data("digits").split("train")
    made = DistilledSet(split.batch(range(6))["pixel_values"], split.labels[:6], num_classes=10, lr=0.05)
    value = method.match(Trajectories([path], {}), flat, Modules(set=made, net=flat), Batch(), run)["match"]
    points = [torch.from_numpy(path[epoch]) for epoch in range(4)]
    theta, velocity, reached = points[0].clone(), torch.zeros(flat.size), {}
    for step in range(7):
        theta.requires_grad_()
        inner = balance(0, 1) * F.cross_entropy(flat.logits(theta, {"pixel_values": made.images}), made.labels)
        (g,) = torch.autograd.grad(inner, theta)
        velocity = 0.9 * velocity + g
        theta = (theta - 0.05 * velocity).detach()
        reached[step + 1] = theta
    expected = sum(
        weight * (reached[step] - end).square().sum() / (points[0] - end).square().sum()
        for step, end, weight in ((2, points[1], 1 / 3), (4, points[2], 2 / 3), (7, points[3], 1.0))
    )
    torch.testing.assert_close(value.detach(), expected)
    value.backward()
    assert made.images.grad.abs().max() > 0


def test_targets_on_the_way(flat, tmp_path):
    path = np.arange(6, dtype=np.float32)[:, None] * np.ones(flat.size, np.float32)
    for kind, weights in (("none", {}), ("aggregate", {3: 1.0, 6: 1.0}), ("adaptive", {3: 1 / 3, 6: 2 / 3})):
        method = SmoothTrajectories(
            inner_steps=10, expert_epochs=3, max_start_epoch=1, intermediate=kind, perturbation=0.5
        )
        run = Run(method, RunDirectory(tmp_path / kind), seed=1)
        run.enter("matching", 0, 10)
        run.place("loss", "match", 0, 0)
        goal = method.goal(Trajectories([path], {}), flat, Modules(), run)
        assert goal.weights == pytest.approx(weights)
        assert {step: float(end[0]) for step, end in goal.targets.items()} == {
            10: 3.0,
            **({3: 1.0, 6: 2.0} if weights else {}),
        }
    single = SmoothTrajectories(expert_epochs=1, max_start_epoch=1)
    assert list(single.goal(Trajectories([path], {}), flat, Modules(), run).targets) == [single.inner_steps]


def test_only_convolutions_are_perturbed_and_by_little(flat):
    weights = flat.weights()
    before, after = flat.views(weights), flat.views(perturbed(flat, weights, 0.7))
    for name, view in before.items():
        if view.ndim == 4:
            moved = after[name] - view
            assert 0 < moved.norm() <= 0.7 * view.abs().max()
            torch.testing.assert_close((moved / view).norm(), torch.tensor(0.7), rtol=1e-3, atol=0)
        else:
            assert torch.equal(after[name], view)
    assert not torch.equal(perturbed(flat, weights, 1.0), perturbed(flat, weights, 1.0))


def test_late_starts_weigh_more():
    assert balance(15, 30) == pytest.approx(math.log(8, 5))
    assert balance(0, 30) == pytest.approx(1 / math.log(23, 5))
    assert balance(29, 30) == pytest.approx(math.log(22, 5))


@pytest.mark.parametrize("per_class", [1, 3])
def test_images_are_of_their_class_and_different(flat, per_class):
    split = load_data("digits").split("train")
    chosen = representatives(split, flat, flat.weights(), per_class)
    assert len(set(chosen.tolist())) == 10 * per_class
    assert split.labels[chosen].tolist() == [label for label in range(10) for _ in range(per_class)]


def test_it_runs_as_a_whole(tmp_path):
    result = run_recipe(build_recipe(TINY), tmp_path / "run")
    assert 0 <= result.metrics["test/accuracy"] <= 1
    other = run_recipe(build_recipe({**TINY, "representative": False}), tmp_path / "other")
    starts = [one.artefacts["set"].distilled.provenance["start"]["samples"] for one in (result, other)]
    assert starts[0] != starts[1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"inner_steps": 1}, "expert_epochs is 2 and inner_steps 1: each epoch between needs a step"),
        ({"network": "mlp"}, "no convolution to perturb; set perturbation=0"),
        ({"perturbation": -1}, "perturbation: expected at least 0"),
        ({"max_start_epoch": 4}, "targets reach to epoch 5, but the experts have 4"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({**TINY, **fields}), tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
