"""CC: the correlations of a batch are the teacher's (arXiv 1904.01802)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.relations import correlation_congruence
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import embeddings
from stillhouse.methods.wiring import Pair
from stillhouse.modules.projectors import LinearProjector


class CC(KnowledgeDistillation):
    """Match the matrix of correlations of a batch under a kernel: ``L = weight_ce CE + weight_cc |C_s - C_t|^2 / b^2``.

    The form ``code`` is what the public toolkits run under this name; it compares no relations. See the page.
    """

    name: ClassVar[str] = "cc"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Correlation Congruence for Knowledge Distillation", 2019, arxiv="1904.01802", venue="ICCV 2019"
    )
    summary: ClassVar[str] = "correlations of a batch under a Gaussian kernel of the embeddings"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"
    reads: ClassVar[frozenset[Reads]] = frozenset({"embedding"})
    couples: ClassVar[bool] = True

    variant: Literal["paper", "code"] = Field(
        "paper", description="code: RepDistiller's products of neighbouring differences (there weight_cc is 0.02)"
    )
    kernel: Literal["gaussian", "bilinear"] = Field("gaussian", description="correlation of two embeddings")
    gamma: float = Field(0.4, gt=0, description="inverse width of the Gaussian kernel (0.4)")
    order: int = Field(2, ge=1, description="highest power of its Taylor series (2)")
    width: int = Field(128, ge=1, description="of the form code: width that both embeddings are projected to (128)")
    gather: bool = Field(False, description="compare the samples of all processes, not of each alone")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_cc: Weight = Field(
        100.0, description="weight of the mean squared difference (Knowledge-Distillation-Zoo: 100)"
    )

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """Of the form ``code``: a projector for each side."""
        if self.variant == "paper":
            return {}
        mine, theirs = (LinearProjector(embedding.shape[1], self.width) for embedding in embeddings(pair))
        return {"projector": mine, "teacher-projector": theirs}

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The distance of the correlations."""
        return {"cc": lambda: self.cc(pair, run)}

    def cc(self, pair: Pair, run: Run) -> Tensor:
        """The term."""
        mine, theirs = embeddings(pair, run if self.gather else None)
        if self.variant == "code":
            mine, theirs = pair.parts["projector"](mine), pair.parts["teacher-projector"](theirs)
        return correlation_congruence(mine, theirs, self.gamma, self.order, kernel=self.kernel, variant=self.variant)
