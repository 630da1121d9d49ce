"""AB: first learn which neurons fire, then the labels (arXiv 1811.03233)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Losses, Modules, Optimizer, Paper, Run, Stage, Weight, sgd
from stillhouse.losses.feature_matching import activation_boundary, aligned
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import averaged, for_each, layers_before, own, pretraining, summed
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.modules.projectors import Connector


class AB(KnowledgeDistillation):
    """Put the student's neurons on the teacher's side of zero, in a stage before the training on labels.

    The stage's loss is ``weight_boundary sum_l AB_l / 2^(n - l)`` through a connector for each layer; the second stage has
    the labels alone, or what stands beside: ``also: [kd]``.
    """

    name: ClassVar[str] = "ab"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
        2019,
        arxiv="1811.03233",
        venue="AAAI 2019",
    )
    summary: ClassVar[str] = "a start for the student: which neurons fire, learned before the labels"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"before"})

    margin: float = Field(1.0, gt=0, description="distance from zero that is asked for (official: 1)")
    init_epochs: float = Field(30, ge=0, description="passes of the stage before (RepDistiller: 30 beside 240)")
    init_optimizer: Optimizer = Field(
        sgd(0.05, momentum=0.9, weight_decay=5e-4),
        description="optimiser of the stage before (RepDistiller: the student's, constant)",
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels, in the second stage")
    weight_boundary: Weight = Field(
        3e-3, description="weight in the stage before, of a sum over neurons (official: 3/1000)"
    )

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """A connector for each layer."""
        return {"connectors": for_each(layers_before(pair), Connector)}

    def ready(self, wiring: Wiring, place: int, run: Run) -> Generator[Stage, Any, None]:
        """The stage before."""

        def loss(m: Modules, batch: Batch, run: Run) -> Losses:
            pairs = wiring.pairs(m, batch)[place]
            return {"boundary": averaged(wiring, [self.boundary(pair) for pair in pairs])}

        yield from pretraining(
            wiring,
            run,
            "ab-boundaries",
            loss,
            weights={"boundary": self.weight_boundary},
            trains=("student", *own(wiring, place, "connectors")),
            optimizer=self.init_optimizer,
            epochs=self.init_epochs,
        )
        for parts in wiring.parts[place]:
            parts["connectors"].requires_grad_(False)

    def boundary(self, pair: Pair) -> Tensor:
        """The loss of the stage before, summed over layers, each counting half of the next."""
        pairs = zip(pair.parts["connectors"], layers_before(pair), strict=True)
        sides = [aligned(connector(mine), theirs) for connector, (mine, theirs) in pairs]
        return summed([activation_boundary(*both, self.margin) for both in sides], halved=True)

    def terms(self, pair: Pair, run: Run) -> Losses:
        """None: its work is done before."""
        return {}
