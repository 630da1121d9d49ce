"""Teachers as fields: pretrained ones, and ones that are trained on the spot and kept in the cache."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Self

from pydantic import Field
from torch import nn

from stillhouse.data import Augment, DataSpec
from stillhouse.engine import Optimizer, Run, SubRun
from stillhouse.methods.supervised import Supervised
from stillhouse.models import ModelSpec, ObjectSpec
from stillhouse.spec import Tagged

PRETRAINED = ("hf", "file", "import", "object", "predictor")


class TeacherSpec(Tagged):
    """A teacher: a pretrained model (``hf:owner/name``, ``file:DIR``, ``pkg.mod:Name``, a module, a fitted
    estimator of scikit-learn's kind), or a network to train.

    Any text or mapping that names a network without weights (``resnet``, ``{kind: cnn, channels: ...}``) is a teacher to
    train, with the defaults of :class:`TrainedTeacher`.
    """

    noun = "teacher"

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Also accept whatever a model accepts."""
        kind = value.get("kind") if isinstance(value, dict) else None
        if isinstance(value, cls) or (isinstance(kind, str) and kind in cls.members):
            return super().parse(value)
        if isinstance(value, nn.Module):
            # A teacher is never changed, so it need not be copied either.
            value = ObjectSpec(object=value, copy_on_build=False)
        model = ModelSpec.parse(value)
        member = PretrainedTeacher if model.kind in PRETRAINED else TrainedTeacher
        return member(model=model)  # type: ignore[return-value]

    def ready(self, run: Run, name: str = "teacher") -> Generator[SubRun, Any, nn.Module]:
        """Train or load the teacher: ``teacher = yield from self.teacher.ready(run)``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it gets ready.")


class PretrainedTeacher(TeacherSpec):
    """A model that comes with its weights."""

    kind = "pretrained"

    model: ModelSpec = Field(description="the model")

    def ready(self, run: Run, name: str = "teacher") -> Generator[SubRun, Any, nn.Module]:
        """Load it."""
        yield from ()
        return self.model.build(run.data.facts)


class TrainedTeacher(TeacherSpec):
    """A network trained on labels before the run, with a seed of its own: trained once, then found in the cache."""

    kind = "trained"

    model: ModelSpec = Field("cnn", description="the network", validate_default=True)
    data: DataSpec | None = Field(None, description="its data set; the student's when not given")
    optimizer: Optimizer = Field(Optimizer(name="adamw", lr=1e-3, schedule="cosine"), description="its optimiser")
    epochs: float = Field(30, gt=0, description="passes over its training split")
    batch_size: int = Field(64, ge=1, description="samples per process and step")
    augment: Augment = Field("none", description="augmentation of its training images", validate_default=True)
    seed: int = Field(0, ge=0, description="its own seed, so that every run meets the same teacher")

    training: ClassVar[type[Supervised]] = Supervised

    def ready(self, run: Run, name: str = "teacher") -> Generator[SubRun, Any, nn.Module]:
        """Train it, or find it."""
        method = self.training(
            data=self.data or run.method.data,
            model=self.model,
            optimizer=self.optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
            augment=self.augment,
        )
        result = yield SubRun(name, method, seed=self.seed, data=run.data if self.data is None else None)
        model: nn.Module = result.model
        return model
