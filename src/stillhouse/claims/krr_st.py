"""KRR-ST's claim: networks pre-trained on its images are nearer to the target model than those pre-trained on real ones."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

OPTIMIZER: dict[str, Any] = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
SHARED: dict[str, Any] = {
    "method": "krr-st",
    "data": "digits",
    "target": {
        "kind": "barlow-twins",
        "model": {"kind": "cnn", "channels": [32, 32], "strides": [1, 2]},
        "projector": [64, 64],
        "augment": {"kind": "shift", "by": 1},
        "second_augment": {"kind": "resized-crop", "smallest": 0.6, "flip": False},
        "epochs": 200,
        "batch_size": 256,
    },
    "standardize": True,
    "raw_start": False,
    "num_images": 20,
    "network": {"kind": "convnet", "width": [16, 32], "depth": 2, "norm": "batch"},
    "pool_size": 5,
    "pool_steps": 200,
    "pool_optimizer": OPTIMIZER,
    "num_steps": 1500,
    "batch_size": 256,
    "augment": {"kind": "shift", "by": 1},
    "optimizer": {"name": "adamw", "lr": 3e-3, "schedule": "linear"},
    "eval_networks": 3,
    "eval_epochs": 400,
    "eval_optimizer": OPTIMIZER,
    "compare_start": False,
    "compare_scratch": False,
    "transfer": ["digits"],
    "protocols": ["probe"],
    "probe_steps": 300,
    "run": {"threads": 1},
}

claim = Claim(
    name="krr-st",
    statement=(
        "On scikit-learn's digits without labels, with 20 images, networks pre-trained on the learned images miss the target "
        "model's representation of test images by at least 30 % less than those pre-trained on as many real images, random or "
        "k-means ones, with the target's words for them."
    ),
    base=SHARED,
    arms={
        "krr-st": {},
        "random": {"num_steps": 0},
        "k-means": {"num_steps": 0, "init": "k-means"},
        "fixed-targets": {"learn_targets": False},
        "pool-of-one": {"pool_size": 1},
    },
    margins=[
        Margin("krr-st", "random", "test/mse", by=0.3, mode="min", ratio=True),
        Margin("krr-st", "k-means", "test/mse", by=0.3, mode="min", ratio=True),
    ],
    metrics=["transfer/digits/probe"],
    remark=(
        "ConvNets of 16 and 32 channels with batch norm, a target model of 32 standardised components trained by Barlow Twins "
        "(one model for all seeds), 1500 outer steps, a pool of 5 of up to 200 steps, 3 fresh networks of 400 full-batch steps "
        "a score. The claim fails: over random real images the gain is 24 %, clear of noise and short of the 30 % asked, and "
        "over real images chosen by k-means in the target's representation there is none. The error of the solved head on "
        "held-out images falls by 30, 32 and 25 % in the three seeds. Fixed representations lose more than half of the gain "
        "over random images, a pool of one a seventh. Whether more steps or images would part it from k-means was not tried. "
        "The probe with all labels is reported and no gate: on digits any pre-training nears the target's own."
    ),
)
