"""DKD: the target class and the other classes distilled apart (arXiv 2203.08679)."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.engine import Losses, Paper, Ramp, Run, Weight
from stillhouse.losses.logit_matching import DKDParts, dkd
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.temperature import Temperature, softened
from stillhouse.methods.wiring import Pair


class DKD(KnowledgeDistillation):
    """Distil how sure the teacher is of the label (TCKD) apart from how it ranks the other classes (NCKD).

    ``L = weight_ce CE + weight_target T^2 TCKD + weight_non_target T^2 NCKD``. In plain KD the second is weighed by
    ``1 - p_y`` of the teacher, so that a sure teacher says little of the other classes.
    """

    name: ClassVar[str] = "dkd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Decoupled Knowledge Distillation", 2022, arxiv="2203.08679", venue="CVPR 2022")
    summary: ClassVar[str] = "KD in two parts with weights of their own: the label's class, and all others"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"labels"})

    temperature: Temperature = Field(
        4.0, description="softmax temperature of both sides (mdistiller: 4); a number, {start, end}, or std, as for kd"
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (mdistiller: 1)")
    weight_target: Weight = Field(
        Ramp(start=1 / 20, end=1.0, until=19 / 240, by="epoch"),
        description="weight of TCKD (alpha: 1, growing over the first 20 of 240 epochs in mdistiller)",
    )
    weight_non_target: Weight = Field(
        Ramp(start=8 / 20, end=8.0, until=19 / 240, by="epoch"),
        description="weight of NCKD (beta: 8 from resnet32x4 to resnet8x4, 2 or 6 elsewhere; grows alike)",
    )

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The two parts."""

        @cache
        def parts() -> DKDParts:
            student, teacher, number = softened(pair.student.logits, pair.teacher.logits, self.temperature, run)
            return dkd(student, teacher, pair.batch.labels, number)

        return {"target": lambda: parts().target, "non_target": lambda: parts().non_target}
