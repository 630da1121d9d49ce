"""MIX-KD: distillation with partly mixed batches and each sample's own temperature, and the study of both (arXiv 2211.03946)."""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.data import Batch, Split
from stillhouse.data.dataset import hard
from stillhouse.engine import (
    Losses,
    Modules,
    Optimizer,
    Paper,
    Ramp,
    Result,
    Run,
    SubRun,
    Table,
    Weight,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.losses.logit_matching import standardize
from stillhouse.methods.distillation import CIFAR_SGD, KnowledgeDistillation, soft_loss
from stillhouse.methods.heatmap import heat_map
from stillhouse.methods.supervised import hard_loss, made_of
from stillhouse.methods.teacher import TrainedTeacher
from stillhouse.methods.teacher_outputs import PartlyStored, TeacherOutputs
from stillhouse.methods.temperature import Temperature
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.metrics import (
    expected_calibration_error,
    fgsm_accuracy,
    negative_log_likelihood,
    noise_accuracy,
    smoothness,
    spread,
)
from stillhouse.models import Standardized, Taps, logits
from stillhouse.models.layers import classifier
from stillhouse.modules.mixing import Mixing, Mixture, Mixup
from stillhouse.spec import Spec

EPSILON, NOISE = 2 / 255, 0.1
"""Of the robustness probes, in units of pixels in [0, 1]: the attack's step, and the noise's deviation."""


class Study(Spec):
    """The grid of a study: which trainings of the teacher, which of the student, which temperatures, how many seeds."""

    teacher_mix: tuple[Mixing, ...] = Field(
        ("none", "mixup"), min_length=1, description="how the teacher's samples are mixed", validate_default=True
    )
    student_mix: tuple[Mixing, ...] = Field(
        ("none", "mixup"), min_length=1, description="how the student's samples are mixed", validate_default=True
    )
    temperatures: tuple[Temperature, ...] = Field(
        (1.0, 4.0, "std"), min_length=1, description="softmax temperatures, and std for each sample's own"
    )
    seeds: int = Field(1, ge=1, description="seeds of each student, from the run's own on")

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else value


class MixKD(KnowledgeDistillation):
    """Distil from a plain teacher on partly mixed batches, with each sample's logit deviation as its temperature.

    ``L = weight_ce CE(s / std(s), y) + weight_kd KL(softmax(t / std(t)) || softmax(s / std(s)))``, both on the mixed samples: y
    are the mixed labels, the teacher sees the mixed images, the student's deviation has a gradient. With a fixed
    temperature it is ``weight_ce CE(s, y) + weight_kd T^2 KL(softmax(t / T) || softmax(s / T))``.
    """

    name: ClassVar[str] = "mixkd"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper(
        "Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study",
        2023,
        arxiv="2211.03946",
        venue="WACV 2023",
    )
    summary: ClassVar[str] = (
        "partial mixup and each sample's own temperature; and a study of which mixing and temperature to use"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    mix: Mixing = Field(
        Mixup(fraction=0.1),
        description="mixing of the student's batches: {kind: mixup, fraction, alpha, ...}, cutmix, none",
        validate_default=True,
    )
    temperature: Temperature = Field(
        "std",
        description="std: each sample's deviation of its logits, on each side; or a number; or {start, end} to move it",
    )
    teacher_sees: Literal["mixed", "parts"] = Field(
        "mixed", description="the mixed samples; or their two parts, whose logits are then mixed (not the paper's)"
    )
    export_scaled: bool = Field(
        False,
        description="also save the student with its logits divided by their deviation, whose probabilities are calibrated",
    )
    study: Literal[False] | Study = Field(
        False, description="also train the grid of a study and say what to use: yes, or {teacher_mix, student_mix, ...}"
    )
    weight_ce: Weight = Field(0.1, description="weight of the cross-entropy with the mixed labels (gamma)")
    weight_kd: Weight = Field(0.9, description="weight of the divergence from the teacher (alpha)")
    optimizer: Optimizer = Field(
        CIFAR_SGD,
        description="optimiser of the student",
    )
    epochs: float = Field(240, gt=0, description="passes over the training split")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.cache_teacher and self.teacher_sees == "parts":
            raise ValueError("cache_teacher: teacher_sees=parts asks the teacher of two samples for each; use mixed")
        if self.study and not isinstance(self.teacher, TrainedTeacher):
            raise ValueError("study: it trains the teacher in several ways, so give one to train and no pretrained one")
        return self

    def check_data(self, run: Run) -> None:
        """Refuse targets that are no classes."""
        super().check_data(run)
        if run.data.facts.task == "regression":
            raise UserError(
                f"mixkd compares distributions over classes, which the data {run.data.name!r} does not have."
            )

    def blended(self, m: Modules, batch: Batch, run: Run) -> Batch:
        """The mixed batch; where the teacher is to see the parts, they come along."""
        mixture = self.mix.draw(next(iter(batch.inputs.values())), rank=run.world.rank, world=run.world.size)
        mixed = made_of(batch, mixture, run)
        if self.teacher_sees == "mixed":
            return mixed
        parts = {"first": mixture.first, "second": mixture.second, "share": mixture.share}
        parts |= {f"whole {name}": values for name, values in batch.inputs.items()}
        along = mixed.replace(**parts)
        along.aside = mixed.aside | parts.keys()
        return along

    def ce(self, pair: Pair, run: Run) -> Tensor:
        """The loss on the (mixed) labels, of standardised logits where the temperature is each sample's own."""
        own = self.temperature == "std"
        student = standardize(pair.student.logits) if own else pair.student.logits
        return hard_loss(pair.models.student, student, pair.batch, run)

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The divergence from the teacher."""
        return {"kd": lambda: self.match(pair.student.logits, self.told(pair), pair.labels, run)}

    def match(self, student: Tensor, teacher: Tensor, labels: Tensor | None, run: Run) -> Tensor:
        """KL(teacher || student) at the temperature: T^2-scaled where it is a number, unscaled where it is the deviation."""
        return soft_loss(losses.kl, student, teacher, self.temperature, labels, run, squared=True)

    def told(self, pair: Pair) -> Tensor:
        """The teacher's logits on the mixed samples, or those on their parts, mixed in the same shares."""
        if self.teacher_sees == "mixed" or "whole " + next(iter(pair.batch.inputs)) not in pair.batch:
            return pair.teacher.logits
        batch = pair.batch
        whole = Batch({name: batch[f"whole {name}"] for name in batch.inputs})
        return Mixture(batch["first"], batch["second"], batch["share"]).inputs(pair.about(whole).logits)

    def measure(self, wiring: Wiring, place: int, run: Run) -> dict[str, float]:
        """Probes on the test split: how smooth predictions are, calibration with standardised logits, robustness."""
        if run.data.facts.task != "classification":
            return {}
        split = run.data.split("test" if "test" in run.data.splits else "validation")
        split = split.take(min(2000, len(split)))
        found: dict[str, float] = {}
        networks = {"student": wiring.student, **wiring.teachers}
        for name, network in networks.items():
            if isinstance(network, PartlyStored):
                network = network.teacher
            elif isinstance(network, TeacherOutputs):
                continue
            with measuring(network):
                batches = list(split.in_order(512, device=run.world.device))
                said, embedded = _embedded(network, batches)
            # Of the samples that were read: a forecast is given some.
            labels = hard(torch.cat([batch.labels for batch in batches]).cpu())
            numbers = smoothness(said, labels)
            deviations = said.double().std(-1)
            numbers |= {f"logit_std_p{p}": float(deviations.quantile(p / 100)) for p in (10, 50, 90)}
            if embedded is not None:
                numbers["separation"] = spread(embedded, labels)["separation"]
            found |= {f"probe/{name}/{key}": value for key, value in numbers.items()}
            if name == "student":
                scaled = standardize(said)
                found["probe/student/ece_scaled"] = float(expected_calibration_error(scaled, labels))
                found["probe/student/nll_scaled"] = float(negative_log_likelihood(scaled, labels))
        if run.data.scale is not None:
            found |= _robustness(wiring.student, split, run)
        return found

    def finished(self, result: Result, run: Run) -> Generator[Any, Any, Result]:
        """Add the scaled student, and the study."""
        if self.export_scaled:
            student = result.artefacts["student"]
            assert isinstance(student, nn.Module)
            result.artefacts["student-scaled"] = Standardized(student)
        if not self.study:
            return result
        study, cells = self.study, []
        for number, (taught, mix, temperature) in enumerate(
            product(study.teacher_mix, study.student_mix, study.temperatures)
        ):
            assert isinstance(self.teacher, TrainedTeacher)
            method = self.model_copy(
                update={
                    "teacher": self.teacher.model_copy(update={"mix": taught}),
                    "mix": mix,
                    "temperature": temperature,
                    "study": False,
                    "export_scaled": False,
                    "compare_alone": False,
                }
            )
            numbers = []
            for seed in range(run.seed, run.seed + study.seeds):
                sub = yield SubRun(f"study/{number}-{seed}", method, seed=seed, data=run.data)
                numbers.append(dict(sub.metrics))
            cells.append(Cell(described(taught), described(mix), temperature, numbers))
        return studied(result, cells)


@dataclass(frozen=True)
class Cell:
    """One combination of a study: how teacher and student were trained, the temperature, each seed's metrics."""

    teacher: str
    student: str
    temperature: Temperature
    metrics: Sequence[Mapping[str, float]]

    def mean(self, name: str) -> float:
        """The mean over seeds of a metric, of the test split where there is one."""
        key = next(key for key in (f"test/{name}", f"validation/{name}") if key in self.metrics[0])
        return statistics.fmean(numbers[key] for numbers in self.metrics)

    @property
    def label(self) -> str:
        """The temperature as it is written in tables."""
        if isinstance(self.temperature, Ramp):
            return f"T={self.temperature.start:g} to {self.temperature.end:g}"
        return "std" if self.temperature == "std" else f"T={self.temperature:g}"


def studied(result: Result, cells: Sequence[Cell]) -> Result:
    """A result with a study's table, heat map, numbers and advice."""
    pairs = list(dict.fromkeys((cell.teacher, cell.student) for cell in cells))
    labels = list(dict.fromkeys(cell.label for cell in cells))
    grid = {(cell.teacher, cell.student, cell.label): cell.mean("accuracy") for cell in cells}
    rows: list[list[str | float | int]] = []
    for cell in cells:
        spread_ = [c for c in (m.get("test/accuracy") for m in cell.metrics) if c is not None]
        deviation = statistics.stdev(spread_) if len(spread_) > 1 else 0.0
        own = cell.mean("teacher/accuracy")
        rows.append([cell.teacher, cell.student, cell.label, cell.mean("accuracy"), deviation, own])
        result.metrics[f"study/{cell.teacher}/{cell.student}/{cell.label}/accuracy"] = cell.mean("accuracy")
    columns = [
        "teacher trained with",
        "student trained with",
        "temperature",
        "student accuracy",
        "std",
        "teacher accuracy",
    ]
    result.tables.append(Table("Study", columns, rows))
    result.pictures["study"] = heat_map(
        [[grid[teacher, student, label] for label in labels] for teacher, student in pairs],
        rows=[f"teacher {teacher}, student {student}" for teacher, student in pairs],
        columns=labels,
        title="student accuracy",
    )
    best = max(cells, key=lambda cell: cell.mean("accuracy"))
    result.notes.append(
        f"study: best is a teacher trained with mix={best.teacher}, a student with mix={best.student} and "
        f"{'each sample its own temperature (std)' if best.temperature == 'std' else best.label} "
        f"({100 * best.mean('accuracy'):.2f} %, mean of {len(best.metrics)} seeds)."
    )
    trained = list(dict.fromkeys(cell.teacher for cell in cells))
    if len(trained) > 1:
        means = {t: statistics.fmean(grid[key] for key in grid if key[0] == t) for t in trained}
        told = ", ".join(f"{name} {100 * mean:.2f} %" for name, mean in means.items())
        result.notes.append(f"study: mean accuracy of the students by how their teacher was trained: {told}.")
    return result


def described(mix: Mixing) -> str:
    """A mixing in a word or two, as it is told in a study."""
    if not isinstance(mix, Mixup):
        return mix.kind
    parts = [mix.kind]
    if mix.alpha != 1:
        parts.append(f"{mix.alpha:g}")
    if mix.fraction != 1:
        parts.append(f"{100 * mix.fraction:g}%")
    return "-".join(parts)


def _embedded(network: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, Tensor | None]:
    """Logits of all batches, and what the classifier reads, where the network has one."""
    try:
        taps = Taps(network, [classifier(network, batches[0])], side="input")
    except UserError:
        return torch.cat([logits(network, batch) for batch in batches]).cpu(), None
    said, embedded = [], []
    with taps:
        for batch in batches:
            said.append(logits(network, batch).cpu())
            embedded += [read.cpu().flatten(1) for read in taps.take().values()]
    return torch.cat(said), torch.cat(embedded)


def _robustness(student: nn.Module, split: Split, run: Run) -> dict[str, float]:
    """Accuracy under a small attack and under noise, both of a size in pixels from 0 to 1."""
    scale = run.data.scale
    assert scale is not None
    mean, std = (torch.tensor(values, device=run.world.device).view(-1, 1, 1) for values in (scale.mean, scale.std))
    low, high = -mean / std, (1 - mean) / std

    def predict(batch: Mapping[str, Tensor]) -> Tensor:
        return logits(student, batch)

    def batches() -> Iterator[Batch]:
        return split.in_order(512, device=run.world.device)

    return {
        "probe/student/accuracy_fgsm": fgsm_accuracy(predict, batches(), EPSILON / std, low=low, high=high),
        "probe/student/accuracy_noise": noise_accuracy(predict, batches(), NOISE / std, low=low, high=high),
    }
