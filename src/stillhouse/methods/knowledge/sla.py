"""SLA and SLA+SD: class and transformation as one joint label, and a single-view head taught by all views (arXiv 1910.05872)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.data import Batch, Split
from stillhouse.engine import (
    Compute,
    Evaluation,
    Held,
    Losses,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stages,
    SubRun,
    Table,
    Update,
    Weight,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.losses import cross_entropy, kl
from stillhouse.losses.joint_labels import (
    aggregation_distillation,
    joint_cross_entropy,
    joint_labels,
    matched_logits,
)
from stillhouse.methods.supervised import Supervised, TrainingFields
from stillhouse.methods.wiring import Reader
from stillhouse.metrics import classification
from stillhouse.models import ModelSpec, count_parameters, logits
from stillhouse.models.layers import classifier
from stillhouse.models.taps import resolve_paths
from stillhouse.modules.joint_head import JointHead
from stillhouse.modules.views import Views

Mode = Literal["base", "da", "mt", "sla", "sla+sd"]


class SLA(TrainingFields):
    """Learn class and transformation as ONE label, average what all views say, and teach that to a head that sees one view.

    With N classes, M transformations (the identity first) and a joint head w of N M outputs, each image counts M times:
    ``L_SLA = 1/M sum_j CE(softmax(w f(t_j(x))), (y, j))`` (equation 3). At test time ``a_i = 1/M sum_j s_j[i, j]`` averages
    the matched logits of all views (equation 5). Self-distillation (equation 6) adds ``CE(u f(x), y)`` and
    ``beta T^2 KL(softmax(a / T) || softmax(u f(x) / T))`` for the network's own classifier u, without a gradient to w.

    The modes ``base`` (plain training), ``da`` (the transformations as augmentation: every view has the label y) and ``mt``
    (two heads: class and transformation) are what the paper compares with.
    """

    name: ClassVar[str] = "sla"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper(
        "Self-supervised Label Augmentation via Input Transformations", 2020, arxiv="1910.05872", venue="ICML 2020"
    )
    summary: ClassVar[str] = "a classifier of few labels taught by its own views: rotations and colours as joint labels"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    student: ModelSpec = Field("cnn", description="the network; its classifier is the head u", validate_default=True)
    mode: Mode = Field(
        "sla+sd",
        description="joint labels with self-distillation, joint labels alone, or what they are compared with: plain training, "
        "transformations as augmentation, two heads",
    )
    transformations: Views = Field(
        "rotation", description="the views of each sample, identity first", validate_default=True
    )
    inference: Literal["single", "aggregated"] = Field(
        "single",
        description="what is measured and ships: the network on one view, or the joint head over all views too",
    )
    large: bool = Field(
        False, description="sum the joint loss over views (the authors' choice for ImageNet), not the mean"
    )
    temperature: float = Field(1.0, gt=0, description="softmax temperature of the self-distillation")
    views_at_once: int | None = Field(
        None,
        ge=1,
        description="views in memory at once; gradients are exact, batch norms see so many views at a time. All by default",
    )
    weight_joint: Weight = Field(1.0, description="weight of the joint loss")
    weight_ce: Weight = Field(1.0, description="weight of the loss of classes alone")
    weight_kl: Weight = Field(1.0, description="weight of the self-distillation (beta)")
    weight_view: Weight = Field(1.0, description="weight of the second head's loss, in the mode mt")
    student_classifier: str | None = Field(
        None, description="module of the student that reads the embedding; its last linear layer by default"
    )
    compare_alone: bool = Field(True, description="also train the student in the plain way, for the table")
    optimizer: Optimizer = Field(
        Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="step", milestones=(0.5, 0.75)),
        description="optimiser of the network and the heads",
    )
    batch_size: int = Field(128, ge=1, description="images per process and step; the network sees each in all views")
    epochs: float = Field(228, gt=0, description="passes over the training split (80,000 steps on 45,000 images)")
    draws: Literal["passes", "anew"] = Field(
        "passes",
        description="each pass gives each image once; or each batch is drawn anew from all images, as released",
    )

    @model_validator(mode="after")
    def _one_label_per_image(self) -> Self:
        if self.mix.kind != "none":
            raise ValueError("mix: a joint label is of one class, and mixed samples have several; use mix=none")
        if self.inference == "aggregated" and not self.joint:
            raise ValueError(f"inference: the mode {self.mode!r} has no joint head to aggregate; use sla or sla+sd")
        return self

    @property
    def joint(self) -> bool:
        """Whether class and view are told by one head."""
        return self.mode in ("sla", "sla+sd")

    def stages(self, run: Run) -> Stages:
        """One stage; then the student with the head that it ships."""
        if run.data.facts.num_classes is None:
            raise UserError(f"sla reads class labels, which the data {run.data.name!r} does not have.")
        student = self.student.build(run.data.facts)
        example = run.data.split("train").batch(range(min(2, len(run.data.split("train")))), device=run.world.device)
        if self.mode != "base":
            for inputs in example.inputs.values():
                self.transformations.check(inputs)
        heads = self.heads(student.to(run.world.device), example)
        held: dict[str, nn.Module | Held] = {"student": student, **heads.modules()}
        stage = self.training_stage(
            run,
            "student",
            held,
            Update(self.loss_of(heads), trains=self.trained(heads), name="loss"),
            trained="student",
            anew=self.draws == "anew",
        )
        if stage.evaluate is not None:
            stage.evaluate = Evaluation(
                lambda m: _named("validation", self.quality(heads, run.data.split("validation"), run, self.inference)),
                every=stage.evaluate.every,
                monitor="validation/accuracy",
                patience=self.patience,
            )
        trained = yield stage
        if self.mode == "sla":
            # Single inference of the joint head, as the plain classifier that it is.
            heads.joint.write_first_view(heads.single)
        tested = yield Compute("test", lambda _: self.tested(heads, run))
        metrics = {**trained.kept, **tested}
        shown = [["student", *_row(tested, "test"), count_parameters(student), 1]]
        if self.joint:
            shown.append(
                ["all views", *_row(tested, "test/aggregated"), count_parameters(student), self.transformations.count]
            )
        if self.compare_alone and self.mode != "base":
            alone = yield SubRun("student-alone", self.alone(), seed=run.seed, data=run.data)
            plain = {name.removeprefix("test/"): v for name, v in alone.metrics.items() if name.startswith("test/")}
            metrics |= _named("test/student-alone", plain)
            shown.append(["student alone", *_row(metrics, "test/student-alone"), count_parameters(student), 1])
        heads.reader.close()
        artefacts: dict[str, Any] = {"student": student}
        functions: dict[str, Callable[[Any], Tensor]] = {"single": partial(single, student)}
        if self.joint:
            functions["aggregate"] = partial(aggregated, student, heads.joint, classifier=heads.path)
            if self.inference == "aggregated":
                artefacts["joint"] = heads.joint
        return Result(
            artefacts=artefacts,
            metrics=metrics,
            tables=[Table("Result", ["model", "test accuracy", "parameters", "views per prediction"], shown)],
            functions=functions,
            notes=self.notes(metrics),
        )

    def heads(self, student: nn.Module, example: Batch) -> Heads:
        """The student's classifier, and the head that the mode adds to it."""
        try:
            path = (
                classifier(student, example)
                if self.student_classifier is None
                else resolve_paths(student, [self.student_classifier])[0]
            )
        except UserError as error:
            raise UserError(f"student_classifier: {error}") from None
        reader = Reader(student, classifier=path)
        with measuring(student):
            seen = reader(example)
        assert seen.embedding is not None
        width, classes, views = seen.embedding.shape[-1], seen.logits.shape[-1], self.transformations
        single = student.get_submodule(path)
        if not isinstance(single, nn.Linear) and self.mode == "sla":
            raise UserError(
                f"student_classifier: {path!r} is a {type(single).__name__}, and the joint head ships as an nn.Linear in its "
                "place; use mode=sla+sd, which trains the student's own."
            )
        joint = second = None
        if self.joint:
            joint = JointHead(width, classes, views, single)
        elif self.mode == "mt":
            second = nn.Linear(width, views.count)
        return Heads(student, path, reader, classes, joint, second)

    def trained(self, heads: Heads) -> dict[str | tuple[str, ...], Optimizer]:
        """The parts that the mode's terms reach."""
        parts: tuple[str, ...] = ("student", *heads.modules())
        if self.mode == "sla":
            parts = ("student", f"!student.{heads.path}", *heads.modules())
        return {parts if len(parts) > 1 else "student": self.optimizer}

    def loss_of(self, heads: Heads) -> Callable[[Modules, Batch, Run], Losses | Iterator[Losses]]:
        """The mode's loss, in one piece or in as many as views do not fit at once."""
        count = self.transformations.count
        if self.joint and self.views_at_once is not None and self.views_at_once < count:
            return lambda m, batch, run: self.in_pieces(heads, batch)
        return lambda m, batch, run: self.whole(heads, batch)

    def whole(self, heads: Heads, batch: Batch) -> Losses:
        """All terms of the mode from one forward pass."""
        labels, count = _checked(batch.labels, heads.classes), self.transformations.count
        if self.mode == "base":
            return {"ce": cross_entropy(heads.reader(batch).logits, labels)}
        seen = heads.reader(self.expanded(batch))
        assert seen.embedding is not None
        if not self.joint:
            terms = {"ce": cross_entropy(seen.logits, labels.repeat_interleave(count))}
            if heads.second is not None:
                number = torch.arange(count, device=labels.device).repeat(len(labels))
                terms["view"] = cross_entropy(heads.second(seen.embedding), number)
            return terms
        scores = heads.scores(seen.embedding, count)
        terms = {"joint": joint_cross_entropy(scores, labels, count, reduction="sum" if self.large else "mean")}
        if self.mode == "sla+sd":
            alone = seen.logits[::count]
            terms["ce"] = cross_entropy(alone, labels)
            terms["kl"] = aggregation_distillation(alone, scores, count, self.temperature)
        return terms

    def in_pieces(self, heads: Heads, batch: Batch) -> Iterator[Losses]:
        """The same terms a few views at a time, each group differentiated before the next; that of view 0 comes last.

        What the views say together is collected without a graph, which it does not need, and taught to the student at the end.
        """
        labels, count, at_once = _checked(batch.labels, heads.classes), self.transformations.count, self.views_at_once
        assert at_once is not None
        target = joint_labels(labels, count).view(len(labels), count)
        matched = labels.new_zeros(len(labels), heads.classes, dtype=torch.float32)
        for start in reversed(range(0, count, at_once)):
            group = range(start, min(start + at_once, count))
            seen = heads.reader(self.expanded(batch, group))
            assert seen.embedding is not None
            scores = heads.scores(seen.embedding, count)
            share = 1.0 if self.large else 1 / count
            terms = {"joint": len(group) * share * cross_entropy(scores, target[:, start : group.stop].flatten())}
            by_view = scores.detach().float().view(len(labels), len(group), heads.classes, count)
            matched = matched + sum(by_view[:, at, :, view] for at, view in enumerate(group)) / count
            if start == 0 and self.mode == "sla+sd":
                alone = seen.logits[:: len(group)]
                terms["ce"] = cross_entropy(alone, labels)
                terms["kl"] = kl(alone, matched, self.temperature)
            yield terms

    def expanded(self, batch: Batch, views: range | None = None) -> Batch:
        """The batch in all views (or some), those of a sample one after the other."""
        return Batch({name: _expanded(x, self.transformations, views) for name, x in batch.inputs.items()})

    def quality(self, heads: Heads, split: Split, run: Run, how: Literal["single", "aggregated"]) -> dict[str, float]:
        """Numbers of the network on one view, or of all views together, on a split."""
        count = self.transformations.count
        batches = split.in_order(512 if how == "single" else max(1, 512 // count), device=run.world.device)
        with measuring(heads.student, *heads.modules().values()):
            return classification(self.aggregate(heads) if how == "aggregated" else self.single(heads), batches)

    def single(self, heads: Heads) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Logits from a sample as it is: of the student's classifier, or while it is not the one that is trained, of the
        joint head restricted to view 0 (equation 4)."""
        if self.mode != "sla":
            return lambda batch: heads.reader(batch).logits
        count = self.transformations.count

        def restricted(batch: Mapping[str, Tensor]) -> Tensor:
            embedding = heads.reader(batch).embedding
            assert embedding is not None
            return heads.scores(embedding, count)[:, ::count]

        return restricted

    def aggregate(self, heads: Heads) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Logits from all views of a sample."""

        def averaged(batch: Mapping[str, Tensor]) -> Tensor:
            embedding = heads.reader(self.expanded(Batch(batch))).embedding
            assert embedding is not None
            return matched_logits(heads.scores(embedding, self.transformations.count), self.transformations.count)

        return averaged

    def tested(self, heads: Heads, run: Run) -> dict[str, float]:
        """Numbers on the test split: ``test/...`` as ``inference`` asks, and both ways by name."""
        if "test" not in run.data.splits:
            return {}
        split = run.data.split("test")
        found = {"single": self.quality(heads, split, run, "single")}
        if self.joint:
            found["aggregated"] = self.quality(heads, split, run, "aggregated")
        metrics = _named("test", found[self.inference])
        for how, numbers in found.items():
            metrics |= _named(f"test/{how}", numbers)
        # Without a joint head there is nothing to aggregate.
        whole = found.get("aggregated", found["single"])
        metrics["test/gain_of_aggregation"] = whole["accuracy"] - found["single"]["accuracy"]
        return metrics

    def alone(self) -> Supervised:
        """The same student, trained on the labels in the plain way."""
        shared = {name: getattr(self, name) for name in TrainingFields.model_fields}
        return Supervised(model=self.student, **shared)

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        """What a reader should know."""
        told = []
        if self.views_at_once is not None and self.joint and self.views_at_once < self.transformations.count:
            told.append(
                f"batch norms saw {self.views_at_once} of the {self.transformations.count} views at a time, so their statistics "
                "differ from those of all views in one batch."
            )
        gain = metrics.get("test/accuracy", 0.0) - metrics.get("test/student-alone/accuracy", 0.0)
        if "test/student-alone/accuracy" in metrics and "test/accuracy" in metrics:
            told.append(f"the mode {self.mode} changed the student's test accuracy by {100 * gain:+.2f} points.")
        return told


class Heads:
    """A student with the module that reads its embedding, and the head beside that.

    Attributes:
        student: the student.
        path: path of its classifier.
        reader: gives its logits and its embedding in one pass.
        classes: number of classes N.
        joint_: the joint head, in the modes that have one.
        second: the head of the transformation alone, in the mode mt.
    """

    def __init__(
        self,
        student: nn.Module,
        path: str,
        reader: Reader,
        classes: int,
        joint: JointHead | None,
        second: nn.Linear | None,
    ) -> None:
        self.student, self.path, self.reader, self.classes = student, path, reader, classes
        self.joint_, self.second = joint, second

    @property
    def joint(self) -> JointHead:
        """The joint head."""
        assert self.joint_ is not None
        return self.joint_

    @property
    def single(self) -> nn.Linear:
        """The student's classifier."""
        module = self.student.get_submodule(self.path)
        assert isinstance(module, nn.Linear)
        return module

    def modules(self) -> dict[str, nn.Module]:
        """What the stage holds beside the student."""
        found = {"joint": self.joint_, "views": self.second}
        return {name: module for name, module in found.items() if module is not None}

    def scores(self, embedding: Tensor, count: int) -> Tensor:
        """Of all pairs of class and view.

        Raises:
            UserError: the head has another number of outputs.
        """
        scores: Tensor = self.joint(embedding)
        if scores.shape[-1] != self.classes * count:
            raise UserError(
                f"the joint head has {scores.shape[-1]} outputs, and {self.classes} classes in {count} views are "
                f"{self.classes * count}."
            )
        return scores


def single(student: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Logits of a student that SLA trained, from each sample as it is.

    Args:
        student: the student.
        inputs: what it takes: a tensor, or tensors by name.
    """
    with measuring(student):
        return logits(student, _batch(inputs, student))


def aggregated(
    student: nn.Module, joint: JointHead, inputs: Tensor | Mapping[str, Tensor], *, classifier: str
) -> Tensor:
    """Logits from all views of each sample (equation 5), from a student, its joint head, and the name of its classifier.

    Args:
        student: the student.
        joint: the head that was trained with it, which knows the transformations.
        inputs: what the student takes: a tensor, or tensors by name.
        classifier: path of the module that reads the student's embedding.
    """
    reader = Reader(student, classifier=classifier)
    batch = _batch(inputs, student)
    try:
        with measuring(student, joint):
            embedding = reader({name: joint.views.expand(x) for name, x in batch.items()}).embedding
            assert embedding is not None
            return matched_logits(joint(embedding), joint.views.count)
    finally:
        reader.close()


def _batch(inputs: Tensor | Mapping[str, Tensor], student: nn.Module) -> Batch:
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    found = {"inputs": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    return Batch({name: x.to(device) for name, x in Batch(found).inputs.items()})


def _expanded(x: Tensor, transformations: Views, views: range | None) -> Tensor:
    if views is None:
        return transformations.expand(x)
    chosen = [transformations.transforms[view](x) for view in views]
    return torch.stack(chosen, 1).flatten(0, 1)


def _checked(labels: Tensor, classes: int) -> Tensor:
    """The labels, if the classes hold them; looked at on the CPU only."""
    if labels.device.type == "cpu" and not labels.is_floating_point() and int(labels.max()) >= classes:
        raise UserError(f"a label is {int(labels.max())}, but the student tells {classes} classes, 0 to {classes - 1}.")
    return labels


def _named(place: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{place}/{name}": value for name, value in numbers.items()}


def _row(numbers: Mapping[str, float], place: str) -> list[float | str]:
    return [numbers.get(f"{place}/accuracy", "")]
