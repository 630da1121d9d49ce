"""Choosing samples of each class: at random, by herding, by greedy k-centre; or of all, by k-means.

All but :func:`k_means` return positions grouped by ascending class, ``per_class`` of each, so that they start a
:class:`~stillhouse.modules.distilled.DistilledSet` as they are. Ties go to the lowest position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError


def random_selection(
    labels: Int[Tensor, " samples"], per_class: int, *, generator: torch.Generator | None = None
) -> Int[Tensor, " chosen"]:
    """``per_class`` samples of each class without replacement, uniformly.

    Args:
        labels: class of each sample; the classes are those that occur.
        per_class: how many of each.
        generator: source of randomness; torch's global CPU generator by default.

    Raises:
        UserError: a class has fewer samples.

    >>> random_selection(torch.tensor([1, 0, 1, 0, 1]), 2).shape
    torch.Size([4])
    """
    return torch.cat(
        [members[_permutation(len(members), generator)[:per_class]] for members in _classes(labels, per_class)]
    )


def herding(
    features: Float[Tensor, "samples features"], labels: Int[Tensor, " samples"], per_class: int
) -> Int[Tensor, " chosen"]:
    """Greedily keep the mean of the chosen next to that of the class (Welling 2009; iCaRL, 1611.07725, algorithm 4).

    The i-th pick minimises ``|| mean - (sum of the chosen + f) / i ||`` among those not yet chosen, so every prefix is
    the best greedy set of its size.

    Args:
        features: where distances are taken; finite.
        labels: class of each sample; the classes are those that occur.
        per_class: how many of each.

    Raises:
        UserError: a class has fewer samples, or features are not finite.

    >>> herding(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), torch.tensor([0, 0, 0, 0]), 2).tolist()
    [2, 1]
    """
    chosen = []
    for members in _classes(labels, per_class, features):
        own = _centred(features[members])
        squares = own.square().sum(1)
        total, taken = torch.zeros_like(own[0]), torch.zeros(len(own), dtype=torch.bool, device=own.device)
        picks = []
        for _ in range(per_class):
            # With the class mean at the origin the distance is |total + f|, here without the part common to all f.
            pick = (squares + 2 * (own @ total)).masked_fill(taken, torch.inf).argmin()
            taken[pick] = True
            total = total + own[pick]
            picks.append(pick)
        chosen.append(members[torch.stack(picks)])
    return torch.cat(chosen)


def k_center(
    features: Float[Tensor, "samples features"],
    labels: Int[Tensor, " samples"],
    per_class: int,
    *,
    start: Literal["mean", "random"] = "mean",
    generator: torch.Generator | None = None,
) -> Int[Tensor, " chosen"]:
    """Greedy k-centre (Gonzalez 1985; Sener & Savarese, 1708.00489): always the sample farthest from all chosen.

    Its covering radius is at most twice the best possible.

    Args:
        features: where distances are taken; finite.
        labels: class of each sample; the classes are those that occur.
        per_class: how many of each.
        start: first pick of a class, the sample nearest to its mean or a random one.
        generator: source of randomness for ``start="random"``; torch's global CPU generator by default.

    Raises:
        UserError: a class has fewer samples, or features are not finite.

    >>> k_center(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), torch.tensor([0, 0, 0, 0]), 3).tolist()
    [2, 0, 3]
    """
    chosen = []
    for members in _classes(labels, per_class, features):
        own = _centred(features[members])
        first = own.square().sum(1).argmin() if start == "mean" else _permutation(len(own), generator)[0].to(own.device)
        picks, distance = [first], torch.full_like(own[:, 0], torch.inf)
        for _ in range(per_class - 1):
            distance = torch.minimum(distance, (own - own[picks[-1]]).square().sum(1))
            # A chosen sample is at distance zero like its duplicates, which may still be taken.
            distance[picks[-1]] = -1
            picks.append(distance.argmax())
        chosen.append(members[torch.stack(picks)])
    return torch.cat(chosen)


def k_means(features: Float[Tensor, "samples features"], count: int, *, seed: int = 0) -> Int[Tensor, " chosen"]:
    """The sample nearest to each of ``count`` k-means centres, regardless of classes; ascending positions.

    Args:
        features: where distances are taken; finite.
        count: how many.
        seed: of scikit-learn's start (k-means++), one run of at most 100 iterations.

    Raises:
        UserError: there are fewer samples, or features are not finite.

    >>> k_means(torch.tensor([[0.0], [0.2], [0.1], [9.0]]), 2).tolist()
    [2, 3]
    """
    from sklearn.cluster import KMeans

    if not 1 <= count <= len(features):
        raise UserError(f"k-means: {count} centres of {len(features)} samples; ask for 1 to {len(features)}.")
    own = features.detach().flatten(1).double().cpu()
    if not bool(torch.isfinite(own).all()):
        raise UserError("k-means: the features are not finite, so samples cannot be compared.")
    fitted = KMeans(count, n_init=1, max_iter=100, random_state=seed).fit(own.numpy())
    centres = torch.from_numpy(fitted.cluster_centers_)
    distances = torch.cdist(centres, own)
    taken = torch.zeros(len(own), dtype=torch.bool)
    for row in distances:
        # Centres of equal samples may share a nearest one; each sample is taken once.
        taken[row.masked_fill(taken, torch.inf).argmin()] = True
    return taken.nonzero().flatten()


def _classes(labels: Tensor, per_class: int, features: Tensor | None = None) -> Iterator[Tensor]:
    """Ascending positions of each class."""
    if per_class < 1:
        raise UserError(f"per_class must be at least 1, not {per_class}.")
    if features is not None and len(features) != len(labels):
        raise UserError(f"{len(labels)} labels need as many features, not {len(features)}.")
    if features is not None and not bool(torch.isfinite(features).all()):
        bad = int((~torch.isfinite(features)).flatten(1).any(1).nonzero()[0])
        raise UserError(f"The features of sample {bad} are not finite, so samples cannot be compared.")
    present, sizes = torch.unique_consecutive(labels.sort().values, return_counts=True)
    for label, size in zip(present.tolist(), sizes.tolist(), strict=True):
        if size < per_class:
            raise UserError(f"The class {label} has {size} samples, fewer than the {per_class} asked for.")
    yield from torch.split(labels.argsort(stable=True), sizes.tolist())


def _centred(features: Tensor) -> Tensor:
    features = features.detach().flatten(1)
    features = features if features.dtype == torch.float64 else features.float()
    return features - features.mean(0)


def _permutation(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device if generator is not None else "cpu")
