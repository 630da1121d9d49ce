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
        "dm-0.3": dm(0.3),
        "dm-1": dm(1.0),
        "dm-3": dm(3.0),
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
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "Networks of width 32 with instance norm, 800 steps, 4 fresh networks of 300 epochs a score. The margin over real images "
        "and over two of DM's weights holds; it fails against DM's weight of 1, where the gain is 2.5 points and within noise. "
        "An earlier record of three seeds had 4.4 points there with a standard error of 0.3: its seeds happened to lie close "
        "together (other seeds of the same code range from -1 to +7 points), so five are used now and the interval is shown. "
        "Herding and k-center choose with one trained network whatever the seed, so their spread is that of the scoring alone."
    ),
)
