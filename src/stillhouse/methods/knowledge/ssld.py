"""SSLD: label-free distillation on the target's images and a mined pool of unlabelled ones (arXiv 2103.05959)."""

from __future__ import annotations

import csv
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.data import Batch, Data, DataSpec, Split, fitted, union
from stillhouse.data.dataset import Carving
from stillhouse.data.images import UNREADABLE, FolderData
from stillhouse.engine import (
    Compute,
    Evaluation,
    Losses,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stage,
    Stages,
    SubRun,
    Table,
    Trained,
    Update,
    Weight,
    frozen,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.losses import DIVERGENCES, soft_cross_entropy
from stillhouse.losses.divergences import Divergence
from stillhouse.losses.logit_matching import jeffreys
from stillhouse.methods.distillation import KnowledgeDistillation, compare, soft_loss
from stillhouse.methods.supervised import Supervised, TrainingFields, held_out, quality
from stillhouse.methods.teacher import PRETRAINED, TeacherSpec
from stillhouse.methods.wiring import Pair, Reader, Wiring
from stillhouse.metrics import agreement
from stillhouse.models import BatchStatistics, MisfitError, batch_norms, fingerprint, logits
from stillhouse.models.layers import classifier
from stillhouse.modules.duplicates import Gallery, matching_keypoints, pixel_embedding
from stillhouse.modules.mining import TopPerClass, confidence
from stillhouse.spec import Spec

UNREADABLE_SHARE = 0.01
"""Most of a pool's images that may be unreadable."""

EVALUATION = ("validation", "test")


class NearDuplicates(Spec):
    """What counts as a near-duplicate of an evaluation image: both a near hash and a near embedding, and keypoints if asked.

    The defaults are for photographs. Drawings of few pixels (digits, clothes on black) are alike to a hash: give smaller
    distances there, such as ``{hash_distance: 2, cosine: 0.99}``, and look at the removed pairs.
    """

    hash_distance: int = Field(10, ge=0, le=64, description="most differing bits, of 64, of the perceptual hash")
    cosine: float = Field(0.95, ge=-1, le=1, description="least cosine of the embeddings")
    embedding: Literal["teacher", "pixels"] = Field(
        "teacher", description="compare what the scoring teacher's classifier reads, or pixels at 16 x 16"
    )
    keypoints: int | None = Field(
        None,
        ge=1,
        description="also ask for so many matching SIFT keypoints (kornia); for photographs, where hashes are loose",
    )

    @model_validator(mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else value


class Fix(Spec):
    """A last stage at a higher resolution: the classifier alone, batch norms running, images as at test time."""

    image_size: int = Field(ge=4, description="side of the images, as for testing")
    epochs: float = Field(10, gt=0, description="passes over the target's training images")
    lr: float = Field(1e-3, gt=0, description="learning rate (SGD with momentum 0.9, cosine)")


class SSLD(KnowledgeDistillation):
    """A teacher's predictions and nothing else: no label enters the loss, so any images serve.

    A pool is mined once (near-duplicates of the evaluation images leave, each class keeps its ``per_class`` surest images)
    and joined with the target's images. Stage 1 trains on both, stage 2 on the target's images at a hundredth of the
    learning rate, each with ``1/2 [KL(teacher || student) + KL(student || teacher)]``. The paper calls it JS; its code
    computes this symmetrised KL.
    """

    name: ClassVar[str] = "ssld"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper(
        "Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve Backbones",
        2021,
        arxiv="2103.05959",
    )
    summary: ClassVar[str] = (
        "a pretrained backbone from a teacher and any images, without a label: mined pool, two stages"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    divergence: Literal["jeffreys", "js", "soft_ce", "kl"] = Field(
        "jeffreys",
        description="what compares predictions: the symmetrised KL, the true JS (needs several times the learning rate), the "
        "soft cross-entropy of later official recipes, or the forward KL",
    )
    teacher_bn: Literal["batch", "running"] = Field(
        "batch", description="the teacher's batch norms take the statistics of each training batch, or their own"
    )
    weight_ce: Weight = Field(0.0, description="0: no label enters the loss")
    weight_soft: Weight = Field(1.0, description="weight of the divergence from the teacher")
    pool: DataSpec | tuple[DataSpec, ...] | None = Field(
        None, description="unlabelled images to mine: any data set, or several; labels there are ignored"
    )
    per_class: int | None = Field(
        4000, ge=1, description="most images of each predicted class to take from the pool; all images if null"
    )
    select: Literal["top", "random"] = Field(
        "top", description="of the pool the surest images of each predicted class, or as many drawn at random in all"
    )
    scorer: TeacherSpec | None = Field(
        None, description="who scores the pool, such as a larger model; the (first) teacher by default"
    )
    duplicates: Literal[False] | NearDuplicates = Field(
        NearDuplicates(),
        description="near-duplicates of validation and test images to take out of the pool; false keeps them",
    )
    num_steps: int | None = Field(None, ge=1, description="steps of stage 1, in place of its epochs")
    epochs: float = Field(360, ge=0, description="stage 1: passes over pool and target; 0 skips it")
    warmup_epochs: float = Field(5, ge=0, description="passes over which the learning rate of each stage rises")
    finetune_epochs: float = Field(30, ge=0, description="stage 2: passes over the target's images; 0 skips it")
    finetune_lr: float | None = Field(
        None, gt=0, description="learning rate of stage 2; a hundredth of stage 1's when not given"
    )
    fix: Fix | None = Field(
        None, description="a last stage for the classifier at a higher resolution: {image_size, epochs, lr}"
    )
    optimizer: Optimizer = Field(
        Optimizer(name="sgd", lr=0.025, momentum=0.9, weight_decay=7e-5, schedule="cosine"),
        description="optimiser of stage 1 (the paper's ResNet50_vd has a rate of 0.4 for batches of 1024, scaled to 64)",
    )

    @model_validator(mode="after")
    def _label_free(self) -> Self:
        if self.weight_ce != 0:
            raise ValueError("weight_ce: no label enters the loss of ssld; use kd for labels beside a teacher")
        if self.also:
            raise ValueError(f"also: ssld trains in stages of its own; {self.also[0].name!r} cannot stand beside it")
        if self.batch_size == 1 and self.teacher_bn == "batch":
            raise ValueError("batch_size: one sample has no batch statistics; use 2 or more, or teacher_bn=running")
        if self.cache_teacher and self.teacher_bn == "batch":
            raise ValueError(
                "cache_teacher: with teacher_bn=batch what the teacher says of a sample depends on its batch; use running"
            )
        if self.cache_teacher and self.pool is not None:
            raise ValueError(
                "cache_teacher: outputs are stored for the target's images alone; leave it out with a pool"
            )
        if self.epochs == 0 and self.num_steps is None:
            if self.finetune_epochs == 0:
                raise ValueError("epochs: both stages are skipped; give one of them passes")
            if self.student.kind not in PRETRAINED:
                raise ValueError(
                    f"epochs: 0 skips stage 1, whose weights stage 2 fine-tunes, and the student {self.student.kind!r} has "
                    "none of its own; give one that has, such as file:DIR"
                )
        return self

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The divergence from the teacher."""
        return {"soft": lambda: self.soft(pair.student.logits, pair.teacher.logits, pair.labels, run)}

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor | None, run: Run) -> Tensor:
        """The divergence at temperature 1."""
        if self.divergence == "soft_ce":
            chosen: Divergence = soft_cross_entropy
        else:
            chosen = jeffreys if self.divergence == "jeffreys" else DIVERGENCES[self.divergence]
        return soft_loss(chosen, student, teacher, 1.0, labels, run, squared=False)

    def stages(self, run: Run) -> Stages:
        """Teachers, the pool, stage 1, stage 2, the classifier at another resolution; then what the table needs."""
        self.check_data(run)
        teachers = yield from self.teachers(run)
        facts = self.known_facts(run, teachers)
        student = self.student.build(facts)
        before = {name: fingerprint(teacher) for name, teacher in teachers.items()}
        mined = None
        # From here on nobody sees a label.
        target = whole = union([run.data.split("train")])
        if self.pool is not None:
            mined = yield from self.mined(run, teachers)
            whole = union([target, mined.split])
        asked, notes = yield from self.asked(run, teachers)
        metrics: dict[str, float] = {}
        steps = 0
        if self.epochs or self.num_steps:
            trained = yield from self.student_on(run, "pool", student, teachers, asked, self.first(run, whole), whole)
            steps += trained.steps
            metrics |= trained.kept
            if self.finetune_epochs:
                tested = yield Compute("after-pool", lambda _: self.tested(student, run))
                metrics |= _named("after-pool", tested)
        if self.finetune_epochs:
            trained = yield from self.student_on(
                run, "target", student, teachers, asked, self.second(run, target), target
            )
            steps += trained.steps
            metrics |= trained.kept

        models = {**teachers, "student": student}
        labelled = run.data.facts.task == "classification"
        if self.compare_alone and labelled:
            alone = yield SubRun("student-alone", self.alone_for(run, steps), seed=run.seed, data=run.data)
            models["student-alone"] = alone.model
        measure = (
            partial(compare, models, list(teachers), run) if labelled else partial(self.agreed, models, teachers, run)
        )
        measured = yield Compute("comparison", lambda _: measure())
        if self.fix is not None:
            fixed = yield from self.fixed(run, student, teachers)
            metrics |= fixed
        tables = [Table("Comparison", measured["columns"], measured["rows"])]
        artefacts: dict[str, Any] = {"student": student}
        if mined is not None:
            artefacts["pool"] = mined
            tables += mined.tables
            metrics |= mined.metrics
        return Result(
            artefacts=artefacts,
            metrics={**metrics, **measured["metrics"]},
            tables=tables,
            notes=[
                *(f"{name} has fingerprint {print_}" for name, print_ in before.items()),
                *([] if mined is None else mined.notes),
                *self.told(teachers),
                *notes,
                *measured["notes"],
            ],
        )

    def check_data(self, run: Run) -> None:
        """Refuse regression, and duplicates that are to be found where there is nothing to find them in."""
        if run.data.facts.task == "regression":
            raise UserError(
                f"ssld compares distributions over classes, and the data {run.data.name!r} has numbers; use kd."
            )
        if self.pool is not None and self.duplicates is not False:
            if "pixel_values" not in run.data.facts.inputs:
                raise UserError(
                    f"duplicates: near-duplicates are found among images, which {run.data.name!r} has none of; set "
                    "duplicates=false."
                )
            if not any(name in run.data.splits for name in EVALUATION):
                raise UserError(
                    f"duplicates: {run.data.name!r} has no validation or test images to take near-duplicates of out of the "
                    "pool; give it such a split, or set duplicates=false."
                )

    def known_facts(self, run: Run, teachers: Mapping[str, nn.Module]) -> Facts:
        """The facts, with as many classes as the teacher tells where the data have no labels."""
        facts = run.data.facts
        if facts.num_classes is not None or facts.task != "unlabelled":
            return facts
        teacher = next(iter(teachers.values())).to(run.world.device)
        with measuring(teacher):
            outputs = logits(teacher, run.data.split("train").batch([0], device=run.world.device)).shape[-1]
        return replace(facts, num_classes=outputs, task="classification")

    # The stages ----------------------------------------------------------------------------------------------------------

    def student_on(
        self,
        run: Run,
        name: str,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        asked: dict[str, nn.Module],
        fields: Mapping[str, Any],
        split: Split,
    ) -> Generator[Any, Any, Trained]:
        """Train the student on a split, with other fields than the method's own."""
        method = self.model_copy(update=dict(fields))
        stage, wiring = yield from method.student_stage(run, name, student, asked, split=split)
        if run.data.facts.task != "classification" and stage.evaluate is not None:
            # The teacher itself: what is stored of it is of the training images.
            teacher = next(iter(teachers.values())).to(run.world.device)
            stage.evaluate = Evaluation(
                lambda m: {
                    "validation/agreement": self.agreeing(m.student, teacher, run.data.split("validation"), run)
                },
                every=stage.evaluate.every,
                monitor="validation/agreement",
                patience=self.patience,
            )
        trained = yield from self.taught(stage, asked)
        wiring.close()
        return trained

    def taught(self, stage: Stage, teachers: Mapping[str, nn.Module]) -> Generator[Stage, Any, Trained]:
        """A stage in which the teachers' batch norms follow :attr:`teacher_bn`."""
        switched = [BatchStatistics(teacher) for teacher in teachers.values()] if self.teacher_bn == "batch" else []
        try:
            trained: Trained = yield stage
        finally:
            for one in switched:
                one.close()
        return trained

    def first(self, run: Run, whole: Split) -> dict[str, Any]:
        """Fields of stage 1."""
        per_epoch = whole.batches(self.batch_size).per_epoch(run.world.size)
        epochs = self.epochs if self.num_steps is None else self.num_steps * self.accumulate / per_epoch
        return {"optimizer": self._warmed(self.optimizer, epochs, per_epoch), "epochs": epochs}

    def second(self, run: Run, target: Split) -> dict[str, Any]:
        """Fields of stage 2."""
        per_epoch = target.batches(self.batch_size).per_epoch(run.world.size)
        lr = self.optimizer.lr / 100 if self.finetune_lr is None else self.finetune_lr
        optimizer = self.optimizer.model_copy(update={"lr": lr})
        return {"optimizer": self._warmed(optimizer, self.finetune_epochs, per_epoch), "epochs": self.finetune_epochs}

    def _warmed(self, optimizer: Optimizer, epochs: float, per_epoch: int) -> Optimizer:
        """The optimiser with its warm-up in steps, of at most a tenth of the stage: short trainings have no time for more."""
        if not self.warmup_epochs or optimizer.warmup:
            return optimizer
        passes = min(self.warmup_epochs, epochs / 10)
        return optimizer.model_copy(update={"warmup": round(passes * per_epoch / self.accumulate)})

    def fixed(
        self, run: Run, student: nn.Module, teachers: dict[str, nn.Module]
    ) -> Generator[Any, Any, dict[str, float]]:
        """Fine-tune the classifier at another resolution, all else as it is, without labels; measure it there."""
        fix = self.fix
        assert fix is not None
        data = resized(self.data, fix.image_size)
        train = data.split("train")
        student.to(run.world.device)
        for module in (student, *teachers.values()):
            _takes(module.to(run.world.device), train.batch(range(2), device=run.world.device), fix.image_size)
        head = classifier(student, train.batch(range(2), device=run.world.device))
        wiring = Wiring(self.objectives, student, teachers, run)

        def loss(m: Modules, batch: Batch, run: Run) -> Losses:
            return wiring.terms(m, batch)

        batches = union([train]).batches(self.batch_size)
        steps = max(1, round(fix.epochs * batches.per_epoch(run.world.size)))
        labelled = data.facts.task == "classification"
        evaluation = None
        if "validation" in data.splits and labelled:
            evaluation = Evaluation(
                lambda m: _named("fix/validation", quality(m.student, data.split("validation"), run)),
                every=max(1, steps // self.evaluations),
                monitor="fix/validation/accuracy",
            )
        optimizer = Optimizer(name="sgd", lr=fix.lr, momentum=0.9, schedule="cosine")
        before = yield Compute("before-fix", lambda _: _on(data, student, run) if labelled else {})
        stage = Stage(
            "fix",
            modules={"student": student, **{name: frozen(teacher) for name, teacher in teachers.items()}},
            updates=[Update(loss, trains={f"student.{head}": optimizer}, eval=("student",))],
            batches=batches,
            steps=steps,
            evaluate=evaluation,
        )
        yield from self.taught(stage, teachers)
        wiring.close()
        after = yield Compute("after-fix", lambda _: _on(data, student, run) if labelled else {})
        return {**_named("fix/before", before), **_named("fix", after)}

    def tested(self, student: nn.Module, run: Run) -> dict[str, float]:
        """Numbers of the student on the test split; nothing where it has no labels."""
        return held_out(student, run) if run.data.facts.task == "classification" else {}

    def alone_for(self, run: Run, steps: int) -> Supervised:
        """The same student, trained on the target's labels for as many steps as both stages took."""
        per_epoch = run.data.split("train").batches(self.batch_size).per_epoch(run.world.size)
        epochs = steps * self.accumulate / per_epoch
        shared = {name: getattr(self, name) for name in TrainingFields.model_fields}
        shared |= {"epochs": epochs, "optimizer": self._warmed(self.optimizer, epochs, per_epoch)}
        return Supervised(model=self.student, **shared)

    def agreeing(self, student: nn.Module, teacher: nn.Module, split: Split, run: Run) -> float:
        """Share of a split's samples on which two networks predict the same class."""
        with measuring(student, teacher):
            pairs = [(logits(student, b), logits(teacher, b)) for b in split.in_order(512, device=run.world.device)]
        ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
        return float(agreement(ours, theirs))

    def agreed(self, models: Mapping[str, nn.Module], teachers: Mapping[str, nn.Module], run: Run) -> dict[str, Any]:
        """What can be compared without labels: how often the student says what its teachers say."""
        name = "test" if "test" in run.data.splits else "validation"
        if name not in run.data.splits:
            name = "train"
        student = models["student"].to(run.world.device)
        found = {
            one: self.agreeing(student, teacher.to(run.world.device), run.data.split(name), run)
            for one, teacher in teachers.items()
        }
        return {
            "metrics": {f"{name}/student/agreement/{one}": value for one, value in found.items()},
            "columns": ["teacher", f"{name} agreement of the student"],
            "rows": [[one, value] for one, value in found.items()],
            "notes": ["the data have no labels, so nothing but the agreement with the teacher was measured."],
        }

    def told(self, teachers: Mapping[str, nn.Module]) -> list[str]:
        """What a reader should know of the teacher's batch norms and of the resolution."""
        notes = []
        if self.teacher_bn == "batch" and not any(batch_norms(teacher) for teacher in teachers.values()):
            notes.append("the teacher has no batch norm, so teacher_bn=batch does nothing.")
        if self.fix is not None:
            size = self.fix.image_size
            notes.append(
                f"the student's classifier is fixed for images of {size} x {size}; the table was measured before, at the "
                "resolution of training."
            )
        return notes

    # The pool ------------------------------------------------------------------------------------------------------------

    def mined(self, run: Run, teachers: Mapping[str, nn.Module]) -> Generator[Any, Any, Mined]:
        """Read the pool, score it, choose: once, then found in the cache."""
        target = run.data.split("train")
        specs = self.pool if isinstance(self.pool, tuple) else (self.pool,)
        loaded = [as_pool(spec, target).load() for spec in specs if spec is not None]
        parts = [fitted(data.split("train"), target, asides=True) for data in loaded]
        scorer: nn.Module | None = None
        if self.scorer is not None:
            scorer = yield from self.scorer.ready(run, "scorer")
        elif self.needs_scores:
            scorer = next(iter(teachers.values()))
        key = json.dumps(
            [
                "mining",
                None if scorer is None else [fingerprint(scorer), repr(scorer)],
                [data.fingerprint for data in loaded],
                run.data.fingerprint,
                self.per_class,
                self.select,
                run.seed if self.select == "random" else None,
                self.duplicates.dump() if self.duplicates is not False else None,
                [torch.__version__, run.world.device.type, torch.get_num_threads()],
            ]
        )
        classes = self.known_facts(run, teachers).num_classes or 1
        found = yield Compute(
            "mining",
            lambda _: self.mine(run, parts, scorer, classes),
            key=key,
            part=lambda _, share: self.mine_some(run, parts, scorer, classes, share),
        )
        _refuse_lost(found)
        picked = found["picked"]
        sizes = [len(part) for part in parts]
        starts = torch.tensor([0, *sizes]).cumsum(0)
        chosen = [
            part.subset(picked[(picked >= start) & (picked < start + len(part))] - start)
            for part, start in zip(parts, starts.tolist(), strict=False)
        ]
        split = union([target.subset(torch.empty(0, dtype=torch.long)), *(one for one in chosen if len(one))])
        names = [data.name for data in loaded]
        return Mined(split, found, names, [len(one) for one in chosen], run.data.facts.class_names)

    @property
    def needs_scores(self) -> bool:
        """Whether anybody must look at the pool's images through a network."""
        embedded = self.duplicates is not False and self.duplicates.embedding == "teacher"
        return embedded or (self.per_class is not None and self.select == "top")

    def mine(self, run: Run, parts: list[Split], scorer: nn.Module | None, classes: int) -> dict[str, Any]:
        """One pass over the pool: unreadable images and near-duplicates leave, the surest of each class stay."""
        device = run.world.device
        look = Eye(scorer.to(device) if scorer is not None else None, run, self.duplicates)
        gallery = self.gallery(run, look)
        top: TopPerClass | None = None
        unreadable, eligible, removed, cosines = 0, [], [], []
        start = 0
        for part in parts:
            for batch in part.in_order(256, device=device):
                index = batch.index.cpu() + start
                readable = torch.ones(batch.size, dtype=torch.bool)
                if UNREADABLE in batch:
                    readable = ~batch[UNREADABLE].bool().cpu()
                    unreadable += int((~readable).sum())
                seen = look(batch)
                keep = readable.clone()
                if gallery is not None:
                    pairs, cosine = gallery.near(seen.pictures, seen.embedding)
                    pairs, cosine = self.confirmed(pairs.cpu(), cosine.cpu(), seen.pictures, run, readable)
                    keep[pairs[:, 0]] = False
                    pairs[:, 0] = index[pairs[:, 0]]
                    removed.append(pairs)
                    cosines.append(cosine)
                eligible.append(index[keep])
                if seen.logits is not None:
                    top = top or TopPerClass(seen.logits.shape[-1], self.per_class or 1)
                    predicted, score = confidence(seen.logits)
                    keep = keep.to(device)
                    top.add(index[keep.cpu()], predicted[keep], score[keep])
            start += len(part)
        look.close()
        left = torch.cat(eligible)
        pairs = torch.cat(removed) if removed else torch.empty(0, 5, dtype=torch.long)
        picked, found = left, None
        if self.per_class is not None and self.select == "random":
            order = torch.randperm(len(left), generator=torch.Generator().manual_seed(run.seed))
            picked = left[order[: self.per_class * classes]].sort().values
        elif self.per_class is not None and top is not None:
            found = top.picked()
            picked = found.index
        return {
            "picked": picked,
            "predicted": top.predicted if top is not None else torch.zeros(0, dtype=torch.long),
            "classes": found.predicted
            if found is not None and self.select == "top"
            else torch.zeros(0, dtype=torch.long),
            "scores": found.score if found is not None and self.select == "top" else torch.zeros(0),
            "removed": pairs,
            "cosines": torch.cat(cosines) if cosines else torch.empty(0),
            "unreadable": unreadable,
            "pool": start,
        }

    def mine_some(
        self, run: Run, parts: list[Split], scorer: nn.Module | None, classes: int, share: float
    ) -> dict[str, Any]:
        """A share of the work of :meth:`mine`, for a forecast, and as many images as can be chosen.

        Which ones an untrained network would choose, and take for duplicates, says nothing.
        """
        begun = [part.subset(torch.arange(max(1, round(share * len(part))))) for part in parts]
        found = self.mine(run, begun, scorer, classes)
        whole = sum(map(len, parts))
        count = whole if self.per_class is None else min(whole, self.per_class * classes)
        named = self.per_class is not None and self.select == "top"
        return {
            **found,
            "picked": torch.arange(count) * whole // count,
            "classes": torch.arange(count) % classes if named else found["classes"],
            "scores": torch.zeros(count) if named else found["scores"],
            "unreadable": 0,
        }

    def gallery(self, run: Run, look: Eye) -> Gallery | None:
        """The evaluation images, remembered; None where nobody asks for near-duplicates."""
        if self.duplicates is False:
            return None
        gallery = Gallery(self.duplicates.hash_distance, self.duplicates.cosine)
        for number, name in enumerate(EVALUATION):
            if name not in run.data.splits:
                continue
            for batch in run.data.split(name).in_order(256, device=run.world.device):
                flipped = batch.replace(pixel_values=batch["pixel_values"].flip(-1))
                seen, mirrored = look(batch), look(flipped)
                gallery.add(seen.pictures, seen.embedding, mirrored.embedding, batch.index, number)
        return gallery

    def confirmed(
        self, pairs: Tensor, cosines: Tensor, pictures: Tensor, run: Run, readable: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The pairs that stay pairs when their keypoints are compared, without those of unreadable images."""
        held = readable[pairs[:, 0]]
        pairs, cosines = pairs[held], cosines[held]
        if self.duplicates is False or self.duplicates.keypoints is None:
            return pairs, cosines
        kept = []
        for row, part, index, *_ in pairs.tolist():
            other = run.data.split(EVALUATION[part]).batch([index], device=run.world.device)
            image = run.data.to_unit(other["pixel_values"])
            kept.append(matching_keypoints(pictures[row : row + 1], image) >= self.duplicates.keypoints)
        mask = torch.tensor(kept, dtype=torch.bool)
        return pairs[mask], cosines[mask]


def _refuse_lost(found: Mapping[str, Any]) -> None:
    """Refuse a pool that cannot be read, or of which nothing is left."""
    unreadable, whole = found["unreadable"], found["pool"]
    if unreadable > UNREADABLE_SHARE * whole:
        raise UserError(
            f"pool: {unreadable} of {whole} images cannot be read, more than {UNREADABLE_SHARE:.0%}; repair or remove them."
        )
    if not len(found["picked"]):
        raise UserError(
            f"pool: none of {whole} images is left: {len(found['removed'])} are near-duplicates of evaluation images, "
            f"{unreadable} cannot be read; give other images, or loosen 'duplicates'."
        )


@dataclass(frozen=True)
class Seen:
    """What there is to see in a batch: pictures in [0, 1], embeddings, logits of the one who scores."""

    pictures: Tensor
    embedding: Tensor
    logits: Tensor | None


class Eye:
    """Looks at batches: as pictures, and through the scoring teacher."""

    def __init__(self, scorer: nn.Module | None, run: Run, duplicates: Literal[False] | NearDuplicates) -> None:
        self.scorer, self.run, self.duplicates = scorer, run, duplicates
        self.reader: Reader | None = None
        if scorer is not None:
            path = None
            if duplicates is not False and duplicates.embedding == "teacher":
                try:
                    path = classifier(scorer, run.data.split("train").batch([0], device=run.world.device))
                except UserError as error:
                    raise UserError(f"duplicates: {error} Or set duplicates.embedding=pixels.") from None
            self.reader = Reader(scorer, classifier=path)

    def __call__(self, batch: Batch) -> Seen:
        pictures = torch.empty(0)
        if self.duplicates is not False:
            pictures = self.run.data.to_unit(batch["pixel_values"])
        if self.reader is None or self.scorer is None:
            return Seen(pictures, pixel_embedding(pictures) if len(pictures) else pictures, None)
        with measuring(self.scorer):
            found = self.reader(batch)
        embedding = found.embedding
        if embedding is None:
            embedding = pixel_embedding(pictures) if len(pictures) else pictures
        return Seen(pictures, embedding.flatten(1) if embedding.dim() > 1 else embedding, found.logits)

    def close(self) -> None:
        """Look no more."""
        if self.reader is not None:
            self.reader.close()


class Mined:
    """What was chosen from a pool, and the report of it.

    Attributes:
        split: the chosen images, in the form of the target's, without labels.
    """

    def __init__(
        self, split: Split, found: Mapping[str, Any], names: list[str], sizes: list[int], classes: tuple[str, ...]
    ) -> None:
        self.split, self.found, self.names, self.sizes = split, found, names, sizes
        predicted = found["predicted"]
        self.classes = classes if len(classes) == len(predicted) else tuple(map(str, range(len(predicted))))
        taken = found["classes"]
        self.taken = torch.bincount(taken, minlength=len(predicted)) if len(taken) else None

    @property
    def metrics(self) -> dict[str, float]:
        """Counts by name, and each source's share of what was chosen."""
        counts = {
            "pool/images": self.found["pool"],
            "pool/unreadable": self.found["unreadable"],
            "pool/near_duplicates": len(self.found["removed"]),
            "pool/picked": len(self.found["picked"]),
        }
        shares = {f"pool/share/{i}": size / max(1, sum(self.sizes)) for i, size in enumerate(self.sizes)}
        return {name: float(value) for name, value in counts.items()} | (shares if len(self.sizes) > 1 else {})

    @property
    def tables(self) -> list[Table]:
        """The steps of the mining, counted; the classes; the first of the removed pairs."""
        rows: list[list[str | float | int]] = [
            ["images in the pool", int(self.found["pool"])],
            ["cannot be read", int(self.found["unreadable"])],
            ["near-duplicates of evaluation images, removed", len(self.found["removed"])],
            ["chosen", len(self.found["picked"])],
        ]
        rows += [[f"chosen from {name}", size] for name, size in zip(self.names, self.sizes, strict=True)]
        tables = [Table("Pool", ["step", "images"], rows)]
        if self.taken is not None:
            counts: list[list[str | float | int]] = [
                [name, int(seen), int(kept)]
                for name, seen, kept in zip(self.classes, self.found["predicted"], self.taken, strict=True)
            ]
            tables.append(Table("Pool by class", ["class", "predicted", "chosen"], counts))
        if len(self.found["removed"]):
            columns = ["pool image", "evaluation split", "evaluation image", "mirrored", "differing bits", "cosine"]
            tables.append(Table("Removed pairs (first 20)", columns, self.pairs()[:20]))
        return tables

    @property
    def notes(self) -> list[str]:
        """Classes for which nothing was chosen."""
        if self.taken is None:
            return []
        empty = [name for name, kept in zip(self.classes, self.taken, strict=True) if not kept]
        if not empty:
            return []
        return [
            f"of {len(empty)} of {len(self.classes)} classes no pool image was chosen, as the teacher predicts none: "
            f"{', '.join(empty)}."
        ]

    def pairs(self) -> list[list[str | float | int]]:
        """Every removed image with what it is a near-duplicate of."""
        return [
            [row, EVALUATION[part], index, "yes" if mirrored else "no", bits, round(cosine, 4)]
            for (row, part, index, mirrored, bits), cosine in zip(
                self.found["removed"].tolist(), self.found["cosines"].tolist(), strict=True
            )
        ]

    def save(self, directory: Path) -> None:
        """Write the report: counts, every chosen image with class and score, every removed pair."""
        told = {
            **{name.removeprefix("pool/"): value for name, value in self.metrics.items()},
            "sources": dict(zip(self.names, self.sizes, strict=True)),
        }
        (directory / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        with (directory / "removed.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["pool_index", "split", "index", "mirrored", "bits", "cosine"])
            rows.writerows(self.pairs())
        with (directory / "chosen.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            picked = self.found["picked"].tolist()
            if self.taken is None:
                rows.writerow(["pool_index"])
                rows.writerows([[index] for index in picked])
            else:
                rows.writerow(["pool_index", "class", "log_probability"])
                scored = zip(picked, self.found["classes"].tolist(), self.found["scores"].tolist(), strict=True)
                rows.writerows([[index, self.classes[label], f"{score:.6g}"] for index, label, score in scored])


def as_pool(spec: DataSpec, target: Split) -> DataSpec:
    """A data set as a pool: all of its images that are no evaluation split of its own, in the target's size and colours.

    A folder's files need no labels and no order, and those that cannot be read are counted and left out.
    """
    given, shape = spec.model_fields_set, target.facts.inputs.get("pixel_values")
    changes: dict[str, Any] = {}
    if isinstance(spec, Carving):
        changes |= {name: 0.0 for name in ("validation", "test") if name not in given}
    if isinstance(spec, FolderData) and shape is not None and shape[1] == shape[2]:
        changes |= {"labels": False, "skip_unreadable": True, "image_size": shape[1], "pixels": "unit"}
        changes["channels"] = 1 if shape[0] == 1 else 3
    return spec.model_copy(update=changes)


def resized(spec: DataSpec, size: int) -> Data:
    """The data at another resolution.

    Raises:
        UserError: its images cannot be had in that size.
    """
    if "image_size" not in type(spec).model_fields:
        raise UserError(f"fix.image_size: the data {spec.kind!r} has no field image_size, so it has one size only.")
    data = spec.model_copy(update={"image_size": size}).load()
    if data.facts.inputs.get("pixel_values", ())[-2:] != (size, size):
        raise UserError(f"fix.image_size: the data {data.name!r} does not come in {size} x {size}.")
    return data


def _takes(module: nn.Module, batch: Batch, size: int) -> None:
    with measuring(module):
        try:
            logits(module, batch)
        except (MisfitError, RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"fix.image_size: {type(module).__name__} does not take images of {size} x {size} ({reason}); choose a network "
                "that pools over all positions, or leave 'fix' out."
            ) from None


def _on(data: Data, student: nn.Module, run: Run) -> dict[str, float]:
    name = "test" if "test" in data.splits else "validation"
    return _named(name, quality(student, data.split(name), run)) if name in data.splits else {}


def _named(place: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{place}/{name}": value for name, value in numbers.items()}
