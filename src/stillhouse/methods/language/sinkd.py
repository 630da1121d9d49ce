"""SinKD: distillation through the Sinkhorn distance between batches of predictions (arXiv 2402.17110)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from stillhouse import losses
from stillhouse.engine import Losses, Optimizer, Paper, Run, Term, Weight
from stillhouse.errors import UserError
from stillhouse.methods.distillation import KnowledgeDistillation, output_error, soft_loss
from stillhouse.methods.wiring import Pair


class SinKD(KnowledgeDistillation):
    """Match the teacher across the samples of a batch: optimal transport between the two sets of predictions.

    ``L = weight_ce CE + weight_kd KD + weight_sinkhorn SD``. KD is the soft cross-entropy without a T^2 factor. SD is the
    Sinkhorn distance ``sum_ij P_ij ||p_i - q_j||_1`` between every student and every teacher prediction of the batch, with
    the gradient through the scaling of P. The paper's weights are 1 - alpha, alpha and 0.8 x 0.001.
    """

    name: ClassVar[str] = "sinkd"
    family: ClassVar[str] = "language"
    paper: ClassVar[Paper] = Paper(
        "Sinkhorn Distance Minimization for Knowledge Distillation", 2024, arxiv="2402.17110", venue="LREC-COLING 2024"
    )
    summary: ClassVar[str] = "a smaller classifier whose batches of predictions are transported onto the teacher's"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    couples: ClassVar[bool] = True

    temperature: float = Field(2.0, gt=0, description="temperature of the soft cross-entropy (SST-2's in the paper)")
    anneal: bool = Field(False, description="move the temperature linearly to 1, epoch by epoch (MNLI, MRPC, QQP)")
    divergence: Literal["soft_cross_entropy", "kl", "reverse_kl", "js", "tv"] = Field(
        "soft_cross_entropy",
        description="what compares each sample's predictions in the KD term; none has a T^2 factor",
    )
    temperature_sinkhorn: float = Field(2.0, gt=0, description="temperature of both sides in the Sinkhorn term")
    epsilon: float = Field(0.1, gt=0, description="entropic regularisation of the transport, in units of its cost")
    num_iterations: int = Field(20, ge=1, description="rounds of Sinkhorn scaling, rows then columns")
    form: Literal["batch", "sample"] = Field(
        "batch", description="transport over the batch, or each sample with itself"
    )
    plan_grad: bool = Field(True, description="let the gradient also run through the transport plan")
    reduction: Literal["sum", "mean"] = Field(
        "sum", description="sum over the batch (the paper; grows with the batch size) or mean over its samples"
    )
    gather: bool = Field(False, description="transport over the samples of all processes, not of each alone")
    max_positions: int = Field(512, ge=1, description="most label positions of a sequence batch in one transport")
    variant: Literal["paper", "code"] = Field(
        "paper", description="sequences: softmax over the vocabulary, or over positions as in the released scripts"
    )
    optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=4e-5, schedule="linear", clip_norm=1.0), description="optimiser of the student"
    )
    batch_size: int = Field(32, ge=1, description="samples per process and step")
    epochs: float = Field(2, gt=0, description="passes over the training split")
    weight_ce: Weight = Field(0.1, description="weight of the cross-entropy with the labels (1 - alpha)")
    weight_kd: Weight = Field(0.9, description="weight of the per-sample term (alpha)")
    weight_sinkhorn: Weight = Field(8e-4, description="weight of the Sinkhorn term (beta times the factor 0.001)")

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The per-sample term and the Sinkhorn term."""
        terms: dict[str, Term] = {
            "kd": lambda: self.per_sample(pair.student.logits, pair.teacher.logits, pair.labels, run)
        }
        if run.data.facts.task != "regression":
            # A single logit has the softmax 1 whatever it is: between regression targets there is nothing to transport.
            terms["sinkhorn"] = lambda: self.transport(pair.student.logits, pair.teacher.logits, pair.labels, run)
        return terms

    def per_sample(self, student: Tensor, teacher: Tensor, labels: Tensor | None, run: Run) -> Tensor:
        """The KD term: soft cross-entropy (or another divergence) at the annealed temperature; MSE in regression."""
        temperature: float = self.temperature
        if self.anneal:
            temperature = float(losses.annealed_temperature(self.temperature, run.epoch_progress))
        if run.data.facts.task == "regression":
            return output_error(student, teacher, temperature)
        same_outputs(student, teacher)
        soft = self.divergence == "soft_cross_entropy"
        divergence = losses.soft_cross_entropy if soft else losses.DIVERGENCES[self.divergence]
        return soft_loss(divergence, student, teacher, temperature, labels, run, squared=False)

    def transport(self, student: Tensor, teacher: Tensor, labels: Tensor | None, run: Run) -> Tensor:
        """The Sinkhorn term."""
        if labels is not None and self.variant == "code":
            shared = self.temperature_sinkhorn, self.epsilon, self.num_iterations, self.reduction
            return transport_over_positions(student, teacher, *shared)
        rows = self.coupled(student, teacher, labels, run)
        step = run.step + 1
        if self.form == "batch" and (step == run.steps or step % run.settings.log_every == 0):
            self.log_deviation(*rows, run)
        return self.distance(*rows)

    def coupled(self, student: Tensor, teacher: Tensor, labels: Tensor | None, run: Run) -> tuple[Tensor, Tensor]:
        """The rows of logits that are transported: those of all samples, or of the labelled positions of a sequence model."""
        same_outputs(student, teacher)
        if labels is not None:
            if self.gather:
                raise UserError(
                    "gather: processes hold different numbers of label positions, so sequences are not gathered."
                )
            return losses.select_positions(student, teacher, labels, max_positions=self.max_positions, allow_none=True)
        return (run.gather(student), run.gather(teacher)) if self.gather else (student, teacher)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The Sinkhorn distance between rows; 0 where a batch has no labelled position."""
        if not len(student):
            return student.float().sum()
        return losses.sinkhorn_distance(
            student,
            teacher,
            temperature=self.temperature_sinkhorn,
            epsilon=self.epsilon,
            num_iterations=self.num_iterations,
            plan_grad=self.plan_grad,
            form=self.form,
            reduction=self.reduction,
            check_finite=False,
        )

    def log_deviation(self, student: Tensor, teacher: Tensor, run: Run) -> None:
        """Log how far the plan's rows are from their mass: the largest over rows and processes.

        The rounds end with the columns, so large values mean too few of them for this ``epsilon``.
        """
        worst = student.new_zeros((), dtype=torch.float32)
        with torch.no_grad():
            if len(student):
                ours, theirs = (
                    torch.softmax(rows.float() / self.temperature_sinkhorn, -1) for rows in (student, teacher)
                )
                plan = losses.sinkhorn(losses.pairwise_l1(ours, theirs), self.epsilon, self.num_iterations)
                worst = losses.row_error(plan)
            worst = run.gather(worst[None]).max()
        run.log({"stage": run.stage, "step": run.step + 1, "sinkhorn/row_deviation": float(worst)})

    def notes(self, run: Run) -> list[str]:
        """Over what was transported, or why nothing was."""
        if self.weight_sinkhorn == 0:
            return []
        if run.data.facts.task == "regression":
            return [
                "the Sinkhorn term was left out: between regression targets there is nothing to transport, because the "
                "softmax of a single output is always 1; the KD term is the squared error to the teacher's outputs."
            ]
        over = "the samples of all processes together" if self.gather else "the samples of each process on its own"
        if self.form == "sample":
            over = "each sample on its own"
        elif run.data.facts.task == "language":
            over = "the labelled positions of each process on its own"
        number = f"{run.world.size} process" + ("es" if run.world.size > 1 else "")
        return [f"the Sinkhorn term was taken over {over} ({number}, {self.batch_size} samples in each)."]


def same_outputs(student: Tensor, teacher: Tensor) -> None:
    """Refuse a teacher with other outputs than the student."""
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"the teacher has {teacher.shape[-1]} outputs and the student {student.shape[-1]}; SinKD needs the same "
            "output space on both sides."
        )


def transport_over_positions(
    student_logits: Float[Tensor, "batch length vocabulary"],
    teacher_logits: Float[Tensor, "batch length vocabulary"],
    temperature: float,
    epsilon: float,
    num_iterations: int,
    reduction: Literal["sum", "mean"],
) -> Float[Tensor, ""]:
    """The Sinkhorn term as the released sequence scripts compute it, for comparison with them.

    They hand (batch, length, vocabulary) to code written for (batch, classes): the softmax runs over the positions, and
    the scaling over the positions of one side and over the batch. ``variant="paper"`` transports between positions with
    a softmax over the vocabulary.
    """
    student = F.softmax(student_logits.float() / temperature, dim=1)
    teacher = F.softmax(teacher_logits.detach().float() / temperature, dim=1)
    cost = torch.cdist(student, teacher, p=1)
    log_plan = -cost / epsilon
    for _ in range(num_iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    total = (log_plan.exp() * cost).sum()
    return total / student.shape[:2].numel() if reduction == "mean" else total
