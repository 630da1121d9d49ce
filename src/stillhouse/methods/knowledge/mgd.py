"""MGD: the teacher's last map is generated from a part of the student's (arXiv 2205.01529)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.feature_matching import aligned, masked_generation
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import layers
from stillhouse.methods.wiring import Pair
from stillhouse.modules.projectors import MaskedGenerator


class MGD(KnowledgeDistillation):
    """Mask the student's last map at random and make the teacher's whole map of the rest: ``weight_mgd |g(m s) - t|^2``.

    The squares are summed over channels and positions, so the weight that serves depends on the size of the map.
    """

    name: ClassVar[str] = "mgd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Masked Generative Distillation", 2022, arxiv="2205.01529", venue="ECCV 2022")
    summary: ClassVar[str] = "the teacher's map generated from the student's, of which a part is masked"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})
    one_layer: ClassVar[bool] = True

    ratio: float = Field(
        0.15, ge=0, lt=1, description="probability of being masked (official code for classifiers: 0.15)"
    )
    mask: Literal["positions", "channels"] = Field(
        "positions", description="what is masked: positions as in the paper, or channels as in the code for classifiers"
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (official code: 1)")
    weight_mgd: Weight = Field(7e-5, description="weight of the summed squares (official code for classifiers: 7e-5)")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The generation block."""
        mine, theirs = layers(pair)[-1]
        return {"generator": MaskedGenerator(mine.shape[1], theirs.shape[1], ratio=self.ratio, mask=self.mask)}

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The squared distance of the generated map."""
        return {"mgd": lambda: self.mgd(pair, run)}

    def mgd(self, pair: Pair, run: Run) -> Tensor:
        """The term, with a mask drawn for each sample."""
        mine, theirs = aligned(*layers(pair)[-1])
        batch, channels, height, width = theirs.shape
        drawn = run.rand(batch, channels, 1, 1) if self.mask == "channels" else run.rand(batch, 1, height, width)
        return masked_generation(pair.parts["generator"](mine, kept=drawn >= self.ratio), theirs)
