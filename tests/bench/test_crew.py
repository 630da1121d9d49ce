"""Worker processes share the runs; killed, stopped or orphaned, they leave a comparison that ends as a straight one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import stillhouse as sh
from stillhouse.bench import Unwatched, crew
from stillhouse.bench.arms import arrange
from stillhouse.bench.comparison import Comparing
from stillhouse.engine import Interrupted, Signals
from stillhouse.errors import RunError

# fmt: off
FIELDS = [
    "data=ring", "data.samples=4000", "teacher=mlp", "teacher.epochs=1", "student=mlp", "student.widths=[8]",
    "epochs=4", "evaluations=2", "run.device=cpu", "run.checkpoint_every=40",
]
# fmt: on
SEEDS = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("crew")


@pytest.fixture(scope="module")
def straight(home):
    """The numbers of every run, made one after the other."""
    sh.compare("kd", "sinkd", seeds=SEEDS, out=home / "straight", overrides=FIELDS)
    return numbers(home / "straight")


def numbers(out):
    return {path.parent.name: json.loads(path.read_text()) for path in (out / "runs").glob("*/metrics.json")}


def holder(out):
    """A worker in the middle of a run, of which there is a checkpoint: its process id and the run; None when there is none."""
    for run in sorted((out / "runs").glob("*")):
        if (run / "metrics.json").exists() or not list(run.glob("checkpoints/*/step-*")):
            continue
        lock = str((out / "locks" / f"{run.name}.lock").resolve())
        for descriptors in Path("/proc").glob("[0-9]*/fd"):
            try:
                held = any(os.readlink(file) == lock for file in descriptors.iterdir())
            except OSError:
                continue
            if held:
                return int(descriptors.parent.name), run
    return None


def wait(condition, seconds=120.0):
    """What a condition gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError


def kill_in_a_run(out):
    """Kill a worker that is in the middle of a run; its process id and the run."""
    while True:
        pid, run = wait(lambda: holder(out))
        # Held still first, so that the run cannot end between the look and the blow.
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.01)
        if not (run / "metrics.json").exists():
            os.kill(pid, signal.SIGKILL)
            return pid, run
        os.kill(pid, signal.SIGCONT)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Heard(Unwatched):
    """Keeps what workers say."""

    def __init__(self):
        self.said = []

    def say(self, sentence):
        self.said.append(sentence)


def test_a_worker_is_killed_then_all_are_and_the_same_command_ends_as_a_straight_one(home, straight):
    out = home / "killed"
    arguments = ["compare", "kd", "sinkd", "--seeds", str(SEEDS), "--jobs", "2", "--out", str(out), *FIELDS]
    program = subprocess.Popen(
        [sys.executable, "-m", "stillhouse", *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    _, run = kill_in_a_run(out)
    other, _ = wait(lambda: (found := holder(out)) and found[1] != run and found)
    program.kill()
    assert f"a worker was killed in {run.name}, which is taken over" in " ".join(program.communicate()[0].split())
    wait(lambda: not alive(other))
    before = set(numbers(out))
    assert before < set(straight)
    seen = []

    class Seen(Unwatched):
        def begins(self, run):
            seen.append(run)

    sh.compare("kd", "sinkd", seeds=SEEDS, out=out, overrides=FIELDS, watch=lambda worker: Seen())
    assert set(seen) == set(straight) - before, "what finished is not repeated"
    assert numbers(out) == straight


def test_with_a_database_workers_are_replaced_and_stop_with_checkpoints(home, straight, postgresql):
    out, signals, heard = home / "database", Signals(), Heard()
    arguments = {"seeds": SEEDS, "out": out, "overrides": FIELDS, "storage": postgresql}
    killed = []

    def disturb():
        killed.append(kill_in_a_run(out)[1].name)
        wait(lambda: heard.said)
        wait(lambda: holder(out))
        signals.stop = True

    thread = threading.Thread(target=disturb)
    thread.start()
    with pytest.raises(Interrupted, match="the same command continues"):
        sh.compare("kd", "sinkd", jobs=2, signals=signals, watch=lambda worker: heard, **arguments)
    thread.join()
    assert heard.said == [f"a worker was killed in {killed[0]}, which is taken over."]
    assert holder(out) is None
    assert set(numbers(out)) < set(straight)
    assert list(out.glob("runs/*/checkpoints/student/step-*"))
    sh.compare("kd", "sinkd", **arguments)
    assert numbers(out) == straight
    assert not (out / "queue.log").exists()


def bench(home, *fields):
    """The runs of a comparison that goes wrong."""
    arms = arrange(["kd"], ["data=ring", "data.samples=400", "teacher=mlp", "epochs=1", "run.device=cpu", *fields])
    made = Comparing(home, {arm.name: arm.recipe for arm in arms}, [0])
    made.settle()
    return made


def test_a_mistake_in_a_run_is_one_sentence(tmp_path):
    made = bench(tmp_path / "c", "student=nowhere.nets:Big")
    crew.crew(made, jobs=1, storage=None, signals=Signals(), watch=lambda worker: Heard())
    told = [json.loads(path.read_text())["error"] for path in made.home.glob("runs/*/failed.json")]
    assert len(told) == len(made.runs)
    for sentence in told:
        assert "'nowhere.nets:Big'" in sentence
        assert "\n" not in sentence


def test_a_run_that_kills_its_workers_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "import os, signal, torch\n"
        "class Bomb(torch.nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(2, 8)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crew, "LIVES", 1)
    made = bench(tmp_path / "c", "student=nets:Bomb", "teacher.epochs=1")
    with pytest.raises(RunError, match="kd-0: its worker was killed 1 times, the last time by signal 9"):
        crew.crew(made, jobs=1, storage=None, signals=Signals(), watch=lambda worker: Heard())


def test_workers_share_threads_and_accelerators(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(crew.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert crew.seats(3) == [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": str(seat)} for seat in (0, 1, 0)]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert crew.seats(2) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "7"}]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert crew.seats(2) == [{}, {}]
