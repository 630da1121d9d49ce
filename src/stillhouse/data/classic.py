"""The classic image sets: scikit-learn's digits (bundled), and MNIST, Fashion-MNIST and CIFAR read from local files.

The directory is the field ``path``, or one found by name in the directory that ``$STILLHOUSE_DATA`` names. Every file's
content is checked against its known sum.
"""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.data.blank import Blank
from stillhouse.data.dataset import Data, ImageSpec
from stillhouse.data.files import Files, LocalFiles
from stillhouse.data.sources import Memory
from stillhouse.data.splits import carve
from stillhouse.errors import UnreachableError, UserError

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Digits(ImageSpec):
    """scikit-learn's 1797 handwritten digits, 8 x 8 with 17 grey levels; fixed 60/20/20 split, class by class."""

    kind: ClassVar[str] = "digits"

    def load(self) -> Data:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]
        labels = torch.from_numpy(bunch.target).long()
        content = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        parts = carve(labels, len(labels), {"train": 0.6, "validation": 0.2, "test": 0.2}, "digits")
        whole = self.sized({"pixel_values": images, "labels": labels}, levels=16)
        sources = {name: Memory(whole).select(index) for name, index in parts.items()}
        scale = self.scale_of(sources["train"], levels=16 if whole["pixel_values"] is images else 255)
        return self.assemble(sources, [content], class_names=[str(digit) for digit in range(10)], scale=scale)


class LocalImages(LocalFiles, ImageSpec):
    """An image set in files of a known form; a fixed tenth of the training images, class by class, is for validation."""

    shape: ClassVar[tuple[int, int, int]]
    """Shape of an image."""
    classes: ClassVar[int] = 10
    """Number of classes."""
    counts: ClassVar[tuple[int, int]]
    """Images of the official training and test splits."""

    def foreseen(self) -> Data | None:
        train, test = self.counts
        channels, *size = self.shape
        sides = size if self.image_size is None else [self.image_size] * 2
        form = {"pixel_values": ((channels, *sides), torch.uint8)}
        counts = {"train": train - train // 10, "validation": train // 10, "test": test}
        sources = {name: Blank(count, form, self.number_of_classes) for name, count in counts.items()}
        scale = self.scale_of(sources["train"])
        return self.assemble(sources, ["blank"], num_classes=self.number_of_classes, scale=scale)

    @property
    def number_of_classes(self) -> int:
        """Number of classes that the labels say."""
        return self.classes

    def read(self, files: Files) -> tuple[dict[str, tuple[Tensor, Tensor]], Sequence[str]] | None:
        """Images (bytes) and labels of "train" and "test", and the class names; ``None`` if no known layout is there."""
        raise NotImplementedError

    def load(self) -> Data:
        files = Files(self)
        found = self.read(files)
        if found is None:
            raise UnreachableError(files.missing())
        parts, class_names = found
        held = {n: self.sized({"pixel_values": x, "labels": y.long()}) for n, (x, y) in parts.items()}
        labels = held["train"]["labels"]
        carved = carve(labels, len(labels), {"train": 0.9, "validation": 0.1}, self.kind)
        sources = {name: Memory(held["train"]).select(index) for name, index in carved.items()}
        sources["test"] = Memory(held["test"])
        scale = self.scale_of(sources["train"])
        return self.assemble(sources, files.read_sums, class_names=class_names, scale=scale)


def _arrays(files: Files, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of a checked ``.npz`` file, read without pickle."""
    content = files.read(name)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError):
        raise UserError(f"{files.find(name)} is not a readable .npz file of plain arrays; get it again.") from None


def _idx(files: Files) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Images and labels of the four idx files, if all are there."""
    if not all(files.find(name) for name in IDX):
        return None
    arrays = [_idx_array(files, name) for name in IDX]
    return {"train": (arrays[0][:, None], arrays[1]), "test": (arrays[2][:, None], arrays[3])}


def _idx_array(files: Files, name: str) -> Tensor:
    content = files.read(name) or b""
    dimensions = 3 if "images" in name else 1
    head, body = content[: 4 + 4 * dimensions], content[4 + 4 * dimensions :]
    shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4)]
    if head[:4] != bytes([0, 0, 8, dimensions]) or len(body) != math.prod(shape):
        raise UserError(f"{files.find(name)} is not an idx file of bytes; get it again.")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


class MNIST(LocalImages):
    """Handwritten digits, 28 x 28 grey, 54 000 / 6 000 / 10 000 (LeCun et al. 1998); official idx files, gzipped or not."""

    kind: ClassVar[str] = "mnist"
    shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    counts: ClassVar[tuple[int, int]] = (60_000, 10_000)
    folders: ClassVar[tuple[str, ...]] = ("mnist", "MNIST/raw", "mnist/raw", "MNIST")
    origin: ClassVar[str] = "the four idx files of MNIST from https://ossci-datasets.s3.amazonaws.com/mnist/"
    sums: ClassVar[dict[str, tuple[str, ...]]] = {
        IDX[0]: ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",),
        IDX[1]: ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",),
        IDX[2]: ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",),
        IDX[3]: ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",),
    }

    def read(self, files: Files) -> tuple[dict[str, tuple[Tensor, Tensor]], Sequence[str]] | None:
        parts = _idx(files)
        return None if parts is None else (parts, [str(digit) for digit in range(10)])


class FashionMNIST(LocalImages):
    """Clothing, 28 x 28 grey, 54 000 / 6 000 / 10 000 (arXiv 1708.07747).

    From the official idx files, or from ``fashion_mnist.npz``, which holds the same 70 000 images divided otherwise.
    """

    kind: ClassVar[str] = "fashion-mnist"
    shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    counts: ClassVar[tuple[int, int]] = (60_000, 10_000)
    folders: ClassVar[tuple[str, ...]] = ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "FashionMNIST")
    origin: ClassVar[str] = "the four idx files of https://github.com/zalandoresearch/fashion-mnist"
    sums: ClassVar[dict[str, tuple[str, ...]]] = {
        IDX[0]: ("f4a8712d7a061bf5bd6d2ca38dc4d50a",),
        IDX[1]: ("bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",),
        IDX[2]: ("8181f5470baa50b63fa0f6fddb340f0a",),
        IDX[3]: ("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",),
        "fashion_mnist.npz": ("53cd95437b9e27b5a6e49a3a71c86115bb724f65c8a309ec130d19730d5601a9",),
    }

    def read(self, files: Files) -> tuple[dict[str, tuple[Tensor, Tensor]], Sequence[str]] | None:
        names = ("T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag", "Ankle boot")
        class_names = [*names[0].split(), names[1]]
        parts = _idx(files)
        if parts is None and (arrays := _arrays(files, "fashion_mnist.npz")) is not None:
            parts = _from_arrays(arrays)
            parts = {name: (images[:, None], labels) for name, (images, labels) in parts.items()}
        return None if parts is None else (parts, class_names)


class CIFAR10(LocalImages):
    """Small colour photographs, 32 x 32, ten classes (Krizhevsky 2009).

    From the official binary version (its archive or its extracted directory; the Python version holds pickles and is
    not read), or from ``cifar10_subset.npz`` with 10 000 training and 2 000 test images of the official splits.
    """

    kind: ClassVar[str] = "cifar10"
    shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    counts: ClassVar[tuple[int, int]] = (50_000, 10_000)
    folders: ClassVar[tuple[str, ...]] = ("cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", ".")
    origin: ClassVar[str] = "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
    archive: ClassVar[str] = "cifar-10-binary.tar.gz"
    sums: ClassVar[dict[str, tuple[str, ...]]] = {
        "cifar-10-binary.tar.gz": ("c32a1d4ab5d03f1284b67883e8d87530",),
        "data_batch_1.bin": ("5dd7e06a14cb22eb9f671a540d1b7c25",),
        "data_batch_2.bin": ("5ea93a67294ea407fff1d09f752e9692",),
        "data_batch_3.bin": ("942cd6a4bcdd0dd3c604fbe906cb4421",),
        "data_batch_4.bin": ("ae636b3ba5c66a11e91e8cb52e771fcb",),
        "data_batch_5.bin": ("53f37980c15c3d472c316c40844f3f0d",),
        "test_batch.bin": ("803d5f7f4d78ea53de84dbe85f74fb6d",),
        "cifar10_subset.npz": ("3959f387a75dec74d81debd898a12569186a6c6822810017e543014b31df2caa",),
    }

    def read(self, files: Files) -> tuple[dict[str, tuple[Tensor, Tensor]], Sequence[str]] | None:
        class_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        train = [f"data_batch_{number}.bin" for number in range(1, 6)]
        contents = _binary(files, self.archive, [*train, "test_batch.bin"])
        if contents is not None:
            images, labels = _records(contents, label_bytes=1)
            parts = {
                "train": (torch.cat(images[:-1]), torch.cat(labels[:-1])[:, 0]),
                "test": (images[-1], labels[-1][:, 0]),
            }
            return parts, class_names
        arrays = _arrays(files, "cifar10_subset.npz")
        return None if arrays is None else (_from_arrays(arrays), class_names)


class CIFAR100(LocalImages):
    """Small colour photographs, 32 x 32, 100 classes in 20 groups (Krizhevsky 2009).

    From the official binary version, or from ``cifar100_subset.npz`` with 8 000 training and 2 000 test images.
    """

    kind: ClassVar[str] = "cifar100"
    shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    counts: ClassVar[tuple[int, int]] = (50_000, 10_000)
    classes: ClassVar[int] = 100
    folders: ClassVar[tuple[str, ...]] = ("cifar100", "cifar-100-binary", "cifar100/cifar-100-binary", ".")
    origin: ClassVar[str] = "cifar-100-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
    archive: ClassVar[str] = "cifar-100-binary.tar.gz"
    sums: ClassVar[dict[str, tuple[str, ...]]] = {
        "cifar-100-binary.tar.gz": ("03b5dce01913d631647c71ecec9e9cb8",),
        "train.bin": ("6172c7755cfe09b2fe270c85cebc1b15",),
        "test.bin": ("4499cfba6c016c1be1438163640a0898",),
        "cifar100_subset.npz": ("27a3e4994510f80881c7aa10babbe0bb1ea96333dfad88832fe4217fb0309d5e",),
    }

    labels: Literal["fine", "coarse"] = "fine"
    """The 100 classes, or the 20 groups they belong to."""

    @property
    def number_of_classes(self) -> int:
        return self.classes if self.labels == "fine" else 20

    def read(self, files: Files) -> tuple[dict[str, tuple[Tensor, Tensor]], Sequence[str]] | None:
        fine = self.labels == "fine"
        class_names = (FINE_NAMES if fine else COARSE_NAMES).split()
        contents = _binary(files, self.archive, ["train.bin", "test.bin"])
        if contents is not None:
            images, labels = _records(contents, label_bytes=2)
            column = 1 if fine else 0
            return {n: (images[i], labels[i][:, column]) for i, n in enumerate(("train", "test"))}, class_names
        arrays = _arrays(files, "cifar100_subset.npz")
        return None if arrays is None else (_from_arrays(arrays, "" if fine else "_coarse"), class_names)


def _from_arrays(arrays: dict[str, np.ndarray], suffix: str = "") -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (torch.from_numpy(arrays[f"x_{name}"]), torch.from_numpy(arrays[f"y_{name}{suffix}"]))
        for name in ("train", "test")
    }


def _binary(files: Files, archive: str, names: Sequence[str]) -> list[bytes] | None:
    """The record files of a CIFAR binary version, from its directory or straight from its archive."""
    if all(files.find(name) for name in names):
        return [files.read(name) or b"" for name in names]
    content = files.read(archive)
    if content is None:
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            extracted = [tar.extractfile(members[name]) for name in names]
            return [member.read() for member in extracted if member is not None]
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error):
        raise UserError(
            f"{files.find(archive)} is not a readable archive of {', '.join(names)}; get it again."
        ) from None


def _records(contents: Sequence[bytes], label_bytes: int) -> tuple[list[Tensor], list[Tensor]]:
    images, labels = [], []
    for content in contents:
        size = label_bytes + 3072
        if not content or len(content) % size:
            raise UserError(
                f"A CIFAR file holds records of {size} bytes, and {len(content)} bytes are no whole number."
            )
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
        images.append(records[:, label_bytes:].reshape(-1, 3, 32, 32))
        labels.append(records[:, :label_bytes])
    return images, labels


FINE_NAMES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle"
    " caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant"
    " flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man"
    " maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree"
    " plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper"
    " snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train"
    " trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
COARSE_NAMES = (
    "aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices"
    " household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes"
    " large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees"
    " vehicles_1 vehicles_2"
)
