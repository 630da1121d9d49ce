"""What methods that distil a model into a smaller one have in common: teachers, objectives, the student's stage, the table."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from stillhouse.data import Batch, Split
from stillhouse.data.dataset import hard
from stillhouse.engine import (
    Compute,
    Held,
    Line,
    Losses,
    Modules,
    Optimizer,
    Projection,
    Result,
    Run,
    Stage,
    Stages,
    SubRun,
    Table,
    Update,
    Weight,
    frozen,
    measuring,
    sgd,
)
from stillhouse.engine.health import UNDER_TRAINED, learned_little
from stillhouse.engine.seeding import forked_generators
from stillhouse.errors import UserError, nearest
from stillhouse.losses.divergences import Divergence
from stillhouse.methods.supervised import (
    POSITIONS,
    Supervised,
    TrainingFields,
    by_shots,
    hard_loss,
    longest,
    placed,
    quality,
    rows_at_once,
    sequences,
)
from stillhouse.methods.teacher import TeacherSpec
from stillhouse.methods.teacher_outputs import PartlyStored, TeacherCache, stored_outputs
from stillhouse.methods.temperature import Temperature, softened
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.metrics import agreement, latency, mean_total_variation, token_agreement
from stillhouse.models import IGNORED, MisfitError, ModelSpec, count_parameters, fingerprint, logits
from stillhouse.modules.mixing import Mixup
from stillhouse.registry import method_class
from stillhouse.spec import first_problem

Reads = Literal["labels", "features", "before", "teacher before", "embedding", "student embedding"]
"""What an objective reads besides logits: class labels; the features at the end of each stage, of both networks; those before
the activation, of both or of the teacher alone; the embedding (what the classifier reads) of both, or of the student alone."""


CIFAR_SGD = sgd(0.05, momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(150 / 240, 180 / 240, 210 / 240))
"""The protocol of CIFAR-100 that the published comparisons share, for 240 epochs of batches of 64 (arXiv 1910.10699)."""


def _objective(value: Any) -> KnowledgeDistillation:
    """Read a method written as an objective: its name, or a mapping of ``kind`` and its own fields."""
    if isinstance(value, KnowledgeDistillation):
        return value
    fields = dict(value) if isinstance(value, dict) else {"kind": value}
    kind = fields.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError("an objective is the name of a method, or a mapping with 'kind' and its own fields")
    try:
        cls = method_class(kind)
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None
    if not issubclass(cls, KnowledgeDistillation) or cls.stages is not KnowledgeDistillation.stages:
        raise ValueError(f"{kind!r} trains in stages of its own, so it cannot be an objective beside others")
    own = [name for name in cls.model_fields if name not in KnowledgeDistillation.model_fields]
    for name in fields:
        if name not in own:
            whole = name in KnowledgeDistillation.model_fields
            why = "belongs to the recipe as a whole" if whole else f"is no field of it; {nearest(name, own)}"
            raise ValueError(f"{kind}: {name!r} {why}")
    try:
        # What it stands beside when it is a method of its own is not asked for here.
        return cls.model_validate({**fields, "also": ()})
    except ValidationError as error:
        path, reason = first_problem(error, cls)
        raise PydanticCustomError("spec", "{reason}", {"reason": reason, "path": path}) from None


def _written(objective: KnowledgeDistillation) -> dict[str, Any]:
    own = [name for name in type(objective).model_fields if name not in KnowledgeDistillation.model_fields]
    values = objective.dump()
    return {"kind": objective.name, **{name: values[name] for name in own}}


Objective = Annotated[Any, BeforeValidator(_objective), PlainSerializer(_written)]
"""A method as one of several objectives of a run."""


class KnowledgeDistillation(TrainingFields):
    """Base of methods that train a student against frozen teachers.

    A subclass is its fields and its :meth:`terms`. It also serves as an objective beside others (field ``also``), unless it
    has :meth:`stages` of its own.

    Class attributes:
        couples: whether the loss couples the samples of a batch.
        reads: what its terms read besides logits.
        one_layer: whether of the layers that are read only the last pair counts.
        mixes: whether :meth:`mixed` makes other inputs of a batch's samples.
    """

    couples: ClassVar[bool] = False
    reads: ClassVar[frozenset[Reads]] = frozenset()
    one_layer: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    teacher: TeacherSpec | tuple[TeacherSpec, ...] = Field(
        "cnn", description="the teacher, or several whose losses are averaged", validate_default=True
    )
    teacher_weights: tuple[float, ...] | None = Field(
        None, description="shares of several teachers in the mean, scaled to a sum of 1; equal ones by default"
    )
    ensemble: Literal["losses", "probabilities", "random"] = Field(
        "losses",
        description="several teachers: average the losses, or their predicted probabilities before the loss, or ask one drawn "
        "anew each step",
    )
    student: ModelSpec = Field("cnn", description="the student", validate_default=True)
    weight_ce: Weight = Field(1.0, description="weight of the loss on the labels")
    also: tuple[Objective, ...] = Field((), description="further objectives: names of methods, or {kind: NAME, fields}")
    student_layers: tuple[str, ...] | None = Field(
        None, description="modules of the student whose features are read; the end of each stage by default"
    )
    teacher_layers: tuple[str, ...] | None = Field(
        None, description="those of the teacher, in pairs with the student's"
    )
    student_classifier: str | None = Field(
        None, description="module of the student that reads the embedding; its last linear layer by default"
    )
    teacher_classifier: str | None = Field(None, description="that of the teacher")
    cache_teacher: Literal[False] | TeacherCache = Field(
        False, description="compute the teacher's outputs once and reuse them in every run: yes, or {views, top, ...}"
    )
    compare_alone: bool = Field(True, description="also train the student without a teacher, for the table")

    # What a method is made of ------------------------------------------------------------------------------------------

    def terms(self, pair: Pair, run: Run) -> Losses:
        """Named, unweighted terms of the student against one teacher; the labels' term is added for it."""
        raise NotImplementedError(f"{type(self).__name__} has no terms.")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """Modules that the objective needs between student and teacher, such as projectors; shapes are those of ``pair``.

        They are trained with the student and are not in the result.
        """
        return {}

    @property
    def has_parts(self) -> bool:
        """Whether it makes any."""
        return type(self).parts is not KnowledgeDistillation.parts

    def part_optimizer(self, part: str) -> Optimizer | None:
        """An optimiser of its own for a part; None trains it as the student."""
        return None

    def projection(self, classifier: str) -> Projection | None:
        """Which of its terms may not oppose others; see :class:`stillhouse.engine.Projection`.

        Args:
            classifier: path of the student's classifier; empty where none is read.
        """
        return None

    def ready(self, wiring: Wiring, place: int, run: Run) -> Generator[Any, Any, None]:
        """Yield what comes before the student's stage: statistics of the teacher, training of parts.

        Args:
            wiring: everything wired.
            place: this objective's place in it.
            run: the run.
        """
        yield from ()

    def measure(self, wiring: Wiring, place: int, run: Run) -> dict[str, float]:
        """The objective's own measurements of the trained student, for the result; asked in eval mode without gradients."""
        return {}

    def shown(self, wiring: Wiring, place: int, run: Run) -> list[Table]:
        """The objective's own tables of the trained student; asked as :meth:`measure` is."""
        return []

    def started(self, run: Run) -> Generator[Any, Any, ModelSpec]:
        """The student as its training finds it; yields what makes it so, such as training on labels before."""
        yield from ()
        return self.student

    def finished(self, result: Result, run: Run) -> Generator[Any, Any, Result]:
        """Yield what is done with the trained student, such as runs to compare it with; gives back the result with that."""
        yield from ()
        return result

    def mixed(self, m: Modules, batch: Batch, run: Run) -> Batch:
        """The batch with inputs mixed from its samples, for methods with ``mixes``."""
        raise NotImplementedError(f"{type(self).__name__} says that it mixes, and not how.")

    def ce(self, pair: Pair, run: Run) -> Tensor:
        """The student's loss on the labels."""
        return hard_loss(pair.models.student, pair.student.logits, pair.batch, run)

    def notes(self, run: Run) -> list[str]:
        """What a reader of the result should know about how the loss was taken on these data."""
        return []

    # What all of them share --------------------------------------------------------------------------------------------

    @property
    def objectives(self) -> tuple[KnowledgeDistillation, ...]:
        """The method itself and what is learned beside it."""
        return (self, *self.also)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = [objective.name for objective in self.objectives if hasattr(objective, "name")]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"also: {twice!r} is there twice; give its weight once")
        nested = next((objective.name for objective in self.also if objective.also), None)
        if nested is not None:
            raise ValueError(f"also: {nested!r} brings objectives of its own; list them beside it")
        projecting = [objective.name for objective in self.objectives if objective.projection("") is not None]
        if len(projecting) > 1:
            raise ValueError(f"also: {projecting[0]!r} and {projecting[1]!r} both project gradients; choose one")
        mixing = [objective.name for objective in self.objectives if objective.mixes]
        if len(mixing) > 1:
            raise ValueError(f"also: {mixing[0]!r} and {mixing[1]!r} both mix the samples of a batch; choose one")
        if self.mix.kind != "none":
            if mixing:
                raise ValueError(f"mix: {mixing[0]!r} mixes the samples of a batch itself; use mix=none")
            reading = next((o.name for o in self.objectives if "labels" in o.reads), None)
            if reading is not None:
                raise ValueError(f"mix: {reading!r} reads class labels, and mixed samples have soft ones; use mix=none")
            # Whole samples are looked up, mixed ones are not.
            whole = isinstance(self.mix, Mixup) and (self.mix.fraction < 1 or self.mix.probability < 1)
            mixing = [] if whole else [f"mix={self.mix.kind}"]
        deep = [o.name for o in self.objectives if set(o.reads) & {"features", "before", "teacher before", "embedding"}]
        if self.cache_teacher and deep:
            raise ValueError(f"cache_teacher: {deep[0]!r} reads the teacher's features, and only its logits are stored")
        if self.cache_teacher and mixing:
            raise ValueError(
                f"cache_teacher: {mixing[0]!r} mixes the samples of a batch, so no two steps ask the teacher the same; mix a "
                "fraction of each batch, or set cache_teacher=false"
            )
        if self.cache_teacher and (self.cache_teacher.views is None) != (self.augment.kind == "none"):
            raise ValueError(
                "cache_teacher.views: without an augmentation all views of a sample are alike; leave it out"
                if self.augment.kind == "none"
                else f"cache_teacher: augment={self.augment.kind} makes new inputs each time; set cache_teacher.views to "
                "store so many fixed views of each sample, augment=none, or cache_teacher=false"
            )
        self._read_layers()
        count = len(self.teacher) if isinstance(self.teacher, tuple) else 1
        if self.ensemble != "losses" and count > 1 and deep:
            why = "have no mean" if self.ensemble == "probabilities" else "differ in shape from step to step"
            raise ValueError(f"ensemble: {deep[0]!r} reads each teacher's features, which {why}; use 'losses'")
        if self.teacher_weights is not None:
            if len(self.teacher_weights) != count:
                raise ValueError(f"teacher_weights: there are {count} teachers and {len(self.teacher_weights)} weights")
            if min(self.teacher_weights) < 0 or sum(self.teacher_weights) == 0:
                raise ValueError("teacher_weights: weights are 0 or more, and one of them is above 0")
        return self

    def _read_layers(self) -> None:
        """Refuse layers and classifiers that somebody names and no objective reads."""
        reading = [o for o in self.objectives if set(o.reads) & {"features", "before", "teacher before"}]
        reads = {what for objective in self.objectives for what in objective.reads}
        asked = {
            "student_layers": bool(reading),
            "teacher_layers": bool(reading),
            "student_classifier": bool(reads & {"embedding", "student embedding"}),
            "teacher_classifier": "embedding" in reads,
        }
        unread = next((name for name, read in asked.items() if getattr(self, name) is not None and not read), None)
        names = " and ".join(repr(objective.name) for objective in self.objectives)
        if unread is not None:
            side, _, what = unread.partition("_")
            what = "layers" if what == "layers" else "embedding"
            verb = "reads" if len(self.objectives) == 1 else "read"
            raise ValueError(f"{unread}: {names} {verb} no {what} of the {side}; leave it out")
        if reading and all(objective.one_layer for objective in reading):
            for name in ("student_layers", "teacher_layers"):
                if len(getattr(self, name) or ()) > 1:
                    raise ValueError(f"{name}: {reading[0].name!r} reads one layer, so name one")

    def stages(self, run: Run) -> Stages:
        """Teachers, then the student, then what the table needs."""
        self.check_data(run)
        teachers = yield from self.teachers(run)
        begun = yield from self.started(run)
        student = begun.build(run.data.facts)
        fit({**teachers, "student": student}, run)
        before = {name: fingerprint(teacher) for name, teacher in teachers.items()}
        asked, notes = yield from self.asked(run, teachers)
        stage, wiring = yield from self.student_stage(run, "student", student, asked)
        alone: Result | None = None
        if self.compare_alone:
            # Before the student, which can then be held against the line of the same network without a teacher.
            alone = yield SubRun("student-alone", self.alone(begun), seed=run.seed, data=run.data)
        judged = {name: teacher for name, teacher in teachers.items() if _same_outputs(teacher, student, run)}
        if stage.evaluate is not None:
            lines = yield from self.lines(run, judged, alone, stage.evaluate.monitor)
            stage.evaluate = replace(stage.evaluate, lines=lines)
        trained = yield stage
        probes: dict[str, Any] = {"metrics": {}, "tables": []}
        if any(objective.looks for objective in self.objectives):
            probes = yield Compute("probes", lambda _: self._looked(wiring, run))
        wiring.close()

        models = {**judged, "student": student} | ({} if alone is None else {"student-alone": alone.model})
        measured = yield Compute("comparison", lambda _: compare(models, list(judged), run))
        told = [f"{name} has fingerprint {print_}" for name, print_ in before.items()]
        told += [
            f"{name} has other outputs than the student, so it is not in the table"
            for name in teachers
            if name not in judged
        ]
        told += [note for objective in self.objectives for note in objective.notes(run)]
        for note in measured["notes"]:
            if note.startswith(UNDER_TRAINED):
                run.listener.say(note)
        result = Result(
            artefacts={"student": student},
            metrics={**trained.kept, **measured["metrics"], **probes["metrics"]},
            tables=[
                Table("Comparison", measured["columns"], measured["rows"]),
                *(Table(**table) for table in probes["tables"]),
            ],
            notes=told + notes + measured["notes"],
        )
        for objective in self.objectives:
            result = yield from objective.finished(result, run)
        return result

    def lines(
        self, run: Run, teachers: dict[str, nn.Module], alone: Result | None, monitor: str
    ) -> Generator[Compute, Any, dict[str, Line]]:
        """What the student's measurements are held against: each teacher's, and the same student's without a teacher."""
        number = monitor.removeprefix("validation/")

        def measured(_: Path) -> dict[str, float]:
            split = run.data.split("validation")
            return {
                name: quality(teacher.to(run.world.device), split, run)[number] for name, teacher in teachers.items()
            }

        values = yield Compute("teacher-lines", measured)
        worse = "the {} is worse than the student on this data"
        lines = {name: Line(value, "worse", worse.format(name)) for name, value in values.items()}
        if alone is not None and (curve := alone.curve(monitor)):
            lines["student-alone"] = Line(curve, "better", "the student is below its no-teacher line")
        return lines

    def check_data(self, run: Run) -> None:
        """Refuse data without the class labels that an objective reads."""
        reading = next((o for o in self.objectives if "labels" in o.reads), None)
        if reading is not None and (run.data.facts.task != "classification" or run.data.facts.num_classes is None):
            raise UserError(f"{reading.name} reads class labels, which the data {run.data.name!r} does not have.")

    def teachers(self, run: Run) -> Generator[Any, Any, dict[str, nn.Module]]:
        """Train or load the teachers."""
        specs = self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)
        found: dict[str, nn.Module] = {}
        for i, spec in enumerate(specs):
            name = "teacher" if len(specs) == 1 else f"teacher-{i}"
            found[name] = yield from spec.ready(run, name)
        return found

    def asked(
        self, run: Run, teachers: dict[str, nn.Module]
    ) -> Generator[Compute, Any, tuple[dict[str, nn.Module], list[str]]]:
        """What is asked during training: the teachers, or their stored outputs; and what is to be said of those."""
        cache = self.cache_teacher
        if not cache:
            return teachers, []
        language = run.data.facts.task == "language"
        stored: dict[str, nn.Module] = {}
        told: list[str] = []
        for name, teacher in teachers.items():
            at_once = max(1, POSITIONS // longest(run.data.split("train"))) if language else 512
            outputs, notes = yield from stored_outputs(cache, name, teacher, run, self.augment, at_once)
            stored[name] = outputs if self.mix.kind == "none" else PartlyStored(outputs, teacher)
            told += notes
        return stored, told

    def student_stage(
        self,
        run: Run,
        name: str,
        student: nn.Module,
        teachers: dict[str, nn.Module],
        *,
        split: Split | None = None,
    ) -> Generator[Any, Any, tuple[Stage, Wiring]]:
        """The stage that trains the student with every objective; what comes before it is yielded here.

        With ``split`` it trains on that in place of the data's training split.
        """
        wiring = Wiring(self.objectives, student, teachers, run)
        for place, objective in enumerate(self.objectives):
            yield from objective.ready(wiring, place, run)

        def loss(m: Modules, batch: Batch, run: Run) -> Losses:
            return wiring.terms(m, batch)

        held: dict[str, nn.Module | Held] = {"student": student, **wiring.modules()}
        held |= {name: frozen(teacher) for name, teacher in teachers.items()}
        couples = any(objective.couples for objective in self.objectives)
        update = Update(
            loss, trains=wiring.trains(), couples=couples, weights=wiring.weights(), projection=wiring.projection()
        )
        views = self.cache_teacher.views if self.cache_teacher else None
        stage = self.training_stage(run, name, held, update, trained="student", views=views, split=split)
        mixing = next((objective for objective in self.objectives if objective.mixes), None)
        if mixing is not None:
            stage.prepare = mixing.mixed
        return stage, wiring

    @property
    def looks(self) -> bool:
        """Whether it has measurements or tables of its own."""
        cls, base = type(self), KnowledgeDistillation
        return cls.measure is not base.measure or cls.shown is not base.shown

    def _looked(self, wiring: Wiring, run: Run) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        tables: list[dict[str, Any]] = []
        # The teachers too, which no stage holds in eval mode any more.
        with measuring(wiring.student, *wiring.teachers.values(), *wiring.modules().values()):
            for place, objective in enumerate(self.objectives):
                metrics |= objective.measure(wiring, place, run)
                found = objective.shown(wiring, place, run)
                tables += [{"title": one.title, "columns": one.columns, "rows": one.rows} for one in found]
        return {"metrics": metrics, "tables": tables}

    def alone(self, student: ModelSpec) -> Supervised:
        """The same student, trained on the labels alone."""
        shared = {name: getattr(self, name) for name in TrainingFields.model_fields}
        return Supervised(model=student, **shared)


def soft_loss(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    temperature: Temperature,
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
        temperature: softmax temperature of both sides: a number, a schedule, or each sample's own.
        labels: what :func:`placed` gave, of sequences; None elsewhere.
        run: the run.
        squared: whether to multiply by the squared temperature; each sample's own is never squared.
    """
    student, teacher, number = softened(student, teacher, temperature, run)
    if labels is None:
        return divergence(student, teacher, number, scale_by_temperature_squared=squared)
    counted = labels != IGNORED
    rows = divergence(
        student,
        teacher,
        number,
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
    """Test quality, size and CPU latency of each model, and how well students agree with the first teacher, if any."""
    measured = "test" if "test" in run.data.splits else "validation"
    split = run.data.split(measured)
    main = "mse" if run.data.facts.task == "regression" else "accuracy"
    example = split.batch([0])
    language = run.data.facts.task == "language"
    rows, metrics = [], {}
    for name, model in models.items():
        model.to(run.world.device)
        numbers = {**quality(model, split, run), **by_shots(model, split, run)}
        metrics.update({f"{measured}/{name}/{k}": v for k, v in numbers.items()})
        metrics[f"parameters/{name}"] = float(count_parameters(model))
        if teachers and name not in teachers and main == "accuracy":
            metrics.update(
                {f"{measured}/{name}/{k}": v for k, v in _agreement(model, models[teachers[0]], split, run).items()}
            )
        with measuring(model):
            model.cpu()
            seconds = latency(partial(logits, model), example)
            model.to(run.world.device)
        quantities = [
            main,
            *(["perplexity"] if language else []),
            *(key for key in numbers if key.startswith("accuracy_")),
        ]
        shown = [numbers[quantity] for quantity in quantities]
        rows.append([name, *shown, count_parameters(model), round(1e3 * seconds, 4)])
    metrics[f"{measured}/{main}"] = metrics[f"{measured}/student/{main}"]
    notes = []
    weak = _under_trained(metrics, teachers, split, run, measured) if main == "accuracy" and not language else None
    if weak is not None:
        notes.append(weak)
    elif (
        teachers
        and main == "accuracy"
        and metrics[f"{measured}/{teachers[0]}/accuracy"] < metrics[f"{measured}/student/{main}"]
    ):
        notes.append("the teacher is worse than the student on this data: try a better teacher.")
    if "student-alone" in models and main == "accuracy" and weak is None:
        gain = metrics[f"{measured}/student/accuracy"] - metrics[f"{measured}/student-alone/accuracy"]
        notes.append(f"distillation changed the student's {measured} accuracy by {100 * gain:+.2f} points.")
    columns = [
        "model",
        *(f"{measured} {quantity.replace('_', ', ')}" for quantity in quantities),
        "parameters",
        "CPU latency (ms, one sample)",
    ]
    return {"metrics": metrics, "columns": columns, "rows": rows, "notes": notes}


def _under_trained(metrics: dict[str, float], teachers: list[str], split: Split, run: Run, measured: str) -> str | None:
    """What is to be said of a student that learned next to nothing; None of one that did."""
    method = run.method
    assert isinstance(method, TrainingFields)
    labels = hard(split.labels)
    most_frequent = float(labels.bincount().max()) / len(labels)
    accuracy = metrics[f"{measured}/student/accuracy"]
    own = ("optimizer", "epochs")
    chosen = [name for name in own if getattr(method, name) != type(method).model_fields[name].default]
    papers = [
        name for name in own if TrainingFields.model_fields[name].default != type(method).model_fields[name].default
    ]
    best = max((metrics[f"{measured}/{name}/accuracy"] for name in teachers), default=None)
    hurried = bool(papers) and not chosen
    if not learned_little(accuracy, most_frequent, len(labels), teacher=best, hurried=hurried):
        return None
    pace = f"{method.epochs:g} epochs of {method.optimizer.name} at a rate of {method.optimizer.lr:g}"
    if hurried:
        pace += f", {method.name}'s defaults, are its paper's for networks of another scale; set optimizer and epochs"
    else:
        pace += " did not do; train longer, or at another rate"
    return (
        f"{UNDER_TRAINED}: its {measured} accuracy is {accuracy:.3f}, where always naming the most frequent class gives "
        f"{most_frequent:.3f}, so nothing can be said of the distillation yet ({pace})."
    )


def fit(models: dict[str, nn.Module], run: Run) -> None:
    """Ask every model about one sample, before anything is trained with it.

    Raises:
        UserError: one cannot read the data, or the student does not answer in its classes; it says which.
    """
    example = run.data.split("train").batch([0], device=run.world.device)
    for name, model in models.items():
        if any(weight.is_meta for weight in model.parameters()):
            continue
        with measuring(model.to(run.world.device)), forked_generators(0, run.world.device):
            try:
                said = logits(model, example)
            except MisfitError as error:
                raise UserError(f"{name}: {error}") from error
        classes = run.data.facts.num_classes
        if name == "student" and classes is not None and (said.dim() != 2 or said.shape[-1] < classes):
            outputs = "x".join(str(n) for n in said.shape[1:]) or "1"
            raise UserError(
                f"student: {type(model).__name__} gives {outputs} outputs, and the data has {classes} classes; a classifier "
                "gives one number for each class."
            )


def _same_outputs(teacher: nn.Module, student: nn.Module, run: Run) -> bool:
    """Whether a teacher answers in the student's classes; one of which only features are read may know others."""
    example = run.data.split("train").batch([0], device=run.world.device)
    with measuring(teacher, student):
        return logits(teacher, example).shape[-1] == logits(student, example).shape[-1]


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
