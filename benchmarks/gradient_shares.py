"""What the sampled shares of the gradient cost: a stage of three terms with and without them, alternated in one process.

The terms are those of a distillation with a frozen teacher (cross-entropy, a divergence, a squared error of logits), so each
sample is three more backwards through the student. Times are of the processor, in one thread, at the default rhythm of the
log. The ratio of two runs is hard to tell from 1 on a busy machine, so the time within the samples is also taken by itself.

Usage: ``OMP_NUM_THREADS=1 python benchmarks/gradient_shares.py [--repeats 9]``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from stillhouse import losses
from stillhouse.data import Batch, Data, ObjectData
from stillhouse.engine import (
    Losses,
    Method,
    Modules,
    Paper,
    Result,
    Run,
    RunDirectory,
    Settings,
    Stage,
    Stages,
    Update,
    adamw,
    frozen,
)
from stillhouse.engine.shares import GradientShares


def network(width: int) -> nn.Module:
    """Three layers; the width sets how long a step takes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Distillation(Method):
    """One stage against a frozen teacher of the same size."""

    name: ClassVar[str] = "distillation"
    family: ClassVar[str] = "benchmarks"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "three terms"

    width: int
    batch_size: int
    steps: int

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Three terms."""
        student, teacher = m.net(batch["features"]), m.teacher(batch["features"])
        return {
            "ce": F.cross_entropy(student, batch.labels),
            "kl": losses.kl(student, teacher, 4.0),
            "mse": F.mse_loss(student, teacher),
        }

    def stages(self, run: Run) -> Stages:
        """The stage."""
        yield Stage(
            "student",
            {"net": network(self.width), "teacher": frozen(network(self.width))},
            [Update(self.loss, {"net": adamw(1e-3, schedule="cosine")})],
            steps=self.steps,
            batches=run.data.split("train").batches(self.batch_size),
        )
        return Result()


def seconds(data: Data, width: int, batch_size: int, steps: int, *, shares: bool) -> tuple[float, float]:
    """Processor time of the whole run, and within its samples."""
    within = [0.0]
    measure = GradientShares.measure

    def timed(*arguments: Any, **options: Any) -> None:
        started = time.process_time()
        measure(*arguments, **options)
        within[0] += time.process_time() - started

    with tempfile.TemporaryDirectory() as place, patch.object(GradientShares, "measure", timed):
        directory = RunDirectory(Path(place))
        directory.lock()
        method = Distillation(width=width, batch_size=batch_size, steps=steps)
        run = Run(method, directory, settings=Settings(device="cpu", gradient_shares=shares), data=data)
        started = time.process_time()
        run.execute()
        took = time.process_time() - started
        directory.release()
    return took, within[0]


def main() -> None:
    """Measure at a step of about 1 ms and of about 20 ms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4096, 64, generator=generator), torch.randint(0, 10, (4096,), generator=generator)
    data = ObjectData.from_object({"train": (x, y)}).load()
    for width, batch_size, steps in ((224, 64, 1500), (768, 256, 450)):
        seconds(data, width, batch_size, 60, shares=True)
        times: dict[bool, list[float]] = {True: [], False: []}
        parts = []
        for repeat in range(repeats):
            for shares in (True, False) if repeat % 2 else (False, True):
                took, within = seconds(data, width, batch_size, steps, shares=shares)
                times[shares].append(took)
                if shares:
                    parts.append(within / took)
        ratio = statistics.median(w / o for w, o in zip(times[True], times[False], strict=True))
        print(
            f"width {width}, batch {batch_size}, {steps} steps: {1e3 * statistics.median(times[False]) / steps:.3f} ms a step "
            f"without, {1e3 * statistics.median(times[True]) / steps:.3f} ms with, ratio {ratio:.4f} (of the fastest "
            f"{min(times[True]) / min(times[False]):.4f}); within the samples {statistics.median(parts):.2%}"
        )


if __name__ == "__main__":
    main()
