"""FSP: first learn how the teacher gets from layer to layer, then the labels (A Gift from Knowledge Distillation)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Losses, Modules, Optimizer, Paper, Run, Stage, Weight, sgd
from stillhouse.losses.feature_matching import fsp
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import averaged, connected, own, pretraining, widened
from stillhouse.methods.wiring import Pair, Wiring


class FSP(KnowledgeDistillation):
    """Match the products of channels between each layer and the next, in a stage before the training on labels.

    ``G_l = F_l' F_(l+1) / (h w)``; the stage's loss is ``weight_fsp sum_l |G_l(s) - G_l(t)|^2``, a mean over entries; the
    second stage has the labels alone, or what stands beside.
    """

    name: ClassVar[str] = "fsp"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        2017,
        venue="CVPR 2017",
    )
    summary: ClassVar[str] = "a start for the student: the flow from layer to layer, learned before the labels"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})

    variant: Literal["paper", "code"] = Field(
        "paper", description="maps of two sizes meet by the largest value of a window, or by the mean (RepDistiller)"
    )
    init_epochs: float = Field(30, ge=0, description="passes of the stage before (RepDistiller: 30 beside 240)")
    init_optimizer: Optimizer = Field(
        sgd(0.05, momentum=0.9, weight_decay=5e-4),
        description="optimiser of the stage before (RepDistiller: the student's, constant)",
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels, in the second stage")
    weight_fsp: Weight = Field(
        1.0, description="weight in the stage before (RepDistiller: 1; its 50 falls on a term of 0)"
    )

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """A connector for each of the student's layers, where the channels differ anywhere."""
        return widened(pair)

    def ready(self, wiring: Wiring, place: int, run: Run) -> Generator[Stage, Any, None]:
        """The stage before."""

        def loss(m: Modules, batch: Batch, run: Run) -> Losses:
            pairs = wiring.pairs(m, batch)[place]
            return {"fsp": averaged(wiring, [self.fsp(pair) for pair in pairs])}

        yield from pretraining(
            wiring,
            run,
            "fsp-flows",
            loss,
            weights={"fsp": self.weight_fsp},
            trains=("student", *own(wiring, place, "connectors")),
            optimizer=self.init_optimizer,
            epochs=self.init_epochs,
        )
        for parts in wiring.parts[place]:
            if "connectors" in parts:
                parts["connectors"].requires_grad_(False)

    def fsp(self, pair: Pair) -> Tensor:
        """The loss of the stage before."""
        return fsp(*connected(pair), variant=self.variant)

    def terms(self, pair: Pair, run: Run) -> Losses:
        """None: its work is done before."""
        return {}
