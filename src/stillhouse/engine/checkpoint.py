"""The checkpoints of one stage: the last two while it runs, its end state for ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.engine.distributed import World
from stillhouse.engine.storage import CorruptError, read_tree, write_tree

LAYOUT = 2
"""What the stored state of a run looks like. Raised when that changes: a run is continued, and a stored teacher or output
is found, only by versions of this layout."""


class Checkpoints:
    """Checkpoints below one directory, named by step.

    Args:
        directory: the stage's own directory.
        world: the processes; all of them read what the main one finds undamaged.
        warn: called with one sentence when something is found damaged and is left aside.
    """

    keep = 2

    def __init__(self, directory: Path, world: World, warn: Callable[[str], None]) -> None:
        self.directory, self.world, self.warn = directory, world, warn

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
        return self._first_readable(self._steps()[::-1], "the checkpoint {} is damaged and is left aside: {}")

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
        sentence = "the end state {} is damaged, so its stage is trained again and what came after it is forgotten: {}"
        return self._first_readable([end] if end.exists() else [], sentence)

    def reopen(self) -> None:
        """Remove the end state, which is damaged: the stage goes on."""
        if self.world.is_main:
            shutil.rmtree(self.directory / "end", ignore_errors=True)

    def _first_readable(self, paths: list[Path], sentence: str) -> dict[str, Any] | None:
        tree: dict[str, Any] | None = None
        chosen: Path | None = None
        if self.world.is_main:
            for path in paths:
                try:
                    tree = read_tree(path)
                except CorruptError as error:
                    self.warn(sentence.format(path, error))
                    continue
                chosen = path
                break
        chosen = self.world.from_main(chosen)
        if chosen is not None and not self.world.is_main:
            tree = read_tree(chosen)
        return tree

    def _steps(self) -> list[Path]:
        return sorted(self.directory.glob("step-*")) if self.directory.exists() else []
