"""What several processes must agree on. Usage, under torchrun: python together.py DIR."""

import copy
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from stillhouse.data import ObjectData
from stillhouse.engine import (
    Compute,
    Evaluation,
    Method,
    Paper,
    Result,
    Run,
    RunDirectory,
    Settings,
    Silent,
    Stage,
    SubRun,
    Update,
    World,
    adamw,
    frozen,
    scratch,
    sgd,
)


class Odd(nn.Module):
    """Buffers of all kinds, that processes start with differently."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.register_buffer("flag", torch.tensor([rank == 0, True, False]))
        self.register_buffer("count", torch.tensor(rank))
        self.register_buffer("waves", torch.full((2, 3), complex(rank, 1)))
        self.register_buffer("brief", torch.full((2, 3), rank + 0.5, dtype=torch.bfloat16).T)
        self.register_buffer("nothing", torch.zeros(0))


class Base(Method):
    """What is the same for all."""

    name: ClassVar[str] = "together"
    family: ClassVar[str] = "tests"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "for processes"

    def loss(self, m, batch, run):
        return {"ce": F.cross_entropy(m.net(batch["features"]), batch.labels)}


class Unequal(Base):
    """Modules that are drawn unseeded, keys and data that differ between processes."""

    name: ClassVar[str] = "unequal"

    def match(self, m, batch, run):
        target = m.teacher(m.fixed(batch["features"]))
        return {"match": F.mse_loss(m.net(batch["features"]), target)}

    def stages(self, run):
        rank = run.world.rank
        torch.manual_seed(100 + rank)
        net, teacher, fixed = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 4)
        batches = run.data.split("train").batches(8)
        modules = {
            "net": net,
            "teacher": frozen(teacher),
            "fixed": scratch(fixed),
            "odd": Odd(rank),
            "again": nn.Sequential(net),
        }
        yield Stage("one", modules, [Update(self.match, {"net": sgd(0.1)})], steps=6, batches=batches)
        yield Compute("keyed", lambda _: {"seen": rank}, key=f"known to process {rank}")
        mine = ObjectData.from_object(small(shift=rank)).load()
        nested = yield SubRun("nested", Nested(), data=mine)
        artefacts = {"net": net, "teacher": teacher, "fixed": fixed, "odd": modules["odd"], "nested": nested.net}
        return Result(artefacts=artefacts)


class Nested(Base):
    """A run within another."""

    name: ClassVar[str] = "nested"

    def stages(self, run):
        net = nn.Linear(4, 3)
        batches = run.data.split("train").batches(8)
        yield Stage("one", {"net": net}, [Update(self.loss, {"net": sgd(0.1)})], steps=2, batches=batches)
        return Result(artefacts={"net": net})


class Normed(Base):
    """Running statistics that move in one update and are used in the other, averaged, evaluated, and kept at their best."""

    name: ClassVar[str] = "normed"

    def judged(self, m, batch, run):
        return {"judged": F.cross_entropy(m.head(m.net(batch["features"])), batch.labels)}

    def stages(self, run):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        head = nn.Linear(3, 3)
        train = run.data.split("train")
        held = train.batch(torch.arange(16))

        def measure(m):
            return {"ce": F.cross_entropy(m.net(held["features"]), held.labels).item()}

        updates = [
            Update(self.loss, {"net": adamw(1e-2)}),
            Update(self.judged, {"head": sgd(0.1, momentum=0.9)}, eval=("net",)),
        ]
        evaluation = Evaluation(measure, every=3, monitor="ce", mode="min")
        first = yield Stage(
            "first",
            {"net": net, "head": head},
            updates,
            steps=20,
            batches=train.batches(8),
            evaluate=evaluation,
            keep="best",
            ema={"net": 0.8},
        )
        averaged = copy.deepcopy(net)
        averaged.load_state_dict(first.ema["net"])
        student = nn.Linear(4, 3)
        updates = [Update(self.second, {"student": sgd(0.1)}, eval=("net",))]
        modules = {"student": student, "net": net, "averaged": averaged}
        yield Stage("second", modules, updates, steps=7, batches=train.batches(8))
        return Result(artefacts={"net": net, "head": head, "averaged": averaged, "student": student})

    def second(self, m, batch, run):
        with torch.no_grad():
            target = m.net(batch["features"]) + m.averaged(batch["features"])
        return {"match": F.mse_loss(m.student(batch["features"]), target)}


class Slow(Base):
    """A computation that takes longer than processes wait for each other in training."""

    name: ClassVar[str] = "slow"

    def stages(self, run):
        yield Compute("slow", lambda _: time.sleep(8))
        net = nn.Linear(4, 3)
        batches = run.data.split("train").batches(8)
        yield Stage("one", {"net": net}, [Update(self.loss, {"net": sgd(0.1)})], steps=2, batches=batches)
        return Result(artefacts={"net": net})


class Stop(Exception):
    """Stands for a process that dies."""


class Stopping(Silent):
    """Stops all processes at the n-th step that it sees."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, step: int) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


def small(shift: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator) + shift
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()


def main() -> None:
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    os.environ["STILLHOUSE_CACHE"] = str(home / "cache")
    data = ObjectData.from_object(small()).load()
    world = World.start("cpu")
    assert World.start("cpu").patient is world.patient

    def go(method: Method, name: str, listener: Silent | None = None) -> None:
        directory = RunDirectory(home / name, writes=world.is_main)
        directory.lock()
        settings = Settings(device="cpu", log_every=4, checkpoint_every=5)
        try:
            run = Run(method, directory, seed=0, settings=settings, data=data, world=world, listener=listener)
            result = run.execute()
        finally:
            directory.release()
        state = {f"{n}.{k}": v for n, m in result.artefacts.items() for k, v in m.state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, home / f"{name}.{world.rank}.safetensors")

    go(Unequal(), "unequal")
    go(Normed(), "straight")
    for at in (13, 4, 11):
        try:
            go(Normed(), "resumed", Stopping(at))
        except Stop:
            dist.barrier()
        else:
            raise AssertionError("was not stopped")
    go(Normed(), "resumed")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5), dist.group.WORLD)
    go(Slow(), "slow")
    if world.is_main:
        time.sleep(8)
    try:
        dist.all_reduce(torch.zeros(1))
        found = False
    except RuntimeError:
        found = True
    (home / f"hang.{world.rank}.json").write_text(json.dumps(found))
    # The group is broken by now: no farewell.
    os._exit(0)


if __name__ == "__main__":
    main()
