"""What a bench does, whatever it compares: a directory with a plan, runs below it, workers that make them."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from filelock import FileLock

from stillhouse.bench.watching import Watcher
from stillhouse.engine import Interrupted, Signals
from stillhouse.engine.storage import write_text
from stillhouse.errors import UserError
from stillhouse.report import environment

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from stillhouse.bench.queue import Queue, Taken

Watch = Callable[[int], Watcher]
"""Gives the watcher of a worker, by the worker's number."""


class Work(ABC):
    """The runs of a bench.

    Args:
        home: the directory of the bench; runs are below ``runs``.
        plan: plain values that tell this bench from others; a directory holds one.
    """

    noun: ClassVar[str]

    def __init__(self, home: Path, plan: Mapping[str, Any]) -> None:
        self.home, self.plan = home, dict(plan)

    @property
    @abstractmethod
    def runs(self) -> list[str]:
        """Names of the runs, in the order in which they are made."""

    @abstractmethod
    def over(self, run: str, trials: Sequence[FrozenTrial]) -> bool:
        """Whether a run needs no worker any more; ``trials`` is what the queue knows of it."""

    @abstractmethod
    def make(self, taken: Taken, watcher: Watcher) -> str:
        """Make or continue a run and tell the queue; returns how it ended, in words."""

    @classmethod
    @abstractmethod
    def joined(cls, home: Path, plan: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """The bench that was planned, in a worker process; ``config`` is what :meth:`config` gave."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What a worker process needs besides the directory, as plain values."""

    @abstractmethod
    def prepare(self, queue: Queue) -> None:
        """Set up the queue's study; called once by each worker."""

    def ended(self) -> int:
        """How many runs are over by their files."""
        return sum(self.over(run, ()) for run in self.runs)

    def place(self, run: str) -> Path:
        """The directory of a run."""
        return self.home / "runs" / run

    def told(self, run: str) -> dict[str, Any]:
        """What a run writes down of how it was made."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return {"started": started, "environment": environment(), "command": ["stillhouse", self.noun], "name": run}

    def refuse_others(self) -> str | None:
        """The identifier that all workers of this bench share, None where its directory is not its own yet; writes nothing.

        Raises:
            UserError: the directory holds another bench, or something else.
        """
        if (self.home / "recipe.yaml").exists():
            raise UserError(f"{self.home} holds a run, not a {self.noun}; choose another --out.")
        if self.home.exists() and not self.home.is_dir():
            raise UserError(f"{self.home} is a file; choose a new directory as --out.")
        path = self.home / "plan.json"
        if path.exists():
            try:
                before = json.loads(path.read_text())
                noun, plan, identifier = before["noun"], before["plan"], str(before["id"])
            except (ValueError, LookupError, TypeError):
                raise UserError(
                    f"{self.home} holds other files: its plan.json is no {self.noun}'s; choose another --out."
                ) from None
            if (found := difference(plan, self.plan)) is not None:
                raise UserError(f"{self.home} holds another {noun}: {found}; choose another --out.")
            return identifier
        if self.home.exists() and any(entry.name != ".lock" for entry in self.home.iterdir()):
            raise UserError(f"{self.home} holds other files; choose an empty or a new directory as --out.")
        return None

    def settle(self) -> str:
        """Make the directory this bench's own, or join it; returns the identifier that all its workers share.

        Raises:
            UserError: it holds another one, or something else.
        """
        # Before anything is written into it.
        self.refuse_others()
        self.home.mkdir(parents=True, exist_ok=True)
        with FileLock(self.home / ".lock"):
            if (known := self.refuse_others()) is not None:
                return known
            made = {"id": uuid.uuid4().hex, "noun": self.noun, "plan": self.plan}
            write_text(self.home / "plan.json", json.dumps(made, indent=1, allow_nan=False) + "\n")
            return str(made["id"])


def work(bench: Work, queue: Queue, signals: Signals, watcher: Watcher) -> None:
    """Take runs from the queue and make them until all are over, whoever made them.

    Raises:
        Interrupted: ``signals`` asked to stop; the run at hand wrote a checkpoint.
    """
    bench.prepare(queue)
    while (taken := queue.take()) is not None:
        watcher.begins(taken.run)
        try:
            with taken:
                how = bench.make(taken, watcher)
        except Interrupted:
            if signals.stop:
                raise
            how = "taken over by another worker"
        watcher.ends(taken.run, how)


def make_all(bench: Work, *, jobs: int, storage: str | None, signals: Signals, watch: Watch) -> None:
    """Make every run of a bench that is not over yet: in this process, or in ``jobs`` processes of this machine.

    Workers elsewhere that share the directory and the storage take part; all return when all runs are over.

    Args:
        bench: the runs.
        jobs: worker processes.
        storage: of the queue: a database URL or a journal file; one in the bench's directory by default.
        signals: ask for checkpoints and a stop.
        watch: makes who watches a worker.

    Raises:
        Interrupted: ``signals`` asked to stop.
        UserError: the directory holds another bench; or what is wrong in a run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"a {bench.noun} is not started by torchrun: its workers come from --jobs, and each makes whole runs."
        )
    identifier = bench.settle()
    if bench.ended() == len(bench.runs):
        return
    if jobs > 1:
        from stillhouse.bench.crew import crew

        crew(bench, jobs=jobs, storage=storage, signals=signals, watch=watch)
        return
    from stillhouse.bench.queue import Queue

    queue = Queue(bench.home, identifier, bench.runs, over=bench.over, storage=storage, signals=signals)
    work(bench, queue, signals, watch(0))


def digest(values: Any) -> str:
    """Twelve hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def difference(before: Any, now: Any, path: str = "") -> str | None:
    """The first place where two plans differ, in words; None where they are equal.

    >>> difference({"arms": {"kd": {"epochs": 30}}}, {"arms": {"kd": {"epochs": 10}}})
    'arms.kd.epochs is 30, not 10'
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            here = f"{path}.{key}" if path else str(key)
            if key not in before or key not in now:
                return f"it has {'no ' if key not in before else ''}{here}"
            if (found := difference(before[key], now[key], here)) is not None:
                return found
        return None
    return None if json.dumps(before) == json.dumps(now) else f"{path} is {json.dumps(before)}, not {json.dumps(now)}"


def without_password(where: str) -> str:
    """A storage as it may be shown and written down."""
    if "://" not in where:
        return where
    head, _, rest = where.partition("://")
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    return f"{head}://{user}{':***' if colon else ''}{at}{place}"
