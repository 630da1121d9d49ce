"""Diffusion models as teachers: pretrained ones, and ones that are trained on the spot and kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.data import DataSpec
from stillhouse.engine import Optimizer, Run, SubRun
from stillhouse.errors import UserError
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
        if isinstance(value, cls) or (kind in cls.members):
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

    def ready(self, run: Run, facts: Facts | None, name: str = "teacher") -> Generator[SubRun, Any, Teacher]:
        """Load it."""
        yield from ()
        saved = self._saved() if self.schedule is None or self.prediction is None else None
        if saved is None and (self.schedule is None or self.prediction is None):
            raise UserError(
                f"teacher: nothing says which process the model {self.model.kind!r} was trained on; give 'schedule' (edm, vp "
                "or flow) and 'prediction'."
            )
        schedule = self.schedule or saved[0]  # type: ignore[index]
        prediction: Prediction = self.prediction or saved[1]  # type: ignore[index]
        check_prediction(schedule, prediction)
        net = self.model.build(facts or Facts({"pixel_values": ()}))
        process = Process.of(net, schedule, prediction, facts, self.conditions, self._null())
        return Teacher(net, process)

    def _null(self) -> dict[str, Tensor]:
        if self.null_conditions is None:
            return {}
        try:
            found: dict[str, Tensor] = load_file(Path(self.null_conditions).expanduser())
        except (OSError, SafetensorError) as error:
            raise UserError(f"null_conditions: {self.null_conditions} cannot be read: {error}.") from None
        return found

    def _saved(self) -> tuple[NoiseSchedule, Prediction] | None:
        """The process that is written beside the network."""
        if isinstance(self.model, FileSpec):
            homes = [Path(self.model.path).expanduser(), Path(self.model.path).expanduser().parent]
        elif isinstance(self.model, DiffusersSpec) and self.model.name is not None:
            homes = [Path(self.model.name).expanduser()]
        else:
            return None
        for home in homes:
            if (home / "process.json").is_file():
                description = json.loads((home / "process.json").read_text())
                found: Written = read(
                    Written, {key: description.get(key) for key in Written.model_fields}, where=str(home)
                )
                return found.schedule, found.prediction
            if (home / "scheduler" / "scheduler_config.json").is_file():
                return from_diffusers(json.loads((home / "scheduler" / "scheduler_config.json").read_text()))
        if isinstance(self.model, DiffusersSpec) and self.model.name is not None:
            library = diffusers()
            try:
                config = library.SchedulerMixin.load_config(
                    self.model.name, subfolder="scheduler", revision=self.model.revision
                )
            except (OSError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                raise UserError(f"The scheduler of {self.model.name!r} could not be read: {reason}.") from None
            return from_diffusers(config)
        return None


class Written(Spec):
    """What ``process.json`` says of a process."""

    schedule: NoiseSchedule
    prediction: Prediction


class TrainedDiffusion(DenoiserTraining, DiffusionTeacher):
    """A diffusion model trained before the run, with a seed of its own: trained once, then found in the cache."""

    kind = "trained"

    optimizer: Optimizer = Field(Optimizer(name="adamw", lr=2e-3, schedule="cosine"), description="its optimiser")
    num_steps: int = Field(5_000, ge=1, description="its steps")
    batch_size: int = Field(64, ge=1, description="samples per process and step")
    ema: float = Field(0.995, gt=0, lt=1, description="decay of the averaged weights, which are the ones that are kept")
    data: DataSpec | None = Field(None, description="its data set; the student's when not given")
    seed: int = Field(0, ge=0, description="its own seed, so that every run meets the same teacher")

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
        return Teacher(net, Process.of(net, self.schedule, self.prediction, facts) if facts is not None else own)


def _has_weights(model: ModelSpec) -> bool:
    return model.kind in PRETRAINED and not (isinstance(model, DiffusersSpec) and model.name is None)
