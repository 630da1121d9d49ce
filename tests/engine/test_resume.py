"""Killed at ten points from a fixed seed, resumed, and equal to a straight run: weights bit for bit, log byte for byte."""

import copy
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stillhouse.engine import Compute, Later, Record, Result, Silent, Stage, Update, adam, frozen

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
