"""DATM's claim: at one image a class early epochs make a set that is far better than real images, and than late epochs."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

SHARED: dict[str, Any] = {
    "data": "digits",
    "images_per_class": 1,
    "network": {"kind": "convnet", "width": 16, "depth": 2, "norm": "group"},
    "augment": "none",
    "eval_networks": 5,
    "eval_epochs": 400,
    "run": {"threads": 1},
}
EXPERTS: dict[str, Any] = {"count": 8, "epochs": 30, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}}


def datm(first: int, last: int, **fields: Any) -> dict[str, Any]:
    """Trajectory matching from the epochs ``first`` to ``last - 1``, with the fields of the card's measurement."""
    return {
        "method": "datm",
        "experts": EXPERTS,
        "num_steps": 300,
        "inner_steps": 15,
        "batch_syn": None,
        "min_start_epoch": first,
        "first_max_start_epoch": None,
        "max_start_epoch": last,
        "lr_images": 10.0,
        "lr_labels": 1.0,
        "step_size": 0.05,
        "compare_start": False,
        **fields,
    }


claim = Claim(
    name="datm",
    statement=(
        "On scikit-learn's digits at one image a class, networks trained on images that match early epochs reach at least 15 "
        "points more test accuracy than on random real images, and at least 5 more than on those that match late epochs."
    ),
    base=SHARED,
    arms={
        "early": datm(0, 4),
        "late": datm(15, 25),
        "early-hard-labels": datm(0, 4, soft_labels=False),
        "early-surrogate": datm(0, 4, exact=False),
        "early-any-images": datm(0, 4, correct_images=False),
        "random": {
            "method": "random-selection",
            "eval_optimizer": {
                "name": "sgd",
                "lr": 0.05,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "schedule": "step",
                "milestones": [0.5],
            },
        },
    },
    margins=[
        Margin("early", "random", "test/accuracy", by=0.15),
        Margin("early", "late", "test/accuracy", by=0.05),
    ],
    seeds=(0, 1, 2),
    remark=(
        "Eight plain experts of 30 epochs, 15 inner steps, 300 outer steps, five fresh networks a score. The paper's other "
        "half, that large sets need late epochs, cannot be seen on digits: experts there learn nothing late that ten real "
        "images a class do not show."
    ),
)
