"""Killed at ten points from a fixed seed, resumed, and equal to a straight run: weights bit for bit, log byte for byte."""

import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from stillhouse.cli import main
from stillhouse.engine import (
    Compute,
    Later,
    Record,
    Result,
    RunDirectory,
    Silent,
    Stage,
    Update,
    adam,
    frozen,
    storage,
)
from stillhouse.front import run_recipe
from stillhouse.recipe import load_recipe

TORTURE = Path(__file__).with_name("torture.py")

_random = random.Random(20240229)
# The torture takes 30 + 20 + 20 steps in its three stages and writes a checkpoint every third one.
KILLS = [
    *[("step", n) for n in sorted(_random.sample(range(1, 30), 3))],
    *[("step", n) for n in sorted(_random.sample(range(31, 50), 2))],
    *[("step", n) for n in sorted(_random.sample(range(51, 70), 2))],
    ("write", _random.randrange(2, 8)),
    ("end", 1),
    ("end", 2),
]


def run(directory, *arguments):
    return subprocess.run(
        [sys.executable, str(TORTURE), str(directory), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    done = run(directory)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), (directory / "metrics.jsonl").read_bytes(), directory


def test_two_equal_runs_are_equal(straight, tmp_path):
    digest, log, _ = straight
    # Other checkpoint times must not change anything either.
    assert run(tmp_path, "--every", 1000).stdout.strip() == digest
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize(("kind", "count"), KILLS)
def test_a_killed_run_continues_as_if_nothing_had_happened(kind, count, straight, tmp_path):
    digest, log, _ = straight
    killed = run(tmp_path, "--kill", kind, count)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "metrics.json").exists()
    resumed = run(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == digest
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_killed_again_and_again(straight, tmp_path):
    digest, log, _ = straight
    for kill in (("step", 8), ("step", 15), ("end", 1), ("step", 9)):
        assert run(tmp_path, "--kill", *kill).returncode == -9
    assert run(tmp_path).stdout.strip() == digest
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_records_of_a_resumed_run_are_the_same(straight, tmp_path):
    _, _, directory = straight
    run(tmp_path, "--kill", "step", 17)
    run(tmp_path)
    record = Path("records") / "first" / "path" / "weight.npy"
    assert (tmp_path / record).read_bytes() == (directory / record).read_bytes()


# A finished run whose earlier end state is damaged goes on as if it had been interrupted in that stage ---------------


def damage(end):
    file = end / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(("stage", "kill"), [("second", None), ("first", ("step", 8))])
def test_a_damaged_end_of_an_earlier_stage_is_mended(stage, kill, straight, tmp_path):
    digest, log, directory = straight
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / stage / "end")
    if kill:
        # Also when the mending itself is interrupted.
        assert run(tmp_path, "--kill", *kill).returncode == -9
        assert not (tmp_path / "metrics.json").exists()
    assert run(tmp_path).stdout.strip() == digest
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    assert (tmp_path / "checkpoints/yields.json").read_bytes() == (directory / "checkpoints/yields.json").read_bytes()
    for record in (directory / "records").rglob("*.npy"):
        assert (tmp_path / record.relative_to(directory)).read_bytes() == record.read_bytes()


def parallel(nets):
    """A stage, three independent ones from where it ended, of which one's name lies below another's, and a last one."""

    def loss(m, batch, run):
        return {"ce": F.cross_entropy(m.net(batch["features"]), batch.labels)}

    def stage(run, name, net, teacher=None):
        batches = run.data.split("train").batches(8)
        modules = {"net": net} | ({"teacher": frozen(teacher)} if teacher else {})
        records = {"path": Record(lambda m: {"weight": m.net.weight}, every=2)}
        return Stage(name, modules, [Update(loss, {"net": adam(0.1)})], steps=6, batches=batches, records=records)

    def stages(self, run):
        base = torch.nn.Linear(4, 3)
        yield stage(run, "base", base)
        parts = [copy.deepcopy(base) for _ in range(3)]
        names = ["part/one", "part", "part/one/more"]
        yield [Later(name, partial(stage, run, name, net)) for name, net in zip(names, parts, strict=True)]
        noise = yield Compute("noise", lambda _: {"scale": float(torch.rand(()) + parts[2].weight.std().detach())})
        last = torch.nn.Linear(4, 3)
        with torch.no_grad():
            last.weight.mul_(noise["scale"])
        yield stage(run, "last", last, teacher=parts[0])
        nets.update(dict(zip(names, parts, strict=True)), base=base, last=last)
        return Result(artefacts={"net": last})

    return stages


@pytest.mark.parametrize("how", ["damaged", "gone"])
@pytest.mark.parametrize("stage", ["base", "part/one", "part", "part/one/more", "last"])
def test_damage_among_parallel_stages_is_mended(engine, tmp_path, stage, how):
    once, again, said = {}, {}, []

    class Listen(Silent):
        trained = []

        def stage(self, name, steps, done):
            self.trained.append(name)

        def say(self, sentence):
            said.append(sentence)

    engine(parallel(once), name="straight", log_every=2)
    engine(parallel({}), name="run", log_every=2)
    end = tmp_path / "run" / "checkpoints" / stage / "end"
    if how == "damaged":
        damage(end)
    else:
        shutil.rmtree(end)
    listener = Listen()
    listener.trained = []
    engine(parallel(again), name="run", log_every=2, listener=listener)
    order = ["base", "part/one", "part", "part/one/more", "noise", "last"]
    assert listener.trained == order[order.index(stage) :]
    assert len(said) == (how == "damaged")
    assert all("is damaged, so its stage is trained again and what came after it is forgotten" in one for one in said)
    for name, net in once.items():
        assert torch.equal(net.weight, again[name].weight), name
    for name in ("metrics.jsonl", "metrics.json", "checkpoints/yields.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert len(list((tmp_path / "run" / "records").rglob("*.npy"))) == 5
    for record in (tmp_path / "straight" / "records").rglob("*.npy"):
        assert (tmp_path / "run" / record.relative_to(tmp_path / "straight")).read_bytes() == record.read_bytes()


# A disk that fills up during a run ------------------------------------------------------------------------------------


class Disk:
    """A disk that is full some steps after the first checkpoint of the student, until somebody makes space.

    Args:
        where: what meets the end of the disk: the tensors' file, its way to the platters, or a row of the log.
    """

    def __init__(self, where, monkeypatch):
        self.where, self.full, self.seen = where, False, 0
        self.save_file, self.sync, self.log = storage.save_file, storage._sync, RunDirectory.log
        monkeypatch.setattr(storage, "save_file", self._save_file)
        monkeypatch.setattr(storage, "_sync", self._sync)
        monkeypatch.setattr(RunDirectory, "log", lambda directory, row: self._log(directory, row))

    def _meets(self, where, met):
        self.seen += where == self.where and met
        self.full |= self.seen == 2
        return self.full

    def _save_file(self, tensors, path):
        self.save_file(tensors, path)
        if self._meets("tensors", ".step-" in str(path) and "student" in path.parts):
            path.write_bytes(path.read_bytes()[:100])
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def _sync(self, path):
        if self._meets("sync", path.name == storage.TENSORS and ".step-" in str(path) and "student" in path.parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.sync(path)

    def _log(self, directory, row):
        if self._meets("row", row.get("stage") == "student" and row["step"] > 5 and "validation/accuracy" in row):
            directory._log.write(json.dumps(row).encode()[:20])
            directory._log.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.log(directory, row)


@pytest.fixture
def stillhouse(monkeypatch, capsys):
    """``stillhouse(*arguments)`` in this process: its exit code and what it said to people."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stillhouse", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, capsys.readouterr().err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


FULL = ["teacher.epochs=1", "epochs=1", "run.checkpoint_every=5", "run.log_every=4", "run.device=cpu", "run.threads=1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    run_recipe(load_recipe("sinkd", FULL, seed=3), directory, cache=False)
    return directory


@pytest.mark.parametrize("where", ["tensors", "sync", "row"])
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_space(
    where, undisturbed, stillhouse, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    disk = Disk(where, monkeypatch)
    code, said = stillhouse("run", "sinkd", *FULL, "--seed", 3, "--no-cache", "--out", out)
    assert (disk.full, code) == (True, 1)
    [sentence] = said.strip().splitlines()
    lost = out if where == "row" else out / "checkpoints" / "student" / "step-000000010"
    assert sentence == f"error: the disk is full: {lost} was not written; what was written before it is intact."
    assert not (out / "metrics.json").exists()

    # The last good checkpoint is there and whole, and nothing else is.
    student = out / "checkpoints" / "student"
    assert [path.name for path in student.glob("step-*")] == ["step-000000005"]
    assert not list(out.rglob(".step-*"))
    assert storage.read_tree(student / "step-000000005")["step"] == 5

    # Still no space: nothing is lost by trying.
    assert stillhouse("resume", out)[0] == 1
    assert storage.read_tree(student / "step-000000005")["step"] == 5

    monkeypatch.undo()
    assert stillhouse("resume", out)[0] == 0
    for name in ("metrics.jsonl", "metrics.json", "result/student/model.safetensors"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
