"""FTD: trajectory matching on experts whose paths are flat (arXiv 2211.11004)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.engine import Compute, Paper, Run, Stage, Table, Trained
from stillhouse.losses.trajectories import inner_batches
from stillhouse.methods.datasets.experts import ExpertTraining, FlatExperts, Trajectories
from stillhouse.methods.datasets.trajectories import Goal, TrajectoryMatching
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.distilled import DistilledSet


class FTD(TrajectoryMatching):
    """Match experts that were trained to lie flat, and hand over the average of the pixels along the way.

    Matching starts on the expert's path each time, training on the finished set does not: a network that is off the path
    is carried further off by as much as the loss is curved there. So the experts' loss is kept flat around their path
    (GSAM). The defaults are those for CIFAR-10 at 10 images a class (table of the paper).
    """

    name: ClassVar[str] = "ftd"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation",
        2023,
        arxiv="2211.11004",
        venue="CVPR 2023",
    )
    summary: ClassVar[str] = (
        "a tiny training set by flat experts, on whose path networks stay also when they are off it"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"

    experts: ExpertTraining = Field(
        FlatExperts(), description="how many experts there are and how they are trained: flat"
    )
    inner_steps: int = Field(30, ge=1, description="steps on the tiny set from an expert's weights (N)")
    expert_epochs: int = Field(2, ge=1, description="epochs of the expert that these steps shall make up for (M)")
    max_start_epoch: int = Field(20, ge=1, description="epoch before which matching starts (T+)")
    lr_images: float = Field(100.0, gt=0, description="learning rate of the pixels")
    step_size: float = Field(0.001, gt=0, description="where the learned step size starts")
    ema: float = Field(
        0.9995,
        ge=0,
        lt=1,
        description="decay of the average of the pixels that is handed over; 0 hands over the last ones",
    )
    chains: int = Field(
        5, ge=0, description="experts along whose path the accumulated error of the set is measured; 0: not"
    )

    def matching_stage(self, distilled: DistilledSet, trajectories: Trajectories, flat: FlatNetwork) -> Stage:
        """The outer training, with the average of the set."""
        return replace(super().matching_stage(distilled, trajectories, flat), ema={"set": self.ema})

    def finished(
        self,
        run: Run,
        distilled: DistilledSet,
        trained: Trained,
        trajectories: Trajectories,
        flat: FlatNetwork,
        scores: dict[str, dict[str, list[float]]],
        before: Tensor,
    ) -> Generator[Any, Any, Any]:
        """Score the averaged and the last set, each on fresh networks; measure the error that accumulates."""
        averaged = DistilledSet(
            trained.ema["set"]["images"],
            distilled.labels.detach(),
            num_classes=distilled.num_classes,
            lr=float(distilled.lr.detach()) if distilled.lr is not None else None,
            mean=distilled.mean.tolist(),
            std=distilled.std.tolist(),
            provenance=distilled.provenance,
        ).to(run.world.device)
        scores["distilled"] = yield from self.scored(run, averaged, "distilled")
        scores["last"] = yield from self.scored(run, distilled, "last")
        if not self.chains:
            return (yield from self.handed_over(run, averaged, scores, before))
        measured = yield Compute(
            "accumulated",
            lambda _: self.accumulated(run, averaged, trajectories, flat),
            form=lambda: [[0.0, 0.0] for _ in range(self.segments)],
        )
        rows = [
            [(number + 1) * self.expert_epochs, round(chained, 4), round(reset, 4)]
            for number, (chained, reset) in enumerate(measured)
        ]
        table = Table(
            f"Distance to the experts, relative to how far they have gone ({min(self.chains, len(trajectories))} of them)",
            ["epoch", "trained on the set throughout", "put back on the path each time"],
            rows,
        )
        numbers = {"error/accumulated": measured[-1][0], "error/matching": measured[-1][1]}
        result = yield from self.handed_over(run, averaged, scores, before, metrics=numbers)
        result.tables.append(table)
        return result

    @property
    def segments(self) -> int:
        """Runs of ``expert_epochs`` epochs that matching reaches."""
        return (self.max_start_epoch - 1 + self.expert_epochs) // self.expert_epochs

    def accumulated(
        self, run: Run, distilled: DistilledSet, trajectories: Trajectories, flat: FlatNetwork
    ) -> list[list[float]]:
        """For each segment, ``||theta - theta*||^2 / ||theta*_0 - theta*||^2`` at its end, in the mean over experts.

        ``theta`` has trained on the set since epoch 0; and, beside it, since the segment's start on the expert's path.
        """
        experts, device = range(min(self.chains, len(trajectories))), run.world.device
        found = torch.zeros(self.segments, 2)
        for expert in experts:
            first = trajectories.weights(expert, 0, device)
            theta = first
            for segment in range(self.segments):
                at = segment * self.expert_epochs
                end = trajectories.weights(expert, at + self.expert_epochs, device)
                theta = self.trained_on(distilled, flat, theta)
                put_back = self.trained_on(distilled, flat, trajectories.weights(expert, at, device))
                gone = (first - end).square().sum()
                for column, weights in enumerate((theta, put_back)):
                    found[segment, column] += ((weights - end).square().sum() / gone).cpu() / len(experts)
        return [[float(value) for value in row] for row in found]

    def trained_on(self, distilled: DistilledSet, flat: FlatNetwork, weights: Tensor) -> Tensor:
        """Weights after the inner steps on the set, as in matching."""
        assert distilled.lr is not None
        order = inner_batches(len(distilled), self.batch_syn, self.inner_steps)
        height, width = distilled.images.shape[-2:]
        draws = [self.augment.draw(len(part), (height, width), shared_choice=True) for part in order]
        goal = Goal(0, 0, weights, {}, {})
        loss = partial(self.inner_loss, flat, draws, goal)
        images, labels, lr = distilled.images.detach(), distilled.labels, distilled.lr.detach()
        for step, part in enumerate(order):
            index = part.to(images.device)
            theta = weights.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(theta, images[index], labels[index], step), theta)
            weights = weights - lr * gradient
        return weights
