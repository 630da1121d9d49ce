"""A method made to be killed, and a program that runs it and dies where it is told to.

Three stages, two updates at different cadences with different optimisers, an average, a stateful part, a Compute, batch
norm, dropout, records, an early stop. Usage: ``python torture.py DIR [--kill KIND N] [--every K]``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.engine import (
    Compute,
    Evaluation,
    Method,
    Paper,
    Ramp,
    Record,
    Result,
    Run,
    RunDirectory,
    Settings,
    Stage,
    Update,
    Weight,
    adamw,
    frozen,
    sgd,
    storage,
)
from stillhouse.engine import fit as fit_module
from stillhouse.engine import run as run_module


class Net(nn.Module):
    """Batch norm and dropout: what moves without being trained, and what draws."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, outputs)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.body(pixel_values)


class Balance(nn.Module):
    """A stateful part: the running size of a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones(()))
        self.register_buffer("last", torch.zeros(()))

    def see(self, value: Tensor) -> None:
        self.last.copy_(value.detach())

    def after_step(self, run: Run) -> None:
        self.size.lerp_(run.world.average(self.last), 0.1)


class Torture(Method):
    """See the module."""

    name: ClassVar[str] = "torture"
    family: ClassVar[str] = "tests"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "made to be killed"

    weight_pull: Weight = Ramp(start=0.0, end=0.5)

    def first(self, m, batch, run):
        ce = F.cross_entropy(m.net(batch["pixel_values"]), batch.labels)
        m.balance.see(ce)
        return {"ce": ce / m.balance.size, "pull": lambda: m.net.body[1].weight.square().mean()}

    def critic(self, m, batch, run):
        with torch.no_grad():
            features = m.net.body[:3](batch["pixel_values"])
        return {"fit": F.mse_loss(m.critic(features), run.randn(batch.size, 2))}

    def second(self, m, batch, run):
        return {"ce": F.cross_entropy(m.net(batch["pixel_values"]), m.shift(batch.labels) % 10)}

    def third(self, m, batch, run):
        target = m.teacher(batch["pixel_values"])
        return {"match": F.mse_loss(m.student(batch["pixel_values"]), target)}

    def stages(self, run):
        train = run.data.split("train")
        batches = train.batches(32, augment="shift")
        net, critic, balance = Net(10), nn.Linear(24, 2), Balance()
        validation = run.data.split("validation").batch(list(range(64)))

        def accuracy(m):
            return {
                "accuracy": (m.net(validation["pixel_values"]).argmax(1) == validation.labels).float().mean().item()
            }

        first = yield Stage(
            "first",
            modules={"net": net, "critic": critic, "balance": balance},
            updates=[
                Update(self.first, trains={"net": adamw(2e-3, schedule="cosine", clip_norm=1.0)}, every=2),
                Update(self.critic, trains={"critic": sgd(0.05, momentum=0.9)}, eval=("net",)),
            ],
            steps=30,
            batches=batches,
            ema={"net": 0.9},
            evaluate=Evaluation(accuracy, every=5, monitor="accuracy"),
            keep="ema",
            records={"path": Record(lambda m: {"weight": m.net.body[1].weight}, every=5)},
        )
        mined = yield Compute("mined", lambda _: {"shift": torch.randint(1, 3, ()), "seen": first.metrics["accuracy"]})
        shift = Shift(mined["shift"] + int(first.records["path"]["weight"].shape[0]))
        second = yield Stage(
            "second",
            modules={"net": net, "shift": frozen(shift)},
            updates=[Update(self.second, trains={"net": sgd(0.0001)}, times=2)],
            steps=400,
            batches=batches,
            evaluate=Evaluation(accuracy, every=4, monitor="accuracy", mode="min", patience=3),
            keep="best",
        )
        assert second.stopped_early, "the early stop is part of the torture"
        student = Net(10)
        yield Stage(
            "third",
            modules={"student": student, "teacher": frozen(net)},
            updates=[Update(self.third, trains={"student": adamw(1e-3)})],
            steps=20,
            batches=batches,
            accumulate=2,
        )
        return Result(
            artefacts={"net": net, "student": student, "critic": critic},
            metrics={"second/steps": float(second.steps), "balance": float(balance.size)},
        )


class Shift(nn.Module):
    """A number as a module."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, count: int) -> None:
    """Die at the ``count``-th event of a kind: step, write (inside a checkpoint's write), end (after a stage's end)."""
    seen = 0

    def counted() -> bool:
        nonlocal seen
        seen += 1
        return seen == count

    if kind == "step":
        original = fit_module.Fit._step

        def step(self, number):
            if counted():
                die()
            original(self, number)

        fit_module.Fit._step = step
    elif kind == "write":
        original_sync = storage._sync

        def sync(path):
            if path.name == storage.TENSORS and counted():
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
                die()
            original_sync(path)

        storage._sync = sync
    elif kind == "end":
        original_train = run_module.Run._train

        def train(self, stage):
            trained = original_train(self, stage)
            if counted():
                die()
            return trained

        run_module.Run._train = train
    else:
        raise SystemExit(f"unknown kind {kind}")


def weights(result: Result) -> str:
    """A digest of every tensor in the artefacts."""
    digest = hashlib.sha256()
    for name in sorted(result.artefacts):
        for key, tensor in sorted(result.artefacts[name].state_dict().items()):
            digest.update(f"{name}.{key}".encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kill", nargs=2, default=None)
    parser.add_argument("--every", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kill:
        arm(options.kill[0], int(options.kill[1]))
    directory = RunDirectory(options.directory)
    directory.lock()
    settings = Settings(device="cpu", log_every=4, checkpoint_every=options.every)
    result = Run(Torture(data="digits"), directory, seed=3, settings=settings).execute()
    directory.release()
    print(weights(result))


if __name__ == "__main__":
    sys.exit(main())
