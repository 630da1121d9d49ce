"""Worker processes of one machine: started, watched, replaced when they die, asked to stop.

A worker is ``python -m stillhouse.bench.crew``. It is told what to do in a line on its standard input and stops when that ends,
so none outlives the process that started it; it says what it does in lines of JSON on its standard output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from stillhouse.bench.watching import Watcher
from stillhouse.bench.work import Watch, Work, work
from stillhouse.engine import Interrupted, Signals
from stillhouse.errors import RunError, StillhouseError, UserError

LIVES = 3
"""So many workers may die in the same run before it is given up."""

EVERY = 0.25
"""Seconds between two steps that a worker tells of."""


def crew(bench: Work, *, jobs: int, storage: str | None, signals: Signals, watch: Watch) -> None:
    """Have ``jobs`` worker processes make a bench's runs.

    Raises:
        Interrupted: ``signals`` asked to stop; every worker wrote a checkpoint.
        UserError: what is wrong in a run.
        RunError: a run failed, or its worker died again and again.
    """
    told = {"noun": bench.noun, "home": str(bench.home), "storage": storage, "config": bench.config(), "path": sys.path}
    workers = [Worker(seat, environment, told, watch(seat)) for seat, environment in enumerate(seats(jobs))]
    deaths: Counter[str] = Counter()
    failure: StillhouseError | None = None
    try:
        while any(worker.alive for worker in workers):
            for worker in workers:
                code = worker.ended()
                if code is None or code in (0, Interrupted.exit_code):
                    continue
                if worker.error is not None:
                    failure = failure or (UserError if code == UserError.exit_code else RunError)(worker.error)
                elif code > 0:
                    failure = failure or RunError(f"{worker.run}: its worker failed, and its last words are above.")
                elif not signals.stop and failure is None:
                    deaths[worker.run] += 1
                    if deaths[worker.run] < LIVES:
                        worker.watcher.say(f"a worker was killed in {worker.run or 'no run'}, which is taken over.")
                        worker.start()
                        continue
                    failure = RunError(
                        f"{worker.run}: its worker was killed {LIVES} times, the last time by signal {-code}; "
                        "is there too little memory for so many jobs?"
                    )
            if signals.stop or failure is not None:
                for worker in workers:
                    worker.ask_to_stop()
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
    if failure is not None:
        raise failure
    if signals.stop:
        raise Interrupted("stopped; the same command continues.")


class Worker:
    """A worker process and what it says.

    Attributes:
        run: the run it makes.
        error: the sentence that it ended with.
    """

    def __init__(self, seat: int, environment: Mapping[str, str], told: Mapping[str, Any], watcher: Watcher) -> None:
        self.seat, self.environment, self.told, self.watcher = seat, environment, told, watcher
        self.start()

    def start(self) -> None:
        """Start the process."""
        self.run, self.alive = "", True
        self.error: str | None = None
        # In a session of its own: Ctrl-C reaches the process that started it, which passes it on.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stillhouse.bench.crew"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self.told) + "\n")
        self.process.stdin.flush()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def ended(self) -> int | None:
        """The exit code, once."""
        if not self.alive or self.process.poll() is None:
            return None
        self.reader.join()
        self.alive = False
        return self.process.returncode

    def ask_to_stop(self) -> None:
        """Have it write a checkpoint and end."""
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            self.process.stdin.close()

    def kill(self) -> None:
        """End it at once, where it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.ask_to_stop()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            match json.loads(line):
                case ["begins", str(run)]:
                    self.run = run
                    self.watcher.begins(run)
                case ["error", str(sentence)]:
                    self.error = sentence
                case [str(word), *arguments]:
                    getattr(self.watcher, word)(*arguments)


class Telling:
    """A watcher in a worker process: tells the process that started it."""

    def __init__(self, channel: IO[str]) -> None:
        self.channel = channel
        self._next = 0.0

    def tell(self, *words: Any) -> None:
        """Say one thing."""
        self.channel.write(json.dumps(words) + "\n")
        self.channel.flush()

    def begins(self, run: str) -> None:
        """Pass on."""
        self.tell("begins", run)

    def ends(self, run: str, how: str) -> None:
        """Pass on."""
        self.tell("ends", run, how)

    def stage(self, name: str, steps: int, done: int) -> None:
        """Pass on."""
        self.tell("stage", name, steps, done)

    def step(self, step: int) -> None:
        """Pass on, a few times a second."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY
            self.tell("step", step)

    def row(self, row: Mapping[str, Any]) -> None:
        """Ignore: the log has it."""

    def measured(self, stage: str, step: int, metric: str, value: float, mode: Literal["max", "min"]) -> None:
        """Ignore: the log has it."""

    def say(self, sentence: str) -> None:
        """Pass on."""
        self.tell("say", sentence)


def seats(jobs: int) -> list[dict[str, str]]:
    """The environment of each worker: its share of the threads, and of the accelerators where there are several.

    What the user set for threads stays.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(number) for number in range(count)]
    return [
        {**threads, **({"CUDA_VISIBLE_DEVICES": devices[seat % count]} if count > 1 else {})} for seat in range(jobs)
    ]


def main() -> int:
    """A worker process."""
    # What anybody prints must not be taken for what the worker says.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    telling = Telling(channel)
    signals = Signals()

    def stop(*_: Any) -> None:
        signals.stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    told = json.loads(sys.stdin.readline())
    # Import paths in recipes mean here what they mean there.
    sys.path += [place for place in told["path"] if place not in sys.path]

    def wait() -> None:
        # Not through sys.stdin, whose lock a waiting thread would hold when the process ends.
        while os.read(0, 1024):
            pass
        signals.stop = True

    threading.Thread(target=wait, daemon=True).start()
    try:
        toil(told, signals, telling)
    except StillhouseError as error:
        if not isinstance(error, Interrupted):
            telling.tell("error", str(error))
        return error.exit_code
    except BrokenPipeError:
        return Interrupted.exit_code
    except OSError as error:
        telling.tell("error", f"{error.filename or 'a file'} cannot be used: {error.strerror or error}.")
        return UserError.exit_code
    return 0


def toil(told: Mapping[str, Any], signals: Signals, watcher: Watcher) -> None:
    """Make runs of the bench that a worker was told of."""
    from stillhouse.bench.comparison import Comparing
    from stillhouse.bench.queue import Queue
    from stillhouse.bench.searching import Searching

    kinds: dict[str, type[Work]] = {cls.noun: cls for cls in (Comparing, Searching)}
    home = Path(told["home"])
    made = json.loads((home / "plan.json").read_text())
    bench = kinds[told["noun"]].joined(home, made["plan"], told["config"])
    queue = Queue(home, made["id"], bench.runs, over=bench.over, storage=told["storage"], signals=signals)
    work(bench, queue, signals, watcher)


if __name__ == "__main__":
    sys.exit(main())
