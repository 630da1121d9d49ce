"""Label smoothing: labels mixed with the uniform distribution (arXiv 1512.00567), a control of distillation."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.data import Batch
from stillhouse.engine import Losses, Modules, Paper, Run, Stages
from stillhouse.errors import UserError
from stillhouse.losses.logit_matching import label_smoothing
from stillhouse.methods.supervised import Supervised, placed
from stillhouse.models import logits


class LabelSmoothing(Supervised):
    """Train on ``(1 - s) y + s / K`` in place of the labels: what a teacher gives that knows nothing of the sample.

    A distillation that does not beat it has gained from soft labels and not from the teacher.
    """

    name: ClassVar[str] = "label-smoothing"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Rethinking the Inception Architecture for Computer Vision", 2016, arxiv="1512.00567", venue="CVPR 2016"
    )
    summary: ClassVar[str] = "soft labels without a teacher: how much of a gain is mere softening"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    smoothing: float = Field(0.1, ge=0, le=1, description="share s of the uniform distribution (0.1)")

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Cross-entropy with the smoothed labels; of sequences over the labelled positions of each process."""
        said = logits(m.model, batch)
        return {"ce": lambda: label_smoothing(said, placed(m.model, batch, run), self.smoothing)}

    def stages(self, run: Run) -> Stages:
        """One stage.

        Raises:
            UserError: the labels are numbers.
        """
        if run.data.facts.task == "regression":
            raise UserError(f"label-smoothing softens classes, which the data {run.data.name!r} does not have.")
        return (yield from super().stages(run))
