"""Matching of features class by class: spatial attention maps ("DataDAM", 2310.00093) and feature means (2110.04181).

Features come either grouped, ``[classes, per_class, ...]``, or flat, ``[samples, ...]``, with the class of each sample.
Real features are usually taken without a graph; nothing here detaches.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError


def attention_map(
    features: Float[Tensor, "*batch channels height width"], power: float = 4, eps: float = 1e-12
) -> Float[Tensor, "*batch positions"]:
    """Where a network looks: ``vec(sum_c |F_c|^power)`` of each sample, divided by its L2 norm.

    The map of ``s * F`` is the map of ``F`` for any s > 0.

    Args:
        features: feature maps of samples, before pooling. Half precision is computed in float32.
        power: exponent p; larger ones weigh the strongest activations more. DataDAM's table has 4, its code 1.
        eps: guard of the division; only a map that is zero everywhere comes out without unit norm (it stays zero).

    Raises:
        UserError: ``power`` is below 1, or the features have no spatial map.

    >>> maps = attention_map(torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]]]), power=2)
    >>> [round(value, 4) for value in maps[0].tolist()]
    [0.7071, 0.0, 0.7071, 0.0]
    """
    if not power >= 1:
        raise UserError(f"power must be at least 1 (the gradient of |0|^power is infinite below), not {power}.")
    if features.ndim < 4:
        raise UserError(
            "An attention map needs feature maps of shape [batch, channels, height, width]; "
            f"features of shape {list(features.shape)} have no spatial map, so choose a convolutional layer."
        )
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    # Scaled by its largest value, which keeps powers in range. The normalised map has degree 0 in F, so treating the scale
    # as a constant leaves the gradient exact.
    scale = features.detach().abs().amax((-3, -2, -1), keepdim=True)
    scaled = features / scale.masked_fill(scale == 0, 1)
    return F.normalize(_power(scaled, power).sum(-3).flatten(-2), dim=-1, eps=eps)


def _power(x: Tensor, power: float) -> Tensor:
    """``|x|^power``; squares are several times faster than powers."""
    if power in (2, 4):
        return x.square() if power == 2 else x.square().square()
    return x.abs() if power == 1 else x.abs().pow(power)


def class_means(
    features: Float[Tensor, "*samples"], labels: Int[Tensor, " samples"] | None = None, num_classes: int | None = None
) -> tuple[Float[Tensor, "classes features"], Float[Tensor, " classes"]]:
    """The mean of the flattened features of each class, and how many samples each class has.

    Args:
        features: [classes, per_class, ...] without ``labels``, [samples, ...] with them.
        labels: class of each sample.
        num_classes: number of classes, needed with ``labels``. The mean of an absent class is zero.

    >>> means, counts = class_means(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 2]), num_classes=3)
    >>> means.flatten().tolist(), counts.tolist()
    ([2.0, 0.0, 5.0], [2.0, 0.0, 1.0])
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    if labels is None:
        if features.ndim < 3:
            raise UserError(
                f"Grouped features have the shape [classes, per_class, ...], not {list(features.shape)}; "
                "pass labels and num_classes with flat features."
            )
        means = features.mean(1).flatten(1)
        return means, means.new_full((len(means),), features.shape[1])
    if num_classes is None or len(labels) != len(features):
        raise UserError(
            f"Flat features need one label each and num_classes; got {len(features)} samples, {len(labels)} labels "
            f"and num_classes {num_classes}."
        )
    flat = features.flatten(1)
    counts = flat.new_zeros(num_classes).index_add_(0, labels, flat.new_ones(len(labels)))
    sums = flat.new_zeros(num_classes, flat.shape[1]).index_add(0, labels, flat)
    return sums / counts.clamp_min(1)[:, None], counts


def mean_matching(
    real_features: Float[Tensor, "*real"],
    synthetic_features: Float[Tensor, "*synthetic"],
    real_labels: Int[Tensor, " real"] | None = None,
    synthetic_labels: Int[Tensor, " synthetic"] | None = None,
    num_classes: int | None = None,
) -> Float[Tensor, ""]:
    """Squared distance between the class means of real and synthetic features, summed over classes and features.

    ``sum_k || mean_real e(x) - mean_synthetic e(x) ||^2``: an MMD with a linear kernel within each class, the loss of
    distribution matching (2110.04181) and the last term of DataDAM.

    Args:
        real_features: [classes, per_class, ...], or [samples, ...] with ``real_labels``.
        synthetic_features: likewise; the number per class may differ from the real one.
        real_labels: class of each real sample, when flat.
        synthetic_labels: class of each synthetic sample, when flat.
        num_classes: number of classes, when flat. A class that is absent on either side adds nothing.

    >>> real = torch.tensor([[[0.0, 0.0], [2.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]]])
    >>> synthetic = torch.tensor([[[1.0, 3.0]], [[1.0, 1.0]]])
    >>> mean_matching(real, synthetic).item()
    5.0
    """
    real, real_counts = class_means(real_features, real_labels, num_classes)
    synthetic, synthetic_counts = class_means(synthetic_features, synthetic_labels, num_classes)
    if real.shape != synthetic.shape:
        raise UserError(
            f"Real features form {real.shape[0]} classes of {real.shape[1]} values and synthetic ones "
            f"{synthetic.shape[0]} of {synthetic.shape[1]}; they must agree."
        )
    distance = (real - synthetic).square().sum(1)
    return distance.where((real_counts > 0) & (synthetic_counts > 0), 0).sum()


def attention_matching(
    real_features: Float[Tensor, "*real channels height width"],
    synthetic_features: Float[Tensor, "*synthetic channels height width"],
    real_labels: Int[Tensor, " real"] | None = None,
    synthetic_labels: Int[Tensor, " synthetic"] | None = None,
    num_classes: int | None = None,
    power: float = 4,
) -> Float[Tensor, ""]:
    """Spatial attention matching of one layer, DataDAM's L_SAM: maps, class means, squared distance.

    The map of each sample is normalised before the mean over its class; the squares are summed over classes and
    positions. Sum over the layers before the last block for the loss of the paper.

    Args:
        real_features: feature maps [classes, per_class, channels, height, width], or [samples, channels, height, width]
            with ``real_labels``.
        synthetic_features: likewise; the number per class may differ from the real one.
        real_labels: class of each real sample, when flat.
        synthetic_labels: class of each synthetic sample, when flat.
        num_classes: number of classes, when flat. A class that is absent on either side adds nothing.
        power: exponent of :func:`attention_map`.

    >>> maps = torch.rand(3, 5, 8, 4, 4)
    >>> attention_matching(maps, 10 * maps).item() < 1e-12
    True
    """
    return mean_matching(
        attention_map(real_features, power),
        attention_map(synthetic_features, power),
        real_labels,
        synthetic_labels,
        num_classes,
    )
