"""SinKD's claim: transport over the batch adds to the same loss without it, with a teacher who has seen much more."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

STUDENT: dict[str, Any] = {"kind": "cnn", "channels": [6, 12, 24], "strides": [2, 2, 1]}
# T^2-scaled distillation at T = 4, written with the soft cross-entropy: 0.9 * 4^2.
SCALED = {"temperature": 4.0, "weight_kd": 14.4}

claim = Claim(
    name="sinkd",
    statement=(
        "On 2,000 Fashion-MNIST images, with a teacher trained on 40,000, the Sinkhorn term (mean form, weight 1) adds at "
        "least 0.3 points of test accuracy to the same loss without it."
    ),
    base={
        "method": "sinkd",
        "data": {"kind": "fashion-mnist", "train_size": 2000},
        "teacher": {
            "kind": "trained",
            "model": {"kind": "cnn", "channels": [32, 64, 128], "strides": [2, 2, 1]},
            "data": {"kind": "fashion-mnist", "train_size": 40000},
            "epochs": 5,
        },
        "student": STUDENT,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine"},
        "epochs": 30,
        "batch_size": 64,
        "temperature": 2.0,
        "reduction": "mean",
        "weight_sinkhorn": 1.0,
        "compare_alone": False,
        "evaluations": 1,
    },
    arms={
        "sinkd": {},
        "without-sinkhorn": {"weight_sinkhorn": 0.0},
        "samplewise": {"form": "sample"},
        "released-strength": {"reduction": "sum", "weight_sinkhorn": 8e-4},
        "labels-only": {"weight_kd": 0.0, "weight_sinkhorn": 0.0, "weight_ce": 1.0},
        "scaled-kd": {**SCALED, "weight_sinkhorn": 0.0},
        "scaled-kd-with-sinkhorn": SCALED,
        "reverse-kl": {"divergence": "reverse_kl", "weight_sinkhorn": 0.0},
        "js": {"divergence": "js", "weight_sinkhorn": 0.0},
        "tv": {"divergence": "tv", "weight_sinkhorn": 0.0},
    },
    margins=[Margin("sinkd", "without-sinkhorn", "test/accuracy", by=0.003)],
    metrics=["test/student/agreement", "test/student/mean_total_variation"],
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "Soft cross-entropy at T = 2 without a T^2 factor is a weak baseline when a student is trained from scratch (the "
        "paper fine-tunes pretrained ones), so the T^2-scaled pair and the labels alone are shown beside it. A first run with "
        "SGD without momentum left all students undertrained (labels alone 65%, the claim then failed by 4 points); momentum "
        "0.9 gives the baseline's published level (labels alone 79 to 81%), and this is the run that is recorded."
    ),
)
