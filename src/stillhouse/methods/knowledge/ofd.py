"""OFD: features before the activation, where they matter to the teacher (arXiv 1904.01866)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.engine import Losses, Paper, Run, Weight
from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import batch_norm_margins, overhaul
from stillhouse.methods.distillation import KnowledgeDistillation, Reads
from stillhouse.methods.layerwise import for_each, layers_before, summed
from stillhouse.methods.wiring import Pair, Reader, Wiring
from stillhouse.modules.projectors import Connector


class OFD(KnowledgeDistillation):
    """Match the teacher's features before the ReLU, its negative values only down to a margin of each channel.

    The margin is the mean of the channel's negative values, as the teacher's batch norm tells it. Where the teacher is
    negative, a student below it is right already.
    """

    name: ClassVar[str] = "ofd"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "A Comprehensive Overhaul of Feature Distillation", 2019, arxiv="1904.01866", venue="ICCV 2019"
    )
    summary: ClassVar[str] = "features before the ReLU, down to the margins of the teacher's batch norms"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    reads: ClassVar[frozenset[Reads]] = frozenset({"before"})

    variant: Literal["paper", "code"] = Field(
        "paper", description="margin of channels that are hardly ever negative: their mean, or the code's -3 deviations"
    )
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with the labels (official: 1)")
    weight_ofd: Weight = Field(1e-3, description="weight of the partial distance, a sum over values (official: 1/1000)")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """A connector for each layer, and the margins, which :meth:`ready` fills in."""
        pairs = layers_before(pair)
        margins = for_each(pairs, lambda _, theirs: Margins(theirs))
        return {"connectors": for_each(pairs, Connector), "margins": margins}

    def ready(self, wiring: Wiring, place: int, run: Run) -> Generator[Any, Any, None]:
        """The margins, from the teachers' batch norms."""
        for link, parts in zip(wiring.links, wiring.parts[place], strict=True):
            assert isinstance(link.read, Reader)
            layers = [link.read.layers[at] for at in link.picks[1]]
            for layer, margins in zip(layers, parts["margins"].children(), strict=True):
                norm: Any = None if layer.norm is None else link.read.module.get_submodule(layer.norm)
                if norm is None or norm.weight is None:
                    raise UserError(
                        f"ofd: the {link.name}'s layer {layer.path!r} has no batch norm before its activation, from which its "
                        "margins come; name layers that have one with teacher_layers, or choose another method."
                    )
                margins.get_buffer("values").copy_(batch_norm_margins(norm.weight, norm.bias, variant=self.variant))
        yield from ()

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The partial distance, summed over layers, each counting half of the next."""
        return {"ofd": lambda: self.ofd(pair)}

    def ofd(self, pair: Pair) -> Tensor:
        """The term."""
        each = zip(layers_before(pair), pair.parts["connectors"], pair.parts["margins"], strict=True)
        found = [overhaul(connector(mine), theirs, margins.values) for (mine, theirs), connector, margins in each]
        return summed(found, halved=True)


class Margins(nn.Module):
    """The margin of each channel of a layer; no parameters, filled once."""

    values: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(channels))
