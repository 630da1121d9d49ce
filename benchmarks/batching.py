"""Batches per second of an in-memory split against torch's DataLoader, on images of 28 x 28 bytes.

    python benchmarks/batching.py --batch-size 128 --seconds 3

Both give shuffled float32 pixels of mean 0 and deviation 1 with labels. Two DataLoaders are measured with each number
of workers: over floats made beforehand (the least work it can have) and over bytes converted per sample (what a data
set with a transform does). The ratio is that of the medians over the rounds, which take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stillhouse.data import load_data


class Bytes(Dataset[tuple[Tensor, Tensor]]):
    """Images kept as bytes and converted one by one."""

    def __init__(self, images: Tensor, labels: Tensor, mean: float, std: float) -> None:
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.images[index].float() / 255 - self.mean) / self.std, self.labels[index]


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def rate(batches: Iterator[Any], seconds: float) -> float:
    """Batches per second."""
    for _ in range(3):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return count / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="time per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (arguments.samples, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (arguments.samples,), generator=generator)
    data = load_data({"kind": "object", "object": (images, labels), "pixels": "standard", "validation": 0, "test": 0})
    split, scale = data.split("train"), data.scale
    assert scale is not None
    floats = TensorDataset(scale.to_model(images), labels)
    raw = Bytes(images, labels, scale.mean[0], scale.std[0])

    def loader(dataset: Dataset[Any], workers: int) -> Callable[[], Iterator[Any]]:
        return lambda: endless(
            DataLoader(
                dataset, arguments.batch_size, shuffle=True, drop_last=True, num_workers=workers,
                persistent_workers=workers > 0,
            )
        )  # fmt: skip

    contenders: dict[str, Callable[[], Iterator[Any]]] = {
        "stillhouse": lambda: split.batches(arguments.batch_size).open(0)
    }
    for workers in arguments.workers:
        contenders[f"DataLoader, floats, {workers} workers"] = loader(floats, workers)
        contenders[f"DataLoader, bytes, {workers} workers"] = loader(raw, workers)

    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, make in contenders.items():
            rates[name].append(rate(make(), arguments.seconds))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    own = medians["stillhouse"]
    print(f"torch {torch.__version__}, {arguments.threads} threads, batches of {arguments.batch_size}")
    for name, median in medians.items():
        spread = f"{min(rates[name]):.0f}-{max(rates[name]):.0f}"
        print(f"{name:34} {median:9.0f} batches/s ({spread}), {1e6 / median:8.1f} us each, ratio {own / median:6.1f}")


if __name__ == "__main__":
    main()
