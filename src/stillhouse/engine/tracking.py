"""Experiment trackers by name, through accelerate's adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.errors import UserError, nearest


class Trackers:
    """Trackers that get every logged row.

    Args:
        trackers: accelerate's tracker objects.
    """

    def __init__(self, trackers: list[Any]) -> None:
        self.trackers = trackers

    @classmethod
    def start(cls, names: Sequence[str], directory: Path, recipe: Mapping[str, Any]) -> Trackers | None:
        """Start the named trackers, logging below ``directory``.

        Raises:
            UserError: accelerate knows no such tracker, or its package is not installed.
        """
        if not names:
            return None
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        PartialState()
        available = [str(kind) for kind in get_available_trackers()]
        trackers = []
        for name in names:
            if name not in [str(kind) for kind in LOGGER_TYPE_TO_CLASS]:
                raise UserError(
                    f"run.trackers: there is no tracker {name!r}; {nearest(name, map(str, LOGGER_TYPE_TO_CLASS))}."
                )
            if name not in available:
                raise UserError(
                    f"run.trackers: {name!r} is not installed; install its package, e.g. pip install {name}."
                )
            kind = next(cls for key, cls in LOGGER_TYPE_TO_CLASS.items() if str(key) == name)
            place = {"logging_dir": str(directory / "trackers")} if kind.requires_logging_directory else {}
            tracker = kind(directory.name, **place)
            if hasattr(tracker, "start"):  # Newer accelerate opens a tracker in a step of its own.
                tracker.start()
            flat = {key: value for key, value in recipe.items() if isinstance(value, int | float | str | bool)}
            tracker.store_init_configuration(flat)
            trackers.append(tracker)
        return cls(trackers)

    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Pass on a row with its number in the log (a resumed run continues the count), its names below the stage's."""
        values = {f"{row['stage']}/{k}": v for k, v in row.items() if k not in ("stage", "step")}
        for tracker in self.trackers:
            tracker.log({**values, f"{row['stage']}/step": row["step"]}, step=number)

    def finish(self) -> None:
        """Close all."""
        for tracker in self.trackers:
            tracker.finish()
