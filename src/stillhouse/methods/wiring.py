"""Student, teachers and objectives, wired: every network is asked once per batch, and each objective sees its pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Modules, Projection, Run, Term, measuring
from stillhouse.engine.seeding import derive
from stillhouse.errors import UserError
from stillhouse.losses.logit_matching import ensemble_log_probabilities
from stillhouse.methods.supervised import placed
from stillhouse.methods.teacher_outputs import TeacherOutputs
from stillhouse.models import Taps, logits, resolve_paths
from stillhouse.models.layers import Layer, classifier, named, paired, stages

if TYPE_CHECKING:
    from stillhouse.methods.distillation import KnowledgeDistillation


@dataclass
class Outputs:
    """What a network says of a batch.

    Attributes:
        logits: (batch, classes), or (batch, positions, classes) of a sequence model.
        features: at the end of each stage that is read, first to last; maps, tokens or vectors.
        before: the same before the activation that ends the stage.
        embedding: what the classifier reads, (batch, width).
        mean_logits: of several teachers whose probabilities are averaged, the mean of their logits; None elsewhere.
    """

    logits: Tensor
    features: list[Tensor] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    embedding: Tensor | None = None
    mean_logits: Tensor | None = None


class Reader:
    """Reads a network's logits, and what is tapped beside them, in one forward pass.

    Args:
        module: the network.
        layers: the stages to read.
        before: also read what enters the activation that ends each stage.
        classifier: path of the module that reads the embedding; None reads no embedding.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[Layer] = (), *, before: bool = False, classifier: str | None = None
    ) -> None:
        self.module, self.layers, self.classifier = module, tuple(layers), classifier
        self.paths = [layer.path for layer in layers]
        self.activations: list[str] = []
        if before:
            for layer in layers:
                if layer.activation is None:
                    raise UserError(
                        f"{type(module).__name__}: {layer.path!r} does not end in an activation module, so there is no "
                        "feature before it; name a layer that does, or choose another method."
                    )
                self.activations.append(layer.activation)
        self._after = Taps(module, self.paths) if self.paths else None
        self._before = Taps(module, self.activations, side="input", clone=True) if before else None
        self._embedding = Taps(module, [classifier], side="input") if classifier is not None else None

    def __call__(self, batch: Mapping[str, Any]) -> Outputs:
        """One forward pass."""
        found = Outputs(logits(self.module, batch))
        if self._after is not None:
            read = self._after.take()
            found.features = [read[path] for path in self.paths]
        if self._before is not None:
            read = self._before.take()
            found.before = [read[path] for path in self.activations]
        if self._embedding is not None:
            (found.embedding,) = self._embedding.take().values()
        return found

    def close(self) -> None:
        """Remove the taps."""
        for taps in (self._after, self._before, self._embedding):
            if taps is not None:
                taps.close()


@dataclass
class Pair:
    """Student and one teacher on one batch, with the trainable parts that belong to an objective between them.

    Attributes:
        student: the student's outputs.
        batch: the batch.
        labels: of a sequence model the label of each position of its logits, -100 where none counts; None elsewhere.
        parts: what the objective made in its ``parts``, by name.
        models: the modules of the stage; ``models.student`` is the student.
        classifier: path of the student's module that reads its embedding; None where no embedding is read.
        about: the same teacher's outputs on another batch.
    """

    student: Outputs
    ask: Callable[[], Outputs]
    batch: Batch
    labels: Tensor | None
    parts: Mapping[str, Any]
    models: Modules
    about: Callable[[Batch], Outputs]
    classifier: str | None = None

    @cached_property
    def teacher(self) -> Outputs:
        """The teacher's outputs, without a graph; computed when the first term asks."""
        return self.ask()


@dataclass(frozen=True)
class Link:
    """The wire to one teacher.

    Attributes:
        name: the teacher's name in the stage.
        weight: its share in the mean over teachers.
        read: what it says of a batch.
        picks: which of the student's and of the teacher's layers are paired.
    """

    name: str
    weight: float
    read: Callable[[Batch], Outputs]
    picks: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


class Wiring:
    """Student, teachers and objectives of one run.

    Args:
        objectives: what is learned from the teachers; the first is the method itself.
        student: the student.
        teachers: the teachers by name, or their stored outputs.
        run: the run.

    Attributes:
        student: the student.
        teachers: the teachers by name, or their stored outputs.
        read: the student's reader.
        links: the wires to the teachers; a single one where their probabilities are averaged.
        parts: what each objective makes for each link, by name.
    """

    def __init__(
        self,
        objectives: Sequence[KnowledgeDistillation],
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        run: Run,
    ) -> None:
        self.objectives, self.student, self.run = list(objectives), student, run
        self.teachers = dict(teachers)
        whole = self.objectives[0]
        reads = {what for objective in objectives for what in objective.reads}
        train = run.data.split("train")
        # Two samples: what a batch norm in eval mode and a network's shapes need no more of.
        self.example = train.batch(range(min(2, len(train))), device=run.world.device)
        for module in (student, *teachers.values()):
            module.to(run.world.device)
        deep = bool(reads & {"features", "before", "teacher before"})
        mine = _layers(student, whole.student_layers, self.example, "student_layers") if deep else ()
        ends = bool(reads & {"embedding", "student embedding"})
        embedding = _classifier(student, whole.student_classifier, self.example, "student_classifier") if ends else None
        self.readers = [Reader(student, mine, before="before" in reads, classifier=embedding)]
        self.read = self.readers[0]
        total = sum(whole.teacher_weights or (1.0,) * len(teachers))
        weights = [weight / total for weight in whole.teacher_weights or (1.0,) * len(teachers)]
        self.links: list[Link] = []
        for (name, teacher), weight in zip(teachers.items(), weights, strict=True):
            if isinstance(teacher, TeacherOutputs):
                self.links.append(Link(name, weight, _looked_up(teacher)))
                continue
            theirs = _layers(teacher, whole.teacher_layers, self.example, "teacher_layers") if deep else ()
            ends = "embedding" in reads
            embedding = (
                _classifier(teacher, whole.teacher_classifier, self.example, "teacher_classifier") if ends else None
            )
            reader = Reader(teacher, theirs, before=bool(reads & {"before", "teacher before"}), classifier=embedding)
            self.readers.append(reader)
            self.links.append(Link(name, weight, reader, _picked(mine, theirs, whole)))
        if whole.ensemble == "probabilities" and len(self.links) > 1:
            self.links = [Link("teachers", 1.0, _averaged(self.links))]
        elif whole.ensemble == "random" and len(self.links) > 1:
            self.links = [Link("teachers", 1.0, _drawn(self.links, run))]
        self.parts: list[list[dict[str, nn.Module]]] = [[{} for _ in self.links] for _ in self.objectives]
        if any(objective.has_parts for objective in objectives):
            self._make_parts(Modules({"student": student, **teachers}))

    def _make_parts(self, m: Modules) -> None:
        with measuring(*m.values()):
            for place, pairs in enumerate(self.pairs(m, self.example)):
                for at, pair in enumerate(pairs):
                    self.parts[place][at] = self.objectives[place].parts(pair, self.run)

    def modules(self) -> dict[str, nn.Module]:
        """Every part under a name of its own in the stage."""
        named_ = {}
        for place, objective in enumerate(self.objectives):
            for link, parts in zip(self.links, self.parts[place], strict=True):
                for part, module in parts.items():
                    name = part if place == 0 else f"{objective.name}-{part}"
                    named_[name if len(self.links) == 1 else f"{name}-{link.name}"] = module
        return named_

    def trains(self) -> dict[str | tuple[str, ...], Any]:
        """The student and the parts with what trains them: one optimiser, but for parts that ask for their own."""
        shared, own = ["student"], {}
        for name, module in self.modules().items():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                continue
            asked = [o.part_optimizer(name.removeprefix(f"{o.name}-")) for o in self.objectives]
            found = next((optimizer for optimizer in asked if optimizer is not None), None)
            if found is None:
                shared.append(name)
            else:
                own[name] = found
        trained: dict[str | tuple[str, ...], Any] = {
            tuple(shared) if len(shared) > 1 else "student": self.objectives[0].optimizer
        }
        return trained | own

    def pairs(self, m: Modules, batch: Batch) -> list[list[Pair]]:
        """For each objective its pair with each teacher; each network runs once, a teacher when the first term asks."""
        student = self.read(batch)
        labels = placed(self.student, batch, self.run) if student.logits.dim() > 2 else None
        asked = [cache(lambda link=link: link.read(batch)) for link in self.links]
        return [
            [
                Pair(
                    _chosen(student, link.picks[0]),
                    _choosing(ask, link.picks[1]),
                    batch,
                    labels,
                    parts,
                    m,
                    _about(link),
                    self.read.classifier,
                )
                for link, ask, parts in zip(self.links, asked, self.parts[place], strict=True)
            ]
            for place in range(len(self.objectives))
        ]

    def terms(self, m: Modules, batch: Batch) -> dict[str, Term]:
        """The terms of all objectives by name, each averaged over the teachers."""
        run, whole = self.run, self.objectives[0]
        pairs = self.pairs(m, batch)
        found: dict[str, Term] = {"ce": lambda: whole.ce(pairs[0][0], run)}
        for objective, mine in zip(self.objectives, pairs, strict=True):
            each = [objective.terms(pair, run) for pair in mine]
            for term in each[0]:
                name = term if objective is whole else f"{objective.name}.{term}"
                found[name] = self._mean([terms[term] for terms in each])
        return found

    def weights(self) -> dict[str, Any] | None:
        """Weights of the terms by name; None where the method's own fields name them all."""
        if len(self.objectives) == 1:
            return None
        found = {}
        for objective in self.objectives:
            prefix = "" if objective is self.objectives[0] else f"{objective.name}."
            for name in type(objective).model_fields:
                if name.startswith("weight_") and not (prefix and name == "weight_ce"):
                    found[prefix + name.removeprefix("weight_")] = getattr(objective, name)
        return found

    def projection(self) -> Projection | None:
        """Which terms may not oppose others, under their names in the stage."""
        for objective in self.objectives:
            found = objective.projection(self.read.classifier or "")
            if found is not None:
                prefix = "" if objective is self.objectives[0] else f"{objective.name}."
                return replace(found, terms=tuple(prefix + term for term in found.terms))
        return None

    def close(self) -> None:
        """Remove all taps."""
        for reader in self.readers:
            reader.close()

    def _mean(self, terms: Sequence[Term]) -> Term:
        if len(terms) == 1:
            return terms[0]
        weights = [link.weight for link in self.links]
        return lambda: torch.stack(
            [
                weight * (term if isinstance(term, Tensor) else term())
                for weight, term in zip(weights, terms, strict=True)
            ]
        ).sum(0)


def _layers(module: nn.Module, paths: Sequence[str] | None, example: Batch, key: str) -> tuple[Layer, ...]:
    try:
        return stages(module, example) if paths is None else named(module, example, resolve_paths(module, paths))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _classifier(module: nn.Module, path: str | None, example: Batch, key: str) -> str:
    try:
        return classifier(module, example) if path is None else resolve_paths(module, [path])[0]
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _picked(
    mine: Sequence[Layer], theirs: Sequence[Layer], whole: KnowledgeDistillation
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if whole.student_layers is not None and whole.teacher_layers is not None and len(mine) != len(theirs):
        raise UserError(
            f"student_layers names {len(mine)} layers and teacher_layers {len(theirs)}; name as many of both, in pairs."
        )
    ours, others = paired(mine, theirs) if mine else ((), ())
    return tuple(mine.index(layer) for layer in ours), tuple(theirs.index(layer) for layer in others)


def _chosen(outputs: Outputs, picks: Sequence[int]) -> Outputs:
    return replace(
        outputs,
        features=[outputs.features[i] for i in picks] if outputs.features else [],
        before=[outputs.before[i] for i in picks] if outputs.before else [],
    )


def _choosing(ask: Callable[[], Outputs], picks: Sequence[int]) -> Callable[[], Outputs]:
    return lambda: _chosen(ask(), picks)


def _about(link: Link) -> Callable[[Batch], Outputs]:
    return lambda batch: _chosen(link.read(batch), link.picks[1])


def _looked_up(stored: TeacherOutputs) -> Callable[[Batch], Outputs]:
    return lambda batch: Outputs(stored.of(batch))


def _averaged(links: Sequence[Link]) -> Callable[[Batch], Outputs]:
    """One teacher who predicts the mean of all probabilities."""

    links = [link for link in links if link.weight > 0]

    def read(batch: Batch) -> Outputs:
        said = [link.read(batch).logits for link in links]
        weights = [link.weight for link in links]
        mean = torch.stack([weight * one.float() for one, weight in zip(said, weights, strict=True)]).sum(0)
        return Outputs(ensemble_log_probabilities(said, weights), mean_logits=mean)

    return read


def _drawn(links: Sequence[Link], run: Run) -> Callable[[Batch], Outputs]:
    """One of the teachers, drawn by weight for each step, the same in all processes."""
    ends = torch.tensor([link.weight for link in links]).cumsum(0).tolist()

    def read(batch: Batch) -> Outputs:
        # Drawn on the CPU from the place in the run: no device is waited for, and no other draw moves.
        number = derive(run.seed, run.stage, run.step, "teacher") / 2**63
        place = next((i for i, end in enumerate(ends) if number < end), len(links) - 1)
        return links[place].read(batch)

    return read
