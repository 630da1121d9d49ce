"""AST: alignment with smooth and high-quality expert trajectories (arXiv 2310.10541)."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from stillhouse.data import Split
from stillhouse.engine import Compute, Modules, Optimizer, Paper, Run, sgd
from stillhouse.errors import UserError
from stillhouse.methods.datasets.experts import ExpertTraining, SmoothExperts, Trajectories
from stillhouse.methods.datasets.trajectories import Goal, TrajectoryMatching, labelled
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.coresets import k_means, random_selection
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.siamese import Params


class SmoothTrajectories(TrajectoryMatching):
    """Match strong experts, whose path a slow start and a gradient penalty make smooth, by an inner training with momentum.

    Strong experts (momentum, decay) move too fast at first to be matched. Beside their smoothing, the student's side is
    made robust: it starts at perturbed weights, meets the experts' epochs between as well, and weighs its loss by how late
    it starts; images start as real ones near the centres of their class in an expert's logits. The defaults are those for
    CIFAR-100 at 10 images a class (released scripts).
    """

    name: ClassVar[str] = "smooth-trajectories"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories",
        2023,
        arxiv="2310.10541",
    )
    summary: ClassVar[str] = (
        "a tiny training set by strong experts on a smooth path, matched with momentum and on the way"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"

    inner_momentum: ClassVar[float] = 0.9

    experts: ExpertTraining = Field(
        SmoothExperts(), description="how many experts there are and how they are trained: strong and smooth"
    )
    representative: bool = Field(
        True,
        description="start from the real images next to k-means centres in an expert's logits; False: as init says",
    )
    perturbation: float = Field(
        1.0,
        ge=0,
        description="length of the noise on the start's convolutions, relative to the weights (alpha); 0: none",
    )
    balanced: bool = Field(True, description="weigh the inner loss by how late it starts; late ones are small")
    intermediate: Literal["none", "aggregate", "adaptive"] = Field(
        "aggregate", description="also match the epochs between: alike, or by how far they are along; or not"
    )
    inner_steps: int = Field(20, ge=1, description="steps on the tiny set from an expert's weights (N)")
    expert_epochs: int = Field(2, ge=1, description="epochs of the expert that these steps shall make up for (M)")
    max_start_epoch: int = Field(30, ge=1, description="epoch before which matching starts (T+)")
    batch_syn: int | None = Field(128, ge=1, description="tiny images of an inner step; none: all of them")
    eval_optimizer: Optimizer = Field(
        sgd(0.01, momentum=0.9, weight_decay=1e-3, schedule="step", milestones=(0.5,), gamma=0.5),
        description="optimiser in scoring; its learning rate is the set's learned step size",
    )

    def check_trajectories(self, trajectories: Trajectories, flat: FlatNetwork) -> None:
        """Refuse experts that are too short, no room for the epochs between, and noise where nothing takes it."""
        super().check_trajectories(trajectories, flat)
        if self.intermediate != "none" and self.expert_epochs > self.inner_steps:
            raise UserError(
                f"expert_epochs is {self.expert_epochs} and inner_steps {self.inner_steps}: each epoch between needs a step of "
                "its own; raise inner_steps or set intermediate=none."
            )
        if self.perturbation and not any(len(shape) == 4 for shape in flat.shapes.values()):
            raise UserError("perturbation: this network has no convolution to perturb; set perturbation=0.")

    def started(self, run: Run, trajectories: Trajectories, flat: FlatNetwork) -> Generator[Any, Any, DistilledSet]:
        """The real images nearest to the centres of their class, as the first expert sees them at its end."""
        if not self.representative:
            return (yield from super().started(run, trajectories, flat))
        split, device = run.data.split("train"), run.world.device
        chosen = yield Compute(
            "representatives",
            lambda _: representatives(split, flat, trajectories.weights(0, -1, device), self.images_per_class),
            form=lambda: random_selection(split.labels, self.images_per_class),
        )
        return self.chosen_images(run, chosen, lr=self.step_size)

    def goal(self, trajectories: Trajectories, flat: FlatNetwork, m: Modules, run: Run) -> Goal:
        """As in MTT, from perturbed weights, with the epochs between as further targets."""
        goal = super().goal(trajectories, flat, m, run)
        targets, weights = dict(goal.targets), dict(goal.weights)
        if self.intermediate != "none":
            for part in range(1, self.expert_epochs):
                step = part * (self.inner_steps // self.expert_epochs)
                targets[step] = trajectories.weights(goal.expert, goal.epoch + part, run.world.device)
                weights[step] = 1.0 if self.intermediate == "aggregate" else part / self.expert_epochs
        start = perturbed(flat, goal.start, self.perturbation) if self.perturbation else goal.start
        return replace(goal, start=start, targets=targets, weights=weights)

    def inner_loss(
        self,
        flat: FlatNetwork,
        draws: list[Params],
        goal: Goal,
        weights: Tensor,
        images: Tensor,
        labels: Tensor,
        step: int,
    ) -> Tensor:
        """Cross-entropy of an inner step, weighed by the epoch from which it started."""
        value = super().inner_loss(flat, draws, goal, weights, images, labels, step)
        return balance(goal.epoch, self.max_start_epoch) * value if self.balanced else value


def balance(epoch: int, last: int) -> float:
    """Weight of the inner loss: ``log_5(t - h + 8)`` from the middle ``h`` of the window on, the inverse before.

    >>> [round(balance(epoch, 20), 3) for epoch in (0, 9, 10, 19)]
    [0.557, 0.732, 1.292, 1.76]
    """
    middle = last // 2
    if epoch >= middle:
        return math.log(epoch - middle + 8, 5)
    return 1 / math.log(middle - epoch + 8, 5)


def perturbed(flat: FlatNetwork, weights: Float[Tensor, " weights"], alpha: float) -> Float[Tensor, " weights"]:
    """Weights whose convolutions are each multiplied by ``1 + alpha d``, with ``d`` a random direction of length 1."""
    parts = []
    for view in flat.views(weights).values():
        if view.ndim == 4:
            noise = torch.randn_like(view)
            view = view + alpha * noise / noise.norm() * view
        parts.append(view.flatten())
    return torch.cat(parts)


def representatives(
    split: Split, flat: FlatNetwork, weights: Float[Tensor, " weights"], per_class: int
) -> Int[Tensor, " chosen"]:
    """Positions of the images next to ``per_class`` k-means centres of each class, in the space of logits."""
    chosen = []
    for members in split.by_class().values():
        seen = torch.cat(
            [labelled(flat, weights, split.batch(part)["pixel_values"]).cpu() for part in torch.split(members, 512)]
        )
        chosen.append(members[k_means(seen, per_class)])
    return torch.cat(chosen)
