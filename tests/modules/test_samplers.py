"""Samplers against closed forms, against diffusers, and backward simulation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.modules.noise import EDMNoise, FlowNoise, NoiseSchedule, VPNoise
from stillhouse.modules.samplers import backward_simulation, ddim, heun, multistep

MEAN, STD = 0.4, 0.6


def gaussian(schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The ideal denoiser of N(MEAN, STD^2) data."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        return MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * MEAN)

    return denoiser


def transported(noise: Tensor, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Where the exact probability flow takes the start of sampling: quantiles are kept."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    start = schedule.start(noise, t)
    return MEAN + STD * (start - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2).sqrt()


@pytest.mark.parametrize("schedule", [EDMNoise(), VPNoise()], ids=["edm", "vp"])
def test_heun_solves_the_gaussian_flow(schedule: NoiseSchedule) -> None:
    torch.manual_seed(0)
    noise = torch.randn(16, 1, dtype=torch.float64)
    times = schedule.grid(80)
    samples, nfe = heun(gaussian(schedule), noise, schedule, times)
    assert nfe == 159
    torch.testing.assert_close(samples, transported(noise, schedule, times[0]), rtol=0, atol=4e-3)


def test_heun_is_of_second_order_and_ddim_of_first() -> None:
    torch.manual_seed(0)
    schedule, noise = EDMNoise(sigma_min=0.01), torch.randn(16, 1, dtype=torch.float64)

    def error(sampler: Callable[..., tuple[Tensor, int]], steps: int) -> float:
        times = schedule.grid(steps)
        samples = sampler(gaussian(schedule), noise, schedule, times)[0]
        return float((samples - transported(noise, schedule, times[0])).abs().max())

    assert error(ddim, 40) / error(ddim, 80) == pytest.approx(2, rel=0.15)
    assert error(heun, 40) / error(heun, 80) == pytest.approx(4, rel=0.3)
    assert error(heun, 40) < error(ddim, 80) / 3


@pytest.mark.parametrize("schedule", [EDMNoise(), VPNoise(), FlowNoise(), FlowNoise(shift=3)])
def test_ddim_converges_to_the_gaussian_flow(schedule: NoiseSchedule) -> None:
    torch.manual_seed(0)
    noise = torch.randn(16, 1, dtype=torch.float64)
    times = schedule.grid(500)
    samples, nfe = ddim(gaussian(schedule), noise, schedule, times)
    assert nfe == 500
    torch.testing.assert_close(samples, transported(noise, schedule, times[0]), rtol=0, atol=2e-2)


def test_heun_is_algorithm_1() -> None:
    """Against the algorithm written out in its own variables."""
    schedule, noise = EDMNoise(), torch.randn(4, 1, dtype=torch.float64)
    denoiser = gaussian(schedule)
    t = torch.cat([schedule.grid(6), torch.zeros(1, dtype=torch.float64)])
    x = t[0] * noise
    for i in range(6):
        d = (x - denoiser(x, t[i].expand(4))) / t[i]
        following = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = (following - denoiser(following, t[i + 1].expand(4))) / t[i + 1]
            following = x + (t[i + 1] - t[i]) * (0.5 * d + 0.5 * d_prime)
        x = following
    torch.testing.assert_close(heun(denoiser, noise, schedule, schedule.grid(6)).samples, x, rtol=1e-10, atol=1e-10)


def test_heun_needs_signal_at_its_start() -> None:
    with pytest.raises(UserError, match="needs some signal at its first time"):
        heun(lambda x, t: x, torch.randn(2, 1), FlowNoise(), FlowNoise().grid(4))


def test_ddim_agrees_with_diffusers_on_a_discrete_schedule() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="sample"
    )
    schedule, noise = VPNoise(), torch.randn(4, 1)
    denoiser = gaussian(schedule)
    theirs.set_timesteps(10)
    x = noise
    for t in theirs.timesteps:
        x = theirs.step(denoiser(x, t.expand(4)).float(), int(t), x).prev_sample
    torch.testing.assert_close(
        ddim(denoiser, noise, schedule, schedule.grid(10)).samples.float(), x, rtol=1e-3, atol=1e-4
    )


def test_ddim_agrees_with_the_euler_steps_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    noise = torch.randn(4, 1)
    edm, flow = EDMNoise(), FlowNoise(shift=2)

    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(8)
    x = theirs.sigmas[0] * noise
    for t, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        x0 = gaussian(edm)(x, sigma.expand(4))
        output = (x0 - 0.25 / (sigma**2 + 0.25) * x) / (sigma * 0.5 / (sigma**2 + 0.25).sqrt())
        theirs.scale_model_input(x, t)
        x = theirs.step(output.float(), t, x).prev_sample
    torch.testing.assert_close(ddim(gaussian(edm), noise, edm, edm.grid(8)).samples.float(), x, rtol=1e-3, atol=1e-3)

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=2)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = noise
    for t, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        velocity = (x - gaussian(flow)(x, sigma.expand(4))) / sigma
        x = theirs.step(velocity.float(), t, x).prev_sample
    torch.testing.assert_close(ddim(gaussian(flow), noise, flow, flow.grid(4)).samples.float(), x, rtol=1e-3, atol=1e-4)


def test_multistep_ends_in_the_data_distribution_for_a_perfect_student() -> None:
    """A student that maps every noisy sample along the flow keeps the marginals through all re-noising."""
    torch.manual_seed(0)
    schedule = EDMNoise()

    def student(x: Tensor, t: Tensor) -> Tensor:
        return MEAN + STD * (x - MEAN) / (STD**2 + schedule.sigma(t)[:, None] ** 2).sqrt()

    samples, nfe = multistep(student, torch.randn(40000, 1), schedule, schedule.grid(4))
    assert nfe == 4
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, rel=0.02)


def test_backward_simulation_starts_from_the_drawn_noise() -> None:
    schedule = VPNoise()
    times, noise = schedule.grid(4), torch.randn(3, 2)

    def untouched(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("step 0 evaluates nothing")

    x, t = backward_simulation(untouched, noise, schedule, times, step=0)
    assert torch.equal(x, noise)
    assert t.tolist() == [999] * 3
    x, _ = backward_simulation(untouched, noise, EDMNoise(), EDMNoise().grid(2), step=0)
    torch.testing.assert_close(x, 80 * noise)


def test_backward_simulation_is_the_sampler_up_to_its_step() -> None:
    schedule = VPNoise()
    times, noise = schedule.grid(4), torch.randn(3, 2)
    student = gaussian(schedule)
    weight = torch.ones((), requires_grad=True)
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return weight * student(x, t)

    torch.manual_seed(0)
    x, t = backward_simulation(counted, noise, schedule, times, step=3)
    assert calls == [999, 749, 499]
    assert t.tolist() == [249] * 3
    assert not x.requires_grad
    torch.manual_seed(0)
    x0 = multistep(student, torch.randn(3, 2), schedule, times[:3]).samples
    torch.testing.assert_close(x, schedule.add_noise(x0.float(), noise, t))


def test_fresh_noise_comes_from_where_it_is_asked() -> None:
    schedule, noise = VPNoise(), torch.randn(3, 2)
    student = gaussian(schedule)
    x, _ = backward_simulation(student, noise, schedule, schedule.grid(4), step=2, randn_like=torch.zeros_like)
    alpha = schedule.alpha(torch.tensor([749])).float()
    first = student(torch.zeros(3, 2), torch.full((3,), 999)).float()
    second = student(alpha * first, torch.full((3,), 749)).float()
    torch.testing.assert_close(x, schedule.add_noise(second, noise, torch.full((3,), 499)))
