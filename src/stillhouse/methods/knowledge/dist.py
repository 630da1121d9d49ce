"""DIST: probabilities correlate as the teacher's, within samples and within classes (arXiv 2205.10536)."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.logit_matching import dist
from stillhouse.methods.distillation import KnowledgeDistillation
from stillhouse.methods.temperature import Temperature, softened
from stillhouse.methods.wiring import Pair


class DIST(KnowledgeDistillation):
    """Match the teacher's relations and not its values, for teachers that are much stronger than the student.

    ``L = weight_ce CE + weight_inter T^2 (1 - corr over classes) + weight_intra T^2 (1 - corr over the batch)``, Pearson's
    correlation of softened probabilities.
    """

    name: ClassVar[str] = "dist"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Knowledge Distillation from A Stronger Teacher", 2022, arxiv="2205.10536", venue="NeurIPS 2022"
    )
    summary: ClassVar[str] = "correlations of probabilities in place of their values, for a much stronger teacher"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    couples: ClassVar[bool] = True

    temperature: Temperature = Field(
        1.0,
        description="softmax temperature of both sides (1 on ImageNet, 4 on CIFAR-100): a number, {start, end}, or std",
    )
    gather: bool = Field(False, description="correlate over the samples of all processes, not of each alone")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (alpha, 1)")
    weight_inter: Weight = Field(2.0, description="weight of the relation within a sample, over classes (beta, 2)")
    weight_intra: Weight = Field(2.0, description="weight of the relation within a class, over samples (gamma, 2)")

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The two relations."""

        @cache
        def parts() -> tuple[Tensor, Tensor]:
            student, teacher, number = softened(pair.student.logits, pair.teacher.logits, self.temperature, run)
            if self.gather:
                student, teacher = run.gather(student), run.gather(teacher)
            return dist(student, teacher, number)

        return {"inter": lambda: parts()[0], "intra": lambda: parts()[1]}
