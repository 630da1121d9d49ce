"""HeLlO's claim: a light labeller gives most of what a soft label for every view gives."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

SHARED: dict[str, Any] = {
    "method": "hello",
    "data": {"kind": "digits", "image_size": 16},
    "images_per_class": 10,
    "foundation": {
        "kind": "two-towers",
        "model": {
            "kind": "two-towers",
            "image": {"kind": "cnn", "channels": [16, 32, 32], "strides": [2, 2, 1]},
            "width": 32,
            "text_hidden": 32,
        },
        "data": {"kind": "characters", "characters": "0123456789", "size": 16, "per_class": 150},
    },
    "prompt": "a picture of a {}",
    "encoder_rank": 4,
    "head_rank": 8,
    "teacher": {"kind": "cnn", "channels": [16, 32], "strides": [2, 2]},
    "teacher_optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine"},
    "teacher_epochs": 30,
    "teacher_batch_size": 64,
    "checkpoints": 5,
    "labeller_optimizer": {"name": "adamw", "lr": 1e-2, "schedule": "cosine"},
    "labeller_epochs": 40,
    "labeller_batch_size": 64,
    "real_augment": {"kind": "shift", "by": 1},
    "crops": 3,
    "smallest": 0.6,
    "update_steps": 30,
    "view_smallest": 0.15,
    "view_flip": False,
    "view_mix": "none",
    "network": {"kind": "cnn", "channels": [16, 32], "strides": [2, 2]},
    "eval_networks": 2,
    "eval_epochs": 400,
    "eval_batch_size": 25,
    "eval_optimizer": {"name": "adamw", "lr": 5e-3, "weight_decay": 0.01, "schedule": "cosine"},
    "run": {"threads": 1},
}
PROBE: dict[str, Any] = {"encoder_rank": 0, "head_rank": None, "text_init": False}

claim = Claim(
    name="hello",
    statement=(
        "On scikit-learn's digits at ten stitched images a class, students of a labeller with low-rank changes are ahead of "
        "those of a linear probe on the same foundation model and of those that learn one soft label per image, and these of "
        "those that learn class labels alone."
    ),
    base=SHARED,
    arms={
        "hello": {},
        "teacher": {"labels": "teacher"},
        "per-image": {"labels": "per-image"},
        "hard": {"labels": "hard", "weight_hard": 1.0},
        "probe": PROBE,
        "probe-one-teacher": {**PROBE, "checkpoints": 1},
        "no-text": {"head_rank": None, "text_init": False},
        "no-update": {"update_steps": 0},
    },
    margins=[
        Margin("hello", "probe", "test/accuracy", by=0.0),
        Margin("hello", "per-image", "test/accuracy", by=0.0),
        Margin("hello", "hard", "test/accuracy", by=0.0),
        Margin("per-image", "hard", "test/accuracy", by=0.0),
    ],
    metrics=["test/labeller/accuracy", "test/zero-shot/accuracy", "labels/bytes", "labels/full_bytes"],
    remark=(
        "The foundation model is two small towers trained on printed digits with captions (one for all seeds), five weak "
        "teachers, ranks 4 and 8, images of 16x16, 400 epochs of new views, not mixed. The arm teacher is the converged "
        "teacher's word for each view, which stored would take labels/full_bytes; its gain over hard is what hello is to "
        "recover. With ten classes a labeller saves little."
    ),
)
