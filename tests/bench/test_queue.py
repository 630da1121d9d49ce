"""No run is lost and none is made twice, whatever becomes of the workers and wherever the queue is kept."""

import contextlib
import multiprocessing
import os
import signal
import time
from itertools import pairwise

import optuna
import pytest
from optuna.trial import TrialState

from stillhouse.bench import queue as module
from stillhouse.bench.queue import Queue, open_storage
from stillhouse.bench.work import without_password
from stillhouse.engine import Interrupted, Signals
from stillhouse.errors import UserError

RUNS = ["a-0", "b-0", "a-1"]


def ended(run, trials):
    """A run is over once a trial of it is."""
    return any(trial.state == TrialState.COMPLETE for trial in trials)


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request, tmp_path):
    """Where the queue is kept, each in turn."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgresql")
    return f"sqlite:///{tmp_path}/queue.db" if request.param == "sqlite" else None


@pytest.fixture
def home(tmp_path):
    """The directory that workers share."""
    return tmp_path / "bench"


@pytest.fixture
def worker(home, storage, request):
    """Makes workers of one queue."""
    name = f"{request.node.name}-{time.time_ns()}"

    def make(signals=None):
        return Queue(home, name, RUNS, over=ended, storage=storage, signals=signals or Signals())

    return make


def elsewhere(queue):
    """Let a worker be on another machine, whose file locks do not reach here."""
    queue.kernel = "elsewhere:0"
    queue.home = queue.home / "elsewhere"
    (queue.home / "locks").mkdir(parents=True, exist_ok=True)
    return queue


def test_runs_are_taken_in_order_by_one_worker_each(worker):
    one, other = worker(), worker()
    taken = [one.take(), other.take(), one.take()]
    assert [one.run for one in taken] == RUNS
    for run in taken:
        with run:
            run.finish(1.0)
    assert one.take() is None
    assert other.take() is None


def test_a_live_worker_is_not_robbed_however_silent(worker, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", 0.0)
    one, other = worker(), worker()
    first = one.take()
    assert other.take().run == "b-0"
    assert other._claim(first.run) is not None, "only the lock keeps it"
    first._lock.release()


def test_what_a_worker_gives_back_waits_again(worker):
    one, other = worker(), worker()
    with contextlib.suppress(RuntimeError), one.take() as taken:
        taken.trial().suggest_float("x", 0, 1)
        drawn = taken.trial().params
        raise RuntimeError
    assert [trial.state.name for trial in other._trials()["a-0"]] == ["FAIL", "WAITING"], (
        "whoever looks, and from wherever"
    )
    again = other.take()
    assert again.run == "a-0"
    assert {"x": again.trial().suggest_float("x", 0, 1)} == drawn, "what was drawn stays"


def test_a_worker_that_dies_on_this_machine_is_followed_at_once(worker):
    def die():
        worker().take()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    started = time.monotonic()
    taken = worker().take()
    assert taken.run == "a-0"
    assert time.monotonic() - started < module.BEAT
    trials = taken.queue._trials()["a-0"]
    assert [trial.state for trial in trials] == [TrialState.FAIL, TrialState.RUNNING]


def test_a_worker_that_died_before_it_could_speak_is_followed_at_once(worker, monkeypatch):
    far, near = elsewhere(worker()), worker()
    for queue in (near, far):
        monkeypatch.setattr(queue, "beat", lambda *_: None)
    assert near._claim("a-0") is not None
    assert near._claim("a-0") is not None, "its lock is free, and so is the run"
    assert far._claim("b-0") is not None
    assert near._claim("b-0") is None, "it may be alive elsewhere"


def test_a_worker_elsewhere_is_dead_once_it_has_been_silent(worker, monkeypatch):
    far, near = elsewhere(worker()), worker()
    taken = far.take()
    assert taken.run == near.runs[0]
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    assert near._claim("a-0") is None, "its silence has only begun"
    clock[0] = module.SILENCE - 1
    far.beat(taken._trial_id, 1)
    assert near._claim("a-0") is None, "it has just spoken"
    clock[0] += module.SILENCE
    assert near._claim("a-0") is None, "as long as it may be silent"
    clock[0] += 1
    assert near._claim("a-0") is not None


def test_a_worker_whose_run_was_taken_stops_it(worker, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    one, other = worker(), worker()
    with one.take() as taken:
        other.retire(taken.run, taken._trial_id)
        deadline = time.monotonic() + 10
        while not taken.signals.stop and time.monotonic() < deadline:
            time.sleep(0.01)
        assert taken.signals.lost
        taken.finish(0.5)
    states = [trial.state for trial in other._trials()["a-0"]]
    assert states == [TrialState.FAIL, TrialState.WAITING], "it neither ends nor gives back what is another's"


def test_a_live_worker_beats(worker, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    queue = worker()
    with queue.take() as taken:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if queue._trials()["a-0"][0].user_attrs["beat"]["count"] >= 2:
                break
            time.sleep(0.02)
        assert queue._trials()["a-0"][0].user_attrs["beat"]["count"] >= 2
        taken.finish(1.0)


def test_only_the_oldest_of_several_open_trials_is_run(worker):
    one, far = worker(), elsewhere(worker())
    one._add("a-0", None)
    one._add("a-0", None)
    taken = one.take()
    assert far.take().run == "b-0"
    with taken:
        taken.finish(1.0)
    assert [trial.state.name for trial in one._trials()["a-0"]] == ["COMPLETE", "WAITING"]
    assert one.take().run == "a-1"


def test_two_who_take_over_get_one_run(worker, monkeypatch):
    monkeypatch.setattr(module, "SILENCE", -1.0)
    dead, one, other = elsewhere(worker()), worker(), worker()
    dead.take()
    other.home = one.home / "other"
    (other.home / "locks").mkdir(parents=True)
    for queue in (one, other):
        queue.kernel = f"{queue.worker}:0"
        assert queue._claim("a-0") is None, "a first look"
    monkeypatch.setattr(module, "SILENCE", 3600.0)
    for queue in (one, other):
        queue._seen = {key: (beat, -1e6) for key, (beat, _) in queue._seen.items()}
    assert [queue._claim("a-0") is not None for queue in (one, other)] == [True, False]


def test_a_waiting_worker_stops_when_it_is_asked(worker):
    signals = Signals()
    one, other = worker(), worker(signals)
    held = [one.take() for _ in RUNS]
    signals.stop = True
    with pytest.raises(Interrupted, match="the same command continues"):
        other.take()
    assert len(held) == 3


def _toil(home, name, storage, seconds):
    """Take runs until none is left; say when each was begun and ended."""
    queue = Queue(home, name, [f"run-{n}" for n in range(12)], over=ended, storage=storage, signals=Signals())
    while (taken := queue.take()) is not None:
        with taken:
            with (home / f"log-{os.getpid()}").open("a") as log:
                log.write(f"{taken.run} {time.monotonic()} ")
                log.flush()
                time.sleep(seconds)
                log.write(f"{time.monotonic()}\n")
            taken.finish(1.0)


def test_many_workers_make_every_run_once_while_some_are_killed(home, storage, monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.02)
    name = f"many-{time.time_ns()}"
    context = multiprocessing.get_context("fork")
    home.mkdir()
    processes = [context.Process(target=_toil, args=(home, name, storage, 0.1)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes[:2]:
        log = home / f"log-{process.pid}"
        # In the middle of a run: what a worker keeps the others waiting for, they wait for half a minute.
        while not log.exists() or log.read_text().endswith("\n"):
            time.sleep(0.002)
        process.kill()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    spans = {}
    for log in home.glob("log-*"):
        for line in log.read_text().splitlines():
            run, begin, *end = line.split()
            if end:
                spans.setdefault(run, []).append((float(begin), float(end[0])))
    assert set(spans) == {f"run-{n}" for n in range(12)}
    for run, times in spans.items():
        times.sort()
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(times)), run


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("nosuch://host/name", "is no database URL"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/none", "cannot be used"),
        ("mysql+pymysql://me@host/name", "driver of mysql.* is not installed"),
    ],
)
def test_a_wrong_storage_is_one_sentence_without_the_password(tmp_path, where, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        open_storage(where, tmp_path)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_passwords_are_not_shown():
    assert without_password("postgresql+psycopg://me:se:cr@t@host/db") == "postgresql+psycopg://me:***@host/db"
    assert without_password("postgresql://me@host/db?sslmode=require") == "postgresql://me@host/db?sslmode=require"
    assert without_password("sqlite:///queue.db") == "sqlite:///queue.db"
    assert without_password("shared/queue.log") == "shared/queue.log"


def test_a_file_may_be_named(tmp_path):
    open_storage(str(tmp_path / "elsewhere" / "queue.log"), tmp_path)
    assert (tmp_path / "elsewhere" / "queue.log").exists()
    assert isinstance(open_storage(None, tmp_path), optuna.storages.JournalStorage)
