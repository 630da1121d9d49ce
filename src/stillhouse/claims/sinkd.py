"""SinKD's claim: transport over the batch adds to the same loss without it, with a teacher who has seen much more.

Two parts: images, where the term should help, and text, where the paper's divergences are compared on one path and no more
than a tie is asked for.
"""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

STUDENT: dict[str, Any] = {"kind": "cnn", "channels": [6, 12, 24], "strides": [2, 2, 1]}
# T^2-scaled distillation at T = 4, written with the soft cross-entropy: 0.9 * 4^2.
SCALED = {"temperature": 4.0, "weight_kd": 14.4}


def transformer(layers: int, width: int) -> dict[str, Any]:
    """A BERT of that size with random weights, heads of 32 and the vocabulary of the data."""
    return {
        "kind": "hf",
        "config": {
            "model_type": "bert",
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": width // 32,
            "intermediate_size": 4 * width,
            "max_position_embeddings": 32,
        },
    }


def warmed_up(lr: float) -> dict[str, Any]:
    """AdamW as transformers are trained from random weights, in place of the images' SGD with momentum."""
    schedule = {"warmup": 100, "schedule": "linear", "clip_norm": 1.0}
    return {"name": "adamw", "lr": lr, "weight_decay": 0.01, "momentum": 0.0, **schedule}


TEXT: dict[str, Any] = {
    # Fewer than one request in a hundred has more than 20 words.
    "data": {"kind": "clinc150", "max_length": 20, "train_size": 3000},
    "teacher": {
        "kind": "trained",
        "model": transformer(layers=4, width=128),
        "data": {"kind": "clinc150", "max_length": 20},
        "optimizer": warmed_up(1e-3),
        "epochs": 5,
    },
    "student": transformer(layers=1, width=64),
    "optimizer": warmed_up(2e-3),
    "cache_teacher": True,
    "run": {"threads": 1},
}

claim = Claim(
    name="sinkd",
    statement=(
        "On 2,000 Fashion-MNIST images, with a teacher trained on 40,000, the Sinkhorn term (mean form, weight 1) adds at "
        "least 0.3 points of test accuracy to the same loss without it, and on 3,000 requests of CLINC150, with a "
        "transformer trained on 15,000 as the teacher, it stays within 0.5 points of KL."
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
        "text-sinkd": TEXT,
        "text-kl": {**TEXT, "divergence": "kl", "weight_sinkhorn": 0.0},
        "text-reverse-kl": {**TEXT, "divergence": "reverse_kl", "weight_sinkhorn": 0.0},
        "text-js": {**TEXT, "divergence": "js", "weight_sinkhorn": 0.0},
        "text-labels-only": {**TEXT, "weight_kd": 0.0, "weight_sinkhorn": 0.0, "weight_ce": 1.0},
    },
    margins=[
        Margin("sinkd", "without-sinkhorn", "test/accuracy", by=0.003),
        Margin("text-sinkd", "text-kl", "test/accuracy", by=-0.005),
    ],
    metrics=["test/student/agreement", "test/student/mean_total_variation", "test/teacher/accuracy"],
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "Images: the margin holds. But soft cross-entropy at T = 2 without a T^2 factor is a weak baseline when a "
        "student is trained from scratch (the paper fine-tunes pretrained ones): the labels alone (80.3 %) are above "
        "SinKD (79.1 %), and so is the sample-wise form of its term (81.1 %), in every seed; T^2-scaled distillation "
        "reaches 81.9 %, to which the Sinkhorn term adds 0.1, within noise. At the released strength the term does "
        "next to nothing. Reverse KL, JS and TV run at KL's weight, unswept; JS and TV have smaller gradients there, "
        "so their low figures say little. A first run without momentum left all students undertrained (labels alone "
        "65 %) and the claim failed by 4 points; momentum 0.9 gives the baseline's published level. Text: the tie "
        "fails in the mean, by one seed of five. There the SinKD student is undertrained (training cross-entropy 1.3 "
        "after 30 epochs, 0.6 to 0.7 in the others) and 10 points below KL; in the other seeds it lies between +2.3 "
        "and -1.4. Undertraining is the cause: in a check with 60 epochs, the same arms and seeds and nothing else "
        "changed (not part of the record), that student reaches 67 % and the mean difference is +0.3 points (from "
        "-2.4 to +3.6). Of the divergences reverse KL is best there in four of five seeds."
    ),
)
