"""CRD: a sample's embedding is told from thousands of others' by its teacher's (arXiv 1910.10699)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.data.dataset import hard
from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import embeddings
from stillhouse.methods.wiring import Pair
from stillhouse.modules.memory import ContrastiveMemory
from stillhouse.modules.projectors import LinearProjector


class CRD(KnowledgeDistillation):
    """Contrast the student's embedding with the teacher's of the same sample and of others, from a memory; and the other way.

    Both embeddings are projected to one width and unit length. The memory holds those of every training sample, by its
    place in the split, and follows with a momentum.
    """

    name: ClassVar[str] = "crd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Contrastive Representation Distillation", 2020, arxiv="1910.10699", venue="ICLR 2020"
    )
    summary: ClassVar[str] = "each sample told from thousands of others in a memory of all embeddings"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"labels", "embedding"})

    width: int = Field(128, ge=1, description="width of the compared embeddings (official: 128)")
    negatives: int = Field(16384, ge=1, description="samples that each is told from (official: 16384)")
    temperature: float = Field(0.07, gt=0, description="divides the cosines (official: 0.07)")
    momentum: float = Field(0.5, ge=0, lt=1, description="share of the memory's row that stays (official: 0.5)")
    mode: Literal["exact", "relax"] = Field(
        "exact", description="the positive is the sample itself, or any of its class (official: exact)"
    )
    replacement: bool = Field(
        True, description="draw negatives with replacement; the official loader does not where there are enough"
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_crd: Weight = Field(0.8, description="weight of the contrast (RepDistiller, mdistiller: 0.8)")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """A projector for each side, and the memory."""
        mine, theirs = (LinearProjector(one.shape[1], self.width, normalize=True) for one in embeddings(pair))
        train = run.data.split("train")
        memory = ContrastiveMemory(
            len(train),
            self.width,
            labels=hard(train.labels),
            negatives=self.negatives,
            temperature=self.temperature,
            momentum=self.momentum,
            mode=self.mode,
            replacement=self.replacement,
        )
        return {"projector": mine, "teacher-projector": theirs, "memory": memory}

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The contrast; the memory's rows move once the step is done."""
        return {"crd": lambda: self.crd(pair)}

    def crd(self, pair: Pair) -> Tensor:
        """The term."""
        mine, theirs = embeddings(pair)
        student, teacher = pair.parts["projector"](mine), pair.parts["teacher-projector"](theirs)
        loss: Tensor = pair.parts["memory"](student, teacher, pair.batch.index)
        return loss
