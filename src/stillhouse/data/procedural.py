"""Image sets with known factors of variation, for disentanglement: drawn here, or the published dSprites.

Every combination of the factors' values is one image. Batches carry the values as ``sources`` (long, one column per
factor, in the order of ``facts.factors``); there are no labels.
"""

from __future__ import annotations

import hashlib
import math
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.data.blank import Blank
from stillhouse.data.dataset import Data, DataSpec, ImageSpec, PixelSpec
from stillhouse.data.pixels import PixelSpace
from stillhouse.data.sources import InMemory, Memory, Seeds, Source, settle
from stillhouse.data.splits import carve
from stillhouse.errors import UnreachableError, UserError
from stillhouse.offline import is_offline


class FactorSpec(PixelSpec):
    """A set of images of every combination of some factors' values."""

    pixels: PixelSpace = "unit"
    held_out: float = Field(0.1, ge=0, lt=0.5)
    """Share of the combinations set aside for validation, and again for testing; with 0 all are for training."""
    in_memory: InMemory = "auto"
    """Draw everything once; "auto" does below 2 GiB, larger sets are drawn batch by batch."""

    def divided(self, whole: Source, factors: Mapping[str, int], sums: list[str], levels: float = 255) -> Data:
        """The set, with the combinations divided in a fixed way."""
        shares = {"train": 1 - 2 * self.held_out, "validation": self.held_out, "test": self.held_out}
        parts = carve(None, len(whole), shares, self.kind)
        sources = {name: settle(whole.select(index), self.in_memory) for name, index in parts.items()}
        scale = self.scale_of(sources["train"], levels)
        return self.assemble(sources, sums, task="unlabelled", factors=factors, scale=scale)


class DrawnSpec(FactorSpec):
    """A set that is drawn from its factors."""

    @abstractmethod
    def factors(self) -> dict[str, int]:
        """Number of values of each factor, by name, the last varying fastest."""

    @abstractmethod
    def draw(self, sources: Int[Tensor, "batch factors"]) -> UInt8[Tensor, "batch channels size size"]:
        """The images of the given factor values."""

    def load(self) -> Data:
        return self.divided(Drawn(self), self.factors(), [])


class Drawn(Source):
    """All combinations of a set's factors, drawn when they are fetched."""

    def __init__(self, spec: DrawnSpec) -> None:
        self.spec, self.sizes = spec, list(spec.factors().values())

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        sources = torch.stack(torch.unravel_index(index, self.sizes), dim=1)
        return {"pixel_values": self.spec.draw(sources), "sources": sources}


class Sprites(DrawnSpec):
    """White shapes on black with the factors of dSprites (shape, scale, orientation, x, y), soft-edged.

    The full grid of dSprites is ``scales: 6, orientations: 40, positions: 32`` (737 280 images). Unlike there, the
    orientations divide the full turn without drawing 0 and 360 degrees both. A square looks alike after a quarter turn
    and an ellipse after half a turn.
    """

    kind: ClassVar[str] = "sprites"

    size: Literal[16, 32, 64] = 32
    """Side of the images in pixels."""
    scales: int = Field(3, ge=1, le=6)
    """Number of sizes, evenly from half to full."""
    orientations: int = Field(8, ge=1, le=40)
    """Number of orientations, evenly around the full turn."""
    positions: int = Field(8, ge=1, le=32)
    """Number of places along each axis."""

    def factors(self) -> dict[str, int]:
        return {
            "shape": 3,
            "scale": self.scales,
            "orientation": self.orientations,
            "x": self.positions,
            "y": self.positions,
        }

    def draw(self, sources: Int[Tensor, "batch 5"]) -> UInt8[Tensor, "batch 1 size size"]:
        shape, scale, orientation, x, y = (column.view(-1, 1, 1) for column in sources.unbind(1))
        radius = 0.2 * spread(scale, self.scales, 0.5, 1.0)
        angle = 2 * math.pi / self.orientations * orientation
        u, v = centred(self.size, spread(x, self.positions, 0.22, 0.78), spread(y, self.positions, 0.22, 0.78))
        u, v = angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u
        depth = torch.where(
            shape == 0,
            square(u, v, radius / math.sqrt(2)),
            torch.where(shape == 1, ellipse(u, v, radius, radius / 2), heart(u, v, radius)),
        )
        return (255 * covered(depth, self.size)).round().to(torch.uint8)[:, None]


class Scenes(DrawnSpec):
    """A coloured shape on a coloured ground: 4 ground hues, 4 shape hues, 3 shapes, 4 places, 3 sizes; 576 images."""

    kind: ClassVar[str] = "scenes"

    size: int = Field(32, ge=16, le=256)
    """Side of the images in pixels."""

    def factors(self) -> dict[str, int]:
        return {"background_hue": 4, "object_hue": 4, "shape": 3, "x": 4, "size": 3}

    def draw(self, sources: Int[Tensor, "batch 5"]) -> UInt8[Tensor, "batch 3 size size"]:
        background, hue, shape, x, size = (column.view(-1, 1, 1) for column in sources.unbind(1))
        radius = spread(size, 3, 0.12, 0.22)
        u, v = centred(self.size, spread(x, 4, 0.25, 0.75), torch.tensor(0.5))
        depth = torch.where(
            shape == 0,
            square(u, v, radius / math.sqrt(2)),
            torch.where(shape == 1, ellipse(u, v, radius, radius), triangle(u, v, radius)),
        )
        # The shape's hues lie between the ground's and are purer and brighter, so that each shape shows on each ground.
        ground = colour(background / 4, saturation=0.5, value=0.6)
        front = colour(hue / 4 + 1 / 8, saturation=0.9, value=1.0)
        part = covered(depth, self.size)[:, None]
        return (255 * (ground + part * (front - ground))).round().to(torch.uint8)


def spread(index: Int[Tensor, "..."], count: int, low: float, high: float) -> Float[Tensor, "..."]:
    """The index-th of ``count`` even steps from ``low`` to ``high`` (the middle, if there is one step)."""
    return low + (high - low) * index / (count - 1) if count > 1 else torch.full(index.shape, (low + high) / 2)


def centred(size: int, x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels' centres (right and down, the image's side is 1) from the point (x, y)."""
    place = (torch.arange(size) + 0.5) / size
    return place.view(1, 1, -1) - x, place.view(1, -1, 1) - y


def covered(depth: Float[Tensor, "..."], size: int) -> Float[Tensor, "..."]:
    """Share of a pixel that lies within a shape, from its centre's depth below the edge."""
    return (0.5 + depth * size).clamp(0, 1)


def square(u: Tensor, v: Tensor, half: Tensor) -> Tensor:
    """Depth below the edge of a square of side ``2 half``; negative outside, as in all of these."""
    return half - torch.maximum(u.abs(), v.abs())


def ellipse(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Depth in an ellipse of half-axes ``a`` and ``b``, to first order at the edge."""
    norm = ((u / a).square() + (v / b).square()).sqrt().clamp_min(1e-6)
    slope = ((u / a.square()).square() + (v / b.square()).square()).sqrt().clamp_min(1e-6) / norm
    return (1 - norm) / slope


def triangle(u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Depth in an upright triangle with corners at ``radius`` from its centre."""
    slanted = math.sqrt(3) / 2 * u.abs() - v / 2
    return radius / 2 - torch.maximum(slanted, v)


def heart(u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Depth in a heart: a square on its corner with discs on its two upper sides."""
    half = radius / 2.3
    low = v - 0.35 * half
    p, q = (u - low) / math.sqrt(2), (-u - low) / math.sqrt(2)
    discs = torch.minimum((p - half).square() + q.square(), p.square() + (q - half).square()).sqrt()
    return torch.maximum(square(p, q, half), half - discs)


def colour(hue: Float[Tensor, "batch 1 1"], saturation: float, value: float) -> Float[Tensor, "batch 3 1 1"]:
    """Red, green and blue of a hue (a turn is 1), a saturation and a value."""
    offset = torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = (offset + 6 * hue[:, None]) % 6
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))


class DSprites(FactorSpec, ImageSpec):
    """The published dSprites (Matthey et al. 2017): 64 x 64 binary images of 3 shapes, 6 scales, 40 orientations, 32 x 32 places.

    All 737 280 images take 3 GB of memory; fewer values of a factor take as much less. The file's metadata are pickled
    and are not read.
    """

    kind: ClassVar[str] = "dsprites"
    columns: ClassVar[dict[str, int]] = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}

    path: str | None = None
    """The ``.npz`` file; by default the one in the directory ``dsprites`` of $STILLHOUSE_DATA."""
    url: str | None = None
    """Where to download the file from, once; needs ``sha256``."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Sum that the file must have."""
    scales: int = Field(6, ge=1, le=6)
    """Number of scales kept, evenly chosen."""
    orientations: int = Field(40, ge=1, le=40)
    """Number of orientations kept, evenly chosen."""
    positions: int = Field(32, ge=1, le=32)
    """Number of places kept along each axis, evenly chosen."""

    outside: ClassVar[frozenset[str]] = DataSpec.outside | {"url", "sha256"}

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(path=text) if text else cls()

    @model_validator(mode="after")
    def _downloads_are_checked(self) -> DSprites:
        if self.url is not None and self.sha256 is None:
            raise ValueError("a url needs sha256, the sum that the downloaded file must have")
        if self.url is not None and not self.url.startswith("https://"):
            raise ValueError(f"the url must begin with https://, not {self.url!r}")
        return self

    def load(self) -> Data:
        path = self._file()
        content = _file_sum(path)
        if self.sha256 is not None and content != self.sha256:
            raise UserError(f"{path} has the SHA-256 {content[:16]}... and not {self.sha256[:16]}...; get it again.")
        kept = {
            "shape": 3,
            "scale": self.scales,
            "orientation": self.orientations,
            "x": self.positions,
            "y": self.positions,
        }
        images, sources = self._read(path, kept)
        part = self.sized({"pixel_values": images, "sources": sources}, levels=1)
        levels = 1 if part["pixel_values"] is images else 255
        return self.divided(Memory(part), kept, [content], levels)

    def foreseen(self) -> Data | None:
        kept = dict(zip(self.columns, (3, self.scales, self.orientations, self.positions, self.positions), strict=True))
        sides = (self.image_size or 64,) * 2
        form = {"pixel_values": ((1, *sides), torch.uint8), "sources": ((len(kept),), torch.long)}
        whole = math.prod(kept.values())
        held = round(self.held_out * whole)
        counts = {"train": whole - 2 * held, "validation": held, "test": held}
        sources = {name: Blank(count, form) for name, count in counts.items() if count}
        scale = self.scale_of(sources["train"], 1 if self.image_size in (None, 64) else 255)
        return self.assemble(sources, ["blank"], task="unlabelled", factors=kept, scale=scale)

    def _file(self) -> Path:
        if self.url is not None:
            return self._downloaded(self.url)
        if self.path is not None:
            path = Path(self.path).expanduser()
            if not path.is_file():
                raise UserError(f"There is no file {self.path}.")
            return path
        root = os.environ.get("STILLHOUSE_DATA")
        found = sorted(Path(root).expanduser().glob("dsprites/*.npz")) if root else []
        if not found:
            where = f"in {root}/dsprites" if root else "because STILLHOUSE_DATA is not set"
            raise UnreachableError(
                f"The data set 'dsprites' was not found {where}: get the .npz file from"
                " https://github.com/google-deepmind/dsprites-dataset, put it in a directory 'dsprites' and let"
                " STILLHOUSE_DATA name the directory above, or give its path."
            )
        return found[0]

    def _downloaded(self, url: str) -> Path:
        from filelock import FileLock
        from platformdirs import user_cache_path

        target = user_cache_path("stillhouse") / "downloads" / f"{self.sha256}.npz"
        if is_offline():
            if target.is_file():
                return target
            raise UnreachableError(f"{url} was not downloaded before, and nothing is downloaded now.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_file():
                part = target.with_suffix(".part")
                try:
                    with urllib.request.urlopen(url, timeout=60) as answer, part.open("wb") as file:
                        while block := answer.read(2**20):
                            file.write(block)
                except (urllib.error.URLError, OSError) as error:
                    raise UnreachableError(f"{url} could not be downloaded: {error}.") from None
                if _file_sum(part) != self.sha256:
                    part.unlink()
                    raise UserError(f"The file at {url} does not have the given sha256; nothing was kept.")
                part.replace(target)
        return target

    def _read(self, path: Path, kept: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        """The images (0 or 1) and factor values of the kept grid, in the file's order, read block by block."""
        try:
            with zipfile.ZipFile(path) as archive:
                classes = np.concatenate(list(_blocks(archive, "latents_classes")))
                wanted, values = np.ones(len(classes), dtype=bool), []
                # The file's first column is the colour, which is always white.
                for column, (name, count) in enumerate(kept.items(), start=len(classes[0]) - len(kept)):
                    whole = self.columns[name]
                    # The last orientation is the first again, so a choice among them leaves it out.
                    last = whole - 1
                    steps = np.arange(count) * (last / count) if name == "orientation" else np.linspace(0, last, count)
                    chosen = np.arange(whole) if count == whole else np.round(steps).astype(np.int64)
                    wanted &= np.isin(classes[:, column], chosen)
                    values.append(np.searchsorted(chosen, classes[:, column]))
                rows, images = 0, []
                for block in _blocks(archive, "imgs"):
                    images.append(block[wanted[rows : rows + len(block)]])
                    rows += len(block)
        except (zipfile.BadZipFile, KeyError, ValueError, IndexError, OSError, zlib.error) as error:
            raise UserError(f"{path} is not the dSprites file: {error}.") from None
        if rows != len(classes) or wanted.sum() != math.prod(kept.values()):
            raise UserError(f"{path} is not the dSprites file: its grid of factors is not complete.")
        sources = np.stack(values, axis=1)[wanted]
        return torch.from_numpy(np.concatenate(images))[:, None], torch.from_numpy(sources).long()


def _blocks(archive: zipfile.ZipFile, name: str, rows: int = 8192) -> Any:
    """The array ``name`` of an ``.npz`` file in blocks of rows; arrays of Python objects (pickles) are refused."""
    with archive.open(f"{name}.npy") as member:
        major, _ = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        if dtype.hasobject or fortran:
            raise ValueError(f"{name} is not a plain array")
        row = math.prod(shape[1:]) * dtype.itemsize
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            content = member.read(count * row)
            yield np.frombuffer(bytearray(content), dtype=dtype).reshape(count, *shape[1:])


def _file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
