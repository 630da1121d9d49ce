"""TRG's claim: the neighbour graph helps on a long tail, and students' tokens come to lie as the teacher's do."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

OFF: dict[str, float] = {"weight_inner": 0.0, "weight_local": 0.0, "weight_global": 0.0}
# The row divergence of flat rows is tiny: ten times it is of the size of the others.
LOCAL: dict[str, float] = {"weight_local": 10.0}
ALL: dict[str, float] = {"weight_inner": 0.3, "weight_local": 10.0, "weight_global": 0.05}
BALANCED: dict[str, Any] = {"data": {"kind": "fashion-mnist", "long_tail": {"ratio": 1, "most": 200}}}

claim = Claim(
    name="trg",
    statement=(
        "On 2,478 Fashion-MNIST images with a long tail of ratio 100, with a teacher trained on 40,000, the neighbour graph of "
        "tokens adds at least 0.5 points of balanced test accuracy to KD; with all three terms the student's tokens lie to each "
        "other more as the teacher's do (distances, neighbours, retrieval); and on 2,000 balanced images accuracy is at most "
        "0.5 points below KD."
    ),
    base={
        "method": "trg",
        "run": {"threads": 1},
        "data": {"kind": "fashion-mnist", "long_tail": {"ratio": 100, "most": 1000}},
        "teacher": {
            "kind": "trained",
            "model": {"kind": "cnn", "channels": [32, 64, 128], "strides": [2, 2, 1]},
            "data": {"kind": "fashion-mnist", "train_size": 40000},
            "epochs": 5,
        },
        "student": {"kind": "cnn", "channels": [6, 12, 24], "strides": [2, 2, 1]},
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "schedule": "cosine"},
        "epochs": 30,
        "batch_size": 64,
        "weight_ce": 0.1,
        "weight_kd": 0.9,
        "grid": 4,
        "tokens_per_image": 4,
        "inner_power": 1,
        "compare_alone": False,
        "evaluations": 1,
    },
    arms={
        "kd": OFF,
        "local": {**OFF, **LOCAL},
        "inner": {**OFF, "weight_inner": 1.0},
        "global": {**OFF, "weight_global": 0.2},
        "all": ALL,
        "local-of-images": {**OFF, **LOCAL, "nodes": "images"},
        "labels-only": {**OFF, "weight_kd": 0.0, "weight_ce": 1.0},
        "balanced-kd": {**BALANCED, **OFF},
        "balanced-all": {**BALANCED, **ALL},
    },
    margins=[
        Margin("local", "kd", "test/accuracy", by=0.005),
        Margin("all", "kd", "probe/distance_correlation", by=0.02),
        Margin("all", "kd", "probe/neighbour_overlap", by=0.02),
        Margin("all", "kd", "probe/retrieval", by=0.02),
        Margin("balanced-all", "balanced-kd", "test/accuracy", by=-0.005),
    ],
    metrics=["test/student/accuracy_balanced", "test/student/accuracy_many", "test/teacher/accuracy"],
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "All five inequalities hold in the mean, most within noise: one seed (2), in which KD ends at 56 % and the graph "
        "at 68 %, makes up most of the gain of 3.3 points in accuracy and widens all intervals; without it the gain is "
        "1.1. The gain is in the small classes (37 % with the graph, 28 % with KD, where a class has fewer than 20 "
        "images), and it is steadier. The contrast at 0.2 costs accuracy (-0.7), the inner term adds 0.5, all three at "
        "smaller weights 1.5: less than the graph alone. The probes of local-of-images are of whole images and not "
        "comparable with those of tokens. The weights are choices, not the paper's, which could not be read."
    ),
)
