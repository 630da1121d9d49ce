"""DATM: trajectory matching whose epochs follow the size of the set, with learned soft labels (arXiv 2310.05773)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from stillhouse.data import Split
from stillhouse.engine import Compute, Optimizer, Paper, Run, sgd
from stillhouse.errors import UserError
from stillhouse.losses.trajectories import start_window
from stillhouse.methods.datasets.experts import ExpertTraining, FlatExperts, Trajectories
from stillhouse.methods.datasets.trajectories import TrajectoryMatching, labelled
from stillhouse.models.flat import FlatNetwork
from stillhouse.modules.coresets import random_selection
from stillhouse.modules.distilled import DistilledSet


class DATM(TrajectoryMatching):
    """Match the epochs of experts that are as hard as the set is large, with labels that are learned beside the images.

    A small set carries what experts learn early, a large one what they learn late: ``min_start_epoch`` leaves out the easy
    epochs, and the window's end grows from ``first_max_start_epoch`` to ``max_start_epoch``. Images start as real ones that
    an expert classifies correctly; labels are logits, at first the mean of those of all experts that are right. The
    defaults are those for CIFAR-10 at 10 images a class (released configuration).
    """

    name: ClassVar[str] = "datm"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
        2024,
        arxiv="2310.05773",
        venue="ICLR 2024",
    )
    summary: ClassVar[str] = (
        "a training set of any size, by epochs of experts as hard as it is large, and learned labels"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"

    experts: ExpertTraining = Field(
        FlatExperts(epochs=100), description="how many experts there are and how they are trained: flat ones (FTD)"
    )
    correct_images: bool = Field(
        True, description="start from real images that an expert classifies correctly at its end; False: as init says"
    )
    soft_labels: bool = Field(True, description="learn labels as logits; False keeps class numbers")
    label_experts: int | None = Field(
        None,
        ge=1,
        description="experts whose logits the first labels are the mean of, where they are right; all by default",
    )
    num_steps: int = Field(10000, ge=1, description="outer steps, each of which matches a part of an expert's path")
    inner_steps: int = Field(80, ge=1, description="steps on the tiny set from an expert's weights (N)")
    expert_epochs: int = Field(2, ge=1, description="epochs of the expert that these steps shall make up for (M)")
    max_start_epoch: int = Field(20, ge=1, description="epoch before which matching starts, in the end (T+)")
    first_max_start_epoch: int | None = Field(
        10, ge=1, description="epoch before which matching starts at first (T); none: max_start_epoch from the start"
    )
    expansion_steps: int = Field(1000, ge=1, description="outer steps over which that end grows")
    batch_syn: int | None = Field(100, ge=1, description="tiny images of an inner step; none: all of them")
    lr_images: float = Field(100.0, gt=0, description="learning rate of the pixels")
    lr_labels: float = Field(2.0, gt=0, description="learning rate of the labels")
    momentum_labels: float = Field(0.9, ge=0, lt=1, description="momentum of the labels")
    threshold: float = Field(1.0, gt=0, description="steps whose loss is larger move nothing")
    eval_batch_size: int = Field(128, ge=1, description="batch size in scoring")

    def trains(self) -> dict[str | tuple[str, ...], Optimizer]:
        """Images, step size and, where they are soft, labels."""
        trains = super().trains()
        if self.soft_labels:
            trains["set.labels"] = sgd(self.lr_labels, momentum=self.momentum_labels)
        return trains

    def window(self, step: int) -> tuple[int, int]:
        """Epochs from which an expert may be matched at an outer step; the end grows."""
        return start_window(
            step,
            first=self.min_start_epoch,
            last=self.max_start_epoch,
            begin=self.first_max_start_epoch,
            end=self.expansion_steps,
        )

    def dropped(self, value: Tensor, run: Run) -> bool:
        """Whether the loss, in the mean over processes, is above the threshold; one that is not finite is not dropped."""
        return bool(run.world.average(value.detach()) > self.threshold)

    def check_windows(self) -> None:
        """Refuse windows that are empty, now or before they grow."""
        super().check_windows()
        first = self.first_max_start_epoch
        if first is not None and not self.min_start_epoch < first <= self.max_start_epoch:
            raise UserError(
                f"first_max_start_epoch is {first}: it lies above min_start_epoch, {self.min_start_epoch}, and at most at "
                f"max_start_epoch, {self.max_start_epoch}; none takes the whole window from the start."
            )

    def check_trajectories(self, trajectories: Trajectories, flat: FlatNetwork) -> None:
        """Refuse experts that are too short, of another network, or too few for the labels."""
        super().check_trajectories(trajectories, flat)
        if self.label_experts is not None and self.label_experts > len(trajectories):
            raise UserError(f"label_experts is {self.label_experts}, but there are {len(trajectories)} experts.")

    def started(self, run: Run, trajectories: Trajectories, flat: FlatNetwork) -> Generator[Any, Any, DistilledSet]:
        """Real images that experts classify correctly, with the mean logits of the experts that do."""
        split, device = run.data.split("train"), run.world.device
        if self.correct_images:
            chosen = yield Compute(
                "correct-images",
                lambda _: correct_images(split, trajectories, flat, self.images_per_class, device),
                form=lambda: random_selection(split.labels, self.images_per_class),
            )
            made = self.chosen_images(run, chosen, lr=self.step_size)
        else:
            made = yield from super().started(run, trajectories, flat)
        if not self.soft_labels:
            return made
        experts = range(self.label_experts or len(trajectories))
        soft = yield Compute(
            "labels",
            lambda _: mean_logits(
                [labelled(flat, trajectories.weights(number, -1, device), made.images).cpu() for number in experts],
                made.labels.cpu(),
            ),
            form=lambda: torch.zeros(len(made), made.num_classes or 0),
        )
        return DistilledSet(
            made.images,
            soft,
            target="logits",
            learn_labels=True,
            classes=made.labels,
            num_classes=made.num_classes,
            lr=self.step_size,
            mean=made.mean.tolist(),
            std=made.std.tolist(),
            provenance=made.provenance,
        )


def correct_images(
    split: Split, trajectories: Trajectories, flat: FlatNetwork, per_class: int, device: torch.device | str
) -> Int[Tensor, " chosen"]:
    """Positions of images that an expert classifies correctly at its end, ``per_class`` of each class, grouped by class.

    The images of a class are walked in a drawn order; what one expert cannot fill, the next one does.

    Raises:
        UserError: of a class no expert classifies as many correctly.
    """
    order = {
        label: members[torch.randperm(len(members))] for label, members in split.by_class().items() if len(members)
    }
    chosen: dict[int, list[int]] = {label: [] for label in order}
    for expert in range(len(trajectories)):
        lacking = [label for label, found in chosen.items() if len(found) < per_class]
        if not lacking:
            break
        weights = trajectories.weights(expert, -1, device)
        for label in lacking:
            taken = set(chosen[label])
            for part in torch.split(order[label], max(64, per_class)):
                guessed = labelled(flat, weights, split.batch(part)["pixel_values"]).argmax(-1).cpu()
                right = [place for place in part[guessed == label].tolist() if place not in taken]
                chosen[label] += right[: per_class - len(chosen[label])]
                if len(chosen[label]) == per_class:
                    break
    for label, found in chosen.items():
        if len(found) < per_class:
            raise UserError(
                f"correct_images: the {len(trajectories)} experts classify only {len(found)} images of class {label} correctly, "
                f"and images_per_class is {per_class}; train the experts for longer, or give correct_images=false."
            )
    return torch.tensor([place for label in sorted(chosen) for place in chosen[label]])


def mean_logits(
    by_expert: list[Float[Tensor, "samples classes"]], labels: Int[Tensor, " samples"]
) -> Float[Tensor, "samples classes"]:
    """Mean over the experts that are right about a sample; over all of them where none is.

    >>> right, wrong = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    >>> mean_logits([right, wrong, 3 * right], torch.tensor([0])).tolist()
    [[6.0, 2.0]]
    >>> mean_logits([right, wrong], torch.tensor([1])).tolist(), mean_logits([right, 3 * right], torch.tensor([1])).tolist()
    ([[0.0, 2.0]], [[6.0, 2.0]])
    """
    logits = torch.stack(by_expert)
    right = (logits.argmax(-1) == labels).to(logits.dtype)
    right = torch.where(right.sum(0) > 0, right, 1.0)
    return (logits * right[..., None]).sum(0) / right.sum(0)[:, None]
