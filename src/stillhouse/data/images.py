"""Images of any library as byte tensors, and directories with one sub-directory per class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from stillhouse.data.dataset import Carving, Data, ImageSpec
from stillhouse.data.pixels import at_size
from stillhouse.data.sources import MEMORY_LIMIT, InMemory, Rows, Source, settle
from stillhouse.data.tables import SPLIT_NAMES
from stillhouse.errors import UserError

SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])


def as_bytes(image: Any, channels: int | None = None, size: int | None = None) -> Tensor:
    """A PIL image as a byte tensor (channels, height, width).

    Args:
        image: the image.
        channels: 1 for grey, 3 for colour; by default grey stays grey and everything else becomes colour.
        size: side of the square it is brought to.
    """
    if channels is None:
        channels = 1 if image.mode in ("1", "L") else 3
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    pixels = torch.from_numpy(array).view(*array.shape[:2], channels).permute(2, 0, 1).contiguous()
    return pixels if size is None else at_size(pixels[None], size, 255)[0]


UNREADABLE = "unreadable"
"""Name under which a batch says which of its images could not be read."""


class ImageFiles(Rows):
    """Image files, with labels or without.

    With ``tolerant`` a file that cannot be read is a black image of ``size``, and ``unreadable`` says so.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor | None,
        channels: int | None,
        size: int | None,
        *,
        tolerant: bool = False,
    ) -> None:
        self.paths, self._labels, self.channels, self.size = list(paths), labels, channels, size
        self.tolerant = tolerant

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> Tensor | None:
        return self._labels

    def row(self, position: int) -> dict[str, Tensor]:
        from PIL import Image, UnidentifiedImageError

        path = self.paths[position]
        found: dict[str, Tensor] = {}
        try:
            with Image.open(path) as image:
                found["pixel_values"] = as_bytes(image, self.channels, self.size)
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
            if not self.tolerant or self.size is None:
                raise UserError(f"{path} is not a readable image.") from None
            found["pixel_values"] = torch.zeros(self.channels or 3, self.size, self.size, dtype=torch.uint8)
            found[UNREADABLE] = torch.tensor(True)
        if self.tolerant:
            found.setdefault(UNREADABLE, torch.tensor(False))
        if self._labels is not None:
            found["labels"] = self._labels[position]
        return found


class FolderData(ImageSpec, Carving):
    """Images in one sub-directory per class, all together or below train/, validation/ and test/; or images without labels.

    Missing splits are set aside class by class by a fixed hash order.
    """

    kind: ClassVar[str] = "folder"

    path: str
    """The directory."""
    channels: Literal[1, 3] = 3
    """1 reads grey images, 3 colour."""
    in_memory: InMemory = "auto"
    """Read all images once; "auto" does for splits below 2 GiB."""
    labels: Literal["auto"] | bool = "auto"
    """Sub-directories are classes; no takes every image below the directory without a label, however it lies. "auto" is
    no where the directory holds images and no sub-directories."""
    skip_unreadable: bool = False
    """Go on where a file cannot be read; whoever uses the data is told which, and may leave them out. Needs image_size."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            raise ValueError("write the directory after the colon, as in folder:PATH")
        return cls(path=text)

    @model_validator(mode="after")
    def _sized_where_skipped(self) -> Self:
        if self.skip_unreadable and self.image_size is None:
            raise ValueError(
                "skip_unreadable needs image_size: what stands for a file that cannot be read has that size"
            )
        return self

    @property
    def title(self) -> str:
        return f"folder:{self.path}"

    def load(self) -> Data:
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise UserError("Image files need pillow: pip install 'stillhouse[knowledge]'.") from None
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise UserError(f"There is no directory {self.path}.")
        roots = {
            split: root / name
            for split, names in SPLIT_NAMES.items()
            for name in reversed(names)
            if (root / name).is_dir()
        }
        roots = roots if "train" in roots else {"train": root}
        class_names = _directories(roots["train"])
        labelled = self.labels
        if labelled == "auto":
            labelled = bool(class_names) or not _images(roots["train"])
        if labelled and not class_names:
            raise UserError(
                f"The directory {roots['train']} has no sub-directories; it needs one per class, or images without labels."
            )
        sources: dict[str, Source] = {}
        sums = []
        for split, place in roots.items():
            paths, labels = self._listing(place, class_names) if labelled else (_images(place), None)
            if not paths:
                raise UserError(f"The directory {place} holds no images.")
            sums.append(_content(paths, place))
            size, tolerant = self.image_size, self.skip_unreadable
            sources[split] = ImageFiles(paths, labels, self.channels, size, tolerant=tolerant)
        carved = self.carved(sources, sources["train"].labels)
        held = {name: settle(source, self.in_memory) for name, source in carved.items()}
        return self.assemble(
            held,
            sums,
            task="classification" if labelled else "unlabelled",
            class_names=class_names if labelled else (),
            scale=self.scale_of(held["train"]),
            aside=frozenset({UNREADABLE}) if self.skip_unreadable else frozenset(),
        )

    def _listing(self, place: Path, class_names: Sequence[str]) -> tuple[list[Path], Tensor]:
        paths, labels = [], []
        for name in _directories(place):
            if name not in class_names:
                raise UserError(f"The class {name!r} in {place} is not among the training classes.")
            files = _images(place / name)
            if not files:
                raise UserError(f"The directory {place / name} holds no images.")
            paths += files
            labels += [class_names.index(name)] * len(files)
        return paths, torch.tensor(labels)


def _directories(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(place: Path) -> list[Path]:
    """All image files below a directory, in order."""
    files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    return [path for path in files if not path.name.startswith(".") and path.is_file()]


def _content(paths: Sequence[Path], root: Path) -> str:
    """Sum over the files' names and contents; over names and sizes where there is too much to read twice."""
    sizes = [path.stat().st_size for path in paths]
    whole = sum(sizes) <= MEMORY_LIMIT
    digest = hashlib.sha256()
    for path, size in zip(paths, sizes, strict=True):
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        if whole:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
