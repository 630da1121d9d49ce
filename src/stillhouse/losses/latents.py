"""Losses of models with a short code: reconstruction, quantisation, KL and its parts, WGAN, InfoGAN.

Each is a mean over samples, computed in float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError, nearest

Sampling = Literal["weighted", "stratified", "batch"]


def binary_cross_entropy(
    logits: Float[Tensor, "batch *pixels"], target: Float[Tensor, "batch *pixels"]
) -> Float[Tensor, ""]:
    """Sigmoid cross-entropy of reconstruction logits, a mean over the pixels of a sample and then over samples.

    Targets between 0 and 1 are intensities, not labels; the least value is then their entropy, not 0.

    >>> loss = binary_cross_entropy(torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 0.5]] * 2))
    >>> round(loss.item(), 4)  # log 2
    0.6931
    """
    return F.binary_cross_entropy_with_logits(_wide(logits), _wide(target))


def quantization(
    continuous: Float[Tensor, "batch inputs"], quantized: Float[Tensor, "batch inputs"]
) -> Float[Tensor, ""]:
    """Mean squared distance that moves only the stored values: mean_j (sg(c_j) - zq_j)^2.

    Args:
        continuous: encoder output c.
        quantized: nearest stored values zq.

    >>> c = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> q = torch.tensor([[0.0, 2.0]], requires_grad=True)
    >>> torch.autograd.grad(quantization(c, q), (c, q), allow_unused=True)
    (None, tensor([[-1.,  0.]]))
    """
    return F.mse_loss(_wide(quantized), _wide(continuous.detach()))


def commitment(
    continuous: Float[Tensor, "batch inputs"], quantized: Float[Tensor, "batch inputs"]
) -> Float[Tensor, ""]:
    """Mean squared distance that moves only the encoder: mean_j (c_j - sg(zq_j))^2.

    Args:
        continuous: encoder output c.
        quantized: nearest stored values zq.

    >>> c = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> q = torch.tensor([[0.0, 2.0]], requires_grad=True)
    >>> torch.autograd.grad(commitment(c, q), (c, q), allow_unused=True)
    (tensor([[1., 0.]]), None)
    """
    return F.mse_loss(_wide(continuous), _wide(quantized.detach()))


def kl_standard_normal(mean: Float[Tensor, "batch latents"], std: Float[Tensor, "batch latents"]) -> Float[Tensor, ""]:
    """KL(N(mean, diag std^2) || N(0, I)) in nats: a sum over latents, a mean over samples.

    Beside a reconstruction loss that is a mean over pixels, divide by the number of pixel values to keep the ELBO.

    Args:
        mean: posterior means.
        std: posterior standard deviations, positive.

    >>> kl_standard_normal(torch.zeros(4, 3), torch.ones(4, 3)).item()
    0.0
    >>> kl_standard_normal(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2)).item()
    2.5
    """
    mean, std = _wide(mean), _wide(std)
    return (0.5 * (mean.square() + std.square() - 1) - std.log()).sum(dim=-1).mean()


class KLParts(NamedTuple):
    """The three parts of a VAE's average KL term (Isolating Sources of Disentanglement in VAEs, equation 2), in nats.

    Attributes:
        mutual_information: index-code mutual information I(z; n).
        total_correlation: KL(q(z) || prod_j q(z_j)).
        dimension_wise_kl: sum_j KL(q(z_j) || p(z_j)).
    """

    mutual_information: Float[Tensor, ""]
    total_correlation: Float[Tensor, ""]
    dimension_wise_kl: Float[Tensor, ""]


def kl_decomposition(
    samples: Float[Tensor, "batch latents"],
    mean: Float[Tensor, "batch latents"],
    std: Float[Tensor, "batch latents"],
    *,
    dataset_size: int,
    sampling: Sampling = "weighted",
) -> KLParts:
    """Split the KL of a VAE's posterior to N(0, I) into its three parts, estimated on a mini-batch (beta-TCVAE).

    The sum of the three is the one-sample estimate mean(log q(z|x) - log p(z)) of the KL whatever the estimator, as
    what they estimate, log q(z) and log prod_j q(z_j), cancels. Couples the samples of a batch, so it depends on
    the batch size; see :func:`log_aggregate_posterior` for the estimators and their biases.

    Args:
        samples: one draw from each sample's posterior.
        mean: posterior means.
        std: posterior standard deviations, positive.
        dataset_size: number of training samples that the batch was drawn from.
        sampling: estimator of the aggregate posterior.

    >>> z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    >>> parts = kl_decomposition(z, torch.zeros(8, 3), torch.ones(8, 3), dataset_size=100, sampling="stratified")
    >>> [round(abs(part.item()), 4) for part in parts]  # every posterior is the prior
    [0.0, 0.0, 0.0]
    """
    samples, mean, std = _wide(samples), _wide(mean), _wide(std)
    joint, product = log_aggregate_posterior(samples, mean, std, dataset_size=dataset_size, sampling=sampling)
    conditional = _log_normal(samples, mean, std).sum(dim=-1)
    prior = _log_normal(samples, torch.zeros_like(samples), torch.ones_like(samples)).sum(dim=-1)
    return KLParts((conditional - joint).mean(), (joint - product).mean(), (product - prior).mean())


def log_aggregate_posterior(
    samples: Float[Tensor, "batch latents"],
    mean: Float[Tensor, "batch latents"],
    std: Float[Tensor, "batch latents"],
    *,
    dataset_size: int,
    sampling: Sampling = "weighted",
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Estimate log q(z) and log prod_j q(z_j) at each sample, where q(z) averages the posteriors of the data set.

    Three weightings of the batch's posteriors, arXiv 1802.04942, appendix C:

    - ``weighted``: 1 / (batch_size * dataset_size) each (minibatch-weighted sampling). A lower bound in
      expectation; far below q(z), by about log(dataset_size), where the batch's posteriors overlap.
    - ``stratified``: weights that sum to 1, with the sample's own posterior at 1 / dataset_size (minibatch
      stratified sampling). Unbiased for q(z).
    - ``batch``: 1 / batch_size each, the aggregate over the batch itself: exact when the batch is the data set.

    Args:
        samples: one draw from each sample's posterior.
        mean: posterior means.
        std: posterior standard deviations, positive.
        dataset_size: number of training samples that the batch was drawn from.
        sampling: the weighting.

    Returns:
        log q(z) and log prod_j q(z_j), one of each per sample.

    Raises:
        UserError: for an unknown sampling, a data set smaller than the batch, or a stratified batch of one.

    >>> one = torch.ones(2, 1)
    >>> joint, product = log_aggregate_posterior(0 * one, 0 * one, one, dataset_size=2, sampling="batch")
    >>> joint.tolist() == product.tolist(), round(joint[0].item(), 4)  # log N(0; 0, 1)
    (True, -0.9189)
    """
    batch_size = samples.shape[0]
    if dataset_size < batch_size:
        raise UserError(
            f"dataset_size is {dataset_size} but the batch has {batch_size} samples; give the training set's size."
        )
    log_density = _log_normal(_wide(samples)[:, None], _wide(mean)[None], _wide(std)[None])
    log_weight = _log_importance_weights(batch_size, dataset_size, sampling).to(log_density)
    joint = torch.logsumexp(log_weight + log_density.sum(dim=-1), dim=1)
    product = torch.logsumexp(log_weight[..., None] + log_density, dim=1).sum(dim=-1)
    return joint, product


def _log_importance_weights(batch_size: int, dataset_size: int, sampling: Sampling) -> Float[Tensor, "batch batch"]:
    """Log weight of posterior n_m (column) in the estimate at a sample drawn from posterior n_i (row)."""
    if sampling == "weighted":
        weight = torch.full((batch_size, batch_size), 1 / (batch_size * dataset_size), dtype=torch.float64)
    elif sampling == "batch":
        weight = torch.full((batch_size, batch_size), 1 / batch_size, dtype=torch.float64)
    elif sampling == "stratified":
        if batch_size < 2:
            raise UserError("stratified sampling needs at least 2 samples in a batch; this batch has 1.")
        others = batch_size - 1
        weight = torch.full((batch_size, batch_size), 1 / others, dtype=torch.float64)
        row = torch.arange(batch_size)
        weight[row, row] = 1 / dataset_size
        # One of the others stands in for what neither the sample itself nor a full share of the others covers.
        weight[row, (row + 1) % batch_size] = (dataset_size - others) / (dataset_size * others)
    else:
        raise UserError(f"there is no sampling {sampling!r}; {nearest(sampling, ['weighted', 'stratified', 'batch'])}.")
    return weight.log()


def wgan_critic(real_values: Float[Tensor, " batch"], fake_values: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """What a Wasserstein critic minimises: mean value of the fakes minus mean value of the real samples.

    >>> wgan_critic(torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5])).item()
    -1.5
    """
    return _wide(fake_values).mean() - _wide(real_values).mean()


def wgan_generator(fake_values: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """What the generator against a Wasserstein critic minimises: minus the mean value of its samples.

    >>> wgan_generator(torch.tensor([0.5, 1.5])).item()
    -1.0
    """
    return -_wide(fake_values).mean()


def gradient_penalty(
    critic: Callable[[Float[Tensor, "batch *shape"]], Float[Tensor, " batch"]],
    real: Float[Tensor, "batch *shape"],
    fake: Float[Tensor, "batch *shape"],
    *,
    mix: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared deviation from 1 of the critic's gradient norm between real and fake samples (WGAN-GP).

    Improved Training of Wasserstein GANs (arXiv 1704.00028), equation 3, without its weight of 10. The gradient is
    taken at ``mix * real + (1 - mix) * fake`` and itself differentiated; ``fake`` gets no gradient. The critic must
    value each sample on its own (no batch norm).

    Args:
        critic: gives one value per sample.
        real: real samples.
        fake: generated samples.
        mix: share of the real sample, uniform over [0, 1) from torch's global generator when not given.

    >>> x = torch.randn(4, 3)
    >>> gradient_penalty(lambda x: 2 * x[:, 0], x, torch.zeros(4, 3)).item()  # gradient norm 2
    1.0
    """
    if mix is None:
        mix = torch.rand(len(real), device=real.device)
    mix = mix.view(-1, *[1] * (real.ndim - 1)).to(real.dtype)
    between = (mix * real.detach() + (1 - mix) * fake.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    norm: Tensor = torch.linalg.vector_norm(_wide(gradient).flatten(1), dim=1)
    return (norm - 1).square().mean()


def latent_regression(
    predicted: Float[Tensor, "batch latents"], latents: Float[Tensor, "batch latents"]
) -> Float[Tensor, ""]:
    """Mean squared error of an encoder that recovers the latents a sample was generated from (InfoGAN).

    Gradients go to both sides: in a quantised InfoGAN the latents are stored values that learn.

    >>> latent_regression(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)).item()
    0.5
    """
    return F.mse_loss(_wide(predicted), _wide(latents))


def nonnegativity(latents: Float[Tensor, "batch latents"]) -> Float[Tensor, ""]:
    """Mean amount by which latents fall below 0 (BioAE, arXiv 2210.01768).

    >>> nonnegativity(torch.tensor([[1.0, -3.0]])).item()
    1.5
    """
    return _wide(latents).neg().relu().mean()


def activity(latents: Float[Tensor, "batch latents"]) -> Float[Tensor, ""]:
    """Mean squared latent, the energy of a code (BioAE, arXiv 2210.01768).

    >>> activity(torch.tensor([[1.0, -3.0]])).item()
    5.0
    """
    return _wide(latents).square().mean()


def _log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def _wide(x: Tensor) -> Tensor:
    """At least float32: half precision from autocast is widened, float64 stays."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
