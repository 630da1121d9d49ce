"""PKT: from each sample the others are found as likely as by the teacher (arXiv 1803.10837)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.relations import pkt
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import embeddings
from stillhouse.methods.wiring import Pair


class PKT(KnowledgeDistillation):
    """Match the conditional probabilities of one embedding given another: ``L = weight_ce CE + weight_pkt KL(P_t || P_s)``.

    The probabilities are cosine kernels, divided by their sum over the batch; no trained part, and widths may differ.
    """

    name: ClassVar[str] = "pkt"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Learning Deep Representations with Probabilistic Knowledge Transfer",
        2018,
        arxiv="1803.10837",
        venue="ECCV 2018",
    )
    summary: ClassVar[str] = "how likely one sample is found from another, by their embeddings"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"embedding"})
    couples: ClassVar[bool] = True

    variant: Literal["paper", "code"] = Field(
        "paper", description="without pairs of a sample with itself, or with them as in the authors' code"
    )
    gather: bool = Field(False, description="compare the samples of all processes, not of each alone")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_pkt: Weight = Field(
        30000.0, description="weight of the divergence, a mean over pairs (RepDistiller, mdistiller: 30000)"
    )

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The divergence."""
        return {"pkt": lambda: pkt(*embeddings(pair, run if self.gather else None), variant=self.variant)}
