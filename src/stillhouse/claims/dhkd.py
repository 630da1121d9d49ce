"""DHKD's claim: a main head that never sees the teacher gains from the logit loss on the other one."""

from __future__ import annotations

from stillhouse.claims.claim import Claim, Margin
from stillhouse.claims.fashion import SHARED

claim = Claim(
    name="dhkd",
    statement=(
        "On 2,000 Fashion-MNIST images, with a teacher trained on 40,000, the main head of two linear ones, which never sees "
        "the teacher, is at least 1 point of test accuracy better than the same student trained on the labels alone."
    ),
    base={**SHARED, "method": "dhkd", "head": "linear", "alignment": False},
    arms={
        "two-heads": {},
        "ce": {"weight_logit": 0.0},
        "logit-only": {"head": "main", "weight_ce": 0.0},
        "one-head": {"head": "main"},
        "two-heads-nonlinear": {"head": "nonlinear"},
        "two-heads-aligned": {"alignment": True},
        "nonlinear-aligned": {"head": "nonlinear", "alignment": True},
        "nonlinear-aligned-backbone": {"head": "nonlinear", "alignment": True, "align_scope": "backbone"},
        "one-head-aligned": {"head": "main", "alignment": True},
        "one-head-plain": {"head": "main", "logit_loss": "plain"},
        "two-heads-plain": {"logit_loss": "plain"},
    },
    margins=[Margin("two-heads", "ce", "test/accuracy", by=0.01)],
    metrics=["test/accuracy"],
    seeds=(0, 1, 2, 3, 4),
)
