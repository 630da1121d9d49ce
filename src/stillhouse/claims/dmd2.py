"""DMD2's claim: two time scales keep the fake score in step with the generator, without any regression loss."""

from __future__ import annotations

from stillhouse.claims.claim import Claim, Margin

claim = Claim(
    name="dmd2",
    statement=(
        "On a ring of eight Gaussians, one step, without regression or GAN loss, five updates of the fake score for one of the "
        "generator give at least 10% less sliced Wasserstein distance than one for one at equal iterations."
    ),
    base={
        "method": "dmd2",
        "data": {"kind": "ring"},
        "teacher": {"kind": "trained", "model": {"kind": "point_denoiser"}, "num_steps": 4000, "batch_size": 512},
        "num_steps": 2000,
        "batch_size": 256,
        "generator_every": 5,
        "optimizer": {"name": "adamw", "lr": 5e-4, "weight_decay": 0.01, "warmup": 50, "clip_norm": 10.0},
        "weight_gan": 0.0,
        "teacher_steps": 18,
        "eval_samples": 10000,
        "run": {"threads": 1},
    },
    arms={
        "two-time-scales": {},
        "one-to-one": {"generator_every": 1},
        "one-to-one-equal-updates": {"generator_every": 1, "num_steps": 400},
    },
    margins=[Margin("two-time-scales", "one-to-one", "test/sliced_wasserstein", by=0.10, mode="min", ratio=True)],
    metrics=[
        "test/mode_recall",
        "test/mode_quality",
        "test/teacher/sliced_wasserstein",
        "test/teacher-1-step/sliced_wasserstein",
    ],
    seeds=(0, 1, 2),
    remark=(
        "A 3 x 128 network as teacher, student and fake score; 2,000 iterations, so 400 updates of the generator at 5:1. Three "
        "seeds; a seed moves the student and its noise, the teacher is the same."
    ),
)
