"""What methods that distil a classifier into a smaller one have in common: teachers, the student's stage, the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import (
    Compute,
    Held,
    Losses,
    Modules,
    Result,
    Run,
    Stages,
    SubRun,
    Table,
    Update,
    frozen,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.losses.divergences import Divergence
from stillhouse.methods.supervised import Supervised, TrainingFields, placed, quality, rows_at_once, sequences
from stillhouse.methods.teacher import TeacherSpec
from stillhouse.metrics import agreement, latency, mean_total_variation, token_agreement
from stillhouse.models import IGNORED, ModelSpec, count_parameters, fingerprint, logits


class TeacherOutputs(nn.Module):
    """A teacher's logits on every training sample, by the sample's index.

    Args:
        logits: (samples, classes).
    """

    logits: Tensor

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, index: Tensor) -> Tensor:
        """Logits of the samples at ``index``."""
        return self.logits[index]


class KnowledgeDistillation(TrainingFields):
    """Base of methods that train a student against a frozen teacher; a subclass is its fields and its ``loss``."""

    couples: ClassVar[bool] = False
    """Whether the loss couples the samples of a batch."""

    teacher: TeacherSpec | tuple[TeacherSpec, ...] = Field(
        "cnn", description="the teacher, or several whose losses are averaged", validate_default=True
    )
    student: ModelSpec = Field("cnn", description="the student", validate_default=True)
    cache_teacher: bool = Field(False, description="compute the teacher's outputs once and reuse them in every run")
    compare_alone: bool = Field(True, description="also train the student without a teacher, for the table")

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Named, unweighted terms."""
        raise NotImplementedError(f"{type(self).__name__} has no loss.")

    def teacher_logits(self, m: Modules, batch: Batch) -> list[Tensor]:
        """Logits of each teacher, without a graph: computed, or looked up."""
        found = []
        for name in (name for name in m if name.startswith("teacher")):
            module = m[name]
            found.append(module(batch.index) if isinstance(module, TeacherOutputs) else logits(module, batch).detach())
        return found

    def asked_once(self, m: Modules, batch: Batch) -> Callable[[], list[Tensor]]:
        """:meth:`teacher_logits` for the terms of one loss: computed when the first of them asks, and only then."""
        return cache(lambda: self.teacher_logits(m, batch))

    def notes(self, run: Run) -> list[str]:
        """What a reader of the result should know about how the loss was taken on these data."""
        return []

    def stages(self, run: Run) -> Stages:
        """Teachers, then the student, then what the table needs."""
        facts = run.data.facts
        teachers: dict[str, nn.Module] = {}
        specs = self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
        for i, spec in enumerate(specs):
            name = "teacher" if len(specs) == 1 else f"teacher-{i}"
            teachers[name] = yield from spec.ready(run, name)
        student = self.student.build(facts)
        held: dict[str, nn.Module | Held] = {"student": student}
        for name, teacher in teachers.items():
            held[name] = frozen((yield from self._outputs(run, name, teacher)) if self.cache_teacher else teacher)
        before = {name: fingerprint(teacher) for name, teacher in teachers.items()}
        update = Update(self.loss, trains={"student": self.optimizer}, couples=self.couples)
        trained = yield self.training_stage(run, "student", held, update, trained="student")

        models = {**teachers, "student": student}
        if self.compare_alone:
            alone = yield SubRun("student-alone", self._alone(), seed=run.seed, data=run.data)
            models["student-alone"] = alone.model
        measured = yield Compute("comparison", lambda _: compare(models, list(teachers), run))
        notes = [f"{name} has fingerprint {print_}" for name, print_ in before.items()]
        return Result(
            artefacts={"student": student},
            metrics={**trained.best, **measured["metrics"]},
            tables=[Table("Comparison", measured["columns"], measured["rows"])],
            notes=notes + self.notes(run) + measured["notes"],
        )

    def _alone(self) -> Supervised:
        shared = {name: getattr(self, name) for name in TrainingFields.model_fields}
        return Supervised(model=self.student, **shared)

    def _outputs(self, run: Run, name: str, teacher: nn.Module) -> Generator[Compute, Any, TeacherOutputs]:
        if self.augment.kind != "none":
            raise UserError(
                f"cache_teacher: the outputs can be computed once only for fixed inputs, but augment is "
                f"{self.augment.kind!r}; set augment=none or cache_teacher=false."
            )
        parts = ["logits", 1, fingerprint(teacher), repr(teacher), run.data.fingerprint, "train", torch.__version__]
        key = json.dumps([*parts, run.world.device.type, torch.get_num_threads()])

        def compute(_: Path) -> dict[str, Tensor]:
            teacher.to(run.world.device)
            with measuring(teacher):
                train = run.data.split("train")
                language = run.data.facts.task == "language"
                batches = sequences(train, run) if language else train.in_order(512, device=run.world.device)
                return {"logits": torch.cat([logits(teacher, batch).cpu() for batch in batches])}

        stored = yield Compute(f"{name}-outputs", compute, key=key)
        return TeacherOutputs(stored["logits"])


def over_teachers(teachers: Callable[[], list[Tensor]], term: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a term over the teachers' logits."""
    return torch.stack([term(teacher) for teacher in teachers()]).mean(0)


def positions(model: nn.Module, model_logits: Tensor, batch: Batch, run: Run) -> Tensor | None:
    """The label of each position of a sequence model's logits, -100 where none counts; None for logits of samples."""
    return placed(model, batch, run) if model_logits.dim() > 2 else None


def soft_loss(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    labels: Tensor | None,
    run: Run,
    *,
    squared: bool,
) -> Tensor:
    """A divergence between two predictions: its mean over samples, or over the labelled positions of all processes.

    Args:
        divergence: what compares two predictions.
        student: logits of the student.
        teacher: logits of the teacher.
        temperature: softmax temperature of both sides.
        labels: what :func:`positions` gave.
        run: the run.
        squared: whether to multiply by the squared temperature.
    """
    if labels is None:
        return divergence(student, teacher, temperature, scale_by_temperature_squared=squared)
    counted = labels != IGNORED
    rows = divergence(
        student,
        teacher,
        temperature,
        scale_by_temperature_squared=squared,
        mask=counted,
        reduction="none",
        chunk=rows_at_once(student),
    )
    return run.mean(rows, counted)


def output_error(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Between regressors, whose outputs are no distributions: the squared error of one's outputs to the other's."""
    return F.mse_loss(student.squeeze(-1) / temperature, teacher.squeeze(-1) / temperature)


def compare(models: dict[str, nn.Module], teachers: list[str], run: Run) -> dict[str, Any]:
    """Test quality, size and CPU latency of each model, and how well students agree with the first teacher."""
    measured = "test" if "test" in run.data.splits else "validation"
    split = run.data.split(measured)
    main = "mse" if run.data.facts.task == "regression" else "accuracy"
    example = split.batch([0])
    language = run.data.facts.task == "language"
    rows, metrics = [], {}
    for name, model in models.items():
        model.to(run.world.device)
        numbers = quality(model, split, run)
        metrics.update({f"{measured}/{name}/{k}": v for k, v in numbers.items()})
        metrics[f"parameters/{name}"] = float(count_parameters(model))
        if name not in teachers and main == "accuracy":
            metrics.update(
                {f"test/{name}/{k}": v for k, v in _agreement(model, models[teachers[0]], split, run).items()}
            )
        with measuring(model):
            model.cpu()
            seconds = latency(partial(logits, model), example)
            model.to(run.world.device)
        shown = [numbers[main], numbers["perplexity"]] if language else [numbers[main]]
        rows.append([name, *shown, count_parameters(model), round(1e3 * seconds, 4)])
    metrics[f"{measured}/{main}"] = metrics[f"{measured}/student/{main}"]
    notes = []
    if main == "accuracy" and metrics[f"{measured}/{teachers[0]}/accuracy"] < metrics[f"{measured}/student/{main}"]:
        notes.append("the teacher is worse than the student on this data: try a better teacher.")
    if "student-alone" in models and main == "accuracy":
        gain = metrics[f"{measured}/student/accuracy"] - metrics[f"{measured}/student-alone/accuracy"]
        notes.append(f"distillation changed the student's {measured} accuracy by {100 * gain:+.2f} points.")
    quantities = [main, "perplexity"] if language else [main]
    columns = [
        "model",
        *(f"{measured} {quantity}" for quantity in quantities),
        "parameters",
        "CPU latency (ms, one sample)",
    ]
    return {"metrics": metrics, "columns": columns, "rows": rows, "notes": notes}


def _agreement(student: nn.Module, teacher: nn.Module, split: Any, run: Run) -> dict[str, float]:
    with measuring(student, teacher):
        if run.data.facts.task == "language":
            return token_agreement(
                lambda batch: (logits(student, batch), logits(teacher, batch), placed(student, batch, run)),
                sequences(split, run),
            )
        batches = list(split.in_order(512, device=run.world.device))
        ours = torch.cat([logits(student, batch) for batch in batches])
        theirs = torch.cat([logits(teacher, batch) for batch in batches])
    return {
        "agreement": float(agreement(ours, theirs)),
        "mean_total_variation": float(mean_total_variation(ours, theirs)),
    }
