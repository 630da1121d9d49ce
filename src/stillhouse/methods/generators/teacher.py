"""Diffusion models as teachers: pretrained ones, and ones that are trained on the spot and kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.data import DataSpec
from stillhouse.engine import Optimizer, Run, SubRun
from stillhouse.errors import UnreachableError, UserError
from stillhouse.facts import Facts
from stillhouse.methods.generators.denoiser import Denoiser, DenoiserTraining
from stillhouse.methods.generators.process import Process
from stillhouse.models import DiffusersSpec, FileSpec, ModelSpec, ObjectSpec
from stillhouse.models.hub import diffusers
from stillhouse.modules.noise import NoiseSchedule, Prediction, check_prediction, from_diffusers
from stillhouse.spec import Spec, Tagged, read

PRETRAINED = ("diffusers", "file", "import", "object")


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher that is ready: its network and the process that it works on."""

    net: nn.Module
    process: Process


class DiffusionTeacher(Tagged):
    """A diffusion model: a pretrained one (``diffusers:owner/name:unet``, ``file:DIR``, a module), or a network to train.

    Any text or mapping that names a network without weights (``unet:32``, ``point_denoiser``) is a teacher to train,
    with the defaults of :class:`TrainedDiffusion`. A diffusers pipeline gives its denoiser and its scheduler.
    """

    noun = "teacher"

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Also accept whatever a model accepts, and a pipeline."""
        kind = value.get("kind") if isinstance(value, dict) else None
        if isinstance(value, cls) or (isinstance(kind, str) and kind in cls.members):
            return super().parse(value)
        fields: dict[str, Any] = {}
        if hasattr(value, "scheduler"):
            schedule, prediction = from_diffusers(value.scheduler)
            fields = {"schedule": schedule, "prediction": prediction}
            value = getattr(value, "unet", None) or getattr(value, "transformer", None)
        if isinstance(value, nn.Module):
            # A teacher is never changed, so it need not be copied either.
            value = ObjectSpec(object=value, copy_on_build=False)
        model = ModelSpec.parse(value)
        member = PretrainedDiffusion if _has_weights(model) else TrainedDiffusion
        return member(model=model, **fields)  # type: ignore[return-value]

    @property
    def foreseen(self) -> NoiseSchedule | None:
        """The forward process, where it is known before anything is loaded or trained."""
        return None

    def ready(self, run: Run, facts: Facts | None, name: str = "teacher") -> Generator[SubRun, Any, Teacher]:
        """Train or load the teacher: ``teacher = yield from self.teacher.ready(run, facts)``."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it gets ready.")


class PretrainedDiffusion(DiffusionTeacher):
    """A diffusion model that comes with its weights.

    Its process is read from ``process.json`` (as distilled students are saved) or ``scheduler/scheduler_config.json``
    beside the network, where the fields do not say it.
    """

    kind = "pretrained"

    model: ModelSpec = Field(description="the network")
    schedule: NoiseSchedule | None = Field(None, description="its forward process; the saved scheduler's by default")
    prediction: Prediction | None = Field(None, description="what it predicts; as the saved scheduler says by default")
    conditions: tuple[str, ...] = Field(
        (),
        description="tensors of the data that it takes by keyword, such as encoder_hidden_states; none: class labels",
    )
    null_conditions: str | None = Field(
        None, description="safetensors file with their values for 'no condition', for guidance; zeros when not given"
    )
    null_class: int | None = Field(
        None,
        ge=1,
        description="class label that it takes for 'no condition', after all others; when not given, as process.json says, a "
        "DiT's last, or the one that it has more than the data",
    )

    @model_validator(mode="after")
    def _one_kind_of_condition(self) -> Self:
        if self.conditions and self.null_class is not None:
            raise ValueError("'null_class' is for class labels; beside 'conditions' give 'null_conditions'")
        return self

    @property
    def foreseen(self) -> NoiseSchedule | None:
        """What the field says."""
        return self.schedule

    def ready(self, run: Run, facts: Facts | None, name: str = "teacher") -> Generator[SubRun, Any, Teacher]:
        """Load it."""
        yield from ()
        told = self.schedule is not None and self.prediction is not None
        written = self._written() or (None if told else self._scheduler())
        schedule, prediction = self.schedule, self.prediction
        if written is not None:
            schedule, prediction = schedule or written.schedule, prediction or written.prediction
        if schedule is None or prediction is None:
            raise UserError(
                f"teacher: nothing says which process the model {self.model.kind!r} was trained on; give 'schedule' (edm, vp "
                "or flow) and 'prediction'."
            )
        check_prediction(schedule, prediction)
        null = self.null_class
        if null is None and written is not None and not self.conditions:
            null = written.null_class
        net = self.model.build(facts or Facts({"pixel_values": ()}))
        return Teacher(net, Process.of(net, schedule, prediction, facts, self.conditions, self._null(), null))

    def _null(self) -> dict[str, Tensor]:
        if self.null_conditions is None:
            return {}
        try:
            found: dict[str, Tensor] = load_file(Path(self.null_conditions).expanduser())
        except (OSError, SafetensorError) as error:
            kind = UnreachableError if isinstance(error, FileNotFoundError) else UserError
            raise kind(f"null_conditions: {self.null_conditions} cannot be read: {error}.") from None
        return found

    def _homes(self) -> list[Path]:
        """Directories that may say what the process is."""
        if isinstance(self.model, FileSpec):
            return [Path(self.model.path).expanduser(), Path(self.model.path).expanduser().parent]
        if isinstance(self.model, DiffusersSpec) and self.model.name is not None:
            return [Path(self.model.name).expanduser()]
        return []

    def _written(self) -> Written | None:
        """The process as stillhouse wrote it beside the network."""
        for home in self._homes():
            if (home / "process.json").is_file():
                description = json.loads((home / "process.json").read_text())
                return read(  # type: ignore[no-any-return]
                    Written, {key: description.get(key) for key in Written.model_fields}, where=str(home)
                )
        return None

    def _scheduler(self) -> Written | None:
        """The process of the scheduler that diffusers wrote beside the network."""
        config: Any = None
        for home in self._homes():
            if (home / "scheduler" / "scheduler_config.json").is_file():
                config = json.loads((home / "scheduler" / "scheduler_config.json").read_text())
                break
        else:
            if not isinstance(self.model, DiffusersSpec) or self.model.name is None:
                return None
            try:
                config = diffusers().SchedulerMixin.load_config(
                    self.model.name, subfolder="scheduler", revision=self.model.revision
                )
            except (OSError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                kind = UnreachableError if isinstance(error, OSError) else UserError
                raise kind(f"The scheduler of {self.model.name!r} could not be read: {reason}.") from None
        schedule, prediction = from_diffusers(config)
        return Written(schedule=schedule, prediction=prediction)


class Written(Spec):
    """What ``process.json`` says of a process."""

    schedule: NoiseSchedule
    prediction: Prediction
    null_class: int | None = None


class TrainedDiffusion(DenoiserTraining, DiffusionTeacher):
    """A diffusion model trained before the run, with a seed of its own: trained once, then found in the cache."""

    kind = "trained"

    optimizer: Optimizer = Field(Optimizer(name="adamw", lr=2e-3, schedule="cosine"), description="its optimiser")
    num_steps: int = Field(5_000, ge=1, description="its steps")
    batch_size: int = Field(64, ge=1, description="samples per process and step")
    ema: float = Field(0.995, gt=0, lt=1, description="decay of the averaged weights, which are the ones that are kept")
    data: DataSpec | None = Field(None, description="its data set; the student's when not given")
    seed: int = Field(0, ge=0, description="its own seed, so that every run meets the same teacher")

    @property
    def foreseen(self) -> NoiseSchedule:
        """The one that it will be trained on."""
        return self.schedule

    def ready(self, run: Run, facts: Facts | None, name: str = "teacher") -> Generator[SubRun, Any, Teacher]:
        """Train it, or find it."""
        data = self.data or run.method.data
        if data is None:
            raise UserError(
                "teacher: a teacher is trained on data, and there is none; give 'data' or a pretrained one."
            )
        training = {field: getattr(self, field) for field in DenoiserTraining.model_fields}
        method = Denoiser(data=data, eval_samples=0, **training)
        result = yield SubRun(name, method, seed=self.seed, data=run.data if self.data is None else None)
        net: nn.Module = result.model.net
        own = result.model.process
        if facts is None:
            return Teacher(net, own)
        return Teacher(net, Process.of(net, self.schedule, self.prediction, facts, null=own.null))


def _has_weights(model: ModelSpec) -> bool:
    return model.kind in PRETRAINED and not (isinstance(model, DiffusersSpec) and model.name is None)
