"""DHKD: a second head learns the teacher's logits, the first one the labels alone (arXiv 2411.08937)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.engine import Losses, Optimizer, Paper, Projection, Result, Run, Table, Weight
from stillhouse.errors import UserError
from stillhouse.losses import cross_entropy
from stillhouse.losses.logit_matching import binary_kl, binary_kl_norm
from stillhouse.methods.distillation import CIFAR_SGD, KnowledgeDistillation, Reads
from stillhouse.methods.heatmap import heat_map
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.metrics.probes import gradient_cosines, head_and_backbone, pull_and_push, simplex_vertices
from stillhouse.modules.projectors import AuxiliaryHead

PROBED, DRAWN = 2000, 20
"""Training samples whose forces on the classifier are told, and classes in the picture of them."""

FORCES = "Pull and push on one head"


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
        if nonlinear and run.method.batch_size == 1:  # type: ignore[attr-defined]
            raise UserError(
                "dhkd: the nonlinear head's batch norm has no statistics of one sample; use a batch_size of 2 or more, or "
                "head=linear."
            )
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
        value = self.compared(logits, pair.teacher.logits)
        step = run.step + 1
        if step == run.steps or step % run.settings.log_every == 0:
            self.log_cosines(pair, value, run)
        return value

    def compared(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The chosen form of the logit loss."""
        form = binary_kl_norm if self.logit_loss == "normalised" else binary_kl
        return form(student, teacher, self.temperature)

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

    def shown(self, wiring: Wiring, place: int, run: Run) -> list[Table]:
        """For each class how the two losses pull and push a classifier's row, were both on one linear head.

        A force is minus the gradient by the row, through samples of the class (pull) and of all others (push), as its part
        along the class's vertex: the direction of its mean embedding from the mean of all. Where the cosine of the two
        gradients by the row is below 0 the two losses want the opposite of each other.
        """
        names, split = run.data.facts.class_names, run.data.split("train")
        tables = []
        for link, parts in zip(wiring.links, wiring.parts[place], strict=True):
            rows = []
            for batch in split.take(min(PROBED, len(split))).in_order(512, device=run.world.device):
                outputs = wiring.read(batch)
                said = outputs.logits if self.head == "main" else parts["head"](outputs.embedding)
                assert outputs.embedding is not None
                rows.append((outputs.embedding, outputs.logits, said, link.read(batch).logits, batch.labels))
            embeddings, main, said, teacher, labels = (torch.cat(column) for column in zip(*rows, strict=True))
            with torch.enable_grad():
                mine, other = main.detach().requires_grad_(), said.detach().requires_grad_()
                (of_labels,) = torch.autograd.grad(cross_entropy(mine, labels), mine)
                (of_logits,) = torch.autograd.grad(self.compared(other, teacher), other)
            vertices = simplex_vertices(embeddings, labels, main.shape[1])
            forces = [pull_and_push(gradient, embeddings, labels) for gradient in (of_labels, of_logits)]
            along = [(force * vertices).sum(1) for pair in forces for force in pair]
            whole = [pull + push for pull, push in forces]
            cosines = torch.cosine_similarity(whole[0], whole[1], dim=1, eps=1e-30)
            numbers = torch.stack([*along, cosines], 1).tolist()
            called = names if len(names) == len(numbers) else tuple(map(str, range(len(numbers))))
            title = FORCES if len(wiring.links) == 1 else f"{FORCES}, {link.name}"
            columns = ["class", "labels pull", "labels push", "logits pull", "logits push", "cosine of both"]
            tables.append(Table(title, columns, [[name, *row] for name, row in zip(called, numbers, strict=True)]))
        return tables

    def finished(self, result: Result, run: Run) -> Generator[Any, Any, Result]:
        """Add the picture of the forces, and in how many classes they oppose each other."""
        yield from ()
        for table in result.tables:
            if not table.title.startswith(FORCES):
                continue
            rows = sorted(table.rows, key=lambda row: float(row[-1]))
            opposed = sum(float(row[-1]) < 0 for row in rows)
            result.notes.append(
                f"on one linear head the two losses would oppose each other in {opposed} of {len(rows)} classes (see the table "
                f"{table.title!r})."
            )
            drawn = rows[:DRAWN]
            largest = [max((abs(float(row[at])) for row in rows), default=0.0) or 1.0 for at in range(1, 5)]
            result.pictures[table.title.lower().replace(",", "").replace(" ", "-")] = heat_map(
                [[*(float(row[at]) / largest[at - 1] for at in range(1, 5)), float(row[-1])] for row in drawn],
                rows=[str(row[0]) for row in drawn],
                columns=[*table.columns[1:5], "cosine"],
                title="forces on a classifier's rows, each in units of its largest",
            )
        return result
