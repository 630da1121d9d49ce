"""VID: the teacher's features are likely, given the student's (arXiv 1904.05835)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.losses.feature_matching import aligned, variational_information
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import for_each, layers, summed
from stillhouse.methods.wiring import Pair
from stillhouse.modules.projectors import VariationalRegressor


class VID(KnowledgeDistillation):
    """Maximise a bound on the mutual information of the features: ``L = weight_ce CE - weight_vid sum_l E log q(t | s)``.

    q is a Gaussian whose mean is regressed from the student's features and whose variance is learned for each channel.
    """

    name: ClassVar[str] = "vid"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Variational Information Distillation for Knowledge Transfer", 2019, arxiv="1904.05835", venue="CVPR 2019"
    )
    summary: ClassVar[str] = "regressed features, each channel weighed by how well it can be told"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})

    variance: float = Field(5.0, gt=1e-5, description="variance of each channel at the start (the authors' code: 5)")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_vid: Weight = Field(1.0, description="weight of the negative log likelihood (RepDistiller, mdistiller: 1)")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """A regressor for each layer."""
        return {
            "regressors": for_each(
                layers(pair), lambda mine, theirs: VariationalRegressor(mine, theirs, variance=self.variance)
            )
        }

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The negative log likelihood, summed over layers."""
        return {"vid": lambda: self.vid(pair)}

    def vid(self, pair: Pair) -> Tensor:
        """The term; maps meet at the smaller size before the regressor, as in the authors' code."""
        each = []
        for regressor, both in zip(pair.parts["regressors"], layers(pair), strict=True):
            features, target = aligned(*both)
            mean, variance = regressor(features)
            each.append(variational_information(mean, variance, target))
        return summed(each)
