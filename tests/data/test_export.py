"""Exports of a distilled set are read back by the libraries they are written for."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import save_file

from stillhouse.data.export import (
    Card,
    DistilledExport,
    eight_bit,
    load_tensors,
    save_class_folders,
    save_distilled_set,
    save_huggingface,
    save_picture,
    save_tensors,
)
from stillhouse.errors import UserError
from stillhouse.modules.distilled import DistilledSet

Image = pytest.importorskip("PIL.Image", reason="Pillow writes the pictures")


@pytest.fixture
def distilled():
    torch.manual_seed(0)
    images, labels = torch.randn(12, 3, 5, 4), torch.arange(12) % 3
    return DistilledSet.from_samples(
        images,
        labels,
        torch.arange(6),
        soft_labels=torch.randn(6, 3),
        target="logits",
        learn_labels=True,
        lr=0.02,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        provenance={"method": "DATM", "version": 1},
    )


@pytest.fixture
def card():
    return Card(
        method="DATM",
        source="CIFAR-10",
        seed=3,
        protocol={"network": "convnet", "steps": 300, "augmentation": "color_crop: yes"},
        results={"accuracy": 0.5},
        class_names=("cat", "dog, large", "tree/bush"),
    )


def pixels_of(path):
    return np.asarray(Image.open(path))


def front_matter(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("---\n")
    front, rest = text[4:].split("\n---\n", 1)
    return YAML(typ="safe").load(front), rest


def test_eight_bits_are_the_nearest_levels():
    grey = torch.linspace(0, 1, 10_001).view(1, 1, 1, -1)
    levels = eight_bit(grey)
    assert levels.dtype == np.uint8
    assert np.abs(levels.ravel() / 255 - grey.numpy().ravel()).max() <= 1 / 510 + 1e-7
    every = torch.arange(256).view(1, 1, 16, 16) / 255
    assert np.array_equal(eight_bit(every).ravel(), np.arange(256)), "8-bit images come through unchanged"


def test_tensors_come_back_without_loss(distilled, tmp_path):
    with torch.no_grad():
        distilled.images[0] = 40.0
    save_tensors(tmp_path / "set.safetensors", distilled, class_names=("a", "b", "c"))
    again = load_tensors(tmp_path / "set.safetensors")
    state = again.state_dict()
    assert state.keys() == distilled.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in distilled.state_dict().items())
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in distilled.named_parameters()]
    assert (again.target, again.provenance, again.num_classes) == ("logits", distilled.provenance, 3)
    assert torch.equal(again.by_class, distilled.by_class)
    with safe_open(tmp_path / "set.safetensors", "pt") as file:
        assert json.loads(file.metadata()["stillhouse"])["class_names"] == ["a", "b", "c"]


def test_hard_and_unlabelled_sets_come_back_too(tmp_path):
    for original in (
        DistilledSet.from_noise(4, 2, (1, 3, 3)),
        DistilledSet(torch.randn(5, 3, 4, 4), torch.randn(5, 8), target="features", learn_labels=True),
    ):
        save_tensors(tmp_path / "set.safetensors", original)
        again = load_tensors(tmp_path / "set.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(original.parameters(), again.parameters(), strict=True))
        assert torch.equal(original.labels, again.labels)
        assert (again.target, again.lr, again.images_per_class) == (original.target, None, original.images_per_class)


def test_everything_is_written_and_read_by_its_library(distilled, card, tmp_path):
    datasets = pytest.importorskip("datasets", reason="writes and reads the Hugging Face data set")
    paths = save_distilled_set(distilled, tmp_path / "out", card)
    levels = eight_bit(distilled.pixels)

    loaded = datasets.load_from_disk(str(paths["dataset"]))
    assert loaded.features["label"].names == ["cat", "dog, large", "tree/bush"]
    assert loaded["label"] == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(np.stack([np.asarray(image) for image in loaded["image"]]), levels)
    assert torch.equal(torch.tensor(loaded["logits"]), distilled.labels)

    folders = sorted(paths["folders"].iterdir())
    assert [folder.name for folder in folders] == ["0_cat", "1_dog__large", "2_tree_bush"]
    files = [file for folder in folders for file in sorted(folder.iterdir())]
    assert np.array_equal(np.stack([pixels_of(file) for file in files]), levels)

    front, text = front_matter(paths["card"])
    facts = front["distilled"]
    assert facts["method"] == "DATM"
    assert facts["labels"] == "logits"
    assert facts["learned_rate"] == 0.02
    assert facts["protocol"] == card.protocol
    assert facts["seed"] == 3
    assert facts["bytes"] == distilled.bytes
    assert facts["bytes_png"] == sum(file.stat().st_size for file in files)
    assert facts["clipped"] == pytest.approx(distilled.clipped, rel=1e-3)
    assert facts["images_per_class"] == 2
    assert facts["class_names"] == list(card.class_names)
    assert "rounded to 8 bits, which moves them by at most 1/510" in text
    assert "train on their softmax" in text


def test_the_directory_loads_as_an_image_folder(distilled, card, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="reads the folders")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    save_distilled_set(distilled, tmp_path / "out", card)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["label"] == [0, 0, 1, 1, 2, 2], "neither the picture nor the arrow files count"
    assert np.array_equal(np.stack([np.asarray(image) for image in loaded["image"]]), eight_bit(distilled.pixels))


def test_an_export_replaces_its_predecessor_and_nothing_else(distilled, card, tmp_path):
    pytest.importorskip("datasets", reason="writes the Hugging Face data set")
    DistilledExport(distilled, card).save(tmp_path / "out")
    before = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    smaller = DistilledSet(distilled.images[:3], torch.tensor([0, 1, 2]))
    DistilledExport(smaller, card).save(tmp_path / "out")
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    assert (len(before), len(after)) == (7, 4)
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "photo.png").touch()
    with pytest.raises(UserError, match="images is not empty"):
        DistilledExport(smaller, card).save(tmp_path / "mine")
    assert (tmp_path / "mine" / "images" / "photo.png").exists()


def test_unlabelled_and_many_channelled_sets_get_what_fits(tmp_path, card):
    pytest.importorskip("datasets", reason="writes the Hugging Face data set")
    nameless = Card(method="KRR-ST", source="digits", seed=0, protocol={})
    features = DistilledSet(torch.rand(5, 1, 4, 4), torch.randn(5, 8), target="features")
    assert sorted(save_distilled_set(features, tmp_path / "a", nameless)) == ["card", "dataset", "picture", "tensors"]
    front, text = front_matter(tmp_path / "a" / "README.md")
    assert "configs" not in front
    assert "images_per_class" not in front["distilled"]
    assert "per class" not in text
    spectral = DistilledSet.from_noise(2, 1, (7, 4, 4))
    assert sorted(save_distilled_set(spectral, tmp_path / "b", nameless)) == ["card", "tensors"]
    assert "8 bits" not in (tmp_path / "b" / "README.md").read_text()


def test_a_hundred_classes_keep_their_order_in_folders(tmp_path):
    pixels, classes = torch.rand(101, 1, 2, 2), torch.arange(101)
    save_class_folders(tmp_path / "images", pixels, classes)
    folders = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert folders[2] == "002_2"
    assert folders[100] == "100_100"
    assert np.array_equal(pixels_of(tmp_path / "images" / "100_100" / "100.png"), eight_bit(pixels)[100, :, :, 0])


def test_the_picture_has_a_row_for_each_class(tmp_path):
    pixels = torch.zeros(5, 1, 2, 2)
    pixels[:, 0, 0, 0] = torch.arange(5) / 255
    save_picture(tmp_path / "p.png", pixels, torch.tensor([1, 0, 1, 0, 1]), columns=2, zoom=3)
    drawn = pixels_of(tmp_path / "p.png")
    assert drawn.shape == (2 + 2 * 8, 2 + 2 * 8)
    assert drawn[2:5, 2:5].tolist() == [[1] * 3] * 3
    assert drawn[2, 10] == 3
    assert drawn[10, 2] == 0
    assert drawn[10, 10] == 2
    assert (drawn[:2] == 255).all()
    assert (drawn[:, 8:10] == 255).all()
    save_picture(tmp_path / "q.png", torch.rand(7, 3, 8, 8), columns=3)
    assert pixels_of(tmp_path / "q.png").shape == (2 + 3 * 66, 2 + 3 * 66, 3)
    save_picture(tmp_path / "r.png", torch.rand(7, 1, 8, 8), torch.arange(7), max_rows=2, zoom=1)
    assert pixels_of(tmp_path / "r.png").shape == (2 + 2 * 10, 2 + 10)


def test_bad_input_is_told_in_a_sentence(distilled, card, tmp_path):
    with pytest.raises(UserError, match=r"pixel values in \[0, 1\], not in \[-1, 1\]; undo standardisation"):
        eight_bit(torch.tensor([[[[-1.0, 1.0]]]]))
    with pytest.raises(UserError, match=r"in \[0, 1\], not in \[nan, nan\]"):
        eight_bit(torch.full((1, 1, 2, 2), torch.nan))
    with pytest.raises(UserError, match="one or three channels"):
        save_picture(tmp_path / "p.png", torch.rand(2, 5, 4, 4))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").touch()
    with pytest.raises(UserError, match="full is not empty"):
        save_class_folders(tmp_path / "full", torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="3 classes need as many different names, not 2"):
        save_distilled_set(distilled, tmp_path / "o", Card("x", "y", 0, {}, class_names=("a", "a", "b")))
    with pytest.raises(UserError, match=r"missing\.safetensors cannot be read as a distilled set"):
        load_tensors(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be read as a distilled set"):
        load_tensors(tmp_path / "broken.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors is no distilled set"):
        load_tensors(tmp_path / "other.safetensors")


def test_missing_libraries_name_the_extra_after_the_tensors_are_safe(distilled, card, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[datasets\]'"):
        save_huggingface(tmp_path / "d", distilled.pixels, distilled.class_of)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"pip install 'stillhouse\[datasets\]'"):
        save_distilled_set(distilled, tmp_path / "out", card)
    assert torch.equal(load_tensors(tmp_path / "out" / "distilled.safetensors").images, distilled.images)
