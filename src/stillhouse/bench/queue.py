"""A queue of runs that outlives its workers: no run is lost, and none is made by two workers at once.

The queue is an Optuna study, so that workers on other machines can join through its storage: a journal file or a database.
A run is a trial that waits, runs, or is over. Which worker has it is known in two ways:

- A worker holds the run's lock file for as long as it makes the run. The kernel frees the lock when the worker dies, in
  whatever way, so on one machine (or wherever file locks reach) death is known at once, and a live worker is never robbed.
- A worker counts up a number in the trial every :data:`BEAT` seconds. Where another kernel's locks may not be seen, a worker
  whose number has stood still for :data:`SILENCE` seconds, by the observer's own clock, is taken for dead.

Trials pass from waiting to running, and from running to failed, atomically in the storage, and never back: a dead worker's
trial fails and another one takes its place in the queue. Of several open trials of a run only the oldest counts.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from stillhouse.bench.work import without_password
from stillhouse.engine import Interrupted, Signals
from stillhouse.errors import RunError, UserError

BEAT = 10.0
"""Seconds between two signs of life of a worker."""

SILENCE = 60.0
"""Seconds without one after which a worker on another machine is taken for dead."""

POLL = 0.5
"""Seconds between two looks at a queue whose runs are all taken."""

CLAIM = "claimed on "

Over = Callable[[str, Sequence[FrozenTrial]], bool]
"""Whether a run is over, from its name and its trials so far."""


class Queue:
    """The runs that are to be made.

    Args:
        home: a directory that all workers share.
        name: of the study.
        runs: names of the runs, in the order in which they are taken.
        over: tells when one needs no worker any more.
        storage: a database URL or a journal file; a journal file in ``home`` by default.
        signals: ask a waiting worker to stop.
    """

    def __init__(
        self, home: Path, name: str, runs: Sequence[str], *, over: Over, storage: str | None, signals: Signals
    ) -> None:
        self.home, self.runs, self.signals = home, list(runs), signals
        self._over, self._finished = over, set[str]()
        (home / "locks").mkdir(parents=True, exist_ok=True)
        # Tables are made by the first who comes; two at once would fail.
        with FileLock(home / "locks" / ".storage"):
            self.storage = open_storage(storage, home)
            self.study = optuna.create_study(
                storage=self.storage, study_name=name, direction="maximize", load_if_exists=True
            )
        self.worker = uuid.uuid4().hex
        self.kernel = kernel(home)
        self._seen: dict[int, tuple[Any, float]] = {}

    def take(self) -> Taken | None:
        """The next run that waits, or whose worker died; None when all are over. Waits while others make the last ones.

        Raises:
            Interrupted: :attr:`signals` asked to stop.
            RunError: the storage does not answer.
        """
        while True:
            if self.signals.stop:
                raise Interrupted("stopped; the same command continues.")
            left = self.left()
            if not left:
                return None
            for run in left:
                lock = FileLock(self.home / "locks" / f"{run}.lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                trial_id: int | None = None
                try:
                    trial_id = self._patiently(self._claim, run)
                finally:
                    if trial_id is None:
                        lock.release()
                if trial_id is not None:
                    return Taken(self, run, trial_id, lock)
            time.sleep(POLL)

    def left(self) -> list[str]:
        """The runs that are not over."""
        trials = self._patiently(self._trials)
        self._finished |= {
            run for run in self.runs if run not in self._finished and self._over(run, trials.get(run, []))
        }
        return [run for run in self.runs if run not in self._finished]

    def _trials(self) -> dict[str, list[FrozenTrial]]:
        """The trials of each run, oldest first."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in sorted(self.study.get_trials(deepcopy=False), key=lambda trial: trial.number):
            found.setdefault(trial.user_attrs.get("run", ""), []).append(trial)
        return found

    def _claim(self, run: str) -> int | None:
        """Make a run this worker's own, whose lock it holds; None when it is over or another worker has it."""
        while True:
            trials = self._trials().get(run, [])
            if self._over(run, trials):
                return None
            oldest = next((trial for trial in trials if not trial.state.is_finished()), None)
            if oldest is None:
                self._add(run, trials[-1] if trials else None)
                continue
            trial_id: int = oldest._trial_id
            # The storage says whether it was this worker that moved the trial on.
            with contextlib.suppress(UpdateFinishedTrialError):
                if oldest.state == TrialState.WAITING:
                    # Said before, so that whoever finds the trial running knows where its worker may be.
                    self.storage.set_trial_user_attr(trial_id, f"{CLAIM}{self.kernel}", self.worker)
                    if self.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                        self.beat(trial_id, 0)
                        return trial_id
                elif not self._dead(oldest):
                    return None
                else:
                    self.retire(run, trial_id)

    def _dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial is gone, seen from a worker that holds the run's lock."""
        beat = trial.user_attrs.get("beat")
        claimed = {key.removeprefix(CLAIM) for key in trial.user_attrs if key.startswith(CLAIM)}
        if ({beat["kernel"]} if beat is not None else claimed) == {self.kernel}:
            return True
        known = self._seen.get(trial._trial_id)
        if known is None or known[0] != beat:
            self._seen[trial._trial_id] = beat, time.monotonic()
            return False
        return time.monotonic() - known[1] > SILENCE

    def _add(self, run: str, before: FrozenTrial | None) -> None:
        """Let a run wait; what was drawn for it before stays."""
        fixed = {**before.system_attrs.get("fixed_params", {}), **before.params} if before is not None else {}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING, system_attrs={"fixed_params": fixed}, user_attrs={"run": run}
            )
        )

    def retire(self, run: str, trial_id: int) -> None:
        """Fail a trial and let its run wait again.

        Raises:
            UpdateFinishedTrialError: another worker was first.
        """
        self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        self._add(run, self.storage.get_trial(trial_id))

    def beat(self, trial_id: int, count: int) -> None:
        """Say that this worker lives.

        Raises:
            UpdateFinishedTrialError: the trial was taken from it.
        """
        sign = {"worker": self.worker, "kernel": self.kernel, "count": count}
        self.storage.set_trial_user_attr(trial_id, "beat", sign)

    def _patiently(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Ask the storage, again while it does not answer, such as a database that is started anew."""
        deadline = time.monotonic() + SILENCE
        while True:
            try:
                return call(*arguments)
            except StorageInternalError as error:
                if self.signals.stop or time.monotonic() > deadline:
                    reason = str(error.__cause__ or error).strip().splitlines()[0]
                    raise RunError(
                        f"the queue's storage does not answer ({reason}); the same command goes on."
                    ) from None
                time.sleep(POLL)


class Taken:
    """A run that this worker has; a context that says meanwhile that the worker lives, and gives back what was not told.

    Attributes:
        run: its name.
        signals: ask the run to stop, because the whole worker shall or because another worker took the run over.
    """

    def __init__(self, queue: Queue, run: str, trial_id: int, lock: FileLock) -> None:
        self.queue, self.run = queue, run
        self.signals = TakenSignals(queue.signals)
        self._trial_id, self._lock = trial_id, lock
        self._told = False
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join()
        try:
            if not (self._told or self.signals.lost):
                # A storage that is gone leaves the trial running; it is taken over as a dead worker's.
                with contextlib.suppress(StorageInternalError, UpdateFinishedTrialError):
                    self.queue.retire(self.run, self._trial_id)
        finally:
            self._lock.release()

    def trial(self) -> Trial:
        """What suggests parameters and keeps what is measured."""
        return Trial(self.queue.study, self._trial_id)

    def finish(self, value: float | None, **attributes: Any) -> None:
        """Tell how the run ended.

        Args:
            value: its value, the larger the better; None for one that was given up.
            attributes: kept with the trial.
        """
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        with contextlib.suppress(UpdateFinishedTrialError):  # Whoever took it over finds the run ended.
            for name, attribute in attributes.items():
                self.queue._patiently(self.queue.storage.set_trial_user_attr, self._trial_id, name, attribute)
            values = None if value is None else [value]
            self.queue._patiently(self.queue.storage.set_trial_state_values, self._trial_id, state, values)
        self._told = True

    def _beat(self) -> None:
        count, alive = 0, time.monotonic()
        while not self._ends.wait(BEAT):
            count += 1
            try:
                self.queue.beat(self._trial_id, count)
                alive = time.monotonic()
            except UpdateFinishedTrialError:
                self.signals.lost = True
                return
            except (StorageInternalError, OSError):
                # Others will take this worker for dead: it stops before they do.
                self.signals.lost = time.monotonic() - alive > SILENCE - 2 * BEAT


class TakenSignals(Signals):
    """Asks a run to stop when the worker shall, or when the run was taken from it.

    Attributes:
        lost: the run is another worker's.
    """

    def __init__(self, outer: Signals) -> None:
        self.outer, self.lost = outer, False

    @property
    def stop(self) -> bool:
        """Whether to write a checkpoint and stop."""
        return self.lost or self.outer.stop

    @stop.setter
    def stop(self, value: bool) -> None:
        self.outer.stop = value


def kernel(home: Path) -> str:
    """Which kernel holds file locks in a directory: alike for all processes that see each other's."""
    booted = Path("/proc/sys/kernel/random/boot_id")
    name = booted.read_text().strip() if booted.exists() else platform.node()
    return f"{name}:{os.stat(home).st_dev}"


def open_storage(where: str | None, home: Path) -> optuna.storages.BaseStorage:
    """A journal file (in ``home`` by default) or a database.

    Raises:
        UserError: the URL is none, its driver is not installed, or the database cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if where is None or "://" not in where:
        path = home / "queue.log" if where is None else Path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        return optuna.storages.JournalStorage(backend)
    from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

    shown = without_password(where)
    # Without a driver's name SQLAlchemy takes the one before psycopg 3.
    head, rest = where.split("://", 1)
    url = f"postgresql+psycopg://{rest}" if head in ("postgres", "postgresql") else where
    waiting: dict[str, Any] = {"connect_args": {"timeout": SILENCE}} if head.startswith("sqlite") else {}
    try:
        database = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **waiting})
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise UserError(
            f"storage: {shown} is no database URL; write one such as postgresql+psycopg://user@host/name, or a file."
        ) from None
    except ImportError:
        extra = "pip install 'stillhouse[postgresql]'" if head.startswith("postgres") else "install its package"
        raise UserError(f"storage: the driver of {shown} is not installed: {extra}.") from None
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        raise UserError(f"storage: {shown} cannot be used: {reason.rstrip('.')}.") from None
    except RuntimeError as error:
        raise UserError(f"storage: {shown} holds tables of another version of Optuna ({error}).") from None
    return optuna.storages.get_storage(database)
