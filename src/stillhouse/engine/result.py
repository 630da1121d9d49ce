"""What a run gives back: named artefacts, numbers, tables and pictures, saved in formats that others read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from stillhouse.engine.storage import as_json, write_text
from stillhouse.errors import nearest
from stillhouse.models import save


@runtime_checkable
class Saveable(Protocol):
    """An artefact that knows how to write itself."""

    def save(self, directory: Path) -> None:
        """Write into ``directory``, which exists, in open formats."""


Artefact = nn.Module | Saveable


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        title: what it compares.
        columns: headings.
        rows: cells, as numbers or text.
    """

    title: str
    columns: list[str]
    rows: list[list[str | float | int]]


@dataclass
class Result:
    """The outcome of a run. Artefacts and functions are also attributes: ``result.student``.

    Attributes:
        artefacts: named modules and other saveable things. Only what is listed here ships.
        metrics: named final numbers.
        tables: comparisons for people.
        pictures: named image grids, (channels, height, width) in [0, 1].
        functions: what can be done with the artefacts on new data, by name.
        notes: sentences worth telling.
        directory: where the run is; None when it was temporary.
    """

    artefacts: dict[str, Artefact] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    directory: Path | None = None

    def __getattr__(self, name: str) -> Any:
        for place in ("artefacts", "functions"):
            found = self.__dict__.get(place, {})
            if name in found:
                return found[name]
        known = [*self.__dict__.get("artefacts", {}), *self.__dict__.get("functions", {})]
        raise AttributeError(f"this result has no {name!r}; {nearest(name, known)}")

    def curve(self, metric: str, stage: str | None = None) -> list[tuple[int, float]]:
        """A measurement over the steps of the run, as it was logged: (step, value) pairs in order.

        Nothing where it was not measured, or where the run was temporary. The result of a run within a run
        (:class:`~stillhouse.engine.SubRun`) has the same curve whether it was just trained or found.

        Args:
            metric: its name, such as ``validation/accuracy``.
            stage: the stage that measured it; the first that did by default.
        """
        log = self.directory / "metrics.jsonl" if self.directory is not None else None
        if log is None or not log.exists():
            return []
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        rows = [row for row in rows if isinstance(row.get(metric), int | float) and stage in (None, row["stage"])]
        return [(row["step"], float(row[metric])) for row in rows if row["stage"] == rows[0]["stage"]]

    def save(self, directory: Path) -> None:
        """Write metrics, artefacts, tables and pictures below ``directory``."""
        result = directory / "result"
        result.mkdir(exist_ok=True)
        for name, artefact in self.artefacts.items():
            place = result / name
            place.mkdir(exist_ok=True)
            if isinstance(artefact, Saveable):
                artefact.save(place)
            else:
                save(artefact, place)
        tables = [
            {"title": t.title, "columns": t.columns, "rows": [[as_json(cell) for cell in row] for row in t.rows]}
            for t in self.tables
        ]
        told = {"tables": tables, "notes": self.notes}
        write_text(result / "tables.json", json.dumps(told, indent=2, allow_nan=False) + "\n")
        for name, picture in self.pictures.items():
            save_png(picture, result / f"{name}.png")
        # Last: this file says that the run has ended.
        metrics = {name: as_json(value) for name, value in self.metrics.items()}
        write_text(directory / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def save_png(picture: Tensor, path: Path) -> None:
    """Write a (channels, height, width) tensor in [0, 1] as an 8-bit PNG."""
    from matplotlib.image import imsave

    pixels = picture.detach().float().clamp(0, 1).cpu()
    if pixels.shape[0] == 1:
        pixels = pixels.expand(3, -1, -1)
    imsave(path, pixels.permute(1, 2, 0).numpy())
