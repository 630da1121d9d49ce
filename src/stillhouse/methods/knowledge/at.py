"""AT: the student looks where the teacher looks (arXiv 1612.03928)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.feature_matching import attention_transfer
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import layers, summed
from stillhouse.methods.wiring import Pair


class AT(KnowledgeDistillation):
    """Match the spatial attention maps at the end of each stage: ``L = weight_ce CE + weight_at sum_l |Q_s - Q_t|^2``.

    ``Q = sum_c |F_c|^p``, of unit length; no trained part, and widths may differ.
    """

    name: ClassVar[str] = "at"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention Transfer",
        2017,
        arxiv="1612.03928",
        venue="ICLR 2017",
    )
    summary: ClassVar[str] = "where in the picture each stage is active, whatever the channels"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})

    power: float = Field(2.0, gt=0, description="exponent p of the activations (2)")
    variant: Literal["paper", "code"] = Field(
        "code", description="code: mean square over samples and positions; paper: half the length of the difference"
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_at: Weight = Field(
        1000.0, description="weight of the maps' distance (official code, RepDistiller, mdistiller: 1000)"
    )

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The distance of the maps, summed over layers."""
        return {
            "at": lambda: summed([attention_transfer(*both, self.power, variant=self.variant) for both in layers(pair)])
        }
