"""FTD's claim: experts are flatter at their end, and sets that match them are far better than real images."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

NETWORK: dict[str, Any] = {"kind": "convnet", "width": 16, "depth": 2, "norm": "group"}
EXPERTS: dict[str, Any] = {"count": 4, "epochs": 15, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}}
STEP: dict[str, Any] = {
    "name": "sgd",
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "step",
    "milestones": [0.5],
}


def experts(rho: float) -> dict[str, Any]:
    """Experts alone, with the largest eigenvalue of the Hessian at their end."""
    flat = {"rho": rho, "alpha": 0.3} if rho else {}
    return {
        "method": "expert-trajectories",
        "experts": {**EXPERTS, **flat},
        "sharpness_samples": 500,
    }


def matched(rho: float) -> dict[str, Any]:
    """A set of one image a class that matches such experts."""
    flat = {"rho": rho, "alpha": 0.3} if rho else {}
    return {
        "method": "ftd",
        "images_per_class": 1,
        "experts": {**EXPERTS, **flat},
        "num_steps": 300,
        "inner_steps": 15,
        "max_start_epoch": 4,
        "lr_images": 10.0,
        "step_size": 0.05,
        "ema": 0.99,
        "chains": 4,
        "compare_start": False,
        "eval_networks": 5,
        "eval_epochs": 400,
    }


claim = Claim(
    name="ftd",
    statement=(
        "On scikit-learn's digits, flat experts end where the Hessian's largest eigenvalue is at most three quarters of plain "
        "ones', and at one image a class networks trained on a set that matches them reach at least 15 points more test accuracy "
        "than on random real images; the error that accumulates along a path is no larger than with plain experts."
    ),
    base={"data": "digits", "network": NETWORK, "augment": "none", "run": {"threads": 1}},
    arms={
        "experts-plain": experts(0.0),
        "experts-0.05": experts(0.05),
        "experts-0.3": experts(0.3),
        "plain": matched(0.0),
        "flat": matched(0.05),
        "flat-0.3": matched(0.3),
        "random": {
            "method": "random-selection",
            "images_per_class": 1,
            "eval_networks": 5,
            "eval_epochs": 400,
            "eval_optimizer": STEP,
        },
    },
    margins=[
        Margin("experts-0.3", "experts-plain", "sharpness", by=0.25, mode="min", ratio=True),
        Margin("flat", "random", "test/accuracy", by=0.15),
        Margin("flat", "plain", "error/accumulated", by=0.0, mode="min"),
    ],
    metrics=["test/accuracy", "error/matching"],
    seeds=(0, 1, 2),
    remark="",
)
