"""Samplers for denoisers, as functions that read like their algorithms.

A denoiser is ``denoiser(x_t, t) -> x_0``, with ``t`` of shape ``batch`` in the schedule's unit; bind network, condition
and guidance with a lambda over :func:`stillhouse.modules.noise.denoise`. Times descend from the most noise, as
:meth:`NoiseSchedule.grid` gives them, and clean data follows the last.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.modules.noise import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Noisy samples and their times to clean samples."""


class Sampled(NamedTuple):
    """Samples, and how often the denoiser was evaluated for them (a guided evaluation counts once)."""

    samples: Float[Tensor, "batch ..."]
    nfe: int


@torch.no_grad()
def ddim(
    denoiser: Denoiser, noise: Float[Tensor, "batch ..."], schedule: NoiseSchedule, times: Num[Tensor, "steps"]
) -> Sampled:
    """First-order deterministic sampling: keep the predicted noise, lower its level.

    ``x_s = α_s x̂_0 + σ_s ε̂`` is DDIM (arXiv 2010.02502, Eq. 12 with no added noise) on a variance-preserving process,
    the Euler step of Karras et al. on ``edm`` and the Euler step of rectified flow on ``flow``: the three are one
    formula. One evaluation per step. The state is kept in double precision.

    Args:
        denoiser: see the module.
        noise: standard normal noise; the start is :meth:`NoiseSchedule.start` of it.
        schedule: the process.
        times: descending times.
    """
    times = times.to(noise.device)
    x = schedule.start(noise, times[0]).to(_state_dtype(noise))
    for t, s in pairwise(times):
        x0 = denoiser(x.to(noise.dtype), t.expand(len(x)))
        noise_hat = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
        x = schedule.alpha(s) * x0 + schedule.sigma(s) * noise_hat
    x0 = denoiser(x.to(noise.dtype), times[-1].expand(len(x)))
    return Sampled(x0, len(times))


@torch.no_grad()
def heun(
    denoiser: Denoiser, noise: Float[Tensor, "batch ..."], schedule: NoiseSchedule, times: Num[Tensor, "steps"]
) -> Sampled:
    """Second-order deterministic sampling: Algorithm 1 of Karras et al. (arXiv 2206.00364).

    Works in the variables ``x / α`` and ``σ / α``, in which every process here is variance-exploding and its ODE is
    ``dx / dσ = (x - D(x; σ)) / σ``. ``2 steps - 1`` evaluations, the state in double precision.

    Args:
        denoiser: see the module.
        noise: standard normal noise.
        schedule: a process whose signal does not vanish at ``times[0]``.
        times: descending times.

    Raises:
        UserError: no signal is left at the first time (start a little later, or use :func:`ddim`).
    """
    times = times.to(noise.device)
    alphas = schedule.alpha(times)
    if not alphas[0] > 0:
        raise UserError("Heun's method needs some signal at its first time; start a little later, or use 'ddim'.")
    sigmas = torch.cat([schedule.sigma(times) / alphas, alphas.new_zeros(1)])

    def slope(x: Tensor, i: int) -> Tensor:
        x0 = denoiser((alphas[i] * x).to(noise.dtype), times[i].expand(len(x))).to(x.dtype)
        return (x - x0) / sigmas[i]

    x = schedule.start(noise, times[0]).to(_state_dtype(noise)) / alphas[0]
    for i, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        d = slope(x, i)
        euler = x + (next_sigma - sigma) * d
        last = i + 1 == len(times)
        x = euler if last else x + (next_sigma - sigma) * (d + slope(euler, i + 1)) / 2
    return Sampled(x.to(noise.dtype), 2 * len(times) - 1)


@torch.no_grad()
def multistep(
    denoiser: Denoiser,
    noise: Float[Tensor, "batch ..."],
    schedule: NoiseSchedule,
    times: Num[Tensor, "steps"],
    *,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Sampled:
    """Few-step sampling of a distilled student: predict the clean sample, noise it afresh to the next time, repeat.

    Multistep consistency sampling (arXiv 2303.01469, Algorithm 1), also used by LCM and DMD2. One evaluation per step;
    with one time it is the one-step generator.

    Args:
        denoiser: the student.
        noise: standard normal noise.
        schedule: the process.
        times: descending times.
        randn_like: source of the fresh noise.
    """
    times = times.to(noise.device)
    x0 = denoiser(schedule.start(noise, times[0]), times[0].expand(len(noise)))
    for t in times[1:]:
        x_t = schedule.add_noise(x0, randn_like(x0), t)
        x0 = denoiser(x_t, t.expand(len(noise)))
    return Sampled(x0, len(times))


@torch.no_grad()
def backward_simulation(
    denoiser: Denoiser,
    noise: Float[Tensor, "batch ..."],
    schedule: NoiseSchedule,
    times: Num[Tensor, "steps"],
    step: int,
    *,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> tuple[Float[Tensor, "batch ..."], Num[Tensor, "batch"]]:
    """The input that a few-step student meets at ``times[step]`` in inference, to train on (arXiv 2405.14867, 4.5).

    The student itself takes the first ``step`` steps of :func:`multistep` from fresh noise; its last clean sample is
    then noised with ``noise``. At step 0 the input is the pure ``noise``.

    Args:
        denoiser: the student; its evaluations here have no gradient.
        noise: the noise of the input that comes back.
        schedule: the process.
        times: the student's descending times.
        step: which of them; all processes should use the same, so that they take equally long.
        randn_like: source of all other noise.

    Returns:
        The input, and its time for each sample.
    """
    times = times.to(noise.device)
    t = times[step].expand(len(noise))
    if step == 0:
        return schedule.start(noise, t), t
    x0 = multistep(denoiser, randn_like(noise), schedule, times[:step], randn_like=randn_like).samples
    return schedule.add_noise(x0.to(noise.dtype), noise, t), t


def _state_dtype(noise: Tensor) -> torch.dtype:
    return torch.float32 if noise.device.type == "mps" else torch.float64
