"""How a student starts, as a field: from weights that it comes with, from training on labels, or from random weights."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar

from pydantic import Field

from stillhouse.data import Augment
from stillhouse.engine import Optimizer, Run, SubRun
from stillhouse.errors import UserError
from stillhouse.methods.supervised import Supervised
from stillhouse.methods.teacher import PRETRAINED
from stillhouse.models import ModelSpec, ObjectSpec
from stillhouse.modules.mixing import Mixing
from stillhouse.spec import Tagged


class StartSpec(Tagged):
    """Where a student's first weights come from: ``pretrained``, ``scratch``, ``trained``, or a mapping."""

    noun = "start"

    def ready(self, student: ModelSpec, run: Run) -> Generator[SubRun, Any, ModelSpec]:
        """The student with these weights: ``student = yield from self.start.ready(self.student, run)``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a student starts.")


class ScratchStart(StartSpec):
    """Random weights."""

    kind = "scratch"

    def ready(self, student: ModelSpec, run: Run) -> Generator[SubRun, Any, ModelSpec]:
        yield from ()
        return student


class PretrainedStart(StartSpec):
    """The weights that the student comes with."""

    kind = "pretrained"

    def ready(self, student: ModelSpec, run: Run) -> Generator[SubRun, Any, ModelSpec]:
        if student.kind not in PRETRAINED:
            raise UserError(
                f"start: the student {student.kind!r} comes without weights; give trained ones (hf:owner/name, file:DIR, a "
                "module), or set start=trained to train it on the labels first, or start=scratch."
            )
        yield from ()
        return student


class TrainedStart(StartSpec):
    """The weights of the student trained on the labels before, with the run's seed; found again in the cache."""

    kind = "trained"
    training: ClassVar[type[Supervised]] = Supervised

    optimizer: Optimizer = Field(Optimizer(name="adamw", lr=1e-3, schedule="cosine"), description="its optimiser")
    epochs: float = Field(30, gt=0, description="passes over the training split")
    batch_size: int = Field(64, ge=1, description="samples per process and step")
    augment: Augment = Field("none", description="augmentation of the training images", validate_default=True)
    mix: Mixing = Field("none", description="how training samples are mixed", validate_default=True)

    def ready(self, student: ModelSpec, run: Run) -> Generator[SubRun, Any, ModelSpec]:
        method = self.training(
            data=run.method.data,
            model=student,
            optimizer=self.optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            augment=self.augment,
            mix=self.mix,
        )
        result = yield SubRun("student-start", method, seed=run.seed, data=run.data)
        return ObjectSpec.from_object(result.model)
