"""FTD: flat experts, the average of the pixels, the error that accumulates along a path."""

import numpy as np
import pytest
import torch

from stillhouse.data import load_data
from stillhouse.engine import Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.datasets.experts import Trajectories
from stillhouse.methods.datasets.ftd import FTD
from stillhouse.models import ConvNetSpec
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.distilled import DistilledSet
from stillhouse.recipe import build_recipe

NET = {"kind": "convnet", "width": 4, "depth": 2, "norm": "group"}
TINY = {
    "method": "ftd",
    "network": NET,
    "augment": "none",
    "experts": {"count": 2, "epochs": 4, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}, "rho": 0.05},
    "num_steps": 4,
    "inner_steps": 3,
    "expert_epochs": 2,
    "max_start_epoch": 3,
    "lr_images": 1.0,
    "step_size": 0.05,
    "eval_networks": 1,
    "eval_epochs": 2,
    "run": {"threads": 1, "device": "cpu"},
}


def images(result):
    return result.artefacts["set"].distilled.images.detach()


def test_the_average_of_the_pixels_is_handed_over(tmp_path):
    last, start = (
        images(run_recipe(build_recipe({**TINY, "ema": ema}), tmp_path / str(ema))) for ema in (0.0, 1 - 1e-9)
    )
    half = images(run_recipe(build_recipe({**TINY, "ema": 0.5}), tmp_path / "half"))
    whole = run_recipe(build_recipe({**TINY, "num_steps": 1, "ema": 0.0}), tmp_path / "one")
    real = load_data("digits").split("train").batch(whole.artefacts["set"].distilled.provenance["start"]["samples"])
    torch.testing.assert_close(start, real["pixel_values"])
    assert not torch.equal(last, start)
    once = images(run_recipe(build_recipe({**TINY, "num_steps": 1, "ema": 0.5}), tmp_path / "once"))
    torch.testing.assert_close(once, 0.5 * real["pixel_values"] + 0.5 * images(whole))
    assert (half - start).norm() < (last - start).norm()


def test_both_sets_are_scored_and_errors_are_told(tmp_path):
    result = run_recipe(build_recipe(TINY), tmp_path / "run")
    assert {"test/start/accuracy", "test/distilled/accuracy", "test/last/accuracy"} <= set(result.metrics)
    assert result.metrics["test/accuracy"] == result.metrics["test/distilled/accuracy"]
    assert result.metrics["error/accumulated"] > 0
    table = result.tables[-1]
    assert [row[0] for row in table.rows] == [2, 4]
    assert table.rows[0][1] == pytest.approx(table.rows[0][2], abs=1e-3), "the first segment starts on the path"
    silent = run_recipe(build_recipe({**TINY, "chains": 0}), tmp_path / "silent")
    assert "error/accumulated" not in silent.metrics
    assert torch.equal(images(result), images(silent))


def test_the_error_is_that_of_training_on_the_set(tmp_path):
    """A path that is itself training on the set has no error, chained or put back."""
    method = FTD(augment="none", inner_steps=4, expert_epochs=1, max_start_epoch=3, chains=1)
    run = Run(method, RunDirectory(tmp_path), seed=0)
    data = load_data("digits")
    torch.manual_seed(0)
    flat = FlatNetwork(ConvNetSpec(**{k: v for k, v in NET.items() if k != "kind"}).build(data.facts))
    chosen = torch.arange(20)
    train = data.split("train")
    made = DistilledSet(train.batch(chosen)["pixel_values"], train.labels[chosen], num_classes=10, lr=0.05)
    path = [torch.cat([parameter.detach().flatten() for parameter in flat.network.parameters()])]
    for _ in range(3):
        path.append(method.trained_on(made, flat, path[-1]))
    trajectories = Trajectories([np.stack([weights.numpy() for weights in path])], {})
    found = torch.tensor(method.accumulated(run, made, trajectories, flat))
    torch.testing.assert_close(found, torch.zeros(3, 2), rtol=0, atol=1e-8)
    other = Trajectories([np.stack([(weights + 0.1 * k).numpy() for k, weights in enumerate(path)])], {})
    found = torch.tensor(method.accumulated(run, made, other, flat))
    gone = (path[0] - path[1] - 0.1).square().sum()
    torch.testing.assert_close(found[0], torch.full((2,), float(0.01 * flat.size / gone)), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"ema": 1.0}, "ema: expected less than 1"),
        ({"ema": -0.1}, "ema: expected at least 0"),
        ({"max_start_epoch": 4}, "targets reach to epoch 5, but the experts have 4"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({**TINY, **fields}), tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
