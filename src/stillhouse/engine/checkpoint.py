"""The checkpoints of one stage: the last two while it runs, its end state for ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.engine.storage import CorruptError, read_tree, write_tree


class Checkpoints:
    """Checkpoints below one directory, named by step.

    Args:
        directory: the stage's own directory.
        warn: called with one sentence when a checkpoint is found damaged and the one before it is used.
    """

    keep = 2

    def __init__(self, directory: Path, warn: Callable[[str], None]) -> None:
        self.directory, self.warn = directory, warn

    def save(self, step: int, tree: dict[str, Any]) -> None:
        """Store a checkpoint, then drop all but the last two."""
        newest = self.directory / f"step-{step:09d}"
        write_tree(newest, tree)
        steps = self._steps()
        # Later ones can only be damaged: this run continued from before them.
        good = [path for path in steps if path <= newest]
        for old in [*good[: -self.keep], *(path for path in steps if path > newest)]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> dict[str, Any] | None:
        """The newest readable checkpoint, or None."""
        for path in reversed(self._steps()):
            try:
                tree: dict[str, Any] = read_tree(path)
            except CorruptError as error:
                self.warn(f"the checkpoint {path} is damaged and is left aside: {error}")
                continue
            return tree
        return None

    def any(self) -> bool:
        """True when there is a checkpoint."""
        return bool(self._steps())

    def finish(self, tree: dict[str, Any]) -> None:
        """Store the stage's end state and drop the checkpoints that led to it."""
        write_tree(self.directory / "end", tree)
        for old in [*self._steps(), *self.directory.glob(".step-*")]:
            shutil.rmtree(old, ignore_errors=True)

    def finished(self) -> dict[str, Any] | None:
        """The end state, or None when the stage has not ended (or its end state is damaged, which is said)."""
        end = self.directory / "end"
        if not end.exists():
            return None
        try:
            tree: dict[str, Any] = read_tree(end)
        except CorruptError as error:
            self.warn(f"the end state {end} is damaged, so the stage is trained again: {error}")
            return None
        return tree

    def _steps(self) -> list[Path]:
        return sorted(self.directory.glob("step-*")) if self.directory.exists() else []
