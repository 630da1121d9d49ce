"""AST's claim: a slow start evens the path of strong experts, and sets that match them beat the images they start from."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

STRONG: dict[str, Any] = {
    "count": 6,
    "epochs": 25,
    "batch_size": 64,
    "optimizer": {
        "name": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "schedule": "step",
        "milestones": [0.54],
        "gamma": 0.6,
    },
}
WEAK: dict[str, Any] = {"count": 6, "epochs": 25, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}}
CLIPPED: dict[str, Any] = {**STRONG, "slow_start": 10}
SMOOTH: dict[str, Any] = {**CLIPPED, "weight_penalty": 2.0}


def experts(training: dict[str, Any]) -> dict[str, Any]:
    """Experts alone, for the evenness of their path."""
    return {"method": "expert-trajectories", "experts": training}


def matched(training: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A set of ten images a class that matches such experts."""
    return {
        "method": "smooth-trajectories",
        "images_per_class": 10,
        "experts": training,
        "num_steps": 300,
        "inner_steps": 15,
        "max_start_epoch": 6,
        "batch_syn": 100,
        "lr_images": 10.0,
        "step_size": 0.02,
        "eval_networks": 5,
        "eval_epochs": 200,
        **fields,
    }


claim = Claim(
    name="smooth-trajectories",
    statement=(
        "On scikit-learn's digits a slow start makes the steps of strong experts more even over their first ten epochs, and at "
        "ten images a class networks trained on a set that matches smooth strong experts reach more test accuracy than on the "
        "real images it starts from."
    ),
    base={
        "data": "digits",
        "network": {"kind": "convnet", "width": 16, "depth": 2, "norm": "group"},
        "augment": "none",
        "run": {"threads": 1},
    },
    arms={
        "experts-strong": experts(STRONG),
        "experts-clipped": experts(CLIPPED),
        "experts-smooth": experts(SMOOTH),
        "smooth": matched(SMOOTH),
        "clipped": matched(CLIPPED),
        "strong": matched(STRONG),
        "weak": matched(WEAK),
        "start": matched(SMOOTH, num_steps=1, lr_images=1e-9, lr_step=1e-12, compare_start=False),
    },
    margins=[
        Margin("experts-clipped", "experts-strong", "path/variation", by=0.0, mode="min"),
        Margin("smooth", "start", "test/accuracy", by=0.0),
    ],
    metrics=["test/accuracy", "path/length"],
    seeds=(0, 1, 2),
    remark="",
)
