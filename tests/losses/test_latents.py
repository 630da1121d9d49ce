"""Losses of short codes: closed forms, zero gradients where due, estimators' exact properties."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from stillhouse.errors import UserError
from stillhouse.losses import latents as losses

SAMPLINGS = ["weighted", "stratified", "batch"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def posterior():
    """Means, standard deviations and one draw of each of 12 posteriors over 3 latents."""
    mean = torch.randn(12, 3, generator=gen(0), dtype=torch.float64)
    std = torch.rand(12, 3, generator=gen(1), dtype=torch.float64) + 0.2
    return mean + std * torch.randn(12, 3, generator=gen(2), dtype=torch.float64), mean, std


def test_binary_cross_entropy_is_its_definition():
    logits, target = torch.randn(3, 2, 4, 4, generator=gen()), torch.rand(3, 2, 4, 4, generator=gen(1))
    p = logits.sigmoid()
    per_pixel = -target * p.log() - (1 - target) * (1 - p).log()
    assert losses.binary_cross_entropy(logits, target).item() == pytest.approx(
        per_pixel.flatten(1).mean(1).mean().item(), rel=1e-5
    )


def test_binary_cross_entropy_stays_finite_far_out():
    assert losses.binary_cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([[1.0, 0.0]])).item() == 0
    assert losses.binary_cross_entropy(torch.tensor([[1e4]]), torch.tensor([[0.0]])).item() == 1e4


def test_binary_cross_entropy_at_the_target_has_no_gradient():
    target = torch.rand(4, 3, generator=gen())
    logits = target.logit().requires_grad_()
    losses.binary_cross_entropy(logits, target).backward()
    assert logits.grad.abs().max() < 1e-7


def test_quantisation_and_commitment_are_one_number_with_opposite_gradients():
    c = torch.randn(5, 3, generator=gen(), requires_grad=True)
    q = torch.randn(5, 3, generator=gen(1), requires_grad=True)
    quantization, commitment = losses.quantization(c, q), losses.commitment(c, q)
    assert quantization == commitment == (c - q).square().mean()
    assert torch.autograd.grad(quantization, c, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(commitment, q, retain_graph=True, allow_unused=True) == (None,)
    (to_q,) = torch.autograd.grad(quantization, q)
    (to_c,) = torch.autograd.grad(commitment, c)
    assert torch.allclose(to_q, 2 * (q - c) / 15)
    assert torch.equal(to_q, -to_c)


def test_kl_equals_torch_distributions(posterior):
    _, mean, std = posterior
    expected = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(-1).mean()
    assert losses.kl_standard_normal(mean, std).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_parts_sum_to_the_one_sample_kl(posterior, sampling):
    z, mean, std = posterior
    parts = losses.kl_decomposition(z, mean, std, dataset_size=500, sampling=sampling)
    one_sample = (Normal(mean, std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(-1).mean()
    assert sum(parts).item() == pytest.approx(one_sample.item(), rel=1e-12)


def test_weighted_aggregate_is_its_formula(posterior):
    z, mean, std = posterior
    joint, product = losses.log_aggregate_posterior(z, mean, std, dataset_size=500)
    density = Normal(mean[None], std[None]).log_prob(z[:, None]).exp()
    assert torch.allclose(joint, (density.prod(-1).sum(1) / (12 * 500)).log())
    assert torch.allclose(product, (density.sum(1) / (12 * 500)).log().sum(-1))


@pytest.mark.parametrize("sampling", ["stratified", "batch"])
def test_equal_posteriors_have_neither_information_nor_correlation(sampling):
    z = torch.randn(10, 4, generator=gen(), dtype=torch.float64)
    mean, std = torch.full((10, 4), 0.3, dtype=torch.float64), torch.full((10, 4), 0.7, dtype=torch.float64)
    parts = losses.kl_decomposition(z, mean, std, dataset_size=77, sampling=sampling)
    assert parts.mutual_information.item() == pytest.approx(0, abs=1e-12)
    assert parts.total_correlation.item() == pytest.approx(0, abs=1e-12)


def test_weighted_sampling_shifts_by_the_data_set_size():
    """With equal posteriors the estimate of every q is q / N: log N in the joint, log N per latent in the product."""
    z = torch.randn(10, 4, generator=gen(), dtype=torch.float64)
    one = torch.ones(10, 4, dtype=torch.float64)
    parts = losses.kl_decomposition(z, 0 * one, one, dataset_size=77)
    assert parts.mutual_information.item() == pytest.approx(math.log(77), rel=1e-12)
    assert parts.total_correlation.item() == pytest.approx(3 * math.log(77), rel=1e-12)
    assert parts.dimension_wise_kl.item() == pytest.approx(-4 * math.log(77), rel=1e-12)


def test_stratified_sampling_is_unbiased():
    """Over all ordered batches that start with a sample, the estimate of q at its draw averages to q exactly."""
    size, batch = 6, 4
    mean = torch.randn(size, 2, generator=gen(), dtype=torch.float64)
    std = torch.rand(size, 2, generator=gen(1), dtype=torch.float64) + 0.5
    z = mean + std * torch.randn(size, 2, generator=gen(2), dtype=torch.float64)
    for first in range(size):
        exact = Normal(mean, std).log_prob(z[first]).sum(-1).exp().mean()
        estimates = []
        for others in itertools.permutations([i for i in range(size) if i != first], batch - 1):
            rows = [first, *others]
            joint, _ = losses.log_aggregate_posterior(
                z[rows], mean[rows], std[rows], dataset_size=size, sampling="stratified"
            )
            estimates.append(joint[0].exp())
        assert torch.stack(estimates).mean().item() == pytest.approx(exact.item(), rel=1e-12)


def test_total_correlation_of_a_gaussian_is_its_closed_form():
    """Means from N(0, S), constant noise s: q(z) is N(0, S + s^2 I), whose total correlation is known."""
    count, noise = 2000, 0.5
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    mean = torch.randn(count, 2, generator=gen()) @ factor.T
    z = mean + noise * torch.randn(count, 2, generator=gen(1))
    parts = losses.kl_decomposition(z, mean, torch.full_like(mean, noise), dataset_size=count, sampling="batch")
    covariance = factor @ factor.T + noise**2 * torch.eye(2)
    total_correlation = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet())
    information = 0.5 * (covariance.logdet() - 2 * math.log(noise**2))
    dimension_wise = (0.5 * (covariance.diagonal() - 1 - covariance.diagonal().log())).sum()
    assert parts.total_correlation.item() == pytest.approx(total_correlation.item(), abs=0.04)
    assert parts.mutual_information.item() == pytest.approx(information.item(), abs=0.06)
    assert parts.dimension_wise_kl.item() == pytest.approx(dimension_wise.item(), abs=0.06)


def test_order_of_the_batch_does_not_matter_to_weighted_parts(posterior):
    order = torch.randperm(12, generator=gen())
    parts = losses.kl_decomposition(*posterior, dataset_size=50)
    shuffled = losses.kl_decomposition(*(x[order] for x in posterior), dataset_size=50)
    assert torch.allclose(torch.stack(parts), torch.stack(shuffled))


def test_critic_and_generator_are_opposite_on_fakes():
    real, fake = torch.randn(6, generator=gen()), torch.randn(6, generator=gen(1), requires_grad=True)
    (to_critic,) = torch.autograd.grad(losses.wgan_critic(real, fake), fake)
    (to_generator,) = torch.autograd.grad(losses.wgan_generator(fake), fake)
    assert torch.equal(to_critic, -to_generator)
    assert losses.wgan_critic(real, real) == 0


def test_gradient_penalty_of_a_linear_critic_and_its_gradient():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)  # norm 5
    real, fake = torch.randn(7, 2, generator=gen()), torch.randn(7, 2, generator=gen(1), requires_grad=True)
    penalty = losses.gradient_penalty(lambda x: x @ weight, real, fake)
    assert penalty.item() == pytest.approx(16)
    to_weight, to_fake = torch.autograd.grad(penalty, (weight, fake), allow_unused=True)
    assert torch.allclose(to_weight, 2 * 4 * torch.tensor([0.6, 0.8]))
    assert to_fake is None


def test_gradient_penalty_is_taken_between_the_samples():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().flatten(1).sum(1)

    real, fake = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    penalty = losses.gradient_penalty(critic, real, fake, mix=torch.tensor([0.0, 0.25, 1.0]))
    assert seen[0][:, 0, 0, 0].tolist() == [0.0, 0.25, 1.0]
    # gradient 2x of norm 4x at x = mix
    assert penalty.item() == pytest.approx(((0 - 1) ** 2 + (1 - 1) ** 2 + (4 - 1) ** 2) / 3)


def test_gradient_penalty_at_a_flat_critic_has_a_finite_gradient():
    weight = torch.zeros(2, requires_grad=True)
    penalty = losses.gradient_penalty(lambda x: x @ weight, torch.randn(3, 2), torch.randn(3, 2))
    penalty.backward()
    assert penalty.item() == 1
    assert weight.grad.isfinite().all()


def test_latent_regression_moves_both_sides():
    a, b = (
        torch.randn(4, 3, generator=gen(), requires_grad=True),
        torch.randn(4, 3, generator=gen(1), requires_grad=True),
    )
    to_a, to_b = torch.autograd.grad(losses.latent_regression(a, b), (a, b))
    assert torch.allclose(to_a, 2 * (a - b) / 12)
    assert torch.equal(to_a, -to_b)


def test_biological_terms():
    latents = torch.tensor([[1.0, -2.0], [0.0, -1.0]], requires_grad=True)
    assert losses.nonnegativity(latents).item() == 0.75
    assert losses.activity(latents).item() == 1.5
    losses.nonnegativity(latents).backward()
    assert latents.grad.tolist() == [[0.0, -0.25], [0.0, -0.25]]


@pytest.mark.parametrize(
    "loss",
    [losses.binary_cross_entropy, losses.quantization, losses.commitment, losses.latent_regression],
)
def test_half_precision_is_widened_and_double_kept(loss):
    a, b = torch.rand(4, 3, generator=gen()), torch.rand(4, 3, generator=gen(1))
    assert loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert loss(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize("loss", [losses.binary_cross_entropy, losses.quantization, losses.kl_standard_normal])
def test_mean_over_samples_does_not_depend_on_the_split(loss):
    a, b = torch.rand(8, 3, generator=gen()), torch.rand(8, 3, generator=gen(1))
    halves = (loss(a[:4], b[:4]) + loss(a[4:], b[4:])) / 2
    assert loss(a, b).item() == pytest.approx(halves.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset_size": 11}, "dataset_size is 11"),
        ({"dataset_size": 100, "sampling": "stratifed"}, "did you mean 'stratified'"),
    ],
)
def test_bad_sampling_is_one_sentence(posterior, options, words):
    with pytest.raises(UserError, match=words):
        losses.kl_decomposition(*posterior, **options)


def test_stratified_sampling_needs_two_samples():
    one = torch.ones(1, 2)
    with pytest.raises(UserError, match="at least 2 samples"):
        losses.kl_decomposition(one, one, one, dataset_size=5, sampling="stratified")
