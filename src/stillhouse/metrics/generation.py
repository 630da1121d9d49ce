"""How good generated samples are: Fréchet distance, precision and recall, sliced Wasserstein distance, modes found.

All functions take features or samples of shape (samples, dimensions) and say nothing about where features come from: a
number is comparable only with numbers from the same extractor, whose name :class:`FeatureStatistics` carries along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError


class FeatureStatistics:
    """Mean and covariance of features, gathered batch by batch in double precision.

    Batches are merged by their means and scatter matrices (Chan, Golub and LeVeque), so that far-off features lose no
    digits and the order of batches does not matter.

    Args:
        extractor: samples to features of shape (samples, dimensions); by default samples are flattened.
        name: what the extractor is called; statistics of different names are not compared.

    Attributes:
        count: number of samples seen.
        mean: mean of the features.
        scatter: sum of the outer products of centred features.
    """

    def __init__(self, extractor: Callable[[Tensor], Tensor] | None = None, name: str = "samples") -> None:
        self.extractor, self.name = extractor, name
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, samples: Float[Tensor, "samples ..."]) -> Self:
        """Add a batch of samples; returned for chaining."""
        features = samples if self.extractor is None else self.extractor(samples)
        features = features.flatten(1).double()
        mean = features.mean(0)
        centred = features - mean
        return self._merge(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> Self:
        """Add what another one has seen, of another process for instance; returned for chaining.

        Raises:
            UserError: the other one's features come from another extractor.
        """
        _same(self, other)
        return self._merge(other.count, other.mean, other.scatter)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> Self:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
        elif count:
            total = self.count + count
            shift = mean - self.mean
            self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
            self.mean = self.mean + shift * (count / total)
            self.count = total
        return self

    @property
    def covariance(self) -> Float[Tensor, "dimensions dimensions"]:
        """The unbiased covariance of the features.

        Raises:
            UserError: fewer than two samples were seen.
        """
        if self.count < 2:
            raise UserError(f"A covariance needs at least 2 samples, and {self.count} were seen.")
        return self.scatter / (self.count - 1)


def frechet_distance(real: FeatureStatistics | Tensor, fake: FeatureStatistics | Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features (FID, arXiv 1706.08500, Eq. 6).

    ``|m_1 - m_2|² + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))``, exactly and in double precision. The eigenvalues of
    ``C_1 C_2`` are those of ``C_1^(1/2) C_2 C_1^(1/2)``, which is symmetric, so no root of a general matrix is taken
    and singular covariances need no offset.

    Args:
        real: features (samples, dimensions), or their statistics.
        fake: the same of generated samples.

    Raises:
        UserError: the statistics come from different extractors or differ in size.
    """
    real, fake = _statistics(real), _statistics(fake)
    _same(real, fake)
    if real.mean.shape != fake.mean.shape:
        raise UserError(f"Features of {len(real.mean)} and of {len(fake.mean)} dimensions cannot be compared.")
    root = _psd_root(real.covariance)
    product = torch.linalg.eigvalsh(root @ fake.covariance @ root).clamp(min=0)
    trace = real.covariance.trace() + fake.covariance.trace() - 2 * product.sqrt().sum()
    return float((real.mean - fake.mean).square().sum() + trace)


class PrecisionRecall(NamedTuple):
    """Share of generated samples inside the real manifold, and of real ones inside the generated manifold."""

    precision: float
    recall: float


def precision_recall(
    real: Float[Tensor, "real dimensions"],
    fake: Float[Tensor, "fake dimensions"],
    neighbours: int = 3,
    chunk: int = 2048,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, Eq. 1 to 3).

    A set's manifold is the union of balls around its points that reach to each one's k-th nearest neighbour in the set.

    Args:
        real: features of real samples.
        fake: features of generated samples.
        neighbours: k.
        chunk: rows of the distance matrix held at once.

    Raises:
        UserError: a set has not more than ``neighbours`` samples.
    """
    fewest = min(len(real), len(fake))
    if not 1 <= neighbours < fewest:
        raise UserError(f"With {fewest} samples 'neighbours' must be between 1 and {fewest - 1}, not {neighbours}.")
    real, fake = real.flatten(1), fake.flatten(1)
    return PrecisionRecall(_covered(fake, real, neighbours, chunk), _covered(real, fake, neighbours, chunk))


def sliced_wasserstein(
    first: Float[Tensor, "first dimensions"],
    second: Float[Tensor, "second dimensions"],
    num_projections: int = 512,
    power: float = 2.0,
    *,
    generator: torch.Generator | None = None,
) -> float:
    """Sliced Wasserstein distance: ``(mean over directions of W_p^p)^(1/p)`` between one-dimensional projections.

    Each one-dimensional distance is exact, also for sets of different size.

    Args:
        first: samples.
        second: samples.
        num_projections: number of random directions.
        power: p.
        generator: source of the directions; torch's global one by default. The same state gives the same directions,
            with which distances of several generators are best compared.
    """
    first, second = first.flatten(1).double(), second.flatten(1).double()
    if first.shape[1] != second.shape[1]:
        raise UserError(f"Samples of {first.shape[1]} and of {second.shape[1]} dimensions cannot be compared.")
    device = generator.device if generator is not None else first.device
    directions = torch.randn(first.shape[1], num_projections, generator=generator, device=device, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions.to(first.device), dim=0)
    a, b = (first @ directions).sort(dim=0).values, (second @ directions).sort(dim=0).values
    if len(a) != len(b):
        # Both quantile functions are constant between the union of their steps.
        edges = torch.unique(torch.cat([_edges(len(a), a.device), _edges(len(b), a.device)]))
        middle = (edges[1:] + edges[:-1]) / 2
        a, b = (x[(middle * len(x)).long()] for x in (a, b))
        weight = edges.diff()[:, None]
    else:
        weight = torch.full((len(a), 1), 1 / len(a), dtype=torch.float64, device=a.device)
    return float((weight * (a - b).abs() ** power).sum(0).mean() ** (1 / power))


@dataclass(frozen=True)
class ModeRecall:
    """Which modes of a known mixture samples reach.

    Attributes:
        recall: share of the modes that are found.
        quality: share of the samples that lie within the radius of some mode.
        counts: samples near each mode, of those within the radius.
    """

    recall: float
    quality: float
    counts: tuple[int, ...]


def mode_recall(
    samples: Float[Tensor, "samples dimensions"],
    centres: Float[Tensor, "modes dimensions"],
    radius: float,
    share: float = 0.1,
) -> ModeRecall:
    """How many modes of a known mixture samples reach; a sample belongs to its nearest mode, if within the radius.

    Args:
        samples: generated samples.
        centres: centre of each mode.
        radius: distance up to which a sample counts, such as three standard deviations of a mode.
        share: a mode is found when it gets at least this share of an even split of all samples.
    """
    distance, mode = torch.cdist(samples.flatten(1).double(), centres.double()).min(dim=1)
    counts = torch.bincount(mode[distance <= radius], minlength=len(centres))
    found = counts >= max(1.0, share * len(samples) / len(centres))
    quality = float((distance <= radius).double().mean())
    return ModeRecall(float(found.double().mean()), quality, tuple(counts.tolist()))


def _statistics(features: FeatureStatistics | Tensor) -> FeatureStatistics:
    return FeatureStatistics().update(features) if isinstance(features, Tensor) else features


def _same(first: FeatureStatistics, second: FeatureStatistics) -> None:
    if first.name != second.name:
        raise UserError(
            f"Features of {first.name!r} and of {second.name!r} cannot be compared; use one extractor for both."
        )


def _psd_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _covered(queries: Tensor, points: Tensor, neighbours: int, chunk: int) -> float:
    """Share of the queries inside some point's ball."""
    # The nearest of the k + 1 smallest distances within a set is a point's distance to itself.
    radii = torch.cat(
        [_distances(part, points).kthvalue(neighbours + 1, dim=1).values for part in torch.split(points, chunk)]
    )
    inside = [(_distances(part, points) <= radii).any(dim=1) for part in torch.split(queries, chunk)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _edges(count: int, device: torch.device) -> Tensor:
    return torch.arange(count + 1, dtype=torch.float64, device=device) / count
