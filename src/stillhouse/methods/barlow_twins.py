"""Barlow Twins: representations without labels; what makes the target models of self-supervised distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Augment, Batch, Split
from stillhouse.data.dataset import hard
from stillhouse.engine import (
    Compute,
    Losses,
    Method,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stage,
    Stages,
    Table,
    Update,
    Weight,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.losses.redundancy import barlow_twins
from stillhouse.metrics import effective_dimensions, linear_readout
from stillhouse.models import ModelSpec, count_parameters, embedding
from stillhouse.models.spec import NetworkSpec
from stillhouse.modules.projectors import ProjectionHead

MEASURED = 10_000
"""Samples at most of which representations are measured."""


class BarlowTwins(Method):
    """Train a network so that two views of an image agree in every component and no two components say the same.

    ``L = sum_i (1 - C_ii)^2 + 0.0051 sum_{i != j} C_ij^2`` with the cross-correlation C, over a batch, of the embeddings
    that a projection head makes of both views. The result is the network without the head.
    """

    name: ClassVar[str] = "barlow-twins"
    family: ClassVar[str] = "representations"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", 2021, arxiv="2103.03230", venue="ICML 2021"
    )
    summary: ClassVar[str] = "image representations without labels, by decorrelating the components of two views"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    model: ModelSpec = Field(
        "imagenet-resnet", description="the network; its features are the representation", validate_default=True
    )
    projector: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (8192, 8192, 8192), min_length=1, description="widths of the projection head's layers"
    )
    augment: Augment = Field("resized-crop", description="how the first view is made", validate_default=True)
    second_augment: Augment | None = Field(None, description="how the second view is made; like the first by default")
    optimizer: Optimizer = Field(
        Optimizer(name="adam", lr=1e-3, weight_decay=1e-6, schedule="cosine"),
        description="optimiser of network and head (the paper's is LARS, for batches of 2048)",
    )
    epochs: float = Field(1000, gt=0, description="passes over the training split")
    batch_size: int = Field(2048, ge=2, description="samples per process and step")
    weight_invariance: Weight = Field(1.0, description="weight of the term that makes views agree")
    weight_redundancy: Weight = Field(0.0051, description="weight of the term that tells components apart (lambda)")

    def stages(self, run: Run) -> Stages:
        """One stage, then measures of the representation."""
        model = headless(self.model, run.data.facts)
        train = run.data.split("train")
        if "pixel_values" not in run.data.facts.inputs:
            raise UserError(
                f"data: {self.name} makes views of images, and {run.data.name!r} has {', '.join(run.data.facts.inputs)}."
            )
        batches = train.batches(self.batch_size)
        head = ProjectionHead(width_of(model, train, run), self.projector)
        yield Stage(
            "twins",
            modules={"model": model, "projector": head},
            updates=[Update(self.loss, {("model", "projector"): self.optimizer}, couples=True)],
            batches=batches,
            steps=max(1, round(self.epochs * batches.per_epoch(run.world.size))),
            prepare=self.views,
        )
        numbers = yield Compute("measures", lambda _: measured(model, run), form=dict[str, float])
        columns = ["model", "parameters", *numbers]
        row: list[str | float | int] = [self.model.kind, count_parameters(model), *numbers.values()]
        return Result(
            artefacts={"model": model}, metrics=numbers, tables=[Table("Representation without labels", columns, [row])]
        )

    def views(self, m: Modules, batch: Batch, run: Run) -> Batch:
        """Two views of the batch, drawn alike in all processes and sliced."""
        unit = run.data.to_unit(batch["pixel_values"])
        place = {"rank": run.world.rank, "world": run.world.size}
        first, second = self.augment(unit, **place), (self.second_augment or self.augment)(unit, **place)
        return Batch(first=run.data.from_unit(first), second=run.data.from_unit(second))

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Both terms, on the samples of all processes."""
        # One view after the other, so that batch norm standardises each for itself.
        first, second = (
            run.gather(m.projector(embedding(m.model, {"pixel_values": batch[side]}))) for side in ("first", "second")
        )
        invariance, redundancy = barlow_twins(first, second)
        return {"invariance": invariance, "redundancy": redundancy}


def headless(spec: ModelSpec, facts: Facts) -> nn.Module:
    """The network without a classifier: what it returns is the representation."""
    if isinstance(spec, NetworkSpec) and spec.num_outputs is None:
        spec = spec.model_copy(update={"num_outputs": 0})
    return spec.build(replace(facts, num_classes=None, task="unlabelled", class_names=()))


def width_of(model: nn.Module, split: Split, run: Run) -> int:
    """Width of a network's representation."""
    model.to(run.world.device)
    with measuring(model):
        return embedding(model, images_only(split.batch(range(min(2, len(split))), device=run.world.device))).shape[1]


def images_only(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a network of images reads of a batch."""
    return {"pixel_values": batch["pixel_values"]}


def at_most(split: Split, count: int) -> Split:
    """So many fixed samples of a split, or all where there are not more."""
    return split if len(split) <= count else split.take(count)


def represented(model: nn.Module, split: Split, run: Run) -> Tensor:
    """Representations (samples, width) of a split in order, on the CPU."""
    with measuring(model):
        batches = split.in_order(512, device=run.world.device)
        return torch.cat([embedding(model, images_only(batch)).float().cpu() for batch in batches])


def labelled(model: nn.Module, split: Split, run: Run) -> tuple[Tensor, Tensor]:
    """Representations and classes of a split in order, on the CPU."""
    features, labels = [], []
    with measuring(model):
        for batch in split.in_order(512, device=run.world.device):
            features.append(embedding(model, images_only(batch)).float().cpu())
            labels.append(hard(batch.labels).cpu())
    return torch.cat(features), torch.cat(labels)


def measured(model: nn.Module, run: Run) -> dict[str, float]:
    """Directions that the representation uses, and the accuracy of a linear readout where there are class labels."""
    train = at_most(run.data.split("train"), MEASURED)
    if run.data.facts.task != "classification" or "test" not in run.data.splits:
        return {"representation/dimensions": effective_dimensions(represented(model, train, run))}
    known, labels = labelled(model, train, run)
    readout = linear_readout(known, labels, *labelled(model, at_most(run.data.split("test"), MEASURED), run))
    return {"representation/dimensions": effective_dimensions(known), "test/readout": readout}
