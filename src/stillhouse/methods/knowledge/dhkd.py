"""DHKD: a second head learns the teacher's logits, the first one the labels alone (arXiv 2411.08937)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.engine import Losses, Optimizer, Paper, Projection, Run, Weight
from stillhouse.errors import UserError
from stillhouse.losses.logit_matching import binary_kl, binary_kl_norm
from stillhouse.methods.distillation import CIFAR_SGD, KnowledgeDistillation, Reads
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.metrics.probes import gradient_cosines, head_and_backbone
from stillhouse.modules.projectors import AuxiliaryHead


class DHKD(KnowledgeDistillation):
    """Shape the backbone by a logit loss through an auxiliary head; the main head sees labels and no teacher.

    ``L = weight_ce CE(z, y) + weight_logit BKLN(a, t)``: z from the student's own classifier, a from the auxiliary head on the
    same embedding. BKLN is ``tau^2 sum_k KL(Bern(1/2) || Bern(sigmoid((a - t) / tau)))``: a smooth L1 on logits. With
    ``alignment`` the part of its gradient that points against the labels' is taken away. The auxiliary head is not shipped.
    """

    name: ClassVar[str] = "dhkd"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper(
        "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        2025,
        arxiv="2411.08937",
        venue="KDD 2025",
    )
    summary: ClassVar[str] = "a logit loss that shapes the backbone through a second head, which is thrown away"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"labels", "student embedding"})

    temperature: float = Field(2.0, gt=0, description="temperature tau of the logit loss")
    weight_ce: Weight = Field(1.0, description="weight of the labels' loss on the main head (gamma)")
    weight_logit: Weight = Field(1.0, description="weight of the logit loss (alpha; 0.1 on ImageNet)")
    logit_loss: Literal["normalised", "plain"] = Field(
        "normalised",
        description="BinaryKL on the difference of the logits (BKLN), or between the two predictions (BKL)",
    )
    head: Literal["linear", "nonlinear", "main"] = Field(
        "nonlinear",
        description="auxiliary head: linear for networks of one family; main: none, one head for both losses",
    )
    hidden: int = Field(200, ge=1, description="width of the nonlinear head")
    alignment: bool = Field(True, description="take away what of the logit loss's gradient opposes the labels'")
    align_scope: Literal["all", "backbone"] = Field(
        "all", description="over which parameters the two gradients are compared; 'all' is the released code's"
    )
    optimizer: Optimizer = Field(
        CIFAR_SGD,
        description="optimiser of the student and the auxiliary head",
    )
    epochs: float = Field(240, gt=0, description="passes over the training split")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The auxiliary head."""
        assert pair.student.embedding is not None
        outputs, theirs = pair.student.logits.shape[-1], pair.teacher.logits.shape[-1]
        if outputs != theirs:
            raise UserError(
                f"dhkd: the teacher has {theirs} outputs and the student {outputs}; both need the same classes."
            )
        if self.head == "main":
            return {}
        nonlinear = self.head == "nonlinear"
        return {
            "head": AuxiliaryHead(pair.student.embedding.shape[-1], outputs, nonlinear=nonlinear, hidden=self.hidden)
        }

    def projection(self, classifier: str) -> Projection | None:
        """The logit loss may not oppose the labels'."""
        if not self.alignment:
            return None
        scope = ("student", f"!student.{classifier}") if self.align_scope == "backbone" else ()
        return Projection(terms=("logit",), onto=("ce",), scope=scope)

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The logit loss on the auxiliary head."""
        return {"logit": lambda: self.logit(pair, run)}

    def logit(self, pair: Pair, run: Run) -> Tensor:
        """BKLN, or BKL, between the head that learns from the teacher and the teacher."""
        logits = pair.student.logits if self.head == "main" else pair.parts["head"](pair.student.embedding)
        compared = binary_kl_norm if self.logit_loss == "normalised" else binary_kl
        value = compared(logits, pair.teacher.logits, self.temperature)
        step = run.step + 1
        if step == run.steps or step % run.settings.log_every == 0:
            self.log_cosines(pair, value, run)
        return value

    def log_cosines(self, pair: Pair, value: Tensor, run: Run) -> None:
        """Log the cosine between the gradients of the two losses, in the student's classifier and in its backbone.

        With one head for both losses the classifier's goes below 0 while the backbone's stays above: the paper's diagnosis.
        With two heads no logit loss reaches the classifier, and only the backbone's says something.
        """
        if not value.requires_grad:
            return
        groups = head_and_backbone(pair.models.student, pair.classifier or "")
        if self.head != "main":
            del groups["head"]
        cosines = gradient_cosines({"ce": self.ce(pair, run), "logit": value}, groups)
        found = {name: float(run.gather(cosine[None]).mean()) for name, cosine in cosines.items()}
        row = {f"gradient_cosine/{name.partition('/')[0]}": cosine for name, cosine in found.items()}
        run.log({"stage": run.stage, "step": run.step + 1, **row})

    def measure(self, wiring: Wiring, place: int, run: Run) -> dict[str, float]:
        """Accuracy of the auxiliary head on the test split, and of how many samples both heads say the same."""
        if self.head == "main" or "test" not in run.data.splits:
            return {}
        found: dict[str, float] = {}
        for link, parts in zip(wiring.links, wiring.parts[place], strict=True):
            right, same, count = 0, 0, 0
            for batch in run.data.split("test").in_order(512, device=run.world.device):
                outputs = wiring.read(batch)
                said = parts["head"](outputs.embedding).argmax(1)
                right += int((said == batch.labels).sum())
                same += int((said == outputs.logits.argmax(1)).sum())
                count += len(said)
            at = "" if len(wiring.links) == 1 else f"/{link.name}"
            found |= {
                f"test/auxiliary_head/accuracy{at}": right / count,
                f"test/auxiliary_head/agreement{at}": same / count,
            }
        return found
