"""ReviewKD: each of the student's layers, fused with all above it, learns from the teacher's (arXiv 2104.09044)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.engine import Losses, Paper, Ramp, Run, Weight
from stillhouse.losses.feature_matching import feature_maps, hierarchical_context
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import embeddings, maps, summed
from stillhouse.methods.wiring import Pair
from stillhouse.modules.fusion import ReviewFusion


class ReviewKD(KnowledgeDistillation):
    """Compare the student's layers, fused top down with attention, with the teacher's over a pyramid of grids (ABF and HCL).

    The layers are the ends of the stages and the embedding; the teacher's are read before the activation.
    """

    name: ClassVar[str] = "reviewkd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Distilling Knowledge via Knowledge Review", 2021, arxiv="2104.09044", venue="CVPR 2021"
    )
    summary: ClassVar[str] = "the teacher's lower layers also teach the student's upper ones, through fusion"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features", "teacher before", "embedding"})

    shared: int | None = Field(
        None,
        ge=1,
        description="channels in which layers are fused; the student's last, at most 512, by default (official)",
    )
    levels: tuple[int, ...] = Field(
        (4, 2, 1), description="sides of the coarser grids of the comparison (official: 4, 2, 1)"
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (official: 1)")
    weight_review: Weight = Field(
        Ramp(start=5 / 20, end=5.0, until=19 / 240, by="epoch"),
        description="weight of the comparison (5 from resnet32x4 to resnet8x4, growing over 20 of 240 epochs, in mdistiller; "
        "0.6 to 8 elsewhere)",
    )

    def layers(self, pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
        """The student's and the teacher's layers, the embedding last, as maps."""
        mine, theirs = ([feature_maps(embedding)] for embedding in embeddings(pair))
        student = [maps(features, pair.batch) for features in pair.student.features]
        teacher = [maps(features, pair.batch) for features in pair.teacher.before]
        return student + mine, teacher + theirs

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The fusion."""
        mine, theirs = ([layer.shape[1:] for layer in side] for side in self.layers(pair))
        return {"fusion": ReviewFusion(mine, theirs, self.shared)}

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The comparison, summed over layers."""
        return {"review": lambda: self.review(pair)}

    def review(self, pair: Pair) -> Tensor:
        """The term."""
        mine, theirs = self.layers(pair)
        fused = zip(pair.parts["fusion"](mine), theirs, strict=True)
        return summed([hierarchical_context(*both, levels=self.levels) for both in fused])
