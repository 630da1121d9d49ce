"""Losses of score distillation: exact gradients, fixed points, weights."""

from __future__ import annotations

import doctest
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from stillhouse.errors import UserError
from stillhouse.losses import scores
from stillhouse.losses.scores import (
    Weighting,
    denoising,
    denoising_weight,
    distribution_matching,
    distribution_matching_gradient,
    gan_discriminator,
    gan_generator,
    with_gradient,
)


def test_examples() -> None:
    assert doctest.testmod(scores).failed == 0


def test_gradient_of_the_loss_is_the_direction_over_numel() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    real, fake = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    loss = distribution_matching(x, real, fake)
    loss.backward()
    expected = distribution_matching_gradient(x, real, fake)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected / x.numel())
    torch.testing.assert_close(loss, expected.square().mean() / 2)


def test_direction_is_the_papers() -> None:
    torch.manual_seed(0)
    x, real, fake = torch.randn(3, 2, 4, 4).unbind(), torch.randn(3, 2, 4, 4).unbind(), torch.randn(3, 2, 4, 4).unbind()
    expected = [(f - r) / (a - r).abs().mean() for a, r, f in zip(x, real, fake, strict=True)]
    actual = distribution_matching_gradient(torch.stack(x), torch.stack(real), torch.stack(fake))
    torch.testing.assert_close(actual, torch.stack(expected))


def test_samples_do_not_influence_each_other() -> None:
    x, real, fake = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)
    whole = distribution_matching_gradient(x, real, fake)
    alone = distribution_matching_gradient(x[2:3], real[2:3], fake[2:3])
    torch.testing.assert_close(whole[2:3], alone)


def test_nothing_moves_where_the_scores_agree() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    both = torch.randn(3, 8)
    distribution_matching(x, both, both).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
    # 0 / 0: the teacher returns the sample itself.
    assert torch.equal(distribution_matching_gradient(x, x, x), torch.zeros_like(x))


def test_a_broken_sample_stays_and_a_broken_batch_is_seen() -> None:
    x, real, fake = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    real[1, 2] = torch.inf
    direction = distribution_matching_gradient(x, real, fake)
    assert torch.equal(direction[1], torch.zeros(8))
    torch.testing.assert_close(direction[[0, 2]], distribution_matching_gradient(x, real, fake)[[0, 2]])
    assert direction.isfinite().all()
    real[:] = torch.nan
    assert distribution_matching(x, real, fake).isnan()


def test_no_gradient_reaches_the_scores() -> None:
    x, real, fake = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    distribution_matching(x, real, fake).backward()
    assert (real.grad, fake.grad) == (None, None)


def test_half_precision_samples_get_single_precision_arithmetic() -> None:
    x = torch.randn(2, 4).to(torch.bfloat16)
    direction = distribution_matching_gradient(x, torch.randn(2, 4), torch.randn(2, 4))
    assert direction.dtype == torch.float32
    assert with_gradient(x, direction).dtype == torch.float32


def test_distribution_matching_finds_mean_and_variance_of_gaussian_data() -> None:
    """With ideal denoisers of the data and of the generator's own distribution, the fixed point is the data."""
    torch.manual_seed(0)
    mean, std = torch.tensor([0.7, -0.4]), torch.tensor([0.5, 1.3])
    a, b = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 60))

    def ideal(x: torch.Tensor, sigma: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        return mean + std**2 / (std**2 + sigma**2) * (x - mean)

    for _ in range(1200):
        z = torch.randn(2048, 2)
        x = a + b * z
        sigma = torch.exp(torch.empty(2048, 1).uniform_(-3, 2))
        with torch.no_grad():
            x_t = x + sigma * torch.randn_like(x)
            real, fake = ideal(x_t, sigma, mean, std), ideal(x_t, sigma, a, b)
        optimizer.zero_grad()
        distribution_matching(x, real, fake).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(a.detach(), mean, rtol=0.02, atol=0)
    torch.testing.assert_close(b.detach() ** 2, std**2, rtol=0.02, atol=0)


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_weights_make_the_error_of_a_prediction(weighting: Weighting) -> None:
    from stillhouse.modules.noise import VPNoise, convert

    torch.manual_seed(0)
    schedule = VPNoise()
    x0, noise, t = torch.randn(8, 5).double(), torch.randn(8, 5).double(), torch.randint(20, 900, (8,))
    x_t, guess = schedule.add_noise(x0, noise, t), torch.randn(8, 5).double()
    weight = denoising_weight(schedule.alpha(t), schedule.sigma(t), weighting, schedule.sigma_data)
    expected = F.mse_loss(*(convert(x, x_t, t, schedule, "sample", weighting) for x in (guess, x0)))
    torch.testing.assert_close(denoising(guess, x0, weight), expected)


def test_edm_weight() -> None:
    sigma = torch.tensor([0.002, 0.5, 80.0])
    torch.testing.assert_close(denoising_weight(torch.ones(3), sigma), sigma**-2 + 4)
    with pytest.raises(UserError, match="did you mean 'epsilon'"):
        denoising_weight(torch.ones(1), torch.ones(1), "epsilom")  # type: ignore[arg-type]


def test_denoising_target_gets_no_gradient() -> None:
    prediction, target = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    denoising(prediction, target).backward()
    assert target.grad is None
    torch.testing.assert_close(prediction.grad, 2 * (prediction - target).detach() / 6)


def test_gan_losses() -> None:
    real, fake = torch.randn(5), torch.randn(7)
    torch.testing.assert_close(
        gan_discriminator(real, fake),
        F.binary_cross_entropy_with_logits(real, torch.ones(5))
        + F.binary_cross_entropy_with_logits(fake, torch.zeros(7)),
    )
    torch.testing.assert_close(gan_generator(fake), F.binary_cross_entropy_with_logits(fake, torch.ones(7)))
    assert gan_generator(torch.full((2,), -200.0)).item() == pytest.approx(200)
