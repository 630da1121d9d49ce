"""SP: samples that are alike to the teacher are alike to the student (arXiv 1907.09682)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.relations import similarity_preserving
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import layers
from stillhouse.methods.wiring import Pair


class SP(KnowledgeDistillation):
    """Match the matrix of similarities of a batch at the last stage: ``L = weight_ce CE + weight_sp |G_s - G_t|^2 / b^2``.

    ``G = F F'`` with rows of unit length; no trained part, and widths may differ.
    """

    name: ClassVar[str] = "sp"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Similarity-Preserving Knowledge Distillation", 2019, arxiv="1907.09682", venue="ICCV 2019"
    )
    summary: ClassVar[str] = "which samples of a batch are alike, by the features of the last stage"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})
    one_layer: ClassVar[bool] = True
    couples: ClassVar[bool] = True

    gather: bool = Field(False, description="compare the samples of all processes, not of each alone")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_sp: Weight = Field(3000.0, description="weight of the distance (RepDistiller, mdistiller: 3000)")

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The distance of the similarity matrices."""
        return {"sp": lambda: self.sp(pair, run)}

    def sp(self, pair: Pair, run: Run) -> Tensor:
        """The term."""
        mine, theirs = layers(pair)[-1]
        return similarity_preserving(*((run.gather(mine), run.gather(theirs)) if self.gather else (mine, theirs)))
