"""Losses of score distillation: distribution matching, denoising, and the GAN on diffused samples."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError, nearest

Weighting = Literal["edm", "epsilon", "sample", "v_prediction", "flow_prediction"]
"""Which prediction's plain squared error a denoising loss equals; ``edm`` is the raw network that EDM preconditions."""


def distribution_matching_gradient(
    x: Float[Tensor, "batch ..."], real_x0: Float[Tensor, "batch ..."], fake_x0: Float[Tensor, "batch ..."]
) -> Float[Tensor, "batch ..."]:
    """The direction in which distribution matching moves samples (DMD, arXiv 2311.18828, Eq. 7 and 8).

    ``(p_real - p_fake) / mean|p_real|`` with ``p = x - x0``, the mean taken over each sample. The normaliser makes
    noise levels comparable: without it the noisiest ones dominate. Where a sample has no finite direction (0 / 0 where
    both denoisers return it unchanged, or an overflow in one of them) it does not move.

    Args:
        x: generated samples.
        real_x0: the teacher's clean samples, seen in noised ``x``.
        fake_x0: the same from the denoiser of the generator's own distribution.

    Returns:
        The gradient in single precision or better, without a graph; NaN everywhere when the denoisers' values are
        finite for no sample of the batch, so that the loss is seen to fail.

    >>> x, real, fake = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 2.0]])
    >>> distribution_matching_gradient(x, real, fake)
    tensor([[0.3333, 1.3333]])
    """
    x, real_x0, fake_x0 = x.detach(), real_x0.detach(), fake_x0.detach()
    dtype = torch.promote_types(torch.promote_types(x.dtype, real_x0.dtype), torch.float32)
    p_real, p_fake = x.to(dtype) - real_x0, x.to(dtype) - fake_x0
    scale = p_real.abs().flatten(1).mean(1)
    direction = (p_real - p_fake) / scale.reshape(-1, *[1] * (x.ndim - 1))
    finite = torch.isfinite(scale) & torch.isfinite(p_fake).flatten(1).all(1)
    return torch.nan_to_num(direction, nan=0.0, posinf=0.0, neginf=0.0) + torch.where(finite.any(), 0.0, torch.nan)


def with_gradient(x: Float[Tensor, "batch ..."], gradient: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """A loss whose gradient with respect to ``x`` is ``gradient / x.numel()``: ``mean(x - sg(x - gradient))^2 / 2``.

    Its value is half the mean square of ``gradient``. This is how score distillation skips the Jacobian of the score.

    >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> with_gradient(x, torch.tensor([[4.0, -2.0]])).backward()
    >>> x.grad
    tensor([[ 2., -1.]])

    Args:
        x: samples, with a graph.
        gradient: the direction along which they shall descend.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    return 0.5 * F.mse_loss(x, (x - gradient.to(dtype)).detach())


def distribution_matching(
    x: Float[Tensor, "batch ..."], real_x0: Float[Tensor, "batch ..."], fake_x0: Float[Tensor, "batch ..."]
) -> Float[Tensor, ""]:
    """Distribution matching loss of DMD and DMD2: :func:`with_gradient` of :func:`distribution_matching_gradient`.

    >>> x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    >>> loss = distribution_matching(x, real_x0=torch.tensor([[0.5, 0.5]]), fake_x0=torch.tensor([[1.0, 2.0]]))
    >>> loss.backward()
    >>> loss, x.grad
    (tensor(2.5000, grad_fn=<MulBackward0>), tensor([[0.5000, 1.5000]]))

    Args:
        x: generated samples, with the generator's graph.
        real_x0: the teacher's clean samples at a noised ``x``.
        fake_x0: the fake denoiser's clean samples at the same noised ``x``.
    """
    return with_gradient(x, distribution_matching_gradient(x, real_x0, fake_x0))


def denoising_weight(
    alpha: Float[Tensor, "batch"],
    sigma: Float[Tensor, "batch"],
    weighting: Weighting = "edm",
    sigma_data: float = 0.5,
) -> Float[Tensor, "batch"]:
    """Weight of a clean sample's squared error that makes it the plain squared error of a prediction.

    ``edm``: ``α²/σ² + 1/σ_data²`` (arXiv 2206.00364, Table 1: the loss weight times c_out² is 1); ``epsilon``:
    ``α²/σ²``; ``v_prediction``: ``(α² + σ²)²/σ²``; ``flow_prediction``: ``(α + σ)²/σ²``; ``sample``: 1.

    >>> denoising_weight(torch.tensor([1.0]), torch.tensor([0.5]))
    tensor([8.])

    Args:
        alpha: scale of the clean sample.
        sigma: standard deviation of the noise.
        weighting: the prediction whose error is meant.
        sigma_data: standard deviation of the data (for ``edm``).

    Raises:
        UserError: there is no such weighting.
    """
    match weighting:
        case "edm":
            return (alpha / sigma) ** 2 + 1 / sigma_data**2
        case "epsilon":
            return (alpha / sigma) ** 2
        case "v_prediction":
            return ((alpha**2 + sigma**2) / sigma) ** 2
        case "flow_prediction":
            return ((alpha + sigma) / sigma) ** 2
        case "sample":
            return torch.ones_like(sigma)
    valid = ["edm", "epsilon", "sample", "v_prediction", "flow_prediction"]
    raise UserError(f"There is no denoising weight {weighting!r}; {nearest(weighting, valid)}.")


def denoising(
    prediction: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    weight: Float[Tensor, "batch"] | None = None,
) -> Float[Tensor, ""]:
    """Denoising loss: the mean over all values of ``weight · (prediction - target)²``.

    >>> prediction, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    >>> denoising(prediction, target, weight=torch.tensor([8.0, 0.5]))
    tensor(5.)

    Args:
        prediction: clean samples from a denoiser (or any other prediction, to be compared as it is).
        target: what they should be; no gradient flows into it.
        weight: weight of each sample, see :func:`denoising_weight`; 1 by default.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(dtype) - target.detach().to(dtype)) ** 2
    return error.mean() if weight is None else (weight.to(dtype) * error.flatten(1).mean(1)).mean()


def gan_generator(fake_logits: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """Non-saturating generator loss ``mean softplus(-D(fake))``.

    >>> gan_generator(torch.zeros(4))
    tensor(0.6931)

    Args:
        fake_logits: the discriminator's logits of generated samples; large means real.
    """
    return F.softplus(-fake_logits.float()).mean()


def gan_discriminator(
    real_logits: Float[Tensor, "real ..."], fake_logits: Float[Tensor, "fake ..."]
) -> Float[Tensor, ""]:
    """Discriminator loss ``mean softplus(D(fake)) + mean softplus(-D(real))``.

    >>> gan_discriminator(torch.zeros(4), torch.zeros(4))
    tensor(1.3863)

    Args:
        real_logits: the discriminator's logits of real samples.
        fake_logits: the same of generated samples, which have no graph here.
    """
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()
