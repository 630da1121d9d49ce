"""Experts and the matching of their trajectories: MTT and TESLA over the engine."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stillhouse.data import Batch, load_data
from stillhouse.data.export import load_tensors
from stillhouse.engine import Modules, Run, RunDirectory, sgd
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.datasets.experts import (
    ExpertTraining,
    FlatExperts,
    SmoothExperts,
    Trajectories,
    load_trajectories,
    slow_start,
)
from stillhouse.methods.datasets.trajectories import MTT, TESLA, labelled
from stillhouse.models import ConvNetSpec
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.distilled import DistilledSet
from stillhouse.recipe import build_recipe

NET = {"kind": "convnet", "width": 4, "depth": 2, "norm": "group"}
EXPERTS = {"count": 2, "epochs": 4, "batch_size": 256, "optimizer": {"name": "sgd", "lr": 0.05}}
TINY = {
    "network": NET,
    "augment": "crop_scale_rotate",
    "experts": EXPERTS,
    "num_steps": 3,
    "inner_steps": 3,
    "expert_epochs": 2,
    "max_start_epoch": 3,
    "lr_images": 1.0,
    "step_size": 0.05,
    "eval_networks": 1,
    "eval_epochs": 2,
    "compare_start": False,
    "run": {"threads": 1, "device": "cpu"},
}


class Setting:
    """An outer step outside the engine, over drawn trajectories of four epochs."""

    def __init__(self, method, tmp_path, per_class=1):
        self.method = method
        self.run = Run(method, RunDirectory(tmp_path), seed=1)
        self.run.enter("matching", 0, 10)
        self.run.place("loss", "match", 0, 0)
        data = load_data("digits")
        torch.manual_seed(0)
        self.flat = FlatNetwork(ConvNetSpec(**{k: v for k, v in NET.items() if k != "kind"}).build(data.facts))
        self.paths = [
            np.cumsum(0.1 * np.random.default_rng(k).normal(size=(5, self.flat.size)), 0).astype(np.float32)
            for k in range(3)
        ]
        self.trajectories = Trajectories(self.paths, {})
        members = torch.cat([rows[:per_class] for rows in data.split("train").by_class().values()])
        images, labels = data.split("train").batch(members)["pixel_values"], data.split("train").labels[members]
        self.set = DistilledSet(images, labels, lr=0.05)
        self.m = Modules(set=self.set, net=self.flat)

    def loss(self):
        return self.method.match(self.trajectories, self.flat, self.m, Batch(), self.run)


def test_the_loss_is_the_papers(tmp_path):
    s = Setting(MTT(augment="none", inner_steps=4, expert_epochs=2, max_start_epoch=1), tmp_path)
    value = s.loss()["match"]
    goal = s.method.goal(s.trajectories, s.flat, s.m, s.run)
    start, end = (torch.from_numpy(s.paths[goal.expert][epoch]) for epoch in (0, 2))
    theta = start.clone()
    for _ in range(4):
        theta.requires_grad_()
        inner = F.cross_entropy(s.flat.logits(theta, {"pixel_values": s.set.images}), s.set.labels)
        (g,) = torch.autograd.grad(inner, theta)
        theta = (theta - 0.05 * g).detach()
    expected = (theta - end).square().sum() / (start - end).square().sum()
    torch.testing.assert_close(value.detach(), expected)
    value.backward()
    assert s.set.images.grad.abs().max() > 0
    assert s.set.lr.grad != 0


def test_images_that_no_inner_step_draws_do_not_move(tmp_path):
    s = Setting(MTT(augment="crop_flip", inner_steps=2, batch_syn=3, max_start_epoch=2), tmp_path)
    s.loss()["match"].backward()
    assert s.set.images.grad.flatten(1).any(1).sum() == 6


def test_experts_come_in_turn_and_epochs_from_the_window(tmp_path):
    s = Setting(MTT(min_start_epoch=1, max_start_epoch=3, expert_epochs=1), tmp_path)
    goals = []
    for step in range(60):
        s.run.enter("matching", step, 60)
        s.run.place("loss", "match", 0, 0)
        goals.append(s.method.goal(s.trajectories, s.flat, s.m, s.run))
    for turn in range(20):
        assert sorted(goal.expert for goal in goals[3 * turn : 3 * turn + 3]) == [0, 1, 2]
    assert len({tuple(goal.expert for goal in goals[3 * turn : 3 * turn + 3]) for turn in range(20)}) > 1
    assert {goal.epoch for goal in goals} == {1, 2}
    for goal in goals:
        assert torch.equal(goal.start, torch.from_numpy(s.paths[goal.expert][goal.epoch]))
        assert torch.equal(goal.targets[20], torch.from_numpy(s.paths[goal.expert][goal.epoch + 1]))


def test_processes_take_different_experts_of_one_turn(tmp_path):
    s = Setting(MTT(max_start_epoch=2), tmp_path)
    found = []
    for rank in range(3):
        s.run.world = replace(s.run.world, rank=rank, size=3)
        found.append(s.method.goal(s.trajectories, s.flat, s.m, s.run).expert)
    assert sorted(found) == [0, 1, 2]


def test_tesla_treats_the_weights_of_inner_steps_as_constants(tmp_path):
    gradients = {}
    for steps in (1, 6):
        for cls in (MTT, TESLA):
            s = Setting(cls(augment="none", inner_steps=steps, max_start_epoch=1), tmp_path / f"{cls.name}{steps}")
            s.loss()["match"].backward()
            gradients[cls, steps] = s.set.images.grad
    torch.testing.assert_close(gradients[MTT, 1], gradients[TESLA, 1])
    assert not torch.allclose(gradients[MTT, 6], gradients[TESLA, 6], rtol=1e-3, atol=0)


def test_tesla_takes_labels_from_the_target(tmp_path):
    s = Setting(TESLA(augment="none", teacher_labels=True, inner_steps=2, max_start_epoch=1), tmp_path)
    soft = torch.zeros(10, 10)
    s.set = DistilledSet(s.set.images, soft, target="logits", classes=s.set.labels, lr=0.05)
    s.m = Modules(set=s.set, net=s.flat)
    s.loss()
    goal = s.method.goal(s.trajectories, s.flat, s.m, s.run)
    torch.testing.assert_close(s.set.labels, labelled(s.flat, goal.targets[2], s.set.images))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One tiny run of MTT."""
    home = tmp_path_factory.mktemp("mtt")
    return home, run_recipe(build_recipe({"method": "mtt", **TINY}), home / "run", cache=False)


def test_the_set_carries_its_step_size(ran):
    home, result = ran
    again = load_tensors(home / "run" / "result" / "set" / "distilled.safetensors")
    assert again.lr.item() == result.metrics["step_size"] != 0.05
    assert f"{result.metrics['step_size']:.4g}" in " ".join(result.notes)


def test_records_hold_each_epoch_once(ran):
    home, _ = ran
    directory = home / "run" / "subruns" / "experts"
    for number in range(2):
        path = np.load(directory / "records" / f"expert-{number}" / "path" / "weights.npy", mmap_mode="r")
        assert len(path) == 5
        assert np.linalg.norm(np.diff(path, axis=0), axis=1).min() > 0, "snapshots are copies"
    told = json.loads((directory / "result" / "trajectories" / "trajectories.json").read_text())
    assert told["epochs"] == 4
    assert told["network"]["width"] == 4
    loaded = load_trajectories(directory)
    assert len(loaded) == 2
    assert all(isinstance(path, np.memmap) for path in loaded.paths)


def test_experts_of_a_directory_are_used_and_compared(ran, tmp_path):
    home, result = ran
    directory = str(home / "run" / "subruns" / "experts")
    fields = {**TINY, "experts": {"directory": directory}}
    again = run_recipe(build_recipe({"method": "mtt", **fields}), tmp_path / "same")
    assert torch.equal(again.artefacts["set"].distilled.images, result.artefacts["set"].distilled.images)
    with pytest.raises(UserError, match=r"have network .*'width': 4.* and here it is .*'width': 8"):
        run_recipe(build_recipe({"method": "mtt", **fields, "network": {**NET, "width": 8}}), tmp_path / "other")
    with pytest.raises(UserError, match="is no finished run of expert-trajectories"):
        run_recipe(build_recipe({"method": "mtt", **TINY, "experts": {"directory": str(tmp_path)}}), tmp_path / "none")


def test_methods_share_experts_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    for name in ("mtt", "tesla"):
        run_recipe(build_recipe({"method": name, **TINY}), tmp_path / name)
    assert len(list(Path(tmp_path / "cache" / "runs").glob("expert-trajectories-*"))) == 1


@pytest.mark.parametrize("experts", [{"rho": 0.05, "alpha": 0.3}, {"slow_start": 2, "weight_penalty": 2.0}])
def test_flat_and_smooth_experts_train(tmp_path, experts):
    fields = {"experts": {**EXPERTS, "count": 1, "epochs": 2, "storage": "float16", **experts}, "sharpness_samples": 20}
    recipe = build_recipe({"method": "expert-trajectories", "network": NET, "run": TINY["run"], **fields})
    result = run_recipe(recipe, tmp_path / "run")
    assert set(result.metrics) == {"path/length", "path/variation", "test/accuracy", "sharpness"}
    assert result.artefacts["trajectories"].paths[0].dtype == np.float16


def test_kinds_of_experts_are_the_papers():
    assert (FlatExperts().rho, FlatExperts().alpha, FlatExperts().adaptive) == (0.01, 0.3, True)
    smooth = SmoothExperts()
    assert (smooth.slow_start, smooth.weight_penalty, smooth.optimizer.momentum) == (10, 2.0, 0.9)
    rates = [smooth.optimizer.lr_at(epoch * 7, 350, 7) for epoch in (0, 26, 27, 49)]
    assert rates == pytest.approx([0.003, 0.003, 0.0018, 0.0018])
    assert [slow_start(epoch, 10) for epoch in range(10)] == pytest.approx([0.5 + 0.05 * epoch for epoch in range(10)])
    assert slow_start(10, 10) == slow_start(0, 0) == 1


def test_rho_follows_the_rate():
    training = ExpertTraining(rho=0.4, rho_min=0.1, optimizer=sgd(0.1, schedule="linear"))
    assert training.rho_at(0, 11, 1) == pytest.approx(0.4)
    assert training.rho_at(10, 11, 1) == pytest.approx(0.1)
    assert 0.1 < training.rho_at(5, 11, 1) < 0.4
    assert ExpertTraining(rho=0.4).rho_at(3, 11, 1) == 0.4


def test_a_step_size_that_falls_to_zero_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"learned step size fell to .* lower lr_step"):
        run_recipe(build_recipe({"method": "mtt", **TINY, "lr_step": 1e6}), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"min_start_epoch": 3}, "min_start_epoch is 3 and max_start_epoch 3"),
        ({"max_start_epoch": 4}, "targets reach to epoch 5, but the experts have 4; raise experts.epochs to 5"),
        ({"network": {**NET, "norm": "batch"}}, "keeps running statistics"),
        ({"images_per_class": 500}, "images_per_class is 500, but class 0 has only"),
        ({"experts": {**EXPERTS, "rho": 0.2, "rho_min": 0.1}}, "with a constant learning rate rho cannot follow it"),
        ({"experts": {**EXPERTS, "rho": -1}}, "expected at least 0, not -1"),
        ({"experts": {**EXPERTS, "weight_penalty": -1}}, "expected at least 0, not -1"),
        ({"experts": {**EXPERTS, "optimizer": {"name": "sgd", "lr": 1e-30}}}, "an expert that does not move"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({"method": "mtt", **TINY, **fields}), tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_inner_step_sees_the_same_augmentation_whenever_it_is_rebuilt(tmp_path):
    s = Setting(MTT(inner_steps=2, max_start_epoch=1), tmp_path)
    draws = [s.method.augment.draw(10, (8, 8), shared_choice=True) for _ in range(2)]
    goal = s.method.goal(s.trajectories, s.flat, s.m, s.run)
    loss = partial(s.method.inner_loss, s.flat, draws, goal, goal.start, s.set.images, s.set.labels)
    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(0), loss(1))
