"""DataDAM's claim: at one image a class it beats real images and distribution matching."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

SHARED: dict[str, Any] = {
    "data": "digits",
    "images_per_class": 1,
    "network": {"kind": "convnet", "width": 32, "norm": "instance"},
    "augment": "crop_scale_rotate",
    "eval_networks": 4,
    "eval_epochs": 300,
    "run": {"threads": 1},
}
MATCHED: dict[str, Any] = {"num_steps": 800, "batch_real": 32, "lr_images": 1.0, "compare_start": False}


def dm(weight: float) -> dict[str, Any]:
    """Distribution matching with a weight of its loss (its learning rate is fixed, so the weight sets its pace)."""
    return {**MATCHED, "method": "dm", "weight_features": weight}


def datadam(**fields: Any) -> dict[str, Any]:
    """DataDAM with changed fields."""
    return {**MATCHED, "method": "datadam", **fields}


claim = Claim(
    name="datadam",
    statement=(
        "On scikit-learn's digits at one image a class, networks trained on DataDAM's images reach at least 15 points more "
        "test accuracy than on random real images, and at least 5 more than on those of DM at the best of three weights."
    ),
    base=SHARED,
    arms={
        "datadam": datadam(),
        "random": {"method": "random-selection"},
        "herding": {"method": "herding"},
        "k-center": {"method": "k-center"},
        "dm-1": dm(1.0),
        "dm-10": dm(10.0),
        "dm-100": dm(100.0),
        "power-1": datadam(power=1.0),
        "attention-only": datadam(weight_features=0.0),
        "fixed-network": datadam(fixed_network=True),
        "not-siamese": datadam(siamese=False),
    },
    margins=[
        Margin("datadam", "random", "test/accuracy", by=0.15),
        Margin("datadam", "dm-1", "test/accuracy", by=0.05),
        Margin("datadam", "dm-10", "test/accuracy", by=0.05),
        Margin("datadam", "dm-100", "test/accuracy", by=0.05),
    ],
    seeds=(0, 1, 2),
    remark=(
        "Networks of width 32 with instance norm, 800 steps, 4 fresh networks of 300 epochs a score. The margin over real "
        "images and over two of DM's weights holds; it fails by 0.6 points against DM's weight of 1. Five points were first "
        "measured against a weight of 100 alone, which is DM's worst here: over the best of the sweep the gain is 4.4 points, "
        "in every seed between 3.8 and 4.8. Power 1 and attention alone do as well as the default within noise; a fixed network "
        "or separate augmentations lose 27 and 11 points."
    ),
)
