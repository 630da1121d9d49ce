"""Training throughput of KD, DKD, CRD and ReviewKD: the engine beside the public toolkits' own losses in a bare loop.

    git clone https://github.com/megvii-research/mdistiller && git clone https://github.com/HobbitLong/RepDistiller
    OMP_NUM_THREADS=1 python benchmarks/knowledge_throughput.py --mdistiller mdistiller --repdistiller RepDistiller

resnet32x4 teaches resnet8x4 (both untrained: weights do not change the time) at 32x32 with batches of 64, all methods at the
weights and sizes of their CIFAR-100 configurations, CRD with 16,384 negatives of 50,000 samples. Both sides run the same
networks on batches of the same tensors with the same optimiser. A toolkit's side is the least that its code needs: its
distiller's ``forward_train``, backward and step. Its data loader, its meters and its progress bar are left out, and CRD's
negatives are drawn for it beforehand (its loader does that in processes of its own); the engine's side is all that the engine
does, drawing included. The first step is not counted. Times are the process's own on one thread. RepDistiller has KD and CRD.

Printed is samples per second, the ratio of the engine to each toolkit (median over repeats, in turns), and geometric means.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data import ObjectData
from stillhouse.engine import Run, RunDirectory, Settings, Silent
from stillhouse.models import ModelSpec
from stillhouse.registry import method_class

CLASSES, WIDTH, NEGATIVES, WARM_UP = 100, 256, 16384, 1
OPTIMIZER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
NETWORKS = {
    name: {"kind": "resnet", "depth": depth, "widths": [64, 128, 256], "stem_width": 32}
    for name, depth in (("teacher", 32), ("student", 8))
}
FIELDS: dict[str, dict[str, Any]] = {
    "kd": {},
    "dkd": {"weight_target": 1.0, "weight_non_target": 8.0},
    "crd": {"negatives": NEGATIVES},
    "reviewkd": {"weight_review": 5.0},
}
"""What differs from the defaults: weights that have grown."""


class Enough(Exception):
    """What was to be measured has been."""


class Watch(Silent):
    """Looks at the clock when the counted steps begin and end, and ends the run."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.seconds, self.watching = steps, 0.0, 0.0, False

    def stage(self, name: str, steps: int, done: int) -> None:
        """Watch the student's stage alone."""
        self.watching = name == "student"

    def step(self, step: int) -> None:
        """Note the time at two steps."""
        if self.watching and step == WARM_UP:
            self.started = time.process_time()
        elif self.watching and step == WARM_UP + self.steps:
            self.seconds = time.process_time() - self.started
            raise Enough

    def row(self, row: Mapping[str, Any]) -> None:
        """Ignore."""


class Tapped(nn.Module):
    """A ResNet in the form that the toolkits ask for: logits and features, before and after the activation of each stage."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits, and features by the toolkits' names."""
        net: Any = self.net
        x = net.stem(x)
        after, before = [x], [x]
        for stage in net.stages:
            *others, block = stage
            for one in others:
                x = one(x)
            branch = block.activation1(block.norm1(block.conv1(x)))
            before.append(block.norm2(block.conv2(branch)) + block.shortcut(x))
            x = block.activation2(before[-1])
            after.append(x)
        pooled = net.pool(x).flatten(1)
        return net.classifier(pooled), {"feats": after, "preact_feats": before, "pooled_feat": pooled}


def by_engine(name: str, nets: Mapping[str, nn.Module], data: Mapping[str, Any], batch: int, steps: int) -> float:
    """Samples per second of the stage that trains the student."""
    loaded = ObjectData.from_object(data).load()
    per_epoch = loaded.split("train").batches(batch).per_epoch(1)
    method = method_class(name).model_validate(
        {
            "data": ObjectData.from_object(loaded),
            "teacher": {
                "kind": "pretrained",
                "model": {"kind": "object", "object": nets["teacher"], "copy_on_build": False},
            },
            "student": {"kind": "object", "object": nets["student"]},
            "optimizer": {"name": "sgd", **OPTIMIZER},
            "epochs": (WARM_UP + steps) / per_epoch,
            "batch_size": batch,
            "evaluations": 1,
            "compare_alone": False,
            **FIELDS[name],
        }
    )
    watch = Watch(steps)
    with tempfile.TemporaryDirectory() as place:
        directory = RunDirectory(Path(place))
        directory.lock()
        with contextlib.suppress(Enough):
            Run(method, directory, settings=Settings(device="cpu"), data=loaded, listener=watch).execute()
        directory.release()
    return batch * steps / watch.seconds


Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The loss of images, labels and places in the data."""


def by_toolkit(
    make: Callable[[nn.Module, nn.Module, int], tuple[Step, list[nn.Parameter]]],
    nets: Mapping[str, nn.Module],
    data: Mapping[str, Any],
    batch: int,
    steps: int,
) -> float:
    """Samples per second of a bare loop over a toolkit's loss."""
    images, labels = data["train"]
    student, teacher = Tapped(copy.deepcopy(nets["student"]).train()), Tapped(nets["teacher"])
    with patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
        loss_of, parameters = make(student, teacher, len(images))
    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    started = 0.0
    # RepDistiller's memory says its constants aloud.
    with contextlib.redirect_stdout(io.StringIO()):
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                started = time.process_time()
            index = torch.randint(len(images), (batch,))
            loss = loss_of(images[index], labels[index], index)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return batch * steps / (time.process_time() - started)


def mdistiller(home: Path) -> dict[str, Any]:
    """Its distillers, at the configurations of CIFAR-100, by method."""
    weights = SimpleNamespace
    both = weights(CE_WEIGHT=1.0, FEAT_WEIGHT=0.8)
    sizes, channels = [1, 8, 16, 32], [64, 128, 256, 256]
    configuration = SimpleNamespace(
        KD=weights(TEMPERATURE=4, LOSS=weights(CE_WEIGHT=0.1, KD_WEIGHT=0.9)),
        DKD=weights(CE_WEIGHT=1.0, ALPHA=1.0, BETA=8.0, T=4.0, WARMUP=20),
        CRD=weights(
            LOSS=both,
            FEAT=weights(DIM=128, STUDENT_DIM=WIDTH, TEACHER_DIM=WIDTH),
            NCE=weights(K=NEGATIVES, MOMENTUM=0.5, TEMPERATURE=0.07),
        ),
        REVIEWKD=weights(
            CE_WEIGHT=1.0,
            REVIEWKD_WEIGHT=5.0,
            WARMUP_EPOCHS=20,
            SHAPES=sizes,
            OUT_SHAPES=sizes,
            IN_CHANNELS=channels,
            OUT_CHANNELS=channels,
            MAX_MID_CHANNEL=512,
            STU_PREACT=False,
        ),
    )
    sys.path.insert(0, str(home))
    found = {
        name: getattr(importlib.import_module(f"mdistiller.distillers.{name}"), name)
        for name in ("KD", "DKD", "CRD", "ReviewKD")
    }

    def make(name: str, student: nn.Module, teacher: nn.Module, count: int) -> tuple[Step, list[nn.Parameter]]:
        distiller = found[name](student, teacher, configuration, *([count] if name == "CRD" else []))
        distiller.train()
        negatives = drawn_before(count) if name == "CRD" else None

        def loss_of(images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
            more = {} if negatives is None else {"index": index, "contrastive_index": next(negatives)(index)}
            _, losses = distiller.forward_train(images, labels, epoch=20, **more)
            total: Tensor = sum(loss.mean() for loss in losses.values())  # type: ignore[assignment]
            return total

        return loss_of, list(distiller.get_learnable_parameters())

    return {name.lower(): partial(make, name) for name in found}


def repdistiller(home: Path) -> dict[str, Any]:
    """KD and CRD as its training loop runs them, by method."""
    sys.path.insert(0, str(home))
    soft = importlib.import_module("distiller_zoo.KD").DistillKL(4)
    contrast = importlib.import_module("crd.criterion").CRDLoss

    def make(name: str, student: nn.Module, teacher: nn.Module, count: int) -> tuple[Step, list[nn.Parameter]]:
        gamma, alpha, beta = (0.1, 0.9, 0.0) if name == "kd" else (1.0, 0.0, 0.8)
        parts = nn.ModuleList()
        options = SimpleNamespace(
            s_dim=WIDTH, t_dim=WIDTH, feat_dim=128, n_data=count, nce_k=NEGATIVES, nce_t=0.07, nce_m=0.5
        )
        crd = contrast(options) if name == "crd" else None
        if crd is not None:
            parts.extend([crd.embed_s, crd.embed_t])
        negatives = drawn_before(count) if crd is not None else None

        def loss_of(images: Tensor, labels: Tensor, index: Tensor) -> Tensor:
            logits, features = student(images)
            with torch.no_grad():
                teacher_logits, teacher_features = teacher(images)
            loss: Tensor = gamma * F.cross_entropy(logits, labels) + alpha * soft(logits, teacher_logits)
            if crd is None or negatives is None:
                return loss
            pooled = features["pooled_feat"], teacher_features["pooled_feat"]
            contrasted: Tensor = crd(*pooled, index, next(negatives)(index)).squeeze()
            return loss + beta * contrasted

        return loss_of, [*student.parameters(), *parts.parameters()]

    return {name: partial(make, name) for name in ("kd", "crd")}


def drawn_before(count: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Places of CRD's candidates, drawn once: what a loader does in other processes."""
    drawn = torch.randint(count, (64, NEGATIVES))
    while True:
        yield lambda index: torch.cat([index[:, None], drawn[: len(index)]], 1)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mdistiller", type=Path, help="a clone of megvii-research/mdistiller")
    parser.add_argument("--repdistiller", type=Path, help="a clone of HobbitLong/RepDistiller")
    parser.add_argument("--methods", nargs="+", choices=list(FIELDS), default=list(FIELDS))
    parser.add_argument("--images", type=int, default=50000, help="training samples, as many as CRD's memory has rows")
    parser.add_argument("--batch", type=int, default=64, help="samples of a step")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each")
    options = parser.parse_args()
    toolkits = {}
    if options.mdistiller is not None:
        toolkits["mdistiller"] = mdistiller(options.mdistiller.resolve())
    if options.repdistiller is not None:
        toolkits["RepDistiller"] = repdistiller(options.repdistiller.resolve())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(options.images, 3, 32, 32), torch.arange(options.images) % CLASSES
    part = images[:CLASSES], labels[:CLASSES]
    data = {"train": (images, labels), "validation": part, "test": part}
    facts = ObjectData.from_object({"train": part, "validation": part, "test": part}).load().facts
    nets = {name: ModelSpec.parse(spec).build(facts) for name, spec in NETWORKS.items()}
    nets["teacher"].eval().requires_grad_(False)
    print(
        f"resnet32x4 to resnet8x4, batch {options.batch}, one CPU thread, torch {torch.__version__}; samples per second"
    )
    ratios: dict[str, list[float]] = {name: [] for name in toolkits}
    for name in options.methods:
        ways: dict[str, Callable[..., float]] = {"engine": partial(by_engine, name)}
        ways |= {toolkit: partial(by_toolkit, made[name]) for toolkit, made in toolkits.items() if name in made}
        found: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(options.repeats):
            # Which goes first turns round: a machine drifts while it is measured.
            for way in list(ways) if repeat % 2 else list(ways)[::-1]:
                found[way].append(ways[way](nets, data, options.batch, options.steps))
        said = [f"engine {statistics.median(found['engine']):.2f}"]
        for toolkit in list(ways)[1:]:
            ratio = statistics.median(a / b for a, b in zip(found["engine"], found[toolkit], strict=True))
            ratios[toolkit].append(ratio)
            said.append(f"{toolkit} {statistics.median(found[toolkit]):.2f} (ratio {ratio:.3f})")
        print(f"  {name}: {', '.join(said)}", flush=True)
    for toolkit, each in ratios.items():
        if not each:
            continue
        print(f"  geometric mean over {toolkit}'s {len(each)} methods: {math.prod(each) ** (1 / len(each)):.3f}")


if __name__ == "__main__":
    main()
