"""The ND loss's claim: the norm and direction of embeddings move as it says, and KD loses nothing by it."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin
from stillhouse.claims.fashion import SHARED

# The paper's T = 4; its ramp of 20 epochs in 240 is here 3 in 30.
KD: list[dict[str, Any]] = [
    {"kind": "kd", "temperature": 4.0, "weight_soft": {"start": 0.0, "end": 1.0, "until": 0.1, "by": "epoch"}}
]
# As wide as the teacher where the classifier reads: no projector stands between, which is the cleaner look at the embedding.
WIDE = {"student": {"kind": "cnn", "channels": [6, 12, 128], "strides": [2, 2, 1]}}

claim = Claim(
    name="nd-loss",
    statement=(
        "On 2,000 Fashion-MNIST images, with a teacher trained on 40,000, KD++ (KD and the ND term, weight 2) is within 0.2 "
        "points of KD in test accuracy, and with a student as wide as the teacher the embeddings of test images lie at least "
        "0.05 closer in cosine to the teacher's class means and are longer."
    ),
    base={
        **SHARED,
        "method": "nd-loss",
        "optimizer": {**SHARED["optimizer"], "nesterov": True},
        "weight_nd": 2.0,
        "also": KD,
    },
    arms={
        "kd++": {},
        "kd": {"weight_nd": 0.0},
        "ce": {"weight_nd": 0.0, "also": []},
        "ce-nd": {"also": []},
        "kd-cosine-only": {"form": "cosine"},
        "kd-norm-only": {"form": "norm", "weight_nd": 0.01},
        "kd++-without-dropout": {"dropout": 0.0},
        "wide-kd++": WIDE,
        "wide-kd": {**WIDE, "weight_nd": 0.0},
    },
    margins=[
        Margin("kd++", "kd", "test/accuracy", by=-0.002),
        Margin("wide-kd++", "wide-kd", "test/embedding_cosine", by=0.05),
        Margin("wide-kd++", "wide-kd", "test/embedding_norm", by=0.0),
    ],
    metrics=["test/accuracy", "test/embedding_cosine", "test/embedding_norm", "test/embedding_norm_ratio"],
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "The embedding moves as the paper says, in every seed: cosines to the class means rise from 0.76 to 0.94 with a student "
        "as wide as the teacher, and embeddings grow by half. Accuracy does not follow at this size: KD++ is 0.4 points below "
        "KD (in single seeds 0.0 to 0.9), so the margin fails within noise; with the wide student the two tie. Labels alone "
        "reach 80.4 %, KD 83.9 %, KD++ 83.5 %. The ND term without KD is 0.5 points below labels alone, direction alone does "
        "about as well as both halves, and the norm alone, pushed by a constant step, costs 3.7 points. Cosines of "
        "arms without the term and with a projector are those of an untrained projector and say nothing."
    ),
)
