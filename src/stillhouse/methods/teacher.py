"""Teachers as fields: pretrained ones, and ones that are trained on the spot and kept in the cache."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from stillhouse.data import Augment, DataSpec
from stillhouse.engine import Optimizer, Run, SubRun
from stillhouse.errors import UserError
from stillhouse.methods.supervised import Supervised
from stillhouse.models import Adapted, ModelSpec, ObjectSpec
from stillhouse.models.adapted import named_order, smallest_image
from stillhouse.modules.mixing import Mixing
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
    mean: tuple[float, ...] | None = Field(
        None, description="mean of each channel that its pixels in [0, 1] lack, where they differ from the data's"
    )
    std: tuple[float, ...] | None = Field(None, description="what they are divided by")
    size: int | None = Field(None, ge=1, description="side of the pictures it takes, where it differs from the data's")
    classes: Literal["names"] | tuple[int, ...] | None = Field(
        None, description="its output for each class of the data, where the order differs; names: by its configuration"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std belong together, one of each per channel")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std is above 0, not {min(self.std):g}")
        return self

    def ready(self, run: Run, name: str = "teacher") -> Generator[SubRun, Any, nn.Module]:
        """Load it, and fit it to the data's pixels and classes."""
        yield from ()
        module = self.model.build(run.data.facts)
        classes = self._order(module, run, name)
        shape = run.data.facts.inputs.get("pixel_values")
        smallest = smallest_image(module)
        if shape is not None and self.size is None and smallest is not None and min(shape[1:]) < smallest:
            raise UserError(
                f"{name}: it takes pictures of {smallest}x{smallest} and the data's are {shape[1]}x{shape[2]}; set "
                f"{name}.size={smallest} to enlarge them for it."
            )
        if (self.mean, self.size, classes) == (None, None, None):
            return module
        if shape is None or run.data.scale is None:
            raise UserError(
                f"{name}: mean, std, size and classes are for images, which {run.data.name!r} does not have."
            )
        gain = shift = None
        if self.mean is not None and self.std is not None:
            scale, channels = run.data.scale, len(self.mean)
            if len(scale.mean) not in (1, channels):
                raise UserError(f"{name}.mean: the data has {len(scale.mean)} channels, not {channels}.")
            means, stds = (values * (channels if len(values) == 1 else 1) for values in (scale.mean, scale.std))
            gain = [ours / own for ours, own in zip(stds, self.std, strict=True)]
            shift = [(ours - own) / std for ours, own, std in zip(means, self.mean, self.std, strict=True)]
        return Adapted(module, gain=gain, shift=shift, size=self.size, classes=classes)

    def _order(self, module: nn.Module, run: Run, name: str) -> tuple[int, ...] | None:
        """Its output for each class; None where they are in the data's order."""
        names, count = run.data.facts.class_names, run.data.facts.num_classes
        found = named_order(module, names)
        if self.classes == "names":
            if found is None:
                raise UserError(
                    f"{name}.classes: it does not name all classes of the data, so list its outputs by number."
                )
            return found
        if self.classes is None:
            if found is not None and found != tuple(range(len(found))):
                raise UserError(
                    f"{name}: its classes are named as the data's but stand in another order; set {name}.classes=names."
                )
            return None
        if count is not None and len(self.classes) != count:
            raise UserError(f"{name}.classes: there are {count} classes and {len(self.classes)} outputs named.")
        return self.classes


class TrainedTeacher(TeacherSpec):
    """A network trained on labels before the run, with a seed of its own: trained once, then found in the cache."""

    kind = "trained"

    model: ModelSpec = Field("cnn", description="the network", validate_default=True)
    data: DataSpec | None = Field(None, description="its data set; the student's when not given")
    optimizer: Optimizer = Field(Optimizer(name="adamw", lr=1e-3, schedule="cosine"), description="its optimiser")
    epochs: float = Field(30, gt=0, description="passes over its training split")
    batch_size: int = Field(64, ge=1, description="samples per process and step")
    augment: Augment = Field("none", description="augmentation of its training images", validate_default=True)
    mix: Mixing = Field(
        "none", description="how its training samples are mixed: mixup, cutmix, ...", validate_default=True
    )
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
            mix=self.mix,
        )
        result = yield SubRun(name, method, seed=self.seed, data=run.data if self.data is None else None)
        model: nn.Module = result.model
        return model
