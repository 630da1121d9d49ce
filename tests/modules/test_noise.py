"""Noise schedules, exact conversions between predictions (against diffusers), and calling denoisers."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.modules.noise import (
    EDMNoise,
    FlowNoise,
    NoiseSchedule,
    Prediction,
    VPNoise,
    check_prediction,
    convert,
    denoise,
    from_diffusers,
    mix,
    predict,
    to_diffusers,
    to_eps,
    to_score,
    to_x0,
)
from stillhouse.spec import Spec, read

PREDICTIONS = get_args(Prediction)
SCHEDULES = [EDMNoise(), VPNoise(), VPNoise(beta_schedule="squaredcos_cap_v2"), FlowNoise(shift=3.0)]


class Holder(Spec):
    schedule: NoiseSchedule


def draw(schedule: NoiseSchedule, batch: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    x0, noise = torch.randn(batch, 2, 3, 3, dtype=dtype), torch.randn(batch, 2, 3, 3, dtype=dtype)
    t = schedule.draw(torch.rand(batch), 0.02, 0.95)
    return x0, noise, t, schedule.add_noise(x0, noise, t)


def truth(prediction: Prediction, x0: Tensor, noise: Tensor, t: Tensor, s: NoiseSchedule) -> Tensor:
    a, b = (value[:, None, None, None] for value in mix(prediction, s.alpha(t), s.sigma(t), s.sigma_data))
    return a * x0 + b * noise


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.digest())
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_predictions_give_each_other_exactly(schedule: NoiseSchedule, source: Prediction, target: Prediction) -> None:
    torch.manual_seed(0)
    x0, noise, t, x_t = draw(schedule)
    output, expected = truth(source, x0, noise, t, schedule), truth(target, x0, noise, t, schedule)
    torch.testing.assert_close(convert(output, x_t, t, schedule, source, target), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.digest())
@pytest.mark.parametrize("other", PREDICTIONS)
def test_round_trips_in_single_precision(schedule: NoiseSchedule, other: Prediction) -> None:
    torch.manual_seed(0)
    x0, noise, t, x_t = draw(schedule, batch=64, dtype=torch.float32)
    output = truth("v_prediction", x0, noise, t, schedule).float()
    there = convert(output, x_t, t, schedule, "v_prediction", other)
    back = convert(there, x_t, t, schedule, other, "v_prediction")
    assert back.dtype == torch.float32
    error = (back - output).abs().flatten(1).amax(1) / output.abs().flatten(1).amax(1)
    condition = (schedule.alpha(t) / schedule.sigma(t)).clamp(min=1) * (schedule.sigma(t) / schedule.alpha(t)).clamp(
        min=1
    )
    assert (error < 1e-6 * condition**2).all()


def test_the_same_prediction_comes_back_untouched_even_without_noise() -> None:
    x = torch.randn(2, 3)
    t = torch.zeros(2)
    for prediction in PREDICTIONS:
        assert torch.equal(convert(x, x, t, FlowNoise(), prediction, prediction), x)


def test_named_conversions() -> None:
    x0, noise, t, x_t = draw(VPNoise())
    output = truth("v_prediction", x0, noise, t, VPNoise())
    torch.testing.assert_close(to_x0(output, x_t, t, VPNoise(), "v_prediction"), x0)
    torch.testing.assert_close(to_eps(output, x_t, t, VPNoise(), "v_prediction"), noise)
    score = -noise / VPNoise().sigma(t)[:, None, None, None]
    torch.testing.assert_close(to_score(output, x_t, t, VPNoise(), "v_prediction"), score)


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    schedule, t = VPNoise(), torch.tensor([300])
    mean, std = torch.tensor([1.5], dtype=torch.float64), 0.7
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
    variance = (alpha * std) ** 2 + sigma**2
    density = torch.distributions.Normal(alpha * mean, variance.sqrt()).log_prob(x)
    (score,) = torch.autograd.grad(density.sum(), x)
    x0 = mean + alpha * std**2 / variance * (x - alpha * mean)
    torch.testing.assert_close(convert(x0, x, t.expand(5), schedule, "sample", "score"), score)


def test_edm_preconditioning_is_table_1() -> None:
    schedule = EDMNoise()
    _, _, t, x_t = draw(schedule)
    sigma = t.double()[:, None, None, None]
    output = torch.randn_like(x_t)
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(to_x0(output, x_t, t, schedule, "edm"), c_skip * x_t + c_out * output)
    x, c_noise = schedule.network_inputs(x_t, t)
    torch.testing.assert_close(x, x_t / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_noise, t.log() / 4)


def test_edm_network_in_variance_preserving_coordinates_is_minus_v() -> None:
    schedule = VPNoise(sigma_data=1.0)
    x0, noise, t, x_t = draw(schedule)
    v = truth("v_prediction", x0, noise, t, schedule)
    torch.testing.assert_close(convert(v, x_t, t, schedule, "v_prediction", "edm"), -v)


def test_edm_training_targets_have_unit_variance() -> None:
    torch.manual_seed(0)
    schedule = EDMNoise()
    for level in (0.01, 0.5, 20.0):
        x0, noise = 0.5 * torch.randn(20000, 1), torch.randn(20000, 1)
        t = torch.full((20000,), level)
        target = convert(x0, schedule.add_noise(x0, noise, t), t, schedule, "sample", "edm")
        assert target.std().item() == pytest.approx(1.0, abs=0.02)


def test_karras_table() -> None:
    schedule = EDMNoise()
    ramp = torch.linspace(0, 1, 1000)
    table = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.times.float(), table.flip(0), rtol=1e-4, atol=0)
    assert schedule.times[0].item() == pytest.approx(0.002)
    assert schedule.times[-1].item() == pytest.approx(80.0)
    assert schedule.grid(1).tolist() == pytest.approx([80.0])


def test_drawn_times_lie_in_their_range() -> None:
    uniform = torch.linspace(0, 1, 20001)
    t = VPNoise().draw(uniform, 0.02, 0.98)
    assert (t.min().item(), t.max().item()) == (20, 980)
    t = VPNoise().draw(uniform[:-1])
    assert t.bincount().tolist() == pytest.approx([20] * 1000, abs=1)
    sigma = EDMNoise().draw(uniform, 0.02, 0.98)
    assert sigma.dtype == torch.float32
    assert sigma.min() == EDMNoise().times[20].float()
    assert sigma.max() == EDMNoise().times[980].float()
    with pytest.raises(UserError, match=r"No training time lies between 0\.9 and 0\.1"):
        VPNoise().draw(uniform, 0.9, 0.1)


def test_lognormal_times() -> None:
    torch.manual_seed(0)
    logarithm = EDMNoise().lognormal(torch.randn(50000)).log()
    assert logarithm.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert logarithm.std().item() == pytest.approx(1.2, abs=0.02)


def test_log_snr_falls() -> None:
    for schedule in SCHEDULES:
        assert (schedule.log_snr(schedule.times[:-1]).diff() < 0).all()
    assert VPNoise().log_snr(torch.tensor([0])).item() == pytest.approx(9.21, abs=0.01)


def test_few_step_times() -> None:
    assert VPNoise().grid(4).tolist() == [999, 749, 499, 249]
    assert VPNoise().at([999, 749, 499, 249]).tolist() == [999, 749, 499, 249]
    assert EDMNoise().at([999, 0]).tolist() == pytest.approx([80.0, 0.002])
    with pytest.raises(UserError, match=r"starts at the last step 999, which \[900, 100\] does not"):
        VPNoise().at([900, 100])
    with pytest.raises(UserError, match="descends"):
        VPNoise().at([999, 249, 499])
    with pytest.raises(UserError, match="between 1 and 1000 steps, not 0"):
        VPNoise().grid(0)


def test_schedules_are_specs() -> None:
    assert read(Holder, {"schedule": "vp:scaled_linear"}).schedule == VPNoise(beta_schedule="scaled_linear")
    assert read(Holder, {"schedule": {"kind": "edm", "sigma_max": 10}}).schedule.times[-1].item() == pytest.approx(10)
    schedule = EDMNoise()
    changed = schedule.model_copy(update={"sigma_max": 2.0})
    assert changed.draw(torch.ones(1)).item() == pytest.approx(2.0)
    assert read(Holder, {"schedule": schedule.dump()}).schedule == schedule
    with pytest.raises(UserError, match=r"'sigma_min' is 3\.0 and must be less than 'sigma_max', 2\.0"):
        read(Holder, {"schedule": {"kind": "edm", "sigma_min": 3.0, "sigma_max": 2.0}})
    with pytest.raises(UserError, match="did you mean 'flow'"):
        read(Holder, {"schedule": "flwo"})
    with pytest.raises(UserError, match="lists 2 variances"):
        read(Holder, {"schedule": {"kind": "vp", "trained_betas": [0.1, 0.2]}})


# Against diffusers.

BETAS = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True},
    {"trained_betas": torch.linspace(1e-3, 0.3, 1000).tolist()},
]


@pytest.mark.parametrize("fields", BETAS, ids=["linear", "scaled_linear", "cosine", "zero_snr", "trained"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_vp_agrees_with_ddim(fields: dict[str, object], kind: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.DDIMScheduler(
        prediction_type=kind, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", **fields
    )
    ours, prediction = from_diffusers(theirs)
    assert prediction == kind
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=2e-6)  # type: ignore[attr-defined]
    x0, noise = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4)
    t = torch.tensor([0, 20, 500, 900, 998])
    x_t = ours.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, theirs.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    v = convert(noise, x_t, t, ours, "epsilon", "v_prediction")
    usable = ours.alpha(t) > 0.1
    torch.testing.assert_close(v[usable], theirs.get_velocity(x0, noise, t)[usable], rtol=1e-3, atol=1e-4)
    output = torch.randn(2, 2, 4, 4)
    theirs.set_timesteps(4)
    assert theirs.timesteps.tolist() == ours.grid(4).tolist()
    step = theirs.step(output, int(theirs.timesteps[2]), x_t[:2]).pred_original_sample
    t = theirs.timesteps[2].expand(2)
    torch.testing.assert_close(to_x0(output, x_t[:2], t, ours, prediction), step, rtol=1e-4, atol=1e-4)


def test_vp_agrees_with_ddpm() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    ours, prediction = from_diffusers(theirs)
    x_t, output, t = torch.randn(3, 2), torch.randn(3, 2), 400
    step = theirs.step(output, t, x_t).pred_original_sample
    torch.testing.assert_close(to_x0(output, x_t, torch.tensor([t]), ours, prediction), step, rtol=1e-5, atol=1e-5)


def test_vp_agrees_with_euler_discrete_up_to_its_scale() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EulerDiscreteScheduler()
    ours, _ = from_diffusers(theirs)
    x0, noise, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 400, 999])
    scaled = ours.add_noise(x0, noise, t) / ours.alpha(t)[:, None].float()
    torch.testing.assert_close(scaled, theirs.add_noise(x0, noise, t), rtol=1e-4, atol=1e-4)


def test_edm_agrees_with_edm_euler() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.EDMEulerScheduler()
    ours, prediction = from_diffusers(theirs)
    assert (ours, prediction) == (EDMNoise(), "edm")
    theirs.set_timesteps(7)
    torch.testing.assert_close(theirs.sigmas[:-1], ours.grid(7).float(), rtol=1e-5, atol=1e-6)
    x_t, output, index = torch.randn(3, 2) * 10, torch.randn(3, 2), 2
    sigma = theirs.sigmas[index]
    ours_x, ours_time = ours.network_inputs(x_t, sigma)
    theirs._init_step_index(theirs.timesteps[index])
    torch.testing.assert_close(ours_x, theirs.scale_model_input(x_t, theirs.timesteps[index]))
    torch.testing.assert_close(ours_time, theirs.timesteps[index].expand(3))
    step = theirs.step(output, theirs.timesteps[index], x_t).pred_original_sample
    torch.testing.assert_close(to_x0(output, x_t, sigma, ours, prediction), step)
    noisy = theirs.add_noise(x_t, output, theirs.timesteps[index].expand(3))
    torch.testing.assert_close(ours.add_noise(x_t, output, sigma.expand(3)), noisy)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_agrees_with_flow_match_euler(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ours, prediction = from_diffusers(theirs)
    assert prediction == "flow_prediction"
    torch.testing.assert_close(theirs.sigmas.flip(0), ours.times.float())
    x0, noise, t = torch.randn(3, 2), torch.randn(3, 2), theirs.timesteps[[10, 500, 990]]
    time = t / 1000
    torch.testing.assert_close(ours.add_noise(x0, noise, time), theirs.scale_noise(x0, t, noise), rtol=1e-4, atol=1e-5)
    assert ours.network_inputs(x0, time)[1].tolist() == pytest.approx(t.tolist())
    velocity = convert(noise, ours.add_noise(x0, noise, time), time, ours, "epsilon", "flow_prediction")
    torch.testing.assert_close(velocity, noise - x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (EDMNoise(sigma_max=40), "edm"),
        (FlowNoise(shift=3), "flow_prediction"),
        (VPNoise(beta_schedule="scaled_linear", beta_end=0.012), "v_prediction"),
    ],
)
def test_schedules_become_schedulers_and_come_back(schedule: NoiseSchedule, prediction: Prediction) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = to_diffusers(schedule, prediction)
    assert from_diffusers(config) == (schedule, prediction)
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    assert from_diffusers(theirs) == (schedule, prediction)


def test_unknown_schedulers_and_predictions() -> None:
    with pytest.raises(UserError, match="prediction type 'epsilom'; did you mean 'epsilon'"):
        from_diffusers({"_class_name": "DDIMScheduler", "beta_schedule": "linear", "prediction_type": "epsilom"})
    with pytest.raises(UserError, match="'VQDiffusionScheduler' is of no known kind"):
        from_diffusers({"_class_name": "VQDiffusionScheduler"})
    with pytest.raises(UserError, match="EDMEulerScheduler of diffusers takes no 'epsilon'"):
        to_diffusers(EDMNoise(), "epsilon")
    with pytest.raises(UserError, match="no prediction 'eps'"):
        check_prediction(VPNoise(), "eps")
    with pytest.raises(UserError, match="no signal is left"):
        check_prediction(VPNoise(rescale_betas_zero_snr=True), "epsilon")
    check_prediction(VPNoise(rescale_betas_zero_snr=True), "v_prediction")
    check_prediction(VPNoise(), "epsilon")


# Calling.


class Affine(nn.Module):
    """Knows what it was called with; predicts x scaled by its condition."""

    def __init__(self, variance: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.variance, self.calls = variance, 0

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.seen = timestep
        scale = self.scale if class_labels is None else class_labels.to(sample.dtype)[:, None]
        output = sample * scale
        return torch.cat([output, output], dim=1) if self.variance else output


def test_predictions_reach_networks_of_all_kinds() -> None:
    x, t, labels = torch.randn(4, 3), torch.tensor([1, 2, 3, 4]), torch.arange(4)
    expected = x * labels[:, None]
    for condition in (labels, {"class_labels": labels}):
        torch.testing.assert_close(predict(Affine(), x, t, VPNoise(), condition), expected)
    torch.testing.assert_close(predict(Affine(variance=True), x, t, VPNoise(), labels), expected)
    torch.testing.assert_close(predict(lambda x, t: (x, "rest"), x, t, VPNoise()), x)
    net = Affine()
    predict(net, x, torch.tensor(7), VPNoise())
    assert net.seen.tolist() == [7, 7, 7, 7]
    half = Affine().to(torch.bfloat16)
    assert predict(half, x, t, VPNoise()).dtype == torch.bfloat16
    assert denoise(half, x, t, VPNoise(), "epsilon").dtype == torch.float32


def test_a_text_transformer_gets_its_time_by_keyword() -> None:
    def net(hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return hidden_states * encoder_hidden_states + timestep[:, None]

    x, text, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([1, 2])
    output = predict(net, x, t, VPNoise(), {"encoder_hidden_states": text})
    torch.testing.assert_close(output, x * text + t[:, None])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_the_same_for_every_prediction(prediction: Prediction) -> None:
    schedule, x, t = VPNoise(), torch.randn(4, 3, dtype=torch.float64), torch.tensor([10, 200, 500, 900])
    labels, null = torch.full((4,), 3), torch.tensor([1])

    def net(sample: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return convert(sample * labels[:, None], sample, time, schedule, "sample", prediction)

    guided = denoise(net, x, t, schedule, prediction, labels, null_condition=null, guidance_scale=2.5)
    torch.testing.assert_close(guided, x * (1 + 2.5 * (3 - 1)))


def test_guidance_evaluates_once_and_only_when_asked() -> None:
    net, x, t = Affine(), torch.randn(2, 3), torch.tensor([5, 6])
    condition = {"class_labels": torch.tensor([2, 3])}
    predict(net, x, t, VPNoise(), condition, null_condition={"class_labels": torch.tensor([0, 0])}, guidance_scale=4)
    assert (net.calls, len(net.seen)) == (1, 4)
    predict(net, x, t, VPNoise(), condition)
    assert (net.calls, len(net.seen)) == (2, 2)
    with pytest.raises(UserError, match="needs a condition and a null condition"):
        predict(net, x, t, VPNoise(), condition, guidance_scale=2)
    with pytest.raises(UserError, match="has not the keys"):
        predict(net, x, t, VPNoise(), condition, null_condition={"text": x}, guidance_scale=2)


def test_nested_conditions_are_joined() -> None:
    def net(x: Tensor, t: Tensor, added: dict[str, Tensor], factor: float) -> Tensor:
        return x * added["ids"] * factor

    x, t = torch.ones(2, 1), torch.tensor([5, 6])
    condition = {"added": {"ids": torch.full((2, 1), 3.0)}, "factor": 2.0}
    null = {"added": {"ids": torch.ones(2, 1)}, "factor": 2.0}
    output = predict(net, x, t, VPNoise(), condition, null_condition=null, guidance_scale=3)
    assert output.tolist() == [[2.0 + 3 * 4]] * 2


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"returned the shape \(2, 4\) for samples of shape \(2, 3\)"):
        predict(lambda x, t: torch.zeros(2, 4), torch.zeros(2, 3), torch.tensor([0, 1]), VPNoise())
