"""FT: the student's factors, translated, learn the teacher's, paraphrased (arXiv 1802.04977)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Losses, Modules, Optimizer, Paper, Run, Stage, Weight, sgd
from stillhouse.losses.feature_matching import factor_transfer
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import averaged, layers, maps, own, pretraining
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.modules.factors import Paraphraser, Translator


class FT(KnowledgeDistillation):
    """Compress the teacher's last map by an autoencoder first; the student learns its code: ``|norm(f_s) - norm(f_t)|``.

    The paraphraser is trained without labels in a stage before and then frozen; the translator is trained with the student.
    """

    name: ClassVar[str] = "ft"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Paraphrasing Complex Network: Network Compression via Factor Transfer",
        2018,
        arxiv="1802.04977",
        venue="NeurIPS 2018",
    )
    summary: ClassVar[str] = "an autoencoder's code of the teacher's last map, learned by the student"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})
    one_layer: ClassVar[bool] = True

    rate: float = Field(
        0.5, gt=0, description="channels of the factor per channel of the teacher's map (official: k = 0.5)"
    )
    variant: Literal["paper", "code"] = Field(
        "paper", description="code: RepDistiller's, which reduces factors to attention maps (there weight_ft is 200)"
    )
    init_epochs: float = Field(30, ge=0, description="passes of the paraphraser's training (RepDistiller: 30)")
    init_optimizer: Optimizer = Field(
        sgd(0.01, momentum=0.9, weight_decay=5e-4), description="optimiser of the paraphraser (RepDistiller)"
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (official: 1)")
    weight_ft: Weight = Field(500.0, description="weight of the factors' distance (official: beta = 500)")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The teacher's paraphraser and the student's translator."""
        mine, theirs = (side.shape[1] for side in layers(pair)[-1])
        return {"paraphraser": Paraphraser(theirs, self.rate), "translator": Translator(mine, theirs, self.rate)}

    def ready(self, wiring: Wiring, place: int, run: Run) -> Generator[Stage, Any, None]:
        """Train the paraphrasers to give back the teachers' maps."""

        def loss(m: Modules, batch: Batch, run: Run) -> Losses:
            each = []
            for link, parts in zip(wiring.links, wiring.parts[place], strict=True):
                features = maps(link.read(batch).features[link.picks[1][-1]], batch)
                each.append(F.mse_loss(parts["paraphraser"].reconstruct(features), features))  # type: ignore[operator]
            return {"reconstruction": averaged(wiring, each)}

        yield from pretraining(
            wiring,
            run,
            "ft-paraphraser",
            loss,
            weights={"reconstruction": 0.0 if self.weight_ft == 0 else 1.0},
            trains=own(wiring, place, "paraphraser"),
            optimizer=self.init_optimizer,
            epochs=self.init_epochs,
        )
        for parts in wiring.parts[place]:
            parts["paraphraser"].requires_grad_(False)

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The distance of the factors."""
        return {"ft": lambda: self.ft(pair)}

    def ft(self, pair: Pair) -> Tensor:
        """The term."""
        mine, theirs = layers(pair)[-1]
        with torch.no_grad():
            target = pair.parts["paraphraser"](theirs)
        return factor_transfer(pair.parts["translator"](mine), target, variant=self.variant)
