"""Knowledge distillation of Hinton, Vinyals and Dean (arXiv 1503.02531), with a choice of divergences."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse import losses
from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.methods.distillation import KnowledgeDistillation, output_error, soft_loss
from stillhouse.methods.temperature import Temperature
from stillhouse.methods.wiring import Pair


class KD(KnowledgeDistillation):
    """Match the teacher's softened predictions beside the labels.

    The soft term is ``T^2 KL(softmax(t / T) || softmax(s / T))`` (section 2): its gradient keeps its size when T changes.
    Other divergences take its place by name.
    """

    name: ClassVar[str] = "kd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Distilling the Knowledge in a Neural Network", 2015, arxiv="1503.02531")
    summary: ClassVar[str] = "a smaller classifier from a larger one through softened predictions"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    temperature: Temperature = Field(
        4.0,
        description="softmax temperature of both sides in the soft term: a number; {start, end} to move it; or std: the "
        "deviation of each sample's logits, on each side its own",
    )
    divergence: Literal["kl", "reverse_kl", "js", "tv"] = Field("kl", description="what compares the two predictions")
    weight_ce: Weight = Field(0.1, description="weight of the cross-entropy with the labels")
    weight_soft: Weight = Field(0.9, description="weight of the divergence from the teacher")

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The divergence from the teacher."""
        return {"soft": lambda: self.soft(pair.student.logits, pair.teacher.logits, pair.labels, run)}

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor | None, run: Run) -> Tensor:
        """The divergence at the temperature, times its square; the squared error between regressors."""
        if run.data.facts.task == "regression":
            return output_error(student, teacher)
        divergence = losses.DIVERGENCES[self.divergence]
        return soft_loss(divergence, student, teacher, self.temperature, labels, run, squared=True)

    def notes(self, run: Run) -> list[str]:
        """What stands for the divergence where predictions are numbers."""
        if run.data.facts.task != "regression":
            return []
        return [
            "the soft term is the squared error to the teacher's outputs: predictions of a regressor are no distributions, "
            "so there is no divergence between them, and T^2 times the error of outputs divided by T is that without T."
        ]
