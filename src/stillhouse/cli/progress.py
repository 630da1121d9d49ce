"""The live bar: stage, steps, loss terms, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

REFRESH = 0.1


class ProgressBar:
    """A :class:`stillhouse.engine.Listener` that draws one bar per stage; off a terminal it prints a line per stage.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", style="dim"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None
        self._next = 0.0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def stage(self, name: str, steps: int, done: int) -> None:
        """Finish the bar of the stage before and start one."""
        self._finish()
        self.task = self.progress.add_task(escape(name), total=steps, completed=done, terms="")
        if not self.console.is_terminal:
            self.console.print(f"{name}: {steps} steps" + (f", from {done}" if done else ""), highlight=False)

    def step(self, step: int) -> None:
        """Move the bar, at most ten times a second."""
        now = time.monotonic()
        if now >= self._next and self.task is not None:
            self.progress.update(self.task, completed=step)
            self._next = now + REFRESH

    def row(self, row: Mapping[str, Any]) -> None:
        """Show the newest numbers beside the bar."""
        shown = [f"{key.rpartition('/')[2]} {value:.3g}" for key, value in row.items() if _shown(key, value)]
        if self.task is not None and shown:
            self.progress.update(self.task, completed=row["step"], terms=escape("  ".join(shown[:5])))

    def measured(self, stage: str, step: int, metric: str, value: float, mode: Literal["max", "min"]) -> None:
        """Nothing: the row shows it."""

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self.progress.console.print(escape(sentence), style="yellow", highlight=False)

    def _finish(self) -> None:
        if self.task is not None:
            total = self.progress.tasks[self.task].total
            self.progress.update(self.task, completed=total)


def _shown(key: str, value: Any) -> bool:
    return isinstance(value, float) and "/lr" not in key and not key.endswith(("/scale", "/gradient_share"))
