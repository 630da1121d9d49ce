"""What the claims of the knowledge wing share: 2,000 Fashion-MNIST images, a teacher trained on 40,000, a small student."""

from __future__ import annotations

from typing import Any

TEACHER: dict[str, Any] = {
    "kind": "trained",
    "model": {"kind": "cnn", "channels": [32, 64, 128], "strides": [2, 2, 1]},
    "data": {"kind": "fashion-mnist", "train_size": 40000},
    "epochs": 5,
}

STUDENT: dict[str, Any] = {"kind": "cnn", "channels": [6, 12, 24], "strides": [2, 2, 1]}

SHARED: dict[str, Any] = {
    "data": {"kind": "fashion-mnist", "train_size": 2000},
    "teacher": TEACHER,
    "student": STUDENT,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine"},
    "epochs": 30,
    "batch_size": 64,
    "compare_alone": False,
    "evaluations": 1,
    "run": {"threads": 1},
}
