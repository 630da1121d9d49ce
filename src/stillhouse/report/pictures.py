"""Pictures of a run, inlined: those of its result, and of its training the first, the last and some in between."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

SMALL = 320
"""Pictures are enlarged up to about so many pixels."""

TALL = 420
"""No picture is shown higher than so many pixels."""

PICTURE_BYTES = 8_000_000
"""Larger pictures are named and not shown, so that the page can still be sent to somebody."""

PAGE_BYTES = 24_000_000
"""Pictures of one page together; those beyond are named and not shown."""

SHOWN = 24
"""Pictures of the result that are shown."""

STRIP = 5
"""Pictures of one name during training that are shown."""

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A picture inlined, or only named where it is too large (``source`` is empty then).

    Small ones are shown enlarged a whole number of times, so that every pixel keeps its shape; tall ones are reduced.
    """

    name: str
    source: str
    width: int
    height: int

    @property
    def zoom(self) -> float:
        """How much larger it is shown than it is."""
        enlarged = max(1, SMALL // max(self.width, self.height, 1))
        return min(enlarged, TALL / max(self.height, 1))

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height on the page."""
        return max(1, round(self.width * self.zoom)), max(1, round(self.height * self.zoom))


@dataclass(frozen=True)
class Strip:
    """How one picture changed during a stage: (step, picture) pairs of ``count`` that there are."""

    name: str
    stage: str
    frames: list[tuple[int, Picture]]
    count: int


class Album:
    """Inlines pictures as long as there is room on the page."""

    def __init__(self) -> None:
        self.room = PAGE_BYTES

    def picture(self, path: Path, name: str) -> Picture | None:
        """The picture in a file; None where that is no PNG."""
        data = path.read_bytes()
        if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
            return None
        width, height = struct.unpack(">II", data[16:24])
        source = ""
        if len(data) <= min(PICTURE_BYTES, self.room):
            self.room -= len(data)
            source = "data:image/png;base64," + base64.b64encode(data).decode()
        return Picture(name, source, width, height)

    def of_result(self, result: Path) -> tuple[list[Picture], int]:
        """The pictures in a run's result, and how many further ones there are."""
        paths = [*sorted(result.glob("*.png")), *sorted(result.glob("*/*.png"))]
        named = [(path, path.relative_to(result).with_suffix("").as_posix()) for path in paths[:SHOWN]]
        found = [self.picture(path, name) for path, name in named]
        return [picture for picture in found if picture is not None], max(0, len(paths) - SHOWN)

    def of_training(self, samples: Path) -> list[Strip]:
        """The pictures that were taken during training, per stage and name."""
        return [
            strip
            for (stage, name), frames in samples_of(samples).items()
            if (strip := self._strip(stage, name, frames)) is not None
        ]

    def _strip(self, stage: str, name: str, frames: Sequence[tuple[int, Path]]) -> Strip | None:
        shown = []
        for step, path in some(frames, STRIP):
            picture = self.picture(path, f"{name} at step {step:,}")
            if picture is not None:
                shown.append((step, picture))
        return Strip(name, stage, shown, len(frames)) if shown else None


def samples_of(samples: Path) -> dict[tuple[str, str], list[tuple[int, Path]]]:
    """The files ``<stage>/<step>-<name>.png`` by (stage, name), in the order of their steps."""
    found: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    for path in sorted(samples.rglob("*.png")):
        match = re.fullmatch(r"(\d+)-(.+)", path.stem)
        if match:
            stage = path.parent.relative_to(samples).as_posix()
            found.setdefault((stage, match[2]), []).append((int(match[1]), path))
    return {key: sorted(frames) for key, frames in found.items()}


def some(items: Iterable[T], count: int) -> list[T]:
    """At most ``count`` of the items: the first, the last and evenly chosen ones in between.

    >>> some(range(11), 5), some([1, 2], 5)
    ([0, 3, 5, 8, 10], [1, 2])
    """
    given = list(items)
    if len(given) <= count:
        return given
    return [given[(i * (len(given) - 1) + (count - 1) // 2) // (count - 1)] for i in range(count)]
