"""MEAL V2: a trained student goes on with the mean of teachers' predictions in place of labels (arXiv 2009.08453)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.engine import Losses, Optimizer, Paper, Run, Term, Weight, sgd
from stillhouse.errors import UserError
from stillhouse.losses.logit_matching import adversarial_logits
from stillhouse.methods.distillation import KnowledgeDistillation
from stillhouse.methods.start import StartSpec
from stillhouse.methods.wiring import Pair
from stillhouse.models import ModelSpec
from stillhouse.modules.adversary import LogitDiscriminator, reverse_gradient

SMALLEST = 8
"""Classes from which a vector of logits can be narrowed at all."""


class MEALV2(KnowledgeDistillation):
    """Continue training a student on the mean probabilities of several teachers, without labels and weight decay.

    ``L = weight_sim * -sum_c q_c log softmax(s)_c + weight_adversary * BCE(D(s), D(t))``: q is the mean of the teachers'
    probabilities at temperature 1, t the mean of their logits. The discriminator D tells student from teachers; the student is
    to deceive it, through the reversal of its gradient.
    """

    name: ClassVar[str] = "meal-v2"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper(
        "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
        2020,
        arxiv="2009.08453",
        venue="NeurIPS 2020 workshop Beyond BackPropagation",
    )
    summary: ClassVar[str] = (
        "a classifier that is trained already, improved by an ensemble of teachers without any label"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    start: StartSpec = Field(
        "pretrained",
        description="the student's first weights: pretrained, trained (on labels before), scratch, or {kind: trained, ...}",
        validate_default=True,
    )
    ensemble: Literal["losses", "probabilities", "random"] = Field(
        "probabilities",
        description="several teachers: the mean of their probabilities; or of their losses; or one drawn anew each step",
    )
    adversary: Literal["reversal", "released", "off"] = Field(
        "reversal",
        description="the student deceives the discriminator; or helps it, as the released code does; or there is none",
    )
    variant: Literal["paper", "code"] = Field(
        "paper", description="code: a ReLU on the discriminator's scores, and the student's optimiser for it"
    )
    discriminator_lr: float = Field(
        1e-4, gt=0, description="learning rate of the discriminator (SGD with momentum 0.9)"
    )
    discriminator_reduction: int = Field(8, ge=1, description="the discriminator's layers have C, C/K and C/K^2 inputs")
    weight_ce: Weight = Field(0.0, description="weight of the cross-entropy with the labels; the paper has none")
    weight_sim: Weight = Field(1.0, description="weight of the soft cross-entropy with the teachers")
    weight_adversary: Weight = Field(1.0, description="weight of the discriminator's loss")
    optimizer: Optimizer = Field(
        Optimizer(name="sgd", momentum=0.9, schedule="table", table=((0, 100, 0.01), (101, 300, 0.001))),
        description="optimiser of the student, by default without weight decay",
    )
    batch_size: int = Field(512, ge=1, description="samples per process and step")
    epochs: float = Field(180, gt=0, description="passes over the training split")

    @model_validator(mode="after")
    def _a_teacher(self) -> Self:
        if self.teacher == ():
            raise ValueError("teacher: there is none; give at least one teacher")
        return self

    def started(self, run: Run) -> Generator[Any, Any, ModelSpec]:
        """The student with its first weights."""
        student = yield from self.start.ready(self.student, run)
        return student

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversary != "off" and self.weight_adversary != 0

    @property
    def has_parts(self) -> bool:
        """Whether there is a discriminator."""
        return self.adversarial

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The discriminator."""
        if not self.adversarial:
            return {}
        classes = pair.student.logits.shape[-1]
        if classes < SMALLEST:
            raise UserError(
                f"adversary: the discriminator narrows C logits to C/{self.discriminator_reduction} and on to 2, for which "
                f"{classes} classes are too few; it takes {SMALLEST}, or set adversary=off."
            )
        last_relu = self.variant == "code"
        return {"discriminator": LogitDiscriminator(classes, self.discriminator_reduction, last_relu=last_relu)}

    def part_optimizer(self, part: str) -> Optimizer | None:
        """The discriminator's own; the released code's schedule overwrites it with the student's."""
        if self.variant == "code" or not part.startswith("discriminator"):
            return None
        return sgd(self.discriminator_lr, momentum=0.9)

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The soft cross-entropy, and whose logits these are."""
        terms: dict[str, Term] = {"sim": lambda: self.similarity(pair.student.logits, pair.teacher.logits)}
        if self.adversarial:
            terms["adversary"] = lambda: self.game(pair, run)
        return terms

    def similarity(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The soft cross-entropy at temperature 1."""
        if student.shape != teacher.shape:
            raise UserError(
                f"the teacher has {teacher.shape[-1]} classes and the student {student.shape[-1]}; MEAL V2 needs the same ones "
                "in the same order (see 'classes' of a pretrained teacher)."
            )
        return losses.soft_cross_entropy(student, teacher)

    def game(self, pair: Pair, run: Run) -> Tensor:
        """The discriminator's loss; the student's gradient of it is reversed, unless it is to be as released."""
        mean = pair.teacher.mean_logits
        student, teacher = pair.student.logits.float(), (pair.teacher.logits if mean is None else mean).float()
        if self.adversary == "reversal":
            student = reverse_gradient(student)
        discriminator = pair.parts["discriminator"]
        ours, theirs = discriminator(student), discriminator(teacher)
        step = run.step + 1
        if step == run.steps or step % run.settings.log_every == 0:
            self.log_accuracy(ours.detach(), theirs.detach(), run)
        return adversarial_logits(ours, theirs)

    def log_accuracy(self, ours: Tensor, theirs: Tensor, run: Run) -> None:
        """Log how often the discriminator is right: near one half the student deceives it."""
        right = torch.cat([ours[:, 0] > ours[:, 1], theirs[:, 1] > theirs[:, 0]]).float()
        accuracy = float(run.gather(right).mean())
        run.log({"stage": run.stage, "step": run.step + 1, "discriminator/accuracy": accuracy})

    def notes(self, run: Run) -> list[str]:
        """What is not as one might think."""
        notes = []
        if isinstance(self.teacher, tuple) and len(self.teacher) > 1 and self.ensemble != "probabilities":
            notes.append(f"ensemble={self.ensemble}: the target is not the mean of the teachers' probabilities.")
        if self.weight_ce != 0:
            notes.append("the labels take part (weight_ce), which the paper leaves out.")
        return notes
