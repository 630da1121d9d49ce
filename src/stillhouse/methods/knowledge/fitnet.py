"""FitNets: a layer in the middle of the student is led to the teacher's (arXiv 1412.6550)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Losses, Modules, Optimizer, Paper, Run, Stage, Weight, sgd
from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import hint
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import averaged, layers, own, pretraining
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.modules.projectors import Regressor


class FitNet(KnowledgeDistillation):
    """Regress the teacher's features from the student's at one layer: ``L = weight_ce CE + weight_hint |r(s) - t|^2``.

    The public toolkits train both terms at once. The paper trains the hint alone first, then distils:
    ``init_epochs: 30, weight_hint: 0, also: [kd]`` with ``init_weight`` for the stage before.
    """

    name: ClassVar[str] = "fitnet"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("FitNets: Hints for Thin Deep Nets", 2015, arxiv="1412.6550", venue="ICLR 2015")
    summary: ClassVar[str] = "one hidden layer regressed to the teacher's, the first of the feature methods"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})

    layer: int | None = Field(
        None,
        ge=1,
        description="which pair of layers, counted from 1; the middle one by default (2 of 3 in RepDistiller)",
    )
    init_epochs: float = Field(
        0, ge=0, description="passes of a stage before, with the hint alone (the paper; no toolkit)"
    )
    init_optimizer: Optimizer = Field(
        sgd(0.05, momentum=0.9, weight_decay=5e-4), description="optimiser of the stage before"
    )
    init_weight: Weight = Field(100.0, description="weight of the hint in the stage before")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (RepDistiller: 1)")
    weight_hint: Weight = Field(100.0, description="weight of the mean squared error (RepDistiller, mdistiller: 100)")

    def pick(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's features at the layer."""
        pairs = layers(pair)
        layer = (len(pairs) + 1) // 2 if self.layer is None else self.layer
        if layer > len(pairs):
            raise UserError(f"fitnet: layer is {layer}, and there are {len(pairs)} pairs of layers.")
        return pairs[layer - 1]

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The regressor; it ends in a ReLU where the teacher's features have no negative value."""
        mine, theirs = self.pick(pair)
        return {"regressor": Regressor(mine.shape[1:], theirs.shape[1:], relu=bool((theirs >= 0).all()))}

    def ready(self, wiring: Wiring, place: int, run: Run) -> Generator[Stage, Any, None]:
        """The paper's first stage, if asked for."""

        def loss(m: Modules, batch: Batch, run: Run) -> Losses:
            pairs = wiring.pairs(m, batch)[place]
            return {"hint": averaged(wiring, [self.hint(pair) for pair in pairs])}

        yield from pretraining(
            wiring,
            run,
            "fitnet-hint",
            loss,
            weights={"hint": self.init_weight},
            trains=("student", *own(wiring, place, "regressor")),
            optimizer=self.init_optimizer,
            epochs=self.init_epochs,
        )

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The hint."""
        return {"hint": lambda: self.hint(pair)}

    def hint(self, pair: Pair) -> Tensor:
        """The squared error of the regressed features."""
        mine, theirs = self.pick(pair)
        return hint(pair.parts["regressor"](mine), theirs)
