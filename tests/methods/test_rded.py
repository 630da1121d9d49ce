"""RDED: the crops it takes are the ones it says, the best by the observer, stitched as it says."""

import pytest
import torch
import torch.nn.functional as F

from stillhouse.data import load_data
from stillhouse.data.export import load_tensors
from stillhouse.engine import Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.datasets.rded import RDED, best_crops, padded
from stillhouse.models import CNNSpec
from stillhouse.modules.crops import crop_resized, stitch
from stillhouse.recipe import build_recipe

NET = {"kind": "cnn", "channels": [4, 4]}
TINY = {
    "method": "rded",
    "network": NET,
    "teacher": {"kind": "trained", "model": NET, "epochs": 1},
    "images_per_class": 2,
    "pool": 20,
    "crops": 3,
    "eval_networks": 1,
    "eval_epochs": 2,
    "run": {"threads": 1, "device": "cpu"},
}


def test_the_best_crops_are_those_of_a_search_by_hand():
    score = torch.rand(5, 30, generator=torch.Generator().manual_seed(0))
    place, which = best_crops(score, 7)
    best = sorted((min(column), place) for place, column in enumerate(score.T.tolist()))[:7]
    assert place.tolist() == [place for _, place in best]
    assert score[which, place].tolist() == [value for value, _ in best]


def test_a_frame_of_zeros_has_the_odd_pixel_below_and_right():
    framed = padded(torch.ones(1, 1, 2, 2), (5, 4))
    assert framed[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("factor", [1, 2])
def test_images_are_the_crops_that_the_card_lists(tmp_path, factor):
    run_recipe(build_recipe({**TINY, "factor": factor}), tmp_path / "run")
    again = load_tensors(tmp_path / "run" / "result" / "set" / "distilled.safetensors")
    start = again.provenance["start"]
    split = load_data("digits").split("train")
    chosen, boxes = torch.tensor(start["samples"]), torch.tensor(start["boxes"])
    assert split.labels[chosen].tolist() == torch.arange(10).repeat_interleave(2 * factor**2).tolist()
    assert len(set(start["samples"])) == 20 * factor**2
    assert bool((boxes[:, 2] == boxes[:, 3]).all()), "crops are square"
    parts = crop_resized(split.batch(chosen)["pixel_values"], boxes, (8 // factor, 8 // factor))
    for label, part in enumerate(parts.view(10, -1, *parts.shape[1:])):
        torch.testing.assert_close(again.by_class[label], stitch(part, (8, 8), factor))


def chosen(tmp_path, **fields):
    method = RDED(network=NET, data="digits", images_per_class=2, factor=1, pool=20, crops=3, **fields)
    run = Run(method, RunDirectory(tmp_path), seed=0)
    teacher = CNNSpec(channels=(4, 4)).build(load_data("digits").facts).eval().requires_grad_(False)
    torch.manual_seed(3)
    return method._chosen(teacher, run), teacher


def test_the_score_is_the_observers_cross_entropy_of_the_framed_crop(tmp_path):
    made, teacher = chosen(tmp_path)
    split = load_data("digits").split("train")
    for label in (0, 7):
        parts = crop_resized(split.batch(made["index"][label])["pixel_values"], made["boxes"][label], (8, 8))
        expected = F.cross_entropy(teacher(padded(parts, (8, 8))), torch.full((2,), label), reduction="none")
        torch.testing.assert_close(made["score"][label], expected)
    assert bool((made["score"].diff(dim=1) >= 0).all()), "best first"


def test_realism_is_what_chance_does_not_have(tmp_path):
    torch.manual_seed(0)
    best, _ = chosen(tmp_path / "a")
    torch.manual_seed(0)
    any_, _ = chosen(tmp_path / "b", select="random")
    assert best["score"].mean() < any_["score"].mean()


def test_views_follow_the_factor_unless_given():
    assert (RDED(factor=2).plan().smallest, RDED(factor=2).plan().strips) == (0.5, 2)
    assert (RDED(factor=1).plan().smallest, RDED(factor=1).plan().strips) == (1.0, 1)
    assert RDED(label_views={"smallest": 0.3}).plan().smallest == 0.3
    assert RDED.model_validate(RDED(factor=3).dump()) == RDED(factor=3)


def test_a_stretched_cosine_ends_at_half_of_its_rate():
    optimizer = RDED().eval_optimizer
    assert optimizer.lr_at(0, 100) == pytest.approx(1e-3)
    assert optimizer.lr_at(100, 100) == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pool": 5}, "pool is 5, but 2 images of 4 crops need 8 of each class"),
        ({"factor": 5, "pool": 100}, "leaves crops of less than 2 pixels in images of 8x8"),
        ({"images_per_class": 60, "pool": 500}, "images for the 240 that this needs"),
        ({"crops": 0}, "crops: expected at least 1, not 0"),
    ],
)
def test_bad_input_gives_one_sentence(tmp_path, fields, sentence):
    with pytest.raises(UserError) as caught:
        run_recipe(build_recipe({**TINY, **fields}), tmp_path / "run")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
