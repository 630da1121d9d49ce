"""What the engine costs: a stage against a hand-written loop that does the same work, alternated in one process.

Both draw index-batched samples from memory, run forward, loss and backward, take a fused AdamW step under a cosine
schedule, check the loss for NaN, and every 50 steps write the mean of the loss since the last row to a file. The engine
also seeds each step, checks every gradient, watches the clock for checkpoints and lets itself be interrupted. Times are
of the processor, in one thread, so that a busy machine disturbs them less.

Usage: ``OMP_NUM_THREADS=1 python benchmarks/engine.py [--repeats 9]``. Prints, for each size, the time per step of the
two, the median of the ratios of neighbouring runs, and what a stage costs once (set-up and its end state on disk).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

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
    Silent,
    Stage,
    Stages,
    Update,
    adamw,
)

WARM_UP, LOG_EVERY, LR = 50, 50, 1e-3


def network(width: int) -> nn.Module:
    """Three layers; the width sets how long a step takes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Plain(Method):
    """One stage of plain training."""

    name: ClassVar[str] = "plain"
    family: ClassVar[str] = "benchmarks"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "plain training"

    width: int
    batch_size: int
    steps: int

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Cross-entropy."""
        return {"ce": F.cross_entropy(m.net(batch["features"]), batch.labels)}

    def stages(self, run: Run) -> Stages:
        """The stage."""
        yield Stage(
            "plain",
            {"net": network(self.width)},
            [Update(self.loss, {"net": adamw(LR, schedule="cosine")})],
            steps=self.steps,
            batches=run.data.split("train").batches(self.batch_size),
        )
        return Result()


class Watch(Silent):
    """Notes when the steady part begins and ends."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, [0.0, 0.0]

    def step(self, step: int) -> None:
        """Look at the clock at two steps."""
        if step == WARM_UP:
            self.times[0] = time.process_time()
        elif step == self.steps:
            self.times[1] = time.process_time()

    def row(self, row: Mapping[str, Any]) -> None:
        """Ignore."""


def by_engine(data: Data, width: int, batch_size: int, steps: int) -> tuple[float, float]:
    """Seconds per step, and seconds that the stage costs once."""
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as place:
        directory = RunDirectory(Path(place))
        directory.lock()
        settings = Settings(device="cpu", log_every=LOG_EVERY)
        run = Run(
            Plain(width=width, batch_size=batch_size, steps=steps),
            directory,
            settings=settings,
            data=data,
            listener=watch,
        )
        started = time.process_time()
        run.execute()
        whole = time.process_time() - started
        directory.release()
    per_step = (watch.times[1] - watch.times[0]) / (steps - WARM_UP)
    return per_step, whole - per_step * steps


def by_hand(data: Data, width: int, batch_size: int, steps: int) -> float:
    """Seconds per step of a plain loop."""
    tensors = data.split("train").tensors
    assert tensors is not None
    x, y = tensors["features"], tensors["labels"]
    net, generator = network(width), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True)
    total, position, order, started = torch.zeros(()), len(x), torch.empty(0), 0.0
    with tempfile.TemporaryFile("w") as log:
        for step in range(steps):
            if step == WARM_UP:
                started = time.process_time()
            if position + batch_size > len(x):
                order, position = torch.randperm(len(x), generator=generator), 0
            index = order[position : position + batch_size]
            position += batch_size
            loss = F.cross_entropy(net(x.index_select(0, index)), y.index_select(0, index))
            if not math.isfinite(loss.item()):
                raise SystemExit("the loss is NaN")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.step()
            total = total + loss.detach()
            if (step + 1) % LOG_EVERY == 0:
                log.write(json.dumps({"step": step + 1, "ce": (total / LOG_EVERY).item()}) + "\n")
                log.flush()
                total = torch.zeros(())
    return (time.process_time() - started) / (steps - WARM_UP)


def main() -> None:
    """Measure at a step of about 1 ms and of about 20 ms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4096, 64, generator=generator), torch.randint(0, 10, (4096,), generator=generator)
    data = ObjectData.from_object({"train": (x, y)}).load()
    for width, batch_size, steps in ((224, 128, 450), (768, 384, 90)):
        by_engine(data, width, batch_size, WARM_UP + 10)
        engine, hand, once = [], [], []
        for repeat in range(repeats):
            # Which of the two goes first alternates as well: a machine drifts while it is measured.
            for first in (True, False) if repeat % 2 else (False, True):
                if first:
                    per_step, constant = by_engine(data, width, batch_size, steps)
                    engine.append(per_step)
                    once.append(constant)
                else:
                    hand.append(by_hand(data, width, batch_size, steps))
        ratio = statistics.median(e / h for e, h in zip(engine, hand, strict=True))
        print(
            f"width {width}, batch {batch_size}: engine {1e3 * statistics.median(engine):.3f} ms, by hand "
            f"{1e3 * statistics.median(hand):.3f} ms, ratio {ratio:.3f} (of the fastest {min(engine) / min(hand):.3f}); "
            f"once per stage {1e3 * statistics.median(once):.0f} ms"
        )


if __name__ == "__main__":
    main()
