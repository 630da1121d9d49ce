"""DATM: where a set starts, which epochs it matches, and which steps move nothing."""

import numpy as np
import pytest
import torch

from stillhouse.data import load_data
from stillhouse.engine import Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.datasets.datm import DATM, correct_images
from stillhouse.methods.datasets.experts import Trajectories
from stillhouse.recipe import build_recipe

NET = {"kind": "convnet", "width": 4, "depth": 2, "norm": "group"}
TINY = {
    "method": "datm",
    "network": NET,
    "augment": "crop_scale_rotate",
    "experts": {"count": 2, "epochs": 4, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}},
    "num_steps": 3,
    "inner_steps": 3,
    "max_start_epoch": 2,
    "first_max_start_epoch": 1,
    "expansion_steps": 2,
    "lr_images": 1.0,
    "step_size": 0.05,
    "eval_networks": 1,
    "eval_epochs": 2,
    "correct_images": False,
    "run": {"threads": 1, "device": "cpu"},
}


def guesses(flat, weights, images):
    """Stands in for an expert: logits that look drawn for each image."""
    torch.manual_seed(int(weights[0]))
    return torch.cos(100 * images.flatten(1) @ torch.randn(64, 10))


def test_images_are_those_that_an_expert_gets_right_and_the_next_fills_what_is_missing(monkeypatch):
    monkeypatch.setattr("stillhouse.methods.datasets.datm.labelled", guesses)
    split = load_data("digits").split("train")
    trajectories = Trajectories([np.full((2, 1), k, np.float32) for k in range(3)], {})
    members = split.by_class()[3]
    images = split.batch(members)["pixel_values"]
    right = [guesses(None, torch.tensor([k]), images).argmax(-1) == 3 for k in range(3)]
    first, whole = (
        set(right[0].nonzero().flatten().tolist()),
        set((right[0] | right[1] | right[2]).nonzero().flatten().tolist()),
    )
    assert 0 < len(first) < len(whole) < len(members)
    only = split.subset(members)
    assert int(correct_images(only, trajectories, None, 1, "cpu")) in first
    chosen = correct_images(only, trajectories, None, len(whole), "cpu").tolist()
    assert set(chosen) == whole
    assert set(chosen[: len(first)]) == first
    with pytest.raises(UserError, match=f"classify only {len(whole)} images of class 3 correctly"):
        correct_images(only, trajectories, None, len(whole) + 1, "cpu")


def test_the_window_grows_and_never_begins_before_the_lower_bound():
    method = DATM(min_start_epoch=3, first_max_start_epoch=5, max_start_epoch=25, expansion_steps=100)
    assert [method.window(step) for step in (0, 5, 50, 99, 100, 10**6)] == [
        (3, 5),
        (3, 6),
        (3, 15),
        (3, 24),
        (3, 25),
        (3, 25),
    ]
    assert DATM(first_max_start_epoch=None).window(0) == (0, 20)


def test_labels_are_learned_and_stay_distributions(tmp_path):
    result = run_recipe(build_recipe(TINY), tmp_path / "run")
    made = result.artefacts["set"].distilled
    assert made.target == "logits"
    assert isinstance(made.labels, torch.nn.Parameter)
    torch.testing.assert_close(made.targets().sum(-1), torch.ones(len(made)))
    hard = run_recipe(build_recipe({**TINY, "soft_labels": False}), tmp_path / "hard").artefacts["set"].distilled
    assert hard.target == "hard"
    assert hard.labels.tolist() == list(range(10))


def test_steps_above_the_threshold_move_nothing(tmp_path):
    moved = run_recipe(build_recipe({**TINY, "threshold": 100.0}), tmp_path / "moved").artefacts["set"].distilled
    still = run_recipe(build_recipe({**TINY, "threshold": 1e-9}), tmp_path / "still").artefacts["set"].distilled
    assert float(still.lr.detach()) == pytest.approx(0.05)
    start = still.provenance["start"]["samples"]
    assert start == moved.provenance["start"]["samples"]
    real = load_data("digits").split("train").batch(torch.tensor(start))["pixel_values"]
    assert torch.equal(still.images.detach(), real)
    assert not torch.equal(moved.images.detach(), real)
    assert not torch.equal(moved.labels.detach(), still.labels.detach())


def test_a_loss_at_the_threshold_is_kept(tmp_path):
    method = DATM(threshold=1.0)
    run = Run(method, RunDirectory(tmp_path), seed=0)
    assert not method.dropped(torch.tensor(1.0), run)
    assert method.dropped(torch.tensor(1.0001), run)
    assert not method.dropped(torch.tensor(float("nan")), run), "the guard names it"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"first_max_start_epoch": 3}, "first_max_start_epoch is 3: it lies above min_start_epoch, 0, and at most at"),
        ({"min_start_epoch": 1, "first_max_start_epoch": 1}, "first_max_start_epoch is 1"),
        ({"max_start_epoch": 4}, "targets reach to epoch 5, but the experts have 4"),
        ({"label_experts": 3}, "label_experts is 3, but there are 2 experts"),
        ({"threshold": 0}, "expected more than 0"),
        ({"correct_images": True, "images_per_class": 100}, "classify only"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({**TINY, **fields}), tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
