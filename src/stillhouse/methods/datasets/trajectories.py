"""Trajectory matching: MTT (arXiv 2203.11932) and TESLA (2211.10586), and what their successors share with them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from stillhouse.data import Batch
from stillhouse.engine import (
    SKIP,
    Compute,
    Losses,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stage,
    Stages,
    Trained,
    Update,
    measuring,
    scratch,
    sgd,
)
from stillhouse.engine.seeding import derive
from stillhouse.engine.stage import Skip
from stillhouse.errors import UserError
from stillhouse.losses.trajectories import inner_batches, start_window, trajectory_matching
from stillhouse.methods.datasets.condensation import Condensation, Start, grid
from stillhouse.methods.datasets.experts import ExpertTraining, Trajectories, experts_of
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.siamese import Params, apply


@dataclass(frozen=True)
class Goal:
    """What an outer step matches: an expert from one epoch on.

    Attributes:
        expert: number of the expert.
        epoch: epoch from whose weights the inner training starts.
        start: those weights.
        targets: weights to be reached, by number of inner steps.
        weights: weight of each target, 1 where not given.
    """

    expert: int
    epoch: int
    start: Float[Tensor, " weights"]
    targets: Mapping[int, Float[Tensor, " weights"]]
    weights: Mapping[int, float]


class TrajectoryMatching(Condensation):
    """Base: networks that train on the tiny set for N steps shall end where experts ended after M epochs of the real one."""

    experts: ExpertTraining = Field(ExpertTraining(), description="how many experts there are and how they are trained")
    init: Start = Field("random", description="where images start: random, herding or k-center real ones, or noise")
    num_steps: int = Field(5000, ge=1, description="outer steps, each of which matches a part of an expert's path")
    inner_steps: int = Field(20, ge=1, description="steps on the tiny set from an expert's weights (N)")
    expert_epochs: int = Field(3, ge=1, description="epochs of the expert that these steps shall make up for (M)")
    min_start_epoch: int = Field(0, ge=0, description="first epoch from which an expert is matched (T-)")
    max_start_epoch: int = Field(25, ge=1, description="epoch before which matching starts (T+)")
    batch_syn: int | None = Field(None, ge=1, description="tiny images of an inner step; all of them by default")
    lr_images: float = Field(1000.0, gt=0, description="learning rate of the pixels")
    lr_step: float = Field(1e-5, gt=0, description="learning rate of the step size")
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the pixels and of the step size")
    step_size: float = Field(0.01, gt=0, description="where the learned step size starts")
    exact: bool = Field(
        True, description="differentiate the whole inner training; False leaves out how weights depend on images"
    )
    keep_every: int = Field(
        1,
        ge=1,
        description="keep the weights of every so many inner steps and redo those between; saves memory",
    )
    compare_start: bool = Field(True, description="also score the images that it started from, for the table")
    eval_epochs: int = Field(1000, ge=1, description="passes over the tiny set in scoring")
    eval_batch_size: int = Field(256, ge=1, description="batch size in scoring")
    eval_optimizer: Optimizer = Field(
        sgd(0.01, momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(0.5,)),
        description="optimiser in scoring; its learning rate is the set's learned step size",
    )

    inner_momentum: ClassVar[float] = 0.0
    """Momentum of the inner training."""

    def stages(self, run: Run) -> Stages:
        """Train experts, start, match, score."""
        self.check_data(run)
        self.check_windows()
        trajectories = yield from experts_of(run, self.architecture(), self.augment, self.experts)
        flat = FlatNetwork(self.architecture().build(run.data.facts)).to(run.world.device)
        self.check_trajectories(trajectories, flat)
        distilled = yield from self.started(run, trajectories, flat)
        scores: dict[str, dict[str, list[float]]] = {}
        if self.compare_start:
            scores["start"] = yield from self.scored(run, distilled, "start")
        before = grid(distilled)
        trained = yield self.matching_stage(distilled, trajectories, flat)
        check_step_size(distilled)
        result: Result = yield from self.finished(run, distilled, trained, trajectories, flat, scores, before)
        return result

    def matching_stage(self, distilled: DistilledSet, trajectories: Trajectories, flat: FlatNetwork) -> Stage:
        """The outer training."""
        return Stage(
            "matching",
            modules={"set": distilled, "net": scratch(flat)},
            updates=[Update(partial(self.match, trajectories, flat), self.trains(), name="match")],
            steps=self.num_steps,
            show=lambda m, run: {"images": grid(m.set)},
        )

    def trains(self) -> dict[str | tuple[str, ...], Optimizer]:
        """What is learned, each with its optimiser."""
        return {
            "set.images": sgd(self.lr_images, momentum=self.momentum),
            "set.lr": sgd(self.lr_step, momentum=self.momentum),
        }

    def started(self, run: Run, trajectories: Trajectories, flat: FlatNetwork) -> Generator[Any, Any, DistilledSet]:
        """The set before any training."""
        return (yield from self.start(run, self.init, lr=self.step_size))

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
        """Score the learned set and hand it over."""
        scores["distilled"] = yield from self.scored(run, distilled, "distilled")
        return (yield from self.handed_over(run, distilled, scores, before))

    def handed_over(
        self, run: Run, distilled: DistilledSet, scores: dict[str, dict[str, list[float]]], before: Tensor, **more: Any
    ) -> Generator[Any, Any, Any]:
        """The result, with what was learned besides the images."""
        clipped = yield Compute("clipped", lambda _: float(distilled.clipped), form=float)
        assert distilled.lr is not None
        notes = [
            f"{100 * clipped:.1f}% of the learned pixel values lie outside [0, 1] and are clipped in pictures and exports.",
            f"The learned step size is {float(distilled.lr.detach()):.4g}: networks are to be trained on the set with it.",
        ]
        metrics = more.pop("metrics", {})
        result = self.concluded(run, distilled, scores, pictures={"start": before}, notes=notes, **more)
        result.metrics.update(metrics, step_size=float(distilled.lr.detach()))
        return result

    # One outer step -------------------------------------------------------------------------------------------------

    def match(self, trajectories: Trajectories, flat: FlatNetwork, m: Modules, batch: Batch, run: Run) -> Losses | Skip:
        """The normalised distance to an expert after N steps on the set."""
        lr: Tensor = check_step_size(m.set)
        goal = self.goal(trajectories, flat, m, run)
        order = inner_batches(len(m.set), self.batch_syn, self.inner_steps)
        height, width = m.set.images.shape[-2:]
        draws = [self.augment.draw(len(part), (height, width), shared_choice=True) for part in order]
        value = trajectory_matching(
            partial(self.inner_loss, flat, draws, goal),
            goal.start,
            goal.targets,
            m.set.images,
            m.set.labels,
            lr,
            order,
            momentum=self.inner_momentum,
            weights=goal.weights,
            exact=self.exact,
            keep_every=self.keep_every,
        )
        return SKIP if self.dropped(value, run) else {"match": value}

    def goal(self, trajectories: Trajectories, flat: FlatNetwork, m: Modules, run: Run) -> Goal:
        """The expert and the epoch of this step: experts in turn in a shuffled order, epochs uniformly from the window."""
        position = run.step * run.world.size + run.world.rank
        turn, place = divmod(position, len(trajectories))
        shuffled = torch.Generator().manual_seed(derive(run.seed, "experts", turn))
        expert = int(torch.randperm(len(trajectories), generator=shuffled)[place])
        epoch = int(torch.randint(*self.window(run.step), ()))
        start = trajectories.weights(expert, epoch, run.world.device)
        last = trajectories.weights(expert, epoch + self.expert_epochs, run.world.device)
        return Goal(expert, epoch, start, {self.inner_steps: last}, {})

    def window(self, step: int) -> tuple[int, int]:
        """Epochs from which an expert may be matched at an outer step: from the first up to but without the second."""
        return start_window(step, first=self.min_start_epoch, last=self.max_start_epoch)

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
        """Cross-entropy of an inner step, on augmented images; soft labels are logits."""
        seen = apply(images, draws[step]) if draws[step].operations else images
        targets = labels.softmax(-1) if labels.is_floating_point() else labels
        return F.cross_entropy(flat.logits(weights, {"pixel_values": seen}), targets)

    def dropped(self, value: Tensor, run: Run) -> bool:
        """Whether a step's result is left out."""
        return False

    # What is refused ------------------------------------------------------------------------------------------------

    def check_windows(self) -> None:
        """Refuse windows that are empty or run over the experts' end."""
        if self.min_start_epoch >= self.max_start_epoch:
            raise UserError(
                f"min_start_epoch is {self.min_start_epoch} and max_start_epoch {self.max_start_epoch}: matching starts before "
                "the second, so the first must be smaller."
            )

    def check_trajectories(self, trajectories: Trajectories, flat: FlatNetwork) -> None:
        """Refuse experts that end before the last target, or are of another network."""
        last = self.max_start_epoch - 1 + self.expert_epochs
        if last > trajectories.epochs:
            raise UserError(
                f"max_start_epoch is {self.max_start_epoch} and expert_epochs {self.expert_epochs}, so targets reach to epoch "
                f"{last}, but the experts have {trajectories.epochs}; raise experts.epochs to {last}."
            )


def check_step_size(distilled: DistilledSet) -> Tensor:
    """The learned step size.

    Raises:
        UserError: it is no longer positive.
    """
    assert distilled.lr is not None
    if not float(distilled.lr.detach()) > 0:
        raise UserError(
            f"The learned step size fell to {float(distilled.lr.detach()):.3g}, with which nothing can be trained; lower lr_step."
        )
    return distilled.lr


class MTT(TrajectoryMatching):
    """Match the weights of experts after M epochs with those of N steps on the tiny set, from any of their first epochs.

    ``L = ||theta_N - theta*_{t+M}||^2 / ||theta*_t - theta*_{t+M}||^2``; images and the step size are learned.
    """

    name: ClassVar[str] = "mtt"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Dataset Distillation by Matching Training Trajectories", 2022, arxiv="2203.11932", venue="CVPR 2022"
    )
    summary: ClassVar[str] = "a tiny training set on which networks take the same path as experts on the real one"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"


class TESLA(TrajectoryMatching):
    """MTT with the gradient that treats each inner step's weights as constants, and labels of the matched expert if asked.

    The gradient is biased for more than one inner step (``exact=true`` takes the true one at the same memory).
    """

    name: ClassVar[str] = "tesla"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory",
        2023,
        arxiv="2211.10586",
        venue="ICML 2023",
    )
    summary: ClassVar[str] = "trajectory matching with a surrogate gradient, and soft labels from the matched expert"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    num_steps: int = Field(10000, ge=1, description="outer steps, each of which matches a part of an expert's path")
    exact: bool = Field(
        False,
        description="differentiate the whole inner training; False leaves out how weights depend on images (TESLA)",
    )
    teacher_labels: bool = Field(
        False,
        description="label the tiny images softly, in each step by the matched expert at its target (many classes)",
    )

    def started(self, run: Run, trajectories: Trajectories, flat: FlatNetwork) -> Generator[Any, Any, DistilledSet]:
        """Real images; soft labels start as those of the first expert at its end."""
        made = yield from super().started(run, trajectories, flat)
        if not self.teacher_labels:
            return made
        soft = yield Compute(
            "labels", lambda _: labelled(flat, trajectories.weights(0, -1, run.world.device), made.images)
        )
        return DistilledSet(
            made.images,
            soft,
            target="logits",
            classes=made.labels,
            num_classes=made.num_classes,
            lr=self.step_size,
            mean=made.mean.tolist(),
            std=made.std.tolist(),
            provenance=made.provenance,
        )

    def goal(self, trajectories: Trajectories, flat: FlatNetwork, m: Modules, run: Run) -> Goal:
        """As in MTT; the labels of the set become those that the target gives its images."""
        goal = super().goal(trajectories, flat, m, run)
        if self.teacher_labels:
            m.set.labels.copy_(run.world.average(labelled(flat, goal.targets[self.inner_steps], m.set.images)))
        return goal


def labelled(
    flat: FlatNetwork, weights: Float[Tensor, " weights"], images: Float[Tensor, "samples channels height width"]
) -> Float[Tensor, "samples classes"]:
    """Logits of a network with the given weights on clean images, without a graph."""
    with measuring(flat):
        parts = torch.split(images.detach().to(weights.device), 512)
        return torch.cat([flat.logits(weights, {"pixel_values": part}) for part in parts])
