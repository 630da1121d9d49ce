"""The live view of a bench: how many runs are over, and a bar for each worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from stillhouse.cli.running import stop_on_signals
from stillhouse.engine import Interrupted, Signals


@contextmanager
def continuable(console: Console) -> Iterator[Signals]:
    """Signals by which Ctrl-C and SIGTERM stop a bench within the block; the command then ends with a word on going on."""
    signals = Signals()
    stop_on_signals(signals)
    try:
        yield signals
    except (Interrupted, KeyboardInterrupt):
        console.print("stopped; the same command continues.", highlight=False)
        raise SystemExit(Interrupted.exit_code) from None


class Bars:
    """Draws a bar of all runs and one per worker; off a terminal it prints a line per run that ended.

    Args:
        console: where to draw.
        noun: what is made, such as ``comparison``.
        over: runs that are over already.
        total: number of runs.
    """

    def __init__(self, console: Console, noun: str, *, over: int, total: int) -> None:
        self.console = console
        self.over, self.total = over, total
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self.whole = self.progress.add_task(f"[bold]{noun}[/bold]", total=total, completed=over)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def watch(self, worker: int) -> WorkerBar:
        """The watcher of a worker."""
        return WorkerBar(self)

    def ended(self, run: str, how: str) -> None:
        """Count a run that ended."""
        self.over += 1
        self.progress.update(self.whole, completed=min(self.over, self.total))
        if not self.console.is_terminal:
            self.console.print(
                f"{min(self.over, self.total)} of {self.total}: {escape(run)} {escape(how)}", highlight=False
            )


class WorkerBar:
    """The bar of one worker; a :class:`stillhouse.bench.Watcher`."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.run = ""
        self.task: TaskID | None = None

    def begins(self, run: str) -> None:
        """Start a bar for the run."""
        self.run = run
        self.task = self.bars.progress.add_task(escape(run), total=None)

    def ends(self, run: str, how: str) -> None:
        """Take the bar away."""
        self._away()
        self.bars.ended(run, how)

    def stage(self, name: str, steps: int, done: int) -> None:
        """Show the stage."""
        if self.task is not None:
            told = f"{escape(self.run)} [dim]{escape(name)}[/dim]"
            self.bars.progress.update(self.task, description=told, total=steps, completed=done)

    def step(self, step: int) -> None:
        """Move the bar; it is drawn a few times a second."""
        if self.task is not None:
            self.bars.progress.tasks[self.bars.progress.task_ids.index(self.task)].completed = step

    def row(self, row: Mapping[str, Any]) -> None:
        """Nothing: there are too many."""

    def measured(self, stage: str, step: int, metric: str, value: float, mode: Literal["max", "min"]) -> None:
        """Nothing: there are too many."""

    def say(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        self.bars.console.print(f"{escape(self.run)}: {escape(sentence)}", style="yellow", highlight=False)

    def _away(self) -> None:
        if self.task is not None:
            self.bars.progress.remove_task(self.task)
            self.task = None
