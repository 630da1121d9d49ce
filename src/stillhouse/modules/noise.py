"""Noise schedules, what a denoiser predicts, and the exact conversions between predictions.

Everything here is one picture. A schedule mixes a clean sample with Gaussian noise, ``x_t = α_t x_0 + σ_t ε``; whatever
a network predicts is another mix of the same two, ``p = a x_0 + b ε``. The noisy sample and one prediction are two
linear equations in two unknowns, so every prediction gives every other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Float, Float64, Num
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.errors import UserError, nearest
from stillhouse.spec import Tagged, read

Prediction = Literal["sample", "epsilon", "v_prediction", "flow_prediction", "score", "edm"]
"""What a network predicts, in diffusers' words where it has one: ``sample``, the clean ``x_0``; ``epsilon``, the noise;
``v_prediction``, ``α_t ε - σ_t x_0`` (arXiv 2202.00512); ``flow_prediction``, ``ε - x_0`` (rectified flow, arXiv
2209.03003); ``score``, ``-ε / σ_t``; or ``edm``, the raw network F in ``D = c_skip x_t + c_out F`` (arXiv 2206.00364,
Eq. 7)."""

Condition = Tensor | Mapping[str, Any] | None
"""What a denoiser is conditioned on: a tensor goes third (``net(x, time, condition)``), a mapping by keyword
(``class_labels=``, ``encoder_hidden_states=``, ``added_cond_kwargs=``)."""


class NoiseSchedule(Tagged):
    """A forward process ``x_t = α_t x_0 + σ_t ε``, as text (``edm``, ``vp``, ``flow``) or a mapping.

    ``t`` is in the member's own unit, always growing with the noise: the noise level itself for ``edm``, an integer
    step for ``vp``, a fraction of the path for ``flow``. It has shape ``batch``, or one element for the whole batch.
    """

    noun = "noise schedule"

    num_train_timesteps: int = Field(default=1000, ge=1)
    """Number of times in the training table."""
    sigma_data: float = Field(default=0.5, gt=0)
    """Standard deviation of the data, for EDM preconditioning and weights."""

    @property
    def times(self) -> Num[Tensor, "timesteps"]:
        """The training times, from the least noise to the most, on the CPU."""
        raise NotImplementedError

    def alpha(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Scale of the clean sample at ``t``, in double precision."""
        raise NotImplementedError

    def sigma(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Standard deviation of the noise at ``t``, in double precision."""
        raise NotImplementedError

    def grid(self, num_steps: int) -> Num[Tensor, "steps"]:
        """The times of a sampler with ``num_steps`` steps, from the most noise down; clean data follows the last."""
        raise NotImplementedError

    def start(self, noise: Float[Tensor, "batch ..."], t: Num[Tensor, "*batch"]) -> Float[Tensor, "batch ..."]:
        """What sampling starts from at ``t``: the noise itself, where the process ends in unit variance."""
        del t
        return noise

    def network_inputs(
        self, x_t: Float[Tensor, "batch ..."], t: Num[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "batch ..."], Num[Tensor, "batch"]]:
        """The noisy sample and the time as the network takes them."""
        return x_t, t.expand(x_t.shape[0])

    def log_snr(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Logarithm of the signal-to-noise ratio, ``ln(α_t^2 / σ_t^2)``."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(
        self, x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."], t: Num[Tensor, "*batch"]
    ) -> Float[Tensor, "batch ..."]:
        """Draw from the forward process: ``x_t = α_t x_0 + σ_t ε``, in the type of ``x0``."""
        dtype = torch.promote_types(x0.dtype, torch.float32)
        alpha, sigma = (_per_sample(value, x0, dtype) for value in (self.alpha(t), self.sigma(t)))
        return (alpha * x0 + sigma * noise).to(x0.dtype)

    def draw(self, uniform: Float[Tensor, "batch"], low: float = 0.0, high: float = 1.0) -> Num[Tensor, "batch"]:
        """Training times, uniform over the table between two fractions of it.

        Args:
            uniform: numbers uniform in [0, 1), such as ``torch.rand(batch)``.
            low: fraction of the table below which nothing is drawn.
            high: fraction above which nothing is drawn; the step at ``high`` itself is included (0.02 to 0.98 of 1000
                gives steps 20 to 980).

        Raises:
            UserError: the range holds no step.
        """
        count = self.num_train_timesteps
        first, last = int(low * count), min(int(high * count), count - 1)
        if not 0 <= first <= last:
            raise UserError(f"No training time lies between {low} and {high}; use fractions with 0 <= low < high <= 1.")
        index = (first + uniform * (last + 1 - first)).long().clamp(max=last)
        drawn = _table(self, "times", uniform.device)[index]
        return drawn.float() if drawn.is_floating_point() else drawn

    def at(self, steps: Sequence[int]) -> Num[Tensor, "steps"]:
        """Times of a few-step student by their places in the training table, such as ``[999, 749, 499, 249]``.

        Raises:
            UserError: they do not start at the last place or do not descend.
        """
        last = self.num_train_timesteps - 1
        if not steps or steps[0] != last:
            raise UserError(f"A few-step schedule starts at the last step {last}, which {list(steps)} does not.")
        if any(after >= before for before, after in pairwise(steps)) or steps[-1] < 0:
            raise UserError(f"A few-step schedule descends to at least 0, which {list(steps)} does not.")
        return self.times[list(steps)]


class EDMNoise(NoiseSchedule):
    """The variance-exploding process of Karras et al. (arXiv 2206.00364, Table 1, "ours"): ``x_t = x_0 + t ε``."""

    kind = "edm"

    sigma_min: float = Field(default=0.002, gt=0)
    """Least noise level."""
    sigma_max: float = Field(default=80.0, gt=0)
    """Largest noise level, where sampling starts."""
    rho: float = Field(default=7.0, gt=0)
    """How much the table of noise levels favours the small ones."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"'sigma_min' is {self.sigma_min} and must be less than 'sigma_max', {self.sigma_max}")
        return self

    @property
    def times(self) -> Float64[Tensor, "timesteps"]:
        return self.grid(self.num_train_timesteps).flip(0)

    def alpha(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return torch.ones_like(t, dtype=_double(t))

    def sigma(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return t.to(_double(t))

    def grid(self, num_steps: int) -> Float64[Tensor, "steps"]:
        """Noise levels of Eq. 5."""
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return torch.linspace(*ends, num_steps, dtype=torch.float64) ** self.rho

    def start(self, noise: Float[Tensor, "batch ..."], t: Num[Tensor, "*batch"]) -> Float[Tensor, "batch ..."]:
        """The noise scaled to the level ``t``."""
        return _per_sample(t, noise, noise.dtype) * noise

    def network_inputs(
        self, x_t: Float[Tensor, "batch ..."], t: Num[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch"]]:
        """``c_in x_t`` and ``c_noise = ln(σ) / 4`` of Table 1."""
        sigma = self.sigma(t)
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        return _per_sample(c_in, x_t, x_t.dtype) * x_t, (sigma.log() / 4).to(torch.float32).expand(x_t.shape[0])

    def lognormal(self, normal: Float[Tensor, "batch"], mean: float = -1.2, std: float = 1.2) -> Float[Tensor, "batch"]:
        """Noise levels as EDM teachers are trained on, ``ln σ ~ N(mean, std^2)``, from standard normal numbers."""
        return (mean + std * normal).exp()


class VPNoise(NoiseSchedule):
    """A variance-preserving process with discrete steps, as in DDPM (arXiv 2006.11239), with diffusers' field names.

    ``t`` is the step, from 0 to ``num_train_timesteps - 1``.
    """

    kind = "vp"

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """How the noise grows: DDPM's ``linear``, latent diffusion's ``scaled_linear``, the cosine of arXiv 2102.09672."""
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    """First variance (not for the cosine)."""
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    """Last variance (not for the cosine)."""
    trained_betas: tuple[float, ...] | None = None
    """The variances themselves, in place of a named schedule."""
    rescale_betas_zero_snr: bool = False
    """Rescale so that nothing of the signal is left at the last step (arXiv 2305.08891, Algorithm 1)."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        count = self.num_train_timesteps
        if self.trained_betas is not None and len(self.trained_betas) != count:
            raise ValueError(
                f"'trained_betas' lists {len(self.trained_betas)} variances, not 'num_train_timesteps', {count}"
            )
        return self

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls.model_validate({"beta_schedule": text}) if text else cls()

    @property
    def times(self) -> Num[Tensor, "timesteps"]:
        return torch.arange(self.num_train_timesteps)

    @property
    def alphas_cumprod(self) -> Float64[Tensor, "timesteps"]:
        """``ᾱ_t = α_t^2``, the share of signal left in the variance."""
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        elif self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, count, dtype=torch.float64)
        elif self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, count, dtype=torch.float64) ** 2
        else:
            phase = (torch.arange(count + 1, dtype=torch.float64) / count + 0.008) / 1.008
            level = (phase * math.pi / 2).cos() ** 2
            betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        root = (1 - betas).cumprod(0).sqrt()
        if self.rescale_betas_zero_snr:
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return root**2

    def _signal(self, t: Tensor) -> Tensor:
        return _table(self, "alphas_cumprod", t.device)[t]

    def alpha(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return self._signal(t).sqrt()

    def sigma(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return (1 - self._signal(t)).sqrt()

    def grid(self, num_steps: int) -> Num[Tensor, "steps"]:
        """Evenly spaced steps that begin at the very last ("trailing", arXiv 2305.08891, Table 2)."""
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise UserError(f"A sampler takes between 1 and {self.num_train_timesteps} steps, not {num_steps}.")
        count = self.num_train_timesteps
        return torch.arange(num_steps, 0, -1, dtype=torch.float64).mul(count / num_steps).round().long() - 1


class FlowNoise(NoiseSchedule):
    """The straight path of rectified flow: ``x_t = (1 - t) x_0 + t ε``, ``t`` from 0 to 1."""

    kind = "flow"

    shift: float = Field(default=1.0, gt=0)
    """Moves times towards the noise, ``t → s t / (1 + (s - 1) t)`` (arXiv 2403.03206, Eq. 23)."""

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    @property
    def times(self) -> Float64[Tensor, "timesteps"]:
        count = self.num_train_timesteps
        return self._shifted(torch.arange(1, count + 1, dtype=torch.float64) / count)

    def alpha(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return 1 - t.to(_double(t))

    def sigma(self, t: Num[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        return t.to(_double(t))

    def grid(self, num_steps: int) -> Float64[Tensor, "steps"]:
        return self._shifted(torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps)

    def network_inputs(
        self, x_t: Float[Tensor, "batch ..."], t: Num[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch"]]:
        """The sample as it is and the time counted in training steps, as diffusers' flow transformers take it."""
        return x_t, (t.to(_double(t)) * self.num_train_timesteps).to(torch.float32).expand(x_t.shape[0])


def from_diffusers(scheduler: Any) -> tuple[NoiseSchedule, Prediction]:
    """The schedule and the prediction of a diffusers scheduler, or of its config (``scheduler_config.json``).

    >>> schedule, prediction = from_diffusers({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"})
    >>> schedule.kind, prediction
    ('edm', 'edm')

    Raises:
        UserError: the scheduler or its prediction is of a kind not known here.
    """
    config: Mapping[str, Any] = getattr(scheduler, "config", scheduler)
    name = str(config.get("_class_name", type(scheduler).__name__))
    member: type[NoiseSchedule]
    names: dict[str, Prediction]
    if name.startswith("EDM") and config.get("sigma_schedule", "karras") == "karras":
        member, names = EDMNoise, {"epsilon": "edm"}
    elif name.startswith("FlowMatch"):
        member, names = FlowNoise, {"flow_prediction": "flow_prediction"}
    elif "beta_schedule" in config:
        member, names = VPNoise, {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction"}
    else:
        raise UserError(f"The scheduler {name!r} is of no known kind: none of DDPM, EDM (karras) and FlowMatch.")
    given = str(config.get("prediction_type", next(iter(names))))
    if given not in names:
        raise UserError(f"The scheduler {name!r} has the prediction type {given!r}; {nearest(given, names)}.")
    fields = {key: value for key, value in config.items() if key in member.model_fields and value is not None}
    schedule: NoiseSchedule = read(member, fields, where=name)
    return schedule, names[given]


def to_diffusers(schedule: NoiseSchedule, prediction: Prediction) -> dict[str, Any]:
    """The config of the deterministic diffusers scheduler for this process; the inverse of :func:`from_diffusers`.

    >>> to_diffusers(EDMNoise(), "edm")["_class_name"]
    'EDMEulerScheduler'

    Raises:
        UserError: diffusers has no scheduler for this prediction on this process.
    """
    names: dict[str, tuple[str, dict[str, str]]] = {
        "edm": ("EDMEulerScheduler", {"edm": "epsilon"}),
        "flow": ("FlowMatchEulerDiscreteScheduler", {"flow_prediction": "flow_prediction"}),
        "vp": ("DDIMScheduler", {name: name for name in ("epsilon", "sample", "v_prediction")}),
    }
    scheduler, predictions = names[schedule.kind]
    if prediction not in predictions:
        raise UserError(f"The {scheduler} of diffusers takes no {prediction!r}; {nearest(prediction, predictions)}.")
    fields = schedule.model_dump(mode="json")
    if schedule.kind != "edm":
        del fields["sigma_data"]
    if schedule.kind != "flow":
        fields["prediction_type"] = predictions[prediction]
    if schedule.kind == "vp":
        fields |= {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    return {"_class_name": scheduler, **fields}


def check_prediction(schedule: NoiseSchedule, prediction: str) -> None:
    """Check that ``prediction`` is a known one and determines the clean sample at every training time.

    Raises:
        UserError: it is unknown, or says nothing about the sample where the schedule leaves no signal.
    """
    known = get_args(Prediction)
    if prediction not in known:
        raise UserError(f"There is no prediction {prediction!r}; {nearest(prediction, known)}.")
    if prediction in ("epsilon", "score") and not schedule.alpha(schedule.times[-1:]).item() > 0:
        raise UserError(
            f"A network that predicts {prediction!r} says nothing about the sample at the last step of this schedule, "
            "where no signal is left; use 'v_prediction', or a schedule whose signal does not vanish."
        )


def mix(
    prediction: Prediction, alpha: Float[Tensor, "*batch"], sigma: Float[Tensor, "*batch"], sigma_data: float = 0.5
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The coefficients (a, b) of a prediction ``p = a x_0 + b ε``."""
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    match prediction:
        case "sample":
            return one, zero
        case "epsilon":
            return zero, one
        case "v_prediction":
            return -sigma, alpha
        case "flow_prediction":
            return -one, one
        case "score":
            return zero, -1 / sigma
        case "edm":
            # F = (x_0 - c_skip x) / c_out of EDM's Table 1 at the noise level sigma / alpha and the sample x / alpha.
            norm = (sigma**2 + (alpha * sigma_data) ** 2).sqrt()
            return sigma / (sigma_data * norm), -alpha * sigma_data / norm
    raise UserError(f"There is no prediction {prediction!r}; {nearest(prediction, get_args(Prediction))}.")


def convert(
    output: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    t: Num[Tensor, "*batch"],
    schedule: NoiseSchedule,
    source: Prediction,
    target: Prediction,
) -> Float[Tensor, "batch ..."]:
    """Turn one prediction at ``(x_t, t)`` into another, in single precision or better.

    Solves ``x_t = α x_0 + σ ε, p = a x_0 + b ε`` for the clean sample and the noise and mixes them anew, in one step
    with coefficients in double precision, so that nothing is lost on a detour through a third prediction.

    Args:
        output: what the network predicted.
        x_t: the noisy sample it saw.
        t: its time.
        schedule: the process.
        source: what ``output`` is.
        target: what shall come back.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    if source == target:
        return output.to(dtype)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    a, b = mix(source, alpha, sigma, schedule.sigma_data)
    c, d = mix(target, alpha, sigma, schedule.sigma_data)
    determinant = alpha * b - sigma * a
    from_sample, from_output = (c * b - d * a) / determinant, (alpha * d - sigma * c) / determinant
    return _per_sample(from_sample, x_t, dtype) * x_t + _per_sample(from_output, x_t, dtype) * output


def to_x0(
    output: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    t: Num[Tensor, "*batch"],
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Float[Tensor, "batch ..."]:
    """The clean sample that a prediction means, see :func:`convert`."""
    return convert(output, x_t, t, schedule, prediction, "sample")


def to_eps(
    output: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    t: Num[Tensor, "*batch"],
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Float[Tensor, "batch ..."]:
    """The noise that a prediction means, see :func:`convert`."""
    return convert(output, x_t, t, schedule, prediction, "epsilon")


def to_score(
    output: Float[Tensor, "batch ..."],
    x_t: Float[Tensor, "batch ..."],
    t: Num[Tensor, "*batch"],
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Float[Tensor, "batch ..."]:
    """The score ``∇ ln p_t(x_t)`` that a prediction means, see :func:`convert`."""
    return convert(output, x_t, t, schedule, prediction, "score")


def predict(
    net: Callable[..., Any],
    x_t: Float[Tensor, "batch ..."],
    t: Num[Tensor, "*batch"],
    schedule: NoiseSchedule,
    condition: Condition = None,
    *,
    null_condition: Condition = None,
    guidance_scale: float = 1.0,
) -> Float[Tensor, "batch ..."]:
    """The network's own prediction at ``(x_t, t)``, with classifier-free guidance on request.

    Guidance (arXiv 2207.12598) is ``p_∅ + w (p_c - p_∅)``, evaluated as one doubled batch. All predictions are affine
    in each other at a given ``x_t``, so guiding any of them is guiding all of them.

    Args:
        net: a network that takes ``(x, time)`` and a condition and returns a tensor, a tuple that begins with one, or
            an object with ``.sample``. Twice the channels of ``x_t`` mean that it also predicts a variance: the first
            half is used. Half-precision networks get half-precision inputs.
        x_t: noisy samples.
        t: their times, in the schedule's unit.
        schedule: the process that the network was trained on.
        condition: see :data:`Condition`.
        null_condition: the condition that stands for none, shaped like ``condition``.
        guidance_scale: w; 1 evaluates the conditional branch only.

    Raises:
        UserError: guidance without a null condition, or an output that is not shaped like ``x_t``.
    """
    x, time = schedule.network_inputs(x_t, t)
    owner = getattr(net, "__self__", net)
    dtype = next((p.dtype for p in owner.parameters()), x.dtype) if isinstance(owner, nn.Module) else x.dtype
    if guidance_scale == 1:
        return _call(net, x.to(dtype), time, _cast(condition, dtype), x_t.shape)
    if null_condition is None or condition is None:
        raise UserError(
            f"A guidance scale of {guidance_scale} needs a condition and a null condition to guide away from; "
            "give both, or use a scale of 1."
        )
    both = _join(_cast(null_condition, dtype), _cast(condition, dtype), len(x))
    output = _call(net, torch.cat([x, x]).to(dtype), torch.cat([time, time]), both, (2 * len(x), *x_t.shape[1:]))
    without, with_condition = output.chunk(2)
    return without + guidance_scale * (with_condition - without)


def denoise(
    net: Callable[..., Any],
    x_t: Float[Tensor, "batch ..."],
    t: Num[Tensor, "*batch"],
    schedule: NoiseSchedule,
    prediction: Prediction,
    condition: Condition = None,
    *,
    null_condition: Condition = None,
    guidance_scale: float = 1.0,
) -> Float[Tensor, "batch ..."]:
    """The clean sample that the network sees in ``x_t``, whatever it predicts: :func:`predict`, then :func:`to_x0`."""
    output = predict(net, x_t, t, schedule, condition, null_condition=null_condition, guidance_scale=guidance_scale)
    return to_x0(output, x_t, t, schedule, prediction)


def _call(net: Callable[..., Any], x: Tensor, time: Tensor, condition: Condition, shape: Sequence[int]) -> Tensor:
    if isinstance(condition, Mapping):
        # Text-conditional transformers of diffusers take the time by keyword, behind the text.
        named = "timestep" in inspect.signature(getattr(net, "forward", net)).parameters
        output = net(x, timestep=time, **condition) if named else net(x, time, **condition)
    else:
        output = net(x, time) if condition is None else net(x, time, condition)
    if not isinstance(output, Tensor):
        output = output.sample if hasattr(output, "sample") else output[0]
    if output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if output.shape != tuple(shape):
        raise UserError(f"The denoiser returned the shape {tuple(output.shape)} for samples of shape {tuple(shape)}.")
    return output  # type: ignore[no-any-return]


def _cast(condition: Any, dtype: torch.dtype) -> Any:
    if isinstance(condition, Mapping):
        return {name: _cast(value, dtype) for name, value in condition.items()}
    return condition.to(dtype) if isinstance(condition, Tensor) and condition.is_floating_point() else condition


def _join(null: Any, condition: Any, batch: int) -> Any:
    if isinstance(condition, Mapping):
        if not isinstance(null, Mapping) or null.keys() != condition.keys():
            raise UserError(f"The null condition has not the keys of the condition, {sorted(condition)}.")
        return {name: _join(null[name], condition[name], batch) for name in condition}
    if not isinstance(condition, Tensor):
        return condition
    return torch.cat([null.expand(batch, *condition.shape[1:]), condition])


def _per_sample(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).reshape(-1, *[1] * (like.ndim - 1))


@lru_cache(maxsize=256)
def _table(schedule: NoiseSchedule, name: Literal["times", "alphas_cumprod"], device: torch.device) -> Tensor:
    table: Tensor = getattr(schedule, name)
    return table.to(device, torch.float32 if table.is_floating_point() and device.type == "mps" else None)


def _double(t: Tensor) -> torch.dtype:
    return torch.float32 if t.device.type == "mps" else torch.float64
