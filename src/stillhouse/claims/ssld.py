"""SSLD's claim: without a label a student learns more than with few, more images help, true JS is no drop-in, mining cleans.

Two parts: clean, where the pool has the target's own distribution, and dirty, where two thirds of it are handwritten digits
among clothes.
"""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

STUDENT: dict[str, Any] = {"kind": "cnn", "channels": [6, 12, 24], "strides": [2, 2, 1]}
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine", "weight_decay": 5e-4}
WITH_POOL: dict[str, Any] = {**SGD, "weight_decay": 1e-4}


def teacher(images: int, **data: Any) -> dict[str, Any]:
    """The teacher of a part, trained on many more images than the student sees labels for."""
    return {
        "kind": "trained",
        "model": {"kind": "cnn", "channels": [32, 64, 128], "strides": [2, 2, 1]},
        "data": {"kind": "fashion-mnist", "train_size": images, **data},
        "epochs": 5,
    }


# Each student takes 930 steps: 30 passes over 2,000 images in batches of 64.
CLEAN: dict[str, Any] = {
    "method": "ssld",
    "teacher": teacher(40000),
    "student": STUDENT,
    "optimizer": SGD,
    "num_steps": 930,
    "warmup_epochs": 0,
    "finetune_epochs": 0,
    "duplicates": False,
    "compare_alone": False,
}
POOL: dict[str, Any] = {**CLEAN, "pool": "fashion-mnist", "per_class": 800, "optimizer": WITH_POOL}
SMALL: dict[str, Any] = {"image_size": 14}
DIRTY: dict[str, Any] = {
    **CLEAN,
    "data": {"kind": "fashion-mnist", "train_size": 1000, **SMALL},
    "teacher": teacher(15000, **SMALL),
    "optimizer": WITH_POOL,
    "num_steps": 600,
    "divergence": "js",
    "per_class": 400,
    "pool": [
        {"kind": "fashion-mnist", "train_size": 10000, **SMALL},
        {"kind": "mnist", "train_size": 20000, **SMALL},
    ],
}

claim = Claim(
    name="ssld",
    statement=(
        "On 2,000 Fashion-MNIST images, with a teacher trained on 40,000, label-free Jeffreys is at least 1.0 points above the "
        "labels, 8,000 random unlabelled images add at least 0.5 at the same number of steps, and the true JS at the same "
        "learning rate is at least 5 below; of a pool that is two thirds digits, the surest images of each class train at "
        "least 15 points better than random ones (true JS, 1,000 + 4,000 images)."
    ),
    base={
        "data": {"kind": "fashion-mnist", "train_size": 2000},
        "batch_size": 64,
        "evaluations": 1,
        "run": {"threads": 1},
    },
    arms={
        "labels": {"method": "supervised", "model": STUDENT, "optimizer": SGD, "epochs": 30},
        "kd": {
            "method": "kd",
            "teacher": teacher(40000),
            "student": STUDENT,
            "optimizer": SGD,
            "epochs": 30,
            "compare_alone": False,
        },
        "jeffreys": CLEAN,
        "js": {**CLEAN, "divergence": "js"},
        "random-pool": {**POOL, "select": "random"},
        "top-pool": POOL,
        "dirty-top": DIRTY,
        "dirty-random": {**DIRTY, "select": "random"},
        "dirty-top-3x": {**DIRTY, "num_steps": 1800},
        "dirty-top-running": {**DIRTY, "teacher_bn": "running"},
        "dirty-random-running": {**DIRTY, "teacher_bn": "running", "select": "random"},
    },
    margins=[
        Margin("jeffreys", "labels", "test/accuracy", by=0.01),
        Margin("random-pool", "jeffreys", "test/accuracy", by=0.005),
        Margin("jeffreys", "js", "test/accuracy", by=0.05),
        Margin("dirty-top", "dirty-random", "test/accuracy", by=0.15),
        Margin("dirty-top-3x", "dirty-top", "test/accuracy", by=0.03),
    ],
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "Four margins hold; the one that asks for 15 points on the dirty pool is missed by 0.6, within noise (7 to 22 in "
        "the interval; 8 to 24 in single seeds). Labels 80.2 %, Jeffreys 81.7, KD with labels 81.8, with random pool "
        "images 82.6. The surest images of a clean pool train worse (80.0 %) than random ones: they are the easy ones. "
        "The margin comes from an earlier prototype, which measured 28.7 points. Here the random arm is much better than "
        "there (59.2 %), and with a teacher whose batch norm keeps its running statistics it falls to 49.9 %, so that the "
        "gap is 23.6 points: the batch statistics help most where most images are foreign. The two arms with running "
        "statistics were added after the result was seen. Whether that is the whole difference between the two is not "
        "established."
    ),
)
