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
        "dm-0.3": dm(0.3),
        "dm-1": dm(1.0),
        "dm-3": dm(3.0),
        "dm-10": dm(10.0),
        "dm-100": dm(100.0),
        "power-1": datadam(power=1.0),
        "attention-only": datadam(weight_features=0.0),
        "fixed-network": datadam(fixed_network=True),
        "not-siamese": datadam(siamese=False),
        "datadam-group-norm": datadam(network={"norm": "group"}),
        "dm-1-group-norm": {**dm(1.0), "network": {"norm": "group"}},
    },
    margins=[
        Margin("datadam", "random", "test/accuracy", by=0.15),
        Margin("datadam", "dm-1", "test/accuracy", by=0.05),
        Margin("datadam", "dm-10", "test/accuracy", by=0.05),
        Margin("datadam", "dm-100", "test/accuracy", by=0.05),
    ],
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "Networks of width 32 with the paper's instance norm, 800 steps, 4 fresh networks of 300 epochs a score. The "
        "margin over real images holds, and over DM at weights 10 and 100; against weight 1, the best of the sweep "
        "and the weight that the feature term has in DataDAM itself, the gain is 2.5 points (in single seeds -0.9 to "
        "8.5), so the claim fails. The margin of five points goes back to a comparison with weight 100 alone. Power 1 "
        "and attention alone do as well as the default; a fixed network or separate augmentations lose 25 and 10 "
        "points. With group norm (four groups) in place of instance norm the order is the reverse: DM at weight 1 "
        "reaches 87 %, the best of all arms, and DataDAM 74 %; why is not established. An earlier record of three "
        "seeds, when the same seeds gave other random numbers, had 4.4 points over DM at weight 1 with a standard "
        "error of 0.3: three seeds were too few. Herding chooses with one trained network whatever the seed, so its "
        "spread is that of the scoring alone; k-center chooses the same image as herding at one image a class and is "
        "left out."
    ),
)
