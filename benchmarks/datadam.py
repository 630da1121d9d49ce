"""A step of DataDAM: stillhouse's engine beside a loop over the released code's own functions, in one run.

    git clone https://github.com/DataDistillation/DataDAM released
    OMP_NUM_THREADS=1 python benchmarks/datadam.py --released released

Both do the same: a fresh ConvNet (batch norm, as released), a batch of real images of each class and the tiny set through it
under one augmentation per class, attention maps of power 1 and features compared, one step of SGD on the pixels. The loop
takes network, augmentation and attention from the clone and calls them in the order of its training script; the engine does
all that it always does (seeds, checks, log). Runs alternate; prints the median step time of each, the ratio, and the peak of
what torch holds in two steps beyond the images.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from measuring import peak_memory
from stillhouse.data import Data, ObjectData
from stillhouse.engine import Result, Run, RunDirectory, Settings, Silent
from stillhouse.methods.datasets.datadam import DataDAM

CLASSES, SIZE, STRATEGY, WARM_UP = 10, 32, "color_crop_cutout_flip_scale_rotate", 2

UNUSED = (
    "torchvision",
    "torchvision.utils",
    "einops",
    "einops.layers",
    "einops.layers.torch",
    "tqdm",
    "scipy.ndimage.interpolation",
)
"""What the release imports, and its loss does not need; scipy's module no longer exists."""


class OneStage(Exception):
    """Ends a run after the stage that is measured."""


class Clock(Silent):
    """Times the steps of the matching stage, and ends the run after it."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.matching = False

    def stage(self, name: str, steps: int, done: int) -> None:
        """Only the matching stage counts."""
        if self.matching:
            raise OneStage
        self.matching = name == "matching"

    def step(self, step: int) -> None:
        """Look at the clock."""
        if self.matching:
            self.times.append(time.perf_counter())

    def row(self, row: Mapping[str, Any]) -> None:
        """Ignore."""


def by_engine(data: Data, options: argparse.Namespace, steps: int) -> list[float]:
    """Seconds of each step but the first ones."""
    method = DataDAM.model_validate(
        {
            "data": ObjectData.from_object(data),
            "variant": "code",
            "network": {"kind": "convnet", "width": options.width},
            "images_per_class": options.images,
            "batch_real": options.real,
            "num_steps": steps,
            "augment": STRATEGY,
            "compare_start": False,
            "eval_networks": 1,
            "eval_epochs": 1,
        }
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        directory = RunDirectory(Path(place))
        directory.lock()
        run = Run(method, directory, settings=Settings(device="cpu"), data=data, listener=clock)
        result: Result | None = None
        try:
            result = run.execute()
        except OneStage:
            pass
        finally:
            directory.release()
        assert result is None
    return [b - a for a, b in zip(clock.times[WARM_UP - 1 :], clock.times[WARM_UP:], strict=False)]


def released(home: Path) -> SimpleNamespace:
    """The functions of a clone of the release. What it imports and its loss does not need may be missing here."""
    present = {name: importlib.util.find_spec(name.partition(".")[0]) is not None for name in UNUSED}
    for name in UNUSED:
        if not present[name] or name.startswith("scipy"):
            sys.modules[name] = MagicMock()
    sys.path.insert(0, str(home))
    networks, functions = importlib.import_module("networks"), importlib.import_module("utils")
    return SimpleNamespace(
        ConvNet=networks.ConvNet,
        augment=functions.DiffAugment,
        param=functions.ParamDiffAug(),
        attention=functions.get_attention,
    )


def by_release(code: SimpleNamespace, data: Data, options: argparse.Namespace, steps: int) -> list[float]:
    """Seconds of each step but the first ones."""
    tensors = data.split("train").tensors
    assert tensors is not None
    pixels, members = tensors["pixel_values"], list(data.split("train").by_class().values())
    tiny = torch.cat([pixels[one[: options.images]] for one in members]).requires_grad_()
    optimizer = torch.optim.SGD([tiny], lr=1.0, momentum=0.5)
    times = []
    for step in range(steps):
        started = time.perf_counter()
        net = code.ConvNet(3, CLASSES, options.width, 3, "relu", "batchnorm", "avgpooling", (SIZE, SIZE))
        net.train().requires_grad_(False)
        maps: list[Tensor] = []
        for module in net.features:
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda _, inputs, output, kept=maps: kept.append(output.clone()))
        real, synthetic = [], []
        for label, one in enumerate(members):
            chosen = pixels[one[torch.randperm(len(one))[: options.real]]]
            mine = tiny[label * options.images : (label + 1) * options.images]
            seed = int(time.time() * 1000) % 100000
            real.append(code.augment(chosen, STRATEGY, seed=seed, param=code.param))
            synthetic.append(code.augment(mine, STRATEGY, seed=seed, param=code.param))
        real_features = net(torch.cat(real))[0].detach()
        real_maps = [one.detach() for one in maps]
        maps.clear()
        features = net(torch.cat(synthetic))[0]
        loss = torch.zeros(())
        for theirs, ours in zip(real_maps[:-1], maps[:-1], strict=True):
            loss = loss + 100 * squared(code.attention(theirs, 1, 1, "l2"), code.attention(ours, 1, 1, "l2"))
        loss = loss + 100 * 0.01 * squared(real_features, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if step >= WARM_UP:
            times.append(time.perf_counter() - started)
    return times


def squared(real: Tensor, synthetic: Tensor) -> Tensor:
    """Squared distance of class means, summed."""
    means = [one.reshape(CLASSES, len(one) // CLASSES, -1).mean(1) for one in (real, synthetic)]
    return (means[0] - means[1]).square().sum()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", type=Path, required=True, help="a clone of the released code")
    parser.add_argument("--width", type=int, default=64, help="of the ConvNet; 128 in the paper")
    parser.add_argument("--images", type=int, default=10, help="tiny images of each class")
    parser.add_argument("--real", type=int, default=32, help="real images of each class and step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    code = released(options.released)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(CLASSES * 64, 3, SIZE, SIZE, generator=generator)
    labels = torch.arange(len(images)) % CLASSES
    data = ObjectData.from_object({"train": (images, labels), "test": (images[:CLASSES], labels[:CLASSES])}).load()
    ours, theirs = [], []
    for _ in range(options.repeats):
        ours += by_engine(data, options, WARM_UP + options.steps)
        theirs += by_release(code, data, options, WARM_UP + options.steps)
    memory = [
        peak_memory(lambda: by_engine(data, options, 2), torch.device("cpu")),
        peak_memory(lambda: by_release(code, data, options, 2), torch.device("cpu")),
    ]
    engine, release = 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs)
    print(
        f"width {options.width}, {options.images} tiny and {options.real} real images of each of {CLASSES} classes: engine "
        f"{engine:.0f} ms, released {release:.0f} ms, ratio {engine / release:.3f}; peak {memory[0]:.0f} MiB and "
        f"{memory[1]:.0f} MiB, ratio {memory[0] / memory[1]:.3f} (torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()
