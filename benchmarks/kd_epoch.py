"""Time of an epoch of distillation from cached teacher outputs, against the same student trained without a teacher.

    python benchmarks/kd_epoch.py [--images 4096] [--epochs 2] [--repeats 5] [--threads 1]

Both run through the engine in this process, alternating; the ratio of the medians is printed. The teacher's outputs are
computed once before and are not part of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

import stillhouse as sh

STUDENT = {"kind": "cnn", "channels": [16, 32, 64]}


def seconds(stage: str, method: str, data: object, options: argparse.Namespace, **fields: object) -> float:
    """Time of one stage of a run."""
    with tempfile.TemporaryDirectory() as directory:
        settings = {"threads": options.threads, "device": "cpu"}
        shared = {"epochs": options.epochs, "evaluations": 1, "settings": settings, "out": directory}
        sh.distil(method, data=data, **shared, **fields)
        return json.loads((Path(directory) / "cost.json").read_text())[stage]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("images", 4096), ("epochs", 2), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = torch.rand(options.images, 1, 28, 28), torch.randint(0, 10, (options.images,))
    data = {"train": (images, labels), "validation": (images[:64], labels[:64])}
    teacher = {"kind": "trained", "model": {"kind": "cnn", "channels": [32, 64, 128]}, "epochs": 1}
    distilled = {"teacher": teacher, "student": STUDENT, "cache_teacher": True, "compare_alone": False}
    times: dict[str, list[float]] = {"distilled": [], "alone": []}
    for repeat in range(options.repeats + 1):
        found = {
            "distilled": seconds("student", "kd", data, options, **distilled),
            "alone": seconds("model", "supervised", data, options, model=STUDENT),
        }
        if repeat:
            for name, value in found.items():
                times[name].append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"distilled {medians['distilled']:.3f} s, alone {medians['alone']:.3f} s per {options.epochs} epochs")
    print(f"ratio {medians['distilled'] / medians['alone']:.3f} (asked: at most 1.1)")


if __name__ == "__main__":
    main()
