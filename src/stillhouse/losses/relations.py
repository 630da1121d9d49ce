"""Losses of knowledge distillation on relations between samples or tokens: what lies near what, and at which angle.

All couple the samples of a batch, so their value depends on its size. Widths may differ between student and teacher.
Features are flattened to one vector per sample where not said otherwise; all is computed in float32 (float64 stays), also
under autocast; gradients go to every tensor that requires them, so compute a teacher under ``torch.no_grad``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stillhouse.errors import UserError, nearest
from stillhouse.losses.divergences import kl, reverse_kl

Features = Float[Tensor, "batch *shape"]
Tokens = Float[Tensor, "nodes width"]


def similarity_preserving(student: Features, teacher: Features) -> Float[Tensor, ""]:
    """Squared distance of the similarity matrices of a batch (SP, arXiv 1907.09682).

    ``|G_S - G_T|^2 / b^2`` with ``G = F F'``, each row of unit length. Public toolkits weigh it by 3000.

    Args:
        student: the student's features; the last maps, usually.
        teacher: the teacher's.

    Raises:
        UserError: batches of different size.

    >>> features = torch.rand(4, 6, 2, 2)
    >>> similarity_preserving(3 * features, features.flip(1)).item() < 1e-12  # scale and order of features are free
    True
    """
    a, b = _rows("similarity_preserving", student, teacher)
    with _exact(a):
        difference = F.normalize(a @ a.T) - F.normalize(b @ b.T)
    return difference.square().mean()


def pkt(
    student: Features, teacher: Features, *, variant: Literal["paper", "code"] = "paper", eps: float = 1e-7
) -> Float[Tensor, ""]:
    """Divergence between the conditional probabilities of finding one sample from another (PKT, arXiv 1803.10837).

    ``p_{j|i}`` is the kernel ``(cosine + 1) / 2`` of samples i and j, divided by its sum over all j other than i. The loss
    is ``p^T log(p^T / p^S)``, AVERAGED over all b^2 pairs as in the authors' code, whose weight in public toolkits is
    30000. That code lets each sample be found from itself too, which dilutes the probabilities (``"code"``).

    Args:
        student: the student's embeddings.
        teacher: the teacher's.
        variant: without (``"paper"``) or with (``"code"``) pairs of a sample with itself.
        eps: guard of lengths and logarithms, the authors'.

    Raises:
        UserError: batches of different size, or fewer than 2 samples (3 in the paper's form, where 2 say nothing).

    >>> embeddings = torch.randn(5, 8)
    >>> abs(pkt(3 * embeddings, embeddings).item()) < 1e-7
    True
    """
    _check_variant("pkt", variant, ("paper", "code"))
    a, b = _rows("pkt", student, teacher)
    if len(a) < (3 if variant == "paper" else 2):
        raise UserError(f"pkt: {len(a)} samples have no probabilities to compare; pass a larger batch.")

    def conditional(x: Tensor) -> Tensor:
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)
        with _exact(x):
            kernel = (x @ x.T + 1) / 2
        if variant == "paper":
            kernel = kernel.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
        return kernel / kernel.sum(1, keepdim=True)

    p, q = conditional(b), conditional(a)
    return (p * ((p + eps) / (q + eps)).log()).mean()


def rkd_distance(student: Features, teacher: Features) -> Float[Tensor, ""]:
    """Smooth L1 between pairwise distances, each side divided by its mean distance (RKD, arXiv 1904.05068, RKD-D).

    The mean of both the distances and the loss is as in the authors' code: distances over different samples, the loss
    over all b^2 pairs (equal samples add 0). The usual weight is 25.

    Args:
        student: the student's embeddings.
        teacher: the teacher's.

    Raises:
        UserError: batches of different size, or of one.

    >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    >>> rkd_distance(points[:, :1], points).item()  # on a line both are the same but for the scale
    0.0
    """
    a, b = _rows("rkd_distance", student, teacher, at_least=2)

    def relative(x: Tensor) -> Tensor:
        distances = _distances(x)
        return distances / _mean_distance(distances)

    return F.smooth_l1_loss(relative(a), relative(b))


def rkd_angle(student: Features, teacher: Features, *, chunk: int | None = None) -> Float[Tensor, ""]:
    """Smooth L1 between the cosines of the angles that every two samples form at every third (RKD, arXiv 1904.05068, RKD-A).

    Averaged over all b^3 triples as in the authors' code (those with equal samples add 0). The usual weight is 50.

    Args:
        student: the student's embeddings.
        teacher: the teacher's.
        chunk: number of corners handled at once; with it b^3 cosines never exist at the same time, and each chunk is
            computed twice.

    Raises:
        UserError: batches of different size, or of one, or a chunk below 1.

    >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> turned = 5 * points @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) + 2
    >>> rkd_angle(turned, points).item() < 1e-12
    True
    """
    a, b = _rows("rkd_angle", student, teacher, at_least=2)
    if chunk is not None and chunk < 1:
        raise UserError(f"rkd_angle: chunk is a number of samples of at least 1, not {chunk}.")

    def error(a: Tensor, b: Tensor, corners_a: Tensor, corners_b: Tensor) -> Tensor:
        with _exact(a):
            units = [F.normalize(x[None] - at[:, None], dim=2) for x, at in ((a, corners_a), (b, corners_b))]
            cosines = [unit @ unit.mT for unit in units]
        return F.smooth_l1_loss(cosines[0], cosines[1], reduction="sum")

    if chunk is None or chunk >= len(a):
        total = error(a, b, a, b)
    else:
        parts = zip(a.split(chunk), b.split(chunk), strict=True)  # type: ignore[no-untyped-call]
        total = torch.stack(
            [checkpoint(error, a, b, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        ).sum()
    return total / len(a) ** 3


def correlation_congruence(
    student: Features,
    teacher: Features,
    gamma: float = 0.4,
    order: int = 2,
    *,
    kernel: Literal["gaussian", "bilinear"] = "gaussian",
    variant: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """Squared distance of the correlation matrices of a batch (CC, arXiv 1904.01802): ``|C_S - C_T|^2 / b^2``.

    The correlation of two embeddings of unit length is the Gaussian ``exp(-gamma |x - y|^2)``, as a Taylor series in their
    product up to an ``order``: ``exp(-2 gamma) sum_p (2 gamma)^p / p! (x . y)^p``; or the product alone. Under the same name
    public toolkits run something else (``"code"``, RepDistiller): ``mean_i |s_i - t_i| . |s_{i+1} - t_{i+1}|`` of samples
    that happen to stand next to each other, which needs one width on both sides and compares no relations; its weight is
    0.02.

    Args:
        student: the student's embeddings.
        teacher: the teacher's.
        gamma: inverse width of the kernel, 0.4 in the paper.
        order: highest power P of the series, 2 in the paper.
        kernel: ``"gaussian"`` or ``"bilinear"``.
        variant: ``"paper"`` or ``"code"``.

    Raises:
        UserError: batches of different size, widths that differ in the form ``"code"``, or ``gamma`` or ``order`` out of
            range.

    >>> embeddings = torch.randn(4, 8)
    >>> correlation_congruence(2 * embeddings, embeddings).item() < 1e-12
    True
    """
    where = "correlation_congruence"
    _check_variant(where, variant, ("paper", "code"))
    _check_variant(where, kernel, ("gaussian", "bilinear"), "kernel")
    if not gamma > 0 or order < 1:
        raise UserError(f"{where}: gamma is above 0 and order at least 1, not {gamma} and {order}.")
    a, b = _rows(where, student, teacher)
    if variant == "code":
        if a.shape != b.shape or len(a) < 2:
            raise UserError(
                f"{where}: the form 'code' compares embeddings of one shape and at least 2 samples, not {tuple(a.shape)} and "
                f"{tuple(b.shape)}; project both sides to one width."
            )
        apart = (a - b).abs()
        return (apart[:-1] * apart[1:]).sum(1).mean()

    def correlation(x: Tensor) -> Tensor:
        x = F.normalize(x)
        with _exact(x):
            cosine = x @ x.T
        if kernel == "bilinear":
            return cosine
        # Horner's scheme for the series.
        series = torch.ones_like(cosine)
        for power in range(order, 0, -1):
            series = 1 + 2 * gamma / power * cosine * series
        return math.exp(-2 * gamma) * series

    return F.mse_loss(correlation(a), correlation(b))


def contextual_similarity(
    student: Float[Tensor, "batch tokens student_width"], teacher: Float[Tensor, "batch tokens teacher_width"]
) -> Float[Tensor, ""]:
    """How the tokens of one sample relate to each other, compared (TRG, arXiv 2306.12442, the inner-instance term).

    Mean squared difference of ``softmax(F F' / sqrt(width))``, row by row. Its entries are about 1 / n for n tokens, so the
    value is of order 1 / n^2: a weight meant for numbers near 1 is to be multiplied by n^2.

    Args:
        student: the student's tokens.
        teacher: the teacher's, as many.

    Raises:
        UserError: samples or tokens that differ in number.

    >>> tokens = torch.randn(2, 5, 8)
    >>> contextual_similarity(tokens.flip(2), tokens).item() < 1e-12  # a rotation of the token space is free
    True
    """
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            "contextual_similarity: tokens are (batch, tokens, width) with as many samples and tokens on both sides, not "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )

    def context(tokens: Tensor) -> Tensor:
        tokens = _wide(tokens)
        with _exact(tokens):
            return (tokens @ tokens.mT / math.sqrt(tokens.shape[2])).softmax(-1)

    return F.mse_loss(context(student), context(teacher))


def neighbour_graph(
    tokens: Tokens,
    k: int = 8,
    sigma: float | Literal["median"] = 0.5,
    *,
    scale: Literal["norm", "distance", "none"] = "norm",
    neighbours: Int[Tensor, "nodes k"] | None = None,
) -> tuple[Float[Tensor, "nodes nodes"], Int[Tensor, "nodes k"]]:
    """Gaussian weights to the k nearest of all other tokens, 0 to the rest (TRG, arXiv 2306.12442).

    ``A_ij = exp(-|x_i - x_j|^2 / (2 sigma))`` where j is among the k nearest of i by Euclidean distance. Not symmetric, and
    0 on the diagonal. Who is near has no gradient, the weights have.

    Args:
        tokens: one row per node.
        k: neighbours of each.
        sigma: width of the Gaussian; ``"median"`` takes the median squared distance to the neighbours.
        scale: what the tokens are divided by first, so that one sigma serves any width: their own length, the mean
            distance, or nothing.
        neighbours: columns of each row's neighbours, to take those of another graph.

    Returns:
        The weights, and the columns of each row's neighbours.

    Raises:
        UserError: ``k`` that is not between 1 and the number of other tokens, or ``sigma`` not above 0.

    >>> points = torch.tensor([[0.0], [1.0], [3.0]])
    >>> weights, near = neighbour_graph(points, k=1, sigma=0.5, scale="none")
    >>> near.flatten().tolist(), [round(w, 4) for w in weights.sum(1).tolist()]
    ([1, 0, 1], [0.3679, 0.3679, 0.0183])
    """
    where, count = "neighbour_graph", len(tokens)
    if tokens.dim() != 2:
        raise UserError(f"{where}: tokens are one row per node, (nodes, width), not {tuple(tokens.shape)}.")
    if not 1 <= k < count:
        raise UserError(f"{where}: k lies between 1 and {count - 1}, the number of other tokens, not {k}.")
    if sigma != "median" and not (not isinstance(sigma, str) and sigma > 0):
        raise UserError(f"{where}: sigma is a number above 0 or 'median', not {sigma!r}.")
    _check_variant(where, scale, ("norm", "distance", "none"), "scale")
    x = _wide(tokens)
    if scale == "norm":
        x = F.normalize(x)
    elif scale == "distance":
        x = x / _mean_distance(_distances(x))
    near = neighbours
    if near is None:
        with torch.no_grad():
            # About their mean, so that large common values do not drown the differences.
            centred = x - x.mean(0)
            near = torch.cdist(centred, centred).fill_diagonal_(math.inf).topk(k, largest=False).indices
    squares = (x[:, None] - x[near]).square().sum(2)
    width = squares.detach().median().clamp_min(torch.finfo(x.dtype).tiny) if sigma == "median" else sigma
    weights = torch.exp(-squares / (2 * width))
    return torch.zeros(count, count, dtype=x.dtype, device=x.device).scatter(1, near, weights), near


def local_preserving(
    student: Tokens,
    teacher: Tokens,
    k: int = 8,
    sigma: float | Literal["median"] = 0.5,
    *,
    temperature: float = 1.0,
    direction: Literal["student", "teacher"] = "student",
    neighbours: Literal["own", "teacher"] = "own",
    nearness: Literal["row", "column"] = "row",
    scale: Literal["norm", "distance", "none"] = "norm",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Divergence between the rows of the two neighbour graphs, a mean over nodes (TRG, arXiv 2306.12442, the local term).

    Each row of :func:`neighbour_graph` is softened over ALL nodes, zeros included. With weights between 0 and 1 such rows
    are nearly flat and the divergence tiny; a ``temperature`` below 1 sharpens them.

    Args:
        student: the student's tokens, of many samples.
        teacher: the teacher's, of the same samples and positions.
        k: neighbours of each token.
        sigma: width of the Gaussian.
        temperature: of the softmax over a row; 1 as printed.
        direction: whose rows come first: ``"student"`` for KL(student || teacher), as printed, or the other way.
        neighbours: each side's own, as printed, or the teacher's for both, which is steadier.
        nearness: row i weighs the nodes that are nearest to i (``"row"``), or, as printed, those to which i is among the
            nearest (``"column"``): the transposed graph, in which a node that is nobody's neighbour has a flat row.
        scale: what the tokens are divided by first.
        chunk: rows handled at once.

    Raises:
        UserError: tokens that differ in number, and as in :func:`neighbour_graph`.

    >>> tokens = torch.randn(12, 5)
    >>> local_preserving(2 * tokens, tokens, k=3).item() < 1e-7
    True
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        raise UserError(
            f"local_preserving: tokens are one row per node, as many on both sides, not {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    _check_variant("local_preserving", direction, ("student", "teacher"), "direction")
    _check_variant("local_preserving", neighbours, ("own", "teacher"), "neighbours")
    _check_variant("local_preserving", nearness, ("row", "column"), "nearness")
    theirs, near = neighbour_graph(teacher, k, sigma, scale=scale)
    mine, _ = neighbour_graph(student, k, sigma, scale=scale, neighbours=near if neighbours == "teacher" else None)
    if nearness == "column":
        mine, theirs = mine.T, theirs.T
    divergence = reverse_kl if direction == "student" else kl
    return divergence(mine, theirs, temperature, scale_by_temperature_squared=False, chunk=chunk)


def _distances(x: Tensor) -> Tensor:
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_distance(distances: Tensor) -> Tensor:
    """Mean over different rows; above 0 also where all coincide."""
    mean = distances.sum() / (len(distances) * (len(distances) - 1))
    return mean.clamp_min(torch.finfo(mean.dtype).tiny)


def _exact(x: Tensor) -> torch.autocast:
    """Products in the precision of their factors, whatever surrounds them."""
    return torch.autocast(x.device.type, enabled=False)


def _rows(where: str, student: Tensor, teacher: Tensor, at_least: int = 1) -> tuple[Tensor, Tensor]:
    if student.dim() < 2 or teacher.dim() < 2 or len(student) != len(teacher) or len(student) < at_least:
        raise UserError(
            f"{where}: features are (batch, ...) of the same samples on both sides, at least {at_least}, not "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    return _wide(student).flatten(1), _wide(teacher).flatten(1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_variant(where: str, value: str, valid: tuple[str, ...], name: str = "variant") -> None:
    if value not in valid:
        raise UserError(f"{where}: there is no {name} {value!r}; {nearest(str(value), valid)}.")
