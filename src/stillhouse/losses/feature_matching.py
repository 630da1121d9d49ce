"""Losses of knowledge distillation on features: hints, attention, factors, boundaries, flows, norm and direction.

Features come as networks give them: maps ``(batch, channels, height, width)``, tokens ``(batch, tokens, width)`` or vectors
``(batch, width)``. Where a loss needs maps, :func:`feature_maps` makes them: a square number of tokens becomes a square, a
vector a map of one position. Two maps of different size meet at the smaller one, the larger being averaged
(:func:`aligned`), as in the official codes. Each loss is of ONE pair of layers, to be summed over pairs, but for those
between layers (:func:`fsp`, :func:`kdsvd`). All is computed in float32 (float64 stays), also under autocast; gradients go to
every tensor that requires them, so compute a teacher under ``torch.no_grad``.

Losses are means over samples. Sums over channels and positions are kept where the paper and its official weight have them,
and said at each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.features import attention_map

Features = Float[Tensor, "batch *shape"]
Maps = Float[Tensor, "batch channels height width"]


def feature_maps(features: Features, *, skip: int = 0) -> Maps:
    """Features as maps (batch, channels, height, width).

    Maps stay; tokens (batch, tokens, width) become a square map if their number is a square and a column otherwise;
    vectors become maps of one position.

    Args:
        features: maps, tokens or vectors.
        skip: leading tokens to leave out, such as a class token.

    Raises:
        UserError: features of another number of dimensions, or nothing left.

    >>> feature_maps(torch.zeros(2, 17, 8), skip=1).shape, feature_maps(torch.zeros(2, 8)).shape
    (torch.Size([2, 8, 4, 4]), torch.Size([2, 8, 1, 1]))
    """
    if features.dim() not in (2, 3, 4):
        raise UserError(
            "Features are maps (batch, channels, height, width), tokens (batch, tokens, width) or vectors (batch, width), "
            f"not of shape {tuple(features.shape)}."
        )
    if features.dim() == 4:
        return features
    if features.dim() == 2:
        return features[:, :, None, None]
    tokens = features[:, skip:]
    count = tokens.shape[1]
    if count < 1:
        raise UserError(f"No token is left of {features.shape[1]} after leaving out {skip}.")
    side = math.isqrt(count)
    size = (side, side) if side * side == count else (count, 1)
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], *size)


def aligned(student: Features, teacher: Features) -> tuple[Maps, Maps]:
    """Both sides as maps of one size: in each direction the smaller one, the larger averaged over equal windows.

    Args:
        student: the student's features.
        teacher: the teacher's.

    Raises:
        UserError: batches of different size.

    >>> student, teacher = aligned(torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 8, 8))
    >>> student.shape[2:] == teacher.shape[2:] == (4, 4)
    True
    """
    student, teacher = feature_maps(student), feature_maps(teacher)
    _check_batch("features", student, teacher)
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return _pooled(_wide(student), size), _pooled(_wide(teacher), size)


def hint(student: Features, teacher: Features) -> Float[Tensor, ""]:
    """Mean squared difference of two features of one shape (FitNets, arXiv 1412.6550, equation 3, there a half of the sum).

    The student's usually come through a :class:`~stillhouse.modules.projectors.Regressor`. The public toolkits weigh this
    mean by 100.

    Args:
        student: the student's features, regressed to the teacher's shape.
        teacher: the teacher's.

    Raises:
        UserError: shapes that differ.

    >>> hint(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])).item()
    5.0
    """
    _check_same("hint", student, teacher)
    return F.mse_loss(_wide(student), _wide(teacher))


def attention_transfer(
    student: Features, teacher: Features, power: float = 2, *, variant: Literal["paper", "code"] = "code"
) -> Float[Tensor, ""]:
    """Distance of the spatial attention maps (Paying More Attention to Attention, arXiv 1612.03928).

    A map is ``sum_c |F_c|^power`` over positions, of unit length. The channels may differ, and the scale of either side is
    free. Equation 2 prints the length of the maps' difference, of which the paper weighs half by "10^3 divided by the
    number of elements in the map and the batch size"; the official code takes the mean of the squared difference over
    samples and positions, times 10^3. The code is the default, as its weight is the one in use.

    Args:
        student: the student's features.
        teacher: the teacher's.
        power: exponent p, 2 in the paper.
        variant: ``"code"``: mean square over samples and positions; ``"paper"``: half the length of the difference, mean
            over samples.

    Raises:
        UserError: batches of different size, or maps of one position, which all look the same.

    >>> maps = torch.rand(2, 8, 4, 4)
    >>> attention_transfer(maps, 5 * maps).item() < 1e-12
    True
    """
    _check_variant("attention_transfer", variant)
    a, b = aligned(student, teacher)
    if a[0, 0].numel() == 1:
        raise UserError(
            "attention_transfer: maps of one position have no attention; read a layer before the pooling, with positions."
        )
    difference = attention_map(a, power) - attention_map(b, power)
    if variant == "code":
        return difference.square().mean()
    return 0.5 * _length(difference).mean()


def factor_transfer(
    student: Features, teacher: Features, p: float = 1, *, variant: Literal["paper", "code"] = "paper"
) -> Float[Tensor, ""]:
    """Distance of normalised factors (Paraphrasing Complex Network, FT, arXiv 1802.04977, L_FT).

    Factors are a :class:`~stillhouse.modules.factors.Translator`'s of the student and a frozen
    :class:`~stillhouse.modules.factors.Paraphraser`'s of the teacher. Each is flattened and brought to unit length; the loss is
    the mean of ``|difference|^p`` over samples and elements, as in the authors' code. The widespread reimplementation in
    RepDistiller (``"code"``) first reduces a factor to the mean square of its channels, an attention map: then channels may
    differ and nothing of them is learnt; its weight is 200.

    Args:
        student: the student's factors.
        teacher: the teacher's.
        p: exponent, 1 in the paper.
        variant: ``"paper"`` or ``"code"`` (RepDistiller).

    Raises:
        UserError: factors of different channels, or ``p`` below 1.

    >>> round(factor_transfer(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    0.6
    """
    _check_variant("factor_transfer", variant)
    if not p >= 1:
        raise UserError(f"factor_transfer: p is at least 1, not {p}.")
    a, b = aligned(student, teacher)
    if variant == "code":
        a, b = a.square().mean(1), b.square().mean(1)
    elif a.shape != b.shape:
        raise UserError(
            f"factor_transfer: the student's factor has {a.shape[1]} channels and the teacher's {b.shape[1]}; the "
            "translator must give as many as the paraphraser."
        )
    difference = (F.normalize(a.flatten(1)) - F.normalize(b.flatten(1))).abs()
    return (difference if p == 1 else difference.pow(p)).mean()


def variational_information(
    mean: Features, variance: Float[Tensor, " channels"], teacher: Features
) -> Float[Tensor, ""]:
    """How surprising the teacher's features are given the student's (VID, arXiv 1904.05835).

    ``1/2 ((t - mean)^2 / variance + log variance)``, averaged over samples, channels and positions: the negative log
    likelihood of a Gaussian with a mean for each value and a variance for each channel, without its constant. Comes with
    :class:`~stillhouse.modules.projectors.VariationalRegressor`. It can be negative.

    Args:
        mean: the regressor's prediction of the teacher's features.
        variance: variance of each channel, above 0.
        teacher: the teacher's features; sizes of maps may differ.

    Raises:
        UserError: channels that differ.

    >>> variational_information(torch.zeros(2, 3), torch.ones(3), torch.full((2, 3), 2.0)).item()
    2.0
    """
    predicted, target = aligned(mean, teacher)
    channels = target.shape[1]
    if predicted.shape != target.shape or variance.shape != (channels,):
        raise UserError(
            f"variational_information: the teacher has {channels} channels, but the prediction has "
            f"{predicted.shape[1]} and the variance the shape {tuple(variance.shape)}."
        )
    spread = _wide(variance)[:, None, None]
    return 0.5 * ((predicted - target).square() / spread + spread.log()).mean()


def batch_norm_margins(
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    *,
    variant: Literal["paper", "code"] = "paper",
) -> Float[Tensor, " channels"]:
    """The mean of each channel's negative values, as its batch norm tells it: OFD's margins (arXiv 1904.01866).

    Behind a batch norm a channel is about ``N(bias, weight^2)``, so the mean of what lies below 0 is
    ``bias - |weight| phi(r) / Phi(-r)`` with ``r = bias / |weight|``. The official code puts ``-3 |weight|`` where less than
    0.001 of the channel is negative (``"code"``), though the mean there is about ``-|weight| / r``.

    Args:
        weight: scale of the batch norm before the activation.
        bias: its shift.
        variant: ``"paper"``: the mean; ``"code"``: with the official exception.

    Raises:
        UserError: shapes that differ.

    >>> round(batch_norm_margins(torch.ones(1), torch.zeros(1)).item(), 4)  # -sqrt(2 / pi)
    -0.7979
    """
    _check_variant("batch_norm_margins", variant)
    if weight.shape != bias.shape or weight.dim() != 1:
        raise UserError(
            f"batch_norm_margins: weight and bias have one number per channel, not the shapes {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}."
        )
    # Tails cancel in float32. A channel of zero scale is constant: its mean is itself, or nothing lies below 0.
    device = weight.device if weight.device.type != "mps" else torch.device("cpu")
    scale, shift = weight.detach().to(device, torch.float64).abs(), bias.detach().to(device, torch.float64)
    ratio = shift / scale.clamp_min(1e-300)
    log_below = torch.special.log_ndtr(-ratio)
    mills = torch.exp(-ratio.square() / 2 - 0.5 * math.log(2 * math.pi) - log_below)
    margins = torch.where(scale > 0, shift - scale * mills, shift.clamp_max(0))
    if variant == "code":
        margins = torch.where(log_below > math.log(0.001), margins, -3 * scale)
    # Of the mean below 0 rounding may leave a positive speck, far out in a tail.
    return margins.clamp_max(0).to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)


def overhaul(student: Features, teacher: Features, margins: Float[Tensor, " channels"]) -> Float[Tensor, ""]:
    """Partial distance of features before the activation (A Comprehensive Overhaul, OFD, arXiv 1904.01866).

    The target is the teacher's value, but at least the channel's margin (a negative number). Where the target is not
    positive, a student below it is right already and adds nothing. Squares are SUMMED over channels and positions, a mean
    over samples; the official code weighs that by 1/1000, and layers by 1/2 for each that follows.

    Args:
        student: the student's features before the activation, through a :class:`~stillhouse.modules.projectors.Connector`.
        teacher: the teacher's, before the activation; sizes of maps may differ.
        margins: margin of each of the teacher's channels, from :func:`batch_norm_margins`.

    Raises:
        UserError: channels that differ.

    >>> student, teacher = torch.tensor([[-5.0, 1.0, 1.0]]), torch.tensor([[-9.0, -9.0, 3.0]])
    >>> overhaul(student, teacher, torch.full((3,), -2.0)).item()  # 0 + (1 + 2)^2 + (1 - 3)^2
    13.0
    """
    a, b = aligned(student, teacher)
    if a.shape != b.shape or margins.shape != (b.shape[1],):
        raise UserError(
            f"overhaul: the teacher has {b.shape[1]} channels, but the student has {a.shape[1]} and the margins the shape "
            f"{tuple(margins.shape)}."
        )
    target = torch.maximum(b, _wide(margins)[:, None, None])
    counts = (a > target) | (target > 0)
    return ((a - target).square() * counts).sum((1, 2, 3)).mean()


def activation_boundary(student: Features, teacher: Features, margin: float = 1.0) -> Float[Tensor, ""]:
    """Put each neuron on the teacher's side of zero, with a margin (AB, arXiv 1811.03233, its alternative loss).

    ``(s + m)^2`` where the teacher's neuron is off and ``s > -m``, ``(s - m)^2`` where it is on and ``s <= m``. SUMMED over
    neurons, a mean over samples; the official code weighs that by 3/1000, and layers by 1/2 for each that follows, in a
    stage of its own before the training on labels.

    Args:
        student: the student's features before the activation, through a :class:`~stillhouse.modules.projectors.Connector`.
        teacher: the teacher's, before the activation.
        margin: margin m, 1 in the paper.

    Raises:
        UserError: shapes that differ, or a margin that is not above 0.

    >>> activation_boundary(torch.tensor([[0.5, -3.0]]), torch.tensor([[-1.0, 2.0]])).item()  # 1.5^2 + 4^2
    18.25
    """
    _check_same("activation_boundary", student, teacher)
    if not margin > 0:
        raise UserError(f"activation_boundary: margin is above 0, not {margin}.")
    student = _wide(student)
    # The distance past the margin on the wrong side: s + m for neurons that are off, m - s for those that are on.
    wrong = torch.where(teacher > 0, margin - student, student + margin).relu()
    return wrong.square().flatten(1).sum(1).mean()


def boundary_disagreement(student: Features, teacher: Features) -> Float[Tensor, ""]:
    """Share of neurons that one side switches on and the other does not: what :func:`activation_boundary` stands in for.

    Args:
        student: the student's features before the activation.
        teacher: the teacher's.

    Raises:
        UserError: shapes that differ.

    >>> boundary_disagreement(torch.tensor([[0.5, -3.0]]), torch.tensor([[1.0, 2.0]])).item()
    0.5
    """
    _check_same("boundary_disagreement", student, teacher)
    return ((student > 0) != (teacher > 0)).float().mean()


def hierarchical_context(student: Features, teacher: Features, levels: Sequence[int] = (4, 2, 1)) -> Float[Tensor, ""]:
    """Mean squared difference of a map and of its averages over coarser grids (HCL of ReviewKD, arXiv 2104.09044).

    The map itself counts 1, each level after it half as much as the one before, and the sum is divided by the sum of the
    weights. Levels that are not smaller than the map are left out. The student's maps come from a
    :class:`~stillhouse.modules.fusion.ReviewFusion`.

    Args:
        student: the student's map.
        teacher: the teacher's, of the same shape.
        levels: sides of the coarser grids, 4, 2 and 1 in the official code.

    Raises:
        UserError: shapes that differ.

    >>> hierarchical_context(torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)).item()
    1.0
    """
    _check_same("hierarchical_context", student, teacher)
    student, teacher = feature_maps(_wide(student)), feature_maps(_wide(teacher))
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    # The average is linear, so that of the difference is the difference of averages; and equal windows may be averaged on.
    difference = coarse = student - teacher
    for level in levels:
        if level >= min(difference.shape[2:]):
            continue
        nested = all(side % level == 0 for side in coarse.shape[2:])
        pooled = F.adaptive_avg_pool2d(coarse if nested else difference, level)
        coarse = pooled if nested else difference
        weight /= 2
        loss = loss + weight * pooled.square().mean()
        total += weight
    return loss / total


def masked_generation(generated: Features, teacher: Features) -> Float[Tensor, ""]:
    """Squared distance of features generated from a masked student's to the teacher's (MGD, arXiv 2205.01529).

    SUMMED over channels and positions, a mean over samples; the official weight is 7e-5 for classifiers. Comes with
    :class:`~stillhouse.modules.projectors.MaskedGenerator`.

    Args:
        generated: what the generation block made of the masked student's features.
        teacher: the teacher's features.

    Raises:
        UserError: shapes that differ.

    >>> masked_generation(torch.ones(4, 2, 3, 3), torch.zeros(4, 2, 3, 3)).item()
    18.0
    """
    _check_same("masked_generation", generated, teacher)
    return (_wide(generated) - _wide(teacher)).square().flatten(1).sum(1).mean()


def neuron_selectivity(student: Features, teacher: Features) -> Float[Tensor, ""]:
    """Squared MMD between the student's and the teacher's channels, each a unit vector over positions (NST).

    Like What You Like (arXiv 1707.01219) with the polynomial kernel ``(x . y)^2``: the mean kernel within each
    side minus twice the one across, a mean over samples. With this kernel it equals ``|F'F / C_s - G'G / C_t|^2`` of the
    position-by-position matrices, and whichever form is smaller is computed. The paper weighs it by half of lambda = 50,
    public toolkits by 50.

    Args:
        student: the student's features.
        teacher: the teacher's; channels and sizes of maps may differ.

    Raises:
        UserError: batches of different size.

    >>> maps = torch.rand(2, 6, 4, 4)
    >>> neuron_selectivity(3 * maps, maps.flip(1)).abs().item() < 1e-6  # no order among channels, and no scale
    True
    """
    a, b = (F.normalize(maps.flatten(2), dim=2) for maps in aligned(student, teacher))
    with torch.autocast(a.device.type, enabled=False):
        (_, channels, positions), others = a.shape, b.shape[1]
        if positions * positions <= channels * others:
            grams = a.mT @ a / channels - b.mT @ b / others
            return grams.square().sum((1, 2)).mean()
        within = (a @ a.mT).square().mean() + (b @ b.mT).square().mean()
        return within - 2 * (a @ b.mT).square().mean()


def fsp_matrix(lower: Features, upper: Features, *, pool: Literal["max", "mean"] = "max") -> Float[Tensor, "batch a b"]:
    """Flow between two layers: the mean over positions of products of channels (FSP, A Gift from Knowledge Distillation).

    ``G_ij = sum_{h,w} F1_{h,w,i} F2_{h,w,j} / (h w)`` (CVPR 2017, equation 1). The larger map is pooled to the smaller.

    Args:
        lower: features of the lower layer.
        upper: features of the upper layer.
        pool: the paper takes the largest value of each window, RepDistiller's reimplementation the mean.

    Raises:
        UserError: batches of different size, or an unknown pool.

    >>> fsp_matrix(torch.ones(2, 3, 8, 8), 2 * torch.ones(2, 5, 4, 4))[0, 0].tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    if pool not in ("max", "mean"):
        raise UserError(f"fsp_matrix: pool is 'max' or 'mean', not {pool!r}.")
    lower, upper = feature_maps(_wide(lower)), feature_maps(_wide(upper))
    _check_batch("fsp_matrix", lower, upper)
    size = [min(a, b) for a, b in zip(lower.shape[2:], upper.shape[2:], strict=True)]
    a, b = (_pooled(maps, size, pool).flatten(2) for maps in (lower, upper))
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT / a.shape[2]


def fsp(
    student: Sequence[Features], teacher: Sequence[Features], *, variant: Literal["paper", "code"] = "paper"
) -> Float[Tensor, ""]:
    """Squared difference of the flows between each layer and the next, averaged over entries and samples (CVPR 2017, FSP).

    Trains the student in a stage of its own before the labels. Channels must agree between student and teacher, layer by
    layer. The sum of a matrix's entries, as equation 2 has it, is the mean times its size, which the weight takes up (50 in
    RepDistiller).

    Args:
        student: the student's features, lower to upper.
        teacher: the teacher's.
        variant: maps of two sizes meet by the largest value of a window (``"paper"``) or the mean (``"code"``,
            RepDistiller).

    Raises:
        UserError: fewer than two layers, as many of both not given, or channels that differ.

    >>> maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 4)]
    >>> fsp(maps, maps).item()
    0.0
    """
    _check_variant("fsp", variant)
    _check_layers("fsp", student, teacher)
    pool: Literal["max", "mean"] = "max" if variant == "paper" else "mean"
    total: Tensor | float = 0.0
    for at in range(len(student) - 1):
        flows = [fsp_matrix(side[at], side[at + 1], pool=pool) for side in (student, teacher)]
        total = total + (flows[0] - flows[1]).square().mean()
    assert isinstance(total, Tensor)
    return total


def kdsvd(student: Sequence[Features], teacher: Sequence[Features], k: int = 1) -> Float[Tensor, ""]:
    """Match how the leading singular vectors of one layer relate to the next one's (KDSVD, arXiv 1807.06819).

    Of each map as a (positions x channels) matrix the ``k`` leading right singular vectors are taken, weighted by the
    teacher's normalised singular values; the student's are the ones among its ``k + 3`` leading that lie closest, with
    their sign. Between each layer and the next, kernels ``exp(-(v_i - w_j)^2 / 8)`` of all pairs of entries are compared:
    squared differences, SUMMED, a mean over samples. Follows the reimplementation in RepDistiller of the authors' code.
    Channels must agree between student and teacher, layer by layer. Where singular values coincide the vectors have no
    derivative, and none is passed on: dead maps do no harm.

    Args:
        student: the student's features, lower to upper.
        teacher: the teacher's.
        k: vectors per layer, 1 in the official code.

    Raises:
        UserError: fewer than two layers, as many of both not given, channels that differ, or ``k`` out of range.

    >>> maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 4)]
    >>> kdsvd(maps, maps).item() < 1e-8
    True
    """
    _check_layers("kdsvd", student, teacher)
    smallest = min(min(maps.shape[1], maps[0, 0].numel()) for maps in map(feature_maps, (*student, *teacher)))
    if not 1 <= k <= smallest:
        raise UserError(f"kdsvd: k is between 1 and {smallest}, the smallest rank among these layers, not {k}.")
    pairs = []
    for mine, theirs in zip(student, teacher, strict=True):
        candidates, _ = _right_singular(mine, k + 3)
        target, values = _right_singular(theirs, k)
        with torch.autocast(target.device.type, enabled=False):
            cosine = candidates.mT @ target
        nearest = cosine.abs().argmax(1, keepdim=True)
        sign = torch.where(cosine.gather(1, nearest) < 0, -1.0, 1.0)
        chosen = candidates.gather(2, nearest.expand(-1, candidates.shape[1], -1)) * sign
        weights = F.normalize(values, dim=1).detach()[:, None]
        pairs.append((chosen * weights, target * weights))

    def kernel(upper: Tensor, lower: Tensor) -> Tensor:
        return torch.exp(-(upper[:, :, None] - lower[:, None]).square() / 8)

    total = torch.zeros((), dtype=pairs[0][0].dtype, device=pairs[0][0].device)
    for (mine, theirs), (mine_above, theirs_above) in pairwise(pairs):
        difference = kernel(mine_above, mine) - kernel(theirs_above, theirs)
        total = total + difference.square().sum() / len(mine)
    return total


def norm_direction(
    student_embedding: Float[Tensor, "batch width"],
    teacher_embedding: Float[Tensor, "batch width"],
    towards: Float[Tensor, "batch width"],
) -> Float[Tensor, ""]:
    """ND loss: embeddings as long as the teacher's, in the direction of the teacher's class means (arXiv 2305.17007).

    ``mean_i [1 - <z_i, e_i> / max(|z_i|, |f_i|)]``, e_i the direction of ``towards``. A student longer than the teacher is
    only turned (1 - cosine); a shorter one is pulled along e_i with the constant gradient ``-e_i / |f_i|``. The student's
    length in the denominator is differentiated. Between 0 and 2.

    Args:
        student_embedding: the student's embeddings z, projected to the teacher's width.
        teacher_embedding: the teacher's f, of which only the length is used.
        towards: for each sample the mean of the teacher's embeddings of its class over the training set, of any length.

    Raises:
        UserError: shapes that differ.

    >>> towards, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    >>> [norm_direction(torch.tensor([z]), teacher, towards).item() for z in ([1.0, 9.0], [1.0, 0.0], [4.0, 0.0])]
    [0.8895684480667114, 0.75, 0.0]
    """
    _check_same("norm_direction", student_embedding, teacher_embedding)
    _check_same("norm_direction", student_embedding, towards)
    if student_embedding.dim() != 2:
        raise UserError(f"norm_direction: embeddings are (batch, width), not {tuple(student_embedding.shape)}.")
    z, f = _wide(student_embedding), _wide(teacher_embedding)
    longest = torch.maximum(_length(z), _length(f.detach()))
    return (1 - (z * F.normalize(_wide(towards))).sum(1) / _guarded(longest)).mean()


def direction(
    student_embedding: Float[Tensor, "batch width"], towards: Float[Tensor, "batch width"]
) -> Float[Tensor, ""]:
    """One half of the ND loss alone: ``mean(1 - cosine)`` to the teacher's class means (arXiv 2305.17007).

    Args:
        student_embedding: the student's embeddings, projected to the teacher's width.
        towards: the teacher's mean of each sample's class.

    Raises:
        UserError: shapes that differ.

    >>> direction(torch.tensor([[0.0, 3.0]]), torch.tensor([[5.0, 0.0]])).item()
    1.0
    """
    _check_same("direction", student_embedding, towards)
    return (1 - F.cosine_similarity(_wide(student_embedding), _wide(towards), dim=-1, eps=1e-12)).mean()


def norm_growth(student_embedding: Float[Tensor, "batch width"], step: float = 1.0) -> Float[Tensor, ""]:
    """The other half alone: embeddings grow by a step, ``mean (|z| - sg(|z|) - step)^2`` (stepwise feature norm, SAFN).

    Larger Norm More Transferable (arXiv 1811.07456), whose step is 1.

    Args:
        student_embedding: the student's embeddings.
        step: growth asked for.

    >>> norm_growth(torch.tensor([[3.0, 4.0]]), step=0.5).item()
    0.25
    """
    length = _length(_wide(student_embedding))
    return (length - length.detach() - step).square().mean()


class _RightSingular(torch.autograd.Function):
    """The leading right singular vectors and the singular values of matrices; the vectors alone pass gradients on."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        values = s[..., :count]
        ctx.mark_non_differentiable(values)
        return vh[..., :count, :].mT.contiguous(), values

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        u, s, vh = ctx.saved_tensors
        inside = vh @ grad
        asked = F.pad(inside, (0, s.shape[-1] - grad.shape[-1]))
        # What does not exist, the derivative between equal singular values or at zero ones, is 0.
        squares = s.square()
        smallest = torch.finfo(s.dtype).eps * squares[..., :1].clamp_min(torch.finfo(s.dtype).tiny)
        gaps = squares[..., None, :] - squares[..., :, None]
        rates = torch.where(gaps.abs() > smallest[..., None], 1 / gaps, 0.0)
        inverse = torch.where(squares > smallest, 1 / s, 0.0)
        turns = s[..., :, None] * (rates * (asked - asked.mT))
        outside = (grad - vh.mT @ inside).mT
        return u @ turns @ vh + (u * inverse[..., None, :])[..., : outside.shape[-2]] @ outside, None


def _right_singular(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    matrices = feature_maps(_wide(features)).flatten(2).mT
    with torch.autocast(matrices.device.type, enabled=False):
        vectors, values = _RightSingular.apply(matrices, count)  # type: ignore[no-untyped-call]
    return vectors, values


def _pooled(maps: Tensor, size: Sequence[int], pool: Literal["max", "mean"] = "mean") -> Tensor:
    height, width = size
    if maps.shape[2:] == (height, width):
        return maps
    if pool == "max":
        return F.adaptive_max_pool2d(maps, (height, width))
    return F.adaptive_avg_pool2d(maps, (height, width))


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return length


def _guarded(divisor: Tensor) -> Tensor:
    return divisor.clamp_min(torch.finfo(divisor.dtype).tiny)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_same(where: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise UserError(
            f"{where}: the student's side has the shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "bring them to one shape with a projector."
        )


def _check_batch(where: str, first: Tensor, second: Tensor) -> None:
    if len(first) != len(second):
        raise UserError(f"{where}: {len(first)} samples meet {len(second)}; pass the same batch on both sides.")


def _check_layers(where: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(student) != len(teacher) or len(student) < 2:
        raise UserError(
            f"{where}: relations between layers take at least 2 layers and as many of both networks, not {len(student)} of "
            f"the student and {len(teacher)} of the teacher."
        )
    for at, (mine, theirs) in enumerate(zip(student, teacher, strict=True)):
        a, b = feature_maps(mine), feature_maps(theirs)
        if a.shape[:2] != b.shape[:2]:
            raise UserError(
                f"{where}: layer {at} has {a.shape[1]} channels in the student and {b.shape[1]} in the teacher (samples: "
                f"{len(a)} and {len(b)}); they must agree, by a projector if need be."
            )


def _check_variant(where: str, variant: str) -> None:
    if variant not in ("paper", "code"):
        raise UserError(f"{where}: variant is 'paper' or 'code', not {variant!r}.")
