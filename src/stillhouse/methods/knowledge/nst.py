"""NST: the student's channels are spread as the teacher's, by their maximum mean discrepancy (arXiv 1707.01219)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import neuron_selectivity
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import layers, summed
from stillhouse.methods.wiring import Pair


class NST(KnowledgeDistillation):
    """Match the distribution of what single channels answer to: ``L = weight_ce CE + weight_nst sum_l MMD^2``.

    Each channel is its map, of unit length; the kernel is ``(x . y)^2``. No trained part, and widths may differ.
    """

    name: ClassVar[str] = "nst"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arxiv="1707.01219"
    )
    summary: ClassVar[str] = "which places single channels answer to, as a distribution over channels"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})

    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_nst: Weight = Field(50.0, description="weight of the squared MMD (RepDistiller, mdistiller: 50)")

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The squared MMD, summed over layers."""
        return {"nst": lambda: self.nst(pair)}

    def nst(self, pair: Pair) -> Tensor:
        """The term."""
        pairs = layers(pair)
        if any(side.shape[2:].numel() == 1 for both in pairs for side in both):
            raise UserError(
                "nst: a layer of one position has no places for its channels to answer to; name layers of maps."
            )
        return summed([neuron_selectivity(*both) for both in pairs])
