"""KDSVD: how the leading singular vectors of one layer relate to the next one's (arXiv 1807.06819)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.feature_matching import kdsvd
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import connected, widened
from stillhouse.methods.wiring import Pair


class KDSVD(KnowledgeDistillation):
    """Match the correlations between layers, each layer being its leading singular vectors over channels.

    Layers are compressed by their singular value decomposition; the student's vectors are put in the teacher's order and
    sign; kernels ``exp(-(v - w)^2 / 8)`` of each layer and the next are compared.
    """

    name: ClassVar[str] = "kdsvd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Self-supervised Knowledge Distillation Using Singular Value Decomposition",
        2018,
        arxiv="1807.06819",
        venue="ECCV 2018",
    )
    summary: ClassVar[str] = "how the leading directions of one layer relate to the next one's"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})

    vectors: int = Field(1, ge=1, description="singular vectors kept of each layer (official: 1)")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_svd: Weight = Field(1.0, description="weight of the kernels' squared difference, a sum (mdistiller: 1)")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """A connector for each of the student's layers, where the channels differ anywhere."""
        return widened(pair)

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The kernels' difference, summed over neighbouring layers."""
        return {"svd": lambda: kdsvd(*connected(pair), self.vectors)}
