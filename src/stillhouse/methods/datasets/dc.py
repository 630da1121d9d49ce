"""Gradient matching: data set condensation (DC, arXiv 2006.05929) and the same with siamese augmentation (DSA, 2102.08259)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch, Split
from stillhouse.engine import Compute, Losses, Modules, Paper, Run, Stage, Stages, Update, Weight, sgd
from stillhouse.errors import UserError
from stillhouse.losses.gradients import GradientDistance, gradient_matching
from stillhouse.methods.datasets.condensation import Condensation, Start, grid
from stillhouse.models import initialise, logits
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.siamese import DSA as Siamese
from stillhouse.modules.siamese import apply

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Updates of the images per network, and passes of the network over them in between, by images per class (released code)."""


class GradientMatching(Condensation):
    """Base: the gradient of a network on tiny images is to be that on real ones, class by class, while it trains on them.

    A network is drawn; the images are moved ``outer_loop`` times, and after each time but the last the network is trained on
    them for ``inner_loop`` passes. Then the next network is drawn, ``num_steps`` in all.
    """

    augmented: ClassVar[bool] = False

    init: Start = Field("noise", description="where images start: noise, or random, herding or k-center real ones")
    num_steps: int = Field(1000, ge=1, description="networks that are drawn, one after the other")
    outer_loop: int | None = Field(
        None,
        ge=1,
        description="updates of the images per network; by the released table (1, 10 for IPC 1, 10), else IPC",
    )
    inner_loop: int | None = Field(
        None,
        ge=1,
        description="passes of the network over the images between these; by the table, else 500 / outer_loop",
    )
    batch_real: int = Field(
        256, ge=1, description="real images of each class per update; small classes are drawn twice"
    )
    batch_train: int = Field(256, ge=1, description="batch size of the network's training on the images")
    lr_images: float = Field(0.1, gt=0, description="learning rate of the pixels")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the pixels")
    lr_network: float = Field(0.01, gt=0, description="learning rate of the network between updates")
    distance: GradientDistance = Field(
        "layers", description="layers: one minus the cosine per output node; mse and cosine of the whole gradient"
    )
    siamese: bool = Field(True, description="augment real and tiny images of a class alike")
    compare_start: bool = Field(True, description="also score the images that it started from, for the table")
    eval_batch_size: int = Field(256, ge=1, description="batch size in scoring")
    weight_gradients: Weight = Field(1.0, description="weight of the distance of gradients")

    def loops(self) -> tuple[int, int]:
        """Updates of the images per network, and passes over them between two of these."""
        outer, inner = LOOPS.get(self.images_per_class, (min(self.images_per_class, 50), 0))
        outer = self.outer_loop or outer
        return outer, self.inner_loop or inner or max(1, round(500 / outer))

    def stages(self, run: Run) -> Stages:
        """Start, match, score."""
        distilled = yield from self.start(run, self.init)
        scores: dict[str, dict[str, list[float]]] = {}
        if self.compare_start:
            scores["start"] = yield from self.scored(run, distilled, "start")
        before = grid(distilled)
        net = self.architecture().build(run.data.facts)
        self.check_network(net, len(distilled.by_class), run)
        yield self.matching(run, distilled, net)
        scores["distilled"] = yield from self.scored(run, distilled, "distilled")
        clipped = yield Compute("clipped", lambda _: float(distilled.clipped), form=float)
        note = f"{100 * clipped:.1f}% of the learned pixel values lie outside [0, 1] and are clipped in pictures and exports."
        return self.concluded(run, distilled, scores, pictures={"start": before}, notes=[note])

    def matching(self, run: Run, distilled: DistilledSet, net: nn.Module) -> Stage:
        """One stage of ``num_steps * outer_loop`` updates of the images."""
        outer, inner = self.loops()
        places = Split("tiny", run.data.facts, {"labels": distilled.labels.cpu()})
        size = max(1, min(self.batch_train, len(distilled)) // run.world.size)
        batches = places.batches(size, drop_last=False)
        network = Update(
            self.fit_network,
            {"net": sgd(self.lr_network)},
            name="network",
            every=lambda run: (run.step + 1) % outer != 0,
            times=inner * batches.per_epoch(run.world.size),
            batches=batches,
        )
        images = Update(self.match, {"set.images": sgd(self.lr_images, momentum=self.momentum)}, name="match")
        return Stage(
            "matching",
            modules={"set": distilled, "net": net},
            updates=[images, network],
            steps=self.num_steps * outer,
            prepare=self.prepare,
            show=lambda m, run: {"images": grid(m.set)},
        )

    def prepare(self, m: Modules, batch: Batch, run: Run) -> Batch:
        """A fresh network where it is due, and which real images are seen, [classes, batch_real]."""
        if run.step % self.loops()[0] == 0:
            initialise(m.net)
            run.reset(m.net)
        return Batch(index=self.drawn(run, self.batch_real))

    def match(self, m: Modules, batch: Batch, run: Run) -> Iterator[Losses]:
        """The distance of gradients, a class at a time: the loss is a sum over classes, of which one is in memory."""
        split, synthetic = run.data.split("train"), m.set.by_class
        height, width = synthetic.shape[-2:]
        augment = self.augment if self.augmented else Siamese(strategy="none")
        params = augment.draw(len(synthetic), (height, width), generator=run.generator())
        others = params if self.siamese else augment.draw(len(synthetic), (height, width), generator=run.generator())
        for label in range(run.world.rank, len(synthetic), run.world.size):
            here = slice(label, label + 1)
            real = split.batch(batch["index"][label], device=run.world.device)["pixel_values"]
            pair = apply(real, params[here]), apply(synthetic[label], others[here])
            yield {"gradients": partial(self.distance_of, m.net, *pair, label, run.world.size)}

    def distance_of(self, net: nn.Module, real: Tensor, synthetic: Tensor, label: int, scale: int) -> Tensor:
        """The distance of the gradients on one class's real and tiny images; only the latter's have a graph."""
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        wanted = torch.autograd.grad(_class_loss(net, real, label), parameters)
        found = torch.autograd.grad(_class_loss(net, synthetic, label), parameters, create_graph=True)
        # The engine averages over processes, and each of them sums over its own classes only.
        return scale * gradient_matching(found, wanted, self.distance)

    def fit_network(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Cross-entropy of the network on the tiny images as they are now."""
        images = m.set.images.detach()[batch["index"]]
        if self.augmented:
            images = self.augment.augment(images)
        return {"ce": F.cross_entropy(logits(m.net, Batch(pixel_values=images)), batch.labels)}

    def check_network(self, net: nn.Module, classes: int, run: Run) -> None:
        """Refuse what would make the gradient of a class depend on others."""
        if run.world.size > classes:
            raise UserError(f"{run.world.size} processes cannot share {classes} classes; start at most {classes}.")
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
            raise UserError(
                "network: with batch norm the few tiny images of a class would set the statistics; use norm=instance."
            )


def _class_loss(net: nn.Module, images: Tensor, label: int) -> Tensor:
    labels = torch.full((len(images),), label, device=images.device)
    return F.cross_entropy(logits(net, Batch(pixel_values=images)), labels)


class DC(GradientMatching):
    """Match the gradients of a network on tiny and on real images of each class while it trains on the tiny ones."""

    name: ClassVar[str] = "dc"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Dataset Condensation with Gradient Matching", 2021, arxiv="2006.05929", venue="ICLR 2021"
    )
    summary: ClassVar[str] = "a tiny training set, by matching the gradients of networks that train on it"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    augment: Siamese = Field(
        Siamese(strategy="none"),
        description="augmentation in scoring alone (released code: crop_scale_rotate on MNIST)",
    )
    eval_epochs: int = Field(300, ge=1, description="passes over the tiny set in scoring; 1000 with an augmentation")


class DSA(GradientMatching):
    """DC with one differentiable augmentation of the real and the tiny images of a class, and of the network's training."""

    name: ClassVar[str] = "dsa"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Dataset Condensation with Differentiable Siamese Augmentation", 2021, arxiv="2102.08259", venue="ICML 2021"
    )
    summary: ClassVar[str] = "a tiny training set, by matching gradients under one augmentation of real and tiny images"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    augmented: ClassVar[bool] = True

    init: Start = Field("random", description="where images start: random, herding or k-center real ones, or noise")
    eval_epochs: int = Field(1000, ge=1, description="passes over the tiny set in scoring")
