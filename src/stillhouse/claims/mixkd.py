"""MIX-KD's claim: the paper's study as a grid of arms, and the recipe that it leads to."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

SGD: dict[str, Any] = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "schedule": "cosine"}
FULL: dict[str, Any] = {"kind": "mixup", "fraction": 1.0}
PARTIAL: dict[str, Any] = {"kind": "mixup", "fraction": 0.1}


def cell(teacher: str, student: str | dict[str, Any], temperature: float | str) -> dict[str, Any]:
    """One combination of the study."""
    return {"teacher": {"mix": teacher}, "mix": student, "temperature": temperature}


claim = Claim(
    name="mixkd",
    statement=(
        "On 2,000 Fashion-MNIST images a student does at least 0.5 points worse with a teacher trained with mixup than with a "
        "plain one; where both are trained with mixup, temperature 1 is at least 0.3 points better than 4; and partial mixup "
        "with each sample's own temperature is at least 0.7 points better than full mixup at temperature 4, and 0.5 better "
        "than partial mixup at temperature 4."
    ),
    base={
        "method": "mixkd",
        "run": {"threads": 1},
        "data": {"kind": "fashion-mnist", "train_size": 2000},
        "teacher": {
            "kind": "trained",
            "model": {"kind": "cnn", "channels": [32, 64, 128], "strides": [2, 2, 1]},
            "optimizer": SGD,
            "epochs": 20,
        },
        "student": {"kind": "cnn", "channels": [6, 12, 24], "strides": [2, 2, 1]},
        "optimizer": SGD,
        "epochs": 30,
        "batch_size": 64,
        "compare_alone": False,
        "evaluations": 1,
    },
    arms={
        "partial-std": cell("none", PARTIAL, "std"),
        "partial-t4": cell("none", PARTIAL, 4.0),
        "unmixed-std": cell("none", "none", "std"),
        "unmixed-t4": cell("none", "none", 4.0),
        "unmixed-t1": cell("none", "none", 1.0),
        "full-t4": cell("none", FULL, 4.0),
        "full-t1": cell("none", FULL, 1.0),
        "mixup-teacher-unmixed-t4": cell("mixup", "none", 4.0),
        "mixup-teacher-unmixed-t1": cell("mixup", "none", 1.0),
        "mixup-teacher-full-t4": cell("mixup", FULL, 4.0),
        "mixup-teacher-full-t1": cell("mixup", FULL, 1.0),
    },
    margins=[
        Margin("unmixed-t4", "mixup-teacher-unmixed-t4", "test/accuracy", by=0.005),
        Margin("mixup-teacher-full-t1", "mixup-teacher-full-t4", "test/accuracy", by=0.003),
        Margin("partial-std", "full-t4", "test/accuracy", by=0.007),
        Margin("partial-std", "partial-t4", "test/accuracy", by=0.005),
    ],
    metrics=[
        "test/teacher/accuracy",
        "probe/teacher/entropy",
        "probe/student/entropy",
        "probe/student/separation",
        "probe/student/accuracy_fgsm",
    ],
    seeds=(0, 1, 2, 3, 4),
)
