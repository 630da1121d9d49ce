"""A distilled set comes back from every form in which it may be handed over, on the real set's pixels and classes."""

import shutil

import pytest
import torch

from stillhouse.data import ObjectData, load_data
from stillhouse.data.distilled import read_card, read_distilled
from stillhouse.data.export import TENSORS, Card, save_class_folders, save_distilled_set
from stillhouse.errors import UserError
from stillhouse.modules.distilled import DistilledSet

NAMES = ("cat", "dog", "tree frog")


def real(channels=3, side=6, names=NAMES):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, channels, side, side), generator=generator, dtype=torch.uint8)
    part = {"pixel_values": images, "labels": torch.arange(60) % 3}
    data = ObjectData.from_object({"train": part, "test": part}).load()
    object.__setattr__(data.facts, "class_names", names)
    return data


def handed_over(data, place, **fields):
    """Six images of three classes, exported."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(256, (6, *data.facts.inputs["pixel_values"]), generator=generator).float() / 255
    space = {"mean": data.scale.mean, "std": data.scale.std}
    labels = fields.pop("labels", torch.arange(3).repeat_interleave(2))
    found = DistilledSet(data.from_unit(levels), labels, **fields, **space)
    card = Card(method="dm", source="pets", seed=0, protocol={"epochs": 3}, class_names=NAMES, data={"kind": "digits"})
    save_distilled_set(found, place, card)
    return found


def without_tensors(place):
    (place / TENSORS).unlink()
    return place


@pytest.mark.parametrize("form", ["tensors", "dataset", "within", "folders", "bare folders"])
def test_every_form_gives_the_set_back(form, tmp_path):
    data = real()
    given = handed_over(data, tmp_path / "set")
    place = tmp_path / "set"
    if form != "tensors":
        without_tensors(place)
    if form == "dataset":
        pytest.importorskip("datasets")
        place = place / "dataset"
    elif form == "within":
        pytest.importorskip("datasets")
        shutil.rmtree(place / "images")
    elif form == "folders":
        shutil.rmtree(place / "dataset", ignore_errors=True)
    elif form == "bare folders":
        place = place / "images"
    found = read_distilled(place, data)
    torch.testing.assert_close(found.images.data, given.images.data, rtol=0, atol=1e-5 if form != "tensors" else 0)
    assert torch.equal(found.labels, given.labels)
    assert found.num_classes == 3


def test_soft_labels_come_back_from_tensors_and_from_a_hugging_face_directory(tmp_path):
    pytest.importorskip("datasets")
    data, values = real(), torch.randn(6, 3)
    fields = {"labels": values, "target": "logits", "classes": torch.arange(3).repeat_interleave(2), "lr": 0.02}
    handed_over(data, tmp_path / "set", **fields)
    found = read_distilled(tmp_path / "set", data)
    assert (found.target, found.lr.item()) == ("logits", pytest.approx(0.02))
    assert torch.equal(found.labels, values)
    again = read_distilled(without_tensors(tmp_path / "set"), data)
    torch.testing.assert_close(again.labels, values)
    assert again.class_of.tolist() == [0, 0, 1, 1, 2, 2]


def test_pixels_of_another_scale_become_those_of_the_real_set(tmp_path):
    data = real()
    given = handed_over(data, tmp_path / "set")
    other = DistilledSet(given.pixels * 2 - 1, given.labels, mean=[0.5] * 3, std=[0.5] * 3)
    save_distilled_set(other, tmp_path / "other", Card("dm", "pets", 0, {}, class_names=NAMES))
    torch.testing.assert_close(
        read_distilled(tmp_path / "other", data).images.data, given.images.data, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["0_cat", "1_dog", "2_tree_frog"], [0, 1, 2]),
        (["tree_frog", "cat", "dog"], [2, 0, 1]),
        (["1_tree frog", "2_cat", "3_dog"], [2, 0, 1]),
        (["2", "0", "1"], [2, 0, 1]),
        (["b", "a", "c"], [1, 0, 2]),
        (["dog"], [1]),
    ],
)
def test_folders_are_matched_with_the_real_classes(folders, labels, tmp_path):
    data = real()
    for number, name in enumerate(folders):
        picture = torch.full((1, 3, 6, 6), number / 4)
        save_class_folders(tmp_path / "one", picture, torch.tensor([0]))
        (tmp_path / "set").mkdir(exist_ok=True)
        shutil.move(tmp_path / "one" / "0_0", tmp_path / "set" / name)
        (tmp_path / "one").rmdir()
    found = read_distilled(tmp_path / "set", data)
    assert found.labels.tolist() == sorted(labels)
    shades = [round(float(image.mean()) * 4) for image in found.pixels]
    assert [labels[shade] for shade in shades] == sorted(labels)


def test_grey_pictures_serve_a_set_in_colour_and_only_grey_ones_a_grey_set(tmp_path):
    grey, colour = real(channels=1), real()
    handed_over(grey, tmp_path / "grey")
    handed_over(colour, tmp_path / "colour")
    for name in ("grey", "colour"):
        without_tensors(tmp_path / name)
    found = read_distilled(tmp_path / "grey" / "images", colour)
    assert torch.equal(found.pixels[:, 0], found.pixels[:, 2])
    with pytest.raises(UserError, match=r"are in colour and those of .* are grey"):
        read_distilled(tmp_path / "colour" / "images", grey)


def test_the_card_says_what_it_stands_for_and_a_foreign_readme_nothing(tmp_path):
    handed_over(real(), tmp_path / "set")
    card = read_card(tmp_path / "set")
    assert (card["source"], card["data"], card["protocol"]) == ("pets", {"kind": "digits"}, {"epochs": 3})
    for text in ("hello", "---\na: [\n---\n", "---\na: 1\n---\n", "---\n"):
        (tmp_path / "README.md").write_text(text)
        assert read_card(tmp_path) == {}
    assert read_card(tmp_path / "nowhere") == {}


def broken(place, how):
    data = real()
    match how:
        case "missing":
            return place / "nowhere", data
        case "empty":
            (place / "set").mkdir()
            return place / "set", data
        case "size":
            handed_over(real(side=8), place / "set")
        case "classes":
            handed_over(data, place / "set")
            (without_tensors(place / "set") / "images" / "4_mouse").mkdir()
            (place / "set/images/0_cat").rename(place / "set/images/7_horse")
            return place / "set" / "images", data
        case "picture":
            handed_over(data, place / "set")
            next((without_tensors(place / "set") / "images" / "0_cat").iterdir()).write_bytes(b"no picture")
            return place / "set" / "images", data
        case "sizes":
            handed_over(data, place / "set")
            handed_over(real(side=8), place / "large")
            first = next((place / "large" / "images" / "0_cat").iterdir())
            shutil.copy(first, without_tensors(place / "set") / "images" / "0_cat" / "9.png")
            return place / "set" / "images", data
        case "tensors":
            (place / "set").mkdir()
            (place / "set" / TENSORS).write_bytes(b"nothing")
        case "dataset":
            pytest.importorskip("datasets")
            (place / "set").mkdir()
            (place / "set" / "state.json").write_text("{}")
        case "features":
            handed_over(data, place / "set", labels=torch.randn(6, 4), target="features")
        case "no classes":
            return place, load_data((torch.rand(20, 3), torch.rand(20)))
    return place / "set", data


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing", "There is no directory"),
        ("empty", "holds no distilled set: neither"),
        ("size", "are 8x8 with 3 channels and those of .* 6x6 with 3 channels"),
        ("classes", "are 4, and .* has 3 of other names"),
        ("picture", "is not a readable image"),
        ("sizes", "have different sizes"),
        ("tensors", "cannot be read as a distilled set"),
        ("dataset", "cannot be read as a Hugging Face data set"),
        ("features", "has no class labels"),
        ("no classes", "has no images with class labels"),
    ],
)
def test_bad_input_gives_one_sentence(how, sentence, tmp_path):
    place, data = broken(tmp_path, how)
    with pytest.raises(UserError, match=sentence) as caught:
        read_distilled(place, data)
    assert "\n" not in str(caught.value)
