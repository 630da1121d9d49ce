"""RKD: distances and angles between samples are the teacher's (arXiv 1904.05068)."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.relations import rkd_angle, rkd_distance
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import embeddings
from stillhouse.methods.wiring import Pair

COSINES = 2**24
"""Cosines that exist at the same time: of large batches the angles are taken a few corners at a time."""


class RKD(KnowledgeDistillation):
    """Match pairwise distances, in units of their mean, and the angles of all triples of embeddings in a batch.

    ``L = weight_ce CE + weight_distance RKD-D + weight_angle RKD-A``; no trained part, and widths may differ.
    """

    name: ClassVar[str] = "rkd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Relational Knowledge Distillation", 2019, arxiv="1904.05068", venue="CVPR 2019")
    summary: ClassVar[str] = "distances and angles between the embeddings of a batch"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"embedding"})
    couples: ClassVar[bool] = True

    gather: bool = Field(False, description="compare the samples of all processes, not of each alone")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_distance: Weight = Field(25.0, description="weight of the distances (RepDistiller, mdistiller: 25)")
    weight_angle: Weight = Field(50.0, description="weight of the angles (RepDistiller, mdistiller: 50)")

    def terms(self, pair: Pair, run: Run) -> Losses:
        """Distances and angles."""
        both = cache(lambda: embeddings(pair, run if self.gather else None))
        return {"distance": lambda: rkd_distance(*both()), "angle": lambda: self.angle(*both())}

    def angle(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The angles' term."""
        at_once = max(1, COSINES // len(student) ** 2)
        return rkd_angle(student, teacher, chunk=at_once if at_once < len(student) else None)
