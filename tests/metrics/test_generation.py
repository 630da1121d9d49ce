"""Metrics of generated samples against scipy, scikit-learn, POT and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.neighbors import NearestNeighbors

from stillhouse.errors import UserError
from stillhouse.metrics.generation import (
    FeatureStatistics,
    frechet_distance,
    mode_recall,
    precision_recall,
    sliced_wasserstein,
)


def correlated(count: int, dimensions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, dimensions, generator=generator) @ torch.randn(dimensions, dimensions, generator=generator)
        + seed
    )


def test_statistics_equal_numpy_however_they_are_batched() -> None:
    features = correlated(100, 5, 1) + 1000
    whole, parts = FeatureStatistics(), FeatureStatistics()
    whole.update(features)
    for part in features.split([1, 39, 60]):
        parts.update(part)
    other = FeatureStatistics().update(features[:30]).merge(FeatureStatistics().update(features[30:]))
    for statistics in (whole, parts, other):
        assert statistics.count == 100
        np.testing.assert_allclose(statistics.mean, features.double().mean(0))
        np.testing.assert_allclose(statistics.covariance, np.cov(features.double(), rowvar=False), rtol=1e-9)


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    real, fake = correlated(200, 6, 1), correlated(150, 6, 2)
    c1, c2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    shift = real.double().mean(0) - fake.double().mean(0)
    expected = float(shift @ shift) + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(real, fake) == pytest.approx(frechet_distance(fake, real), rel=1e-9)


def test_frechet_distance_closed_forms() -> None:
    features = correlated(64, 4, 3).double()
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(features, features + 2) == pytest.approx(4 * 4)
    covariance_trace = float(features.T.cov().trace())
    scaled = (features - features.mean(0)) * 3 + features.mean(0)
    assert frechet_distance(features, scaled) == pytest.approx(4 * covariance_trace)


def test_frechet_distance_of_fewer_samples_than_dimensions() -> None:
    a, b = torch.randn(5, 20).double(), torch.randn(5, 20).double()
    c1, c2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    singular = np.linalg.svd(scipy.linalg.sqrtm(c1).real @ scipy.linalg.sqrtm(c2).real, compute_uv=False).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(c1 + c2) - 2 * singular
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_statistics_of_different_extractors_are_not_compared() -> None:
    probe = FeatureStatistics(lambda x: x * 2, name="probe").update(torch.randn(4, 3))
    inception = FeatureStatistics(name="inception").update(torch.randn(4, 3))
    with pytest.raises(UserError, match="'probe' and of 'inception' cannot be compared"):
        frechet_distance(probe, inception)
    with pytest.raises(UserError, match="of 3 and of 2 dimensions"):
        frechet_distance(torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(UserError, match="at least 2 samples, and 1 were seen"):
        frechet_distance(torch.randn(1, 3), torch.randn(4, 3))


def test_precision_and_recall_equal_a_plain_reference() -> None:
    real, fake = torch.randn(60, 3), torch.randn(50, 3) * 0.8 + 0.5

    def covered(queries: torch.Tensor, points: torch.Tensor) -> float:
        nearest = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(points)[0][:, 3]
        return float((torch.cdist(queries, points).numpy() <= nearest).any(axis=1).mean())

    result = precision_recall(real, fake, neighbours=3, chunk=7)
    assert result == pytest.approx((covered(fake, real), covered(real, fake)))


def test_precision_and_recall_see_dropped_and_invented_modes() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(300, 2) - 20, torch.randn(300, 2) + 20
    both = torch.cat([left, right])
    dropped = precision_recall(both, torch.randn(300, 2) - 20)
    assert dropped.precision > 0.9
    assert dropped.recall == pytest.approx(0.5, abs=0.05)
    invented = precision_recall(left, both)
    assert invented.precision == pytest.approx(0.5, abs=0.05)
    assert precision_recall(both, both) == (1.0, 1.0)
    with pytest.raises(UserError, match="must be between 1 and 2, not 3"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))


def test_sliced_wasserstein_in_one_dimension_is_exact() -> None:
    a, b = torch.randn(40, 1).double(), torch.randn(40, 1).double() + 1
    expected = float((a.sort(0).values - b.sort(0).values).square().mean().sqrt())
    assert sliced_wasserstein(a, b) == pytest.approx(expected)
    c = torch.randn(17, 1).double()
    expected = scipy.stats.wasserstein_distance(a[:, 0], c[:, 0])
    assert sliced_wasserstein(a, c, power=1) == pytest.approx(expected)


def test_sliced_wasserstein_equals_pot() -> None:
    ot = pytest.importorskip("ot")
    a, b = torch.randn(30, 3).double(), torch.randn(20, 3).double() * 2
    directions = torch.nn.functional.normalize(
        torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=0
    )
    expected = ot.sliced_wasserstein_distance(a.numpy(), b.numpy(), projections=directions.numpy())
    actual = sliced_wasserstein(a, b, 64, generator=torch.Generator().manual_seed(0))
    assert actual == pytest.approx(float(expected))


def test_sliced_wasserstein_of_a_shift() -> None:
    torch.manual_seed(0)
    a = torch.randn(50, 2)
    # The mean squared projection of a vector of length 3 in the plane is 9 / 2.
    assert sliced_wasserstein(a, a + torch.tensor([0.0, 3.0]), 20000) == pytest.approx(4.5**0.5, rel=0.02)
    assert sliced_wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(UserError, match="of 2 and of 3 dimensions"):
        sliced_wasserstein(torch.randn(4, 2), torch.randn(4, 3))


def test_mode_recall() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    samples = torch.cat(
        [centres[0].expand(50, 2), centres[1].expand(44, 2), centres[2].expand(1, 2), torch.full((5, 2), 5.0)]
    )
    result = mode_recall(samples, centres, radius=1.0)
    assert result.counts == (50, 44, 1, 0)
    assert result.recall == 0.5
    assert result.quality == pytest.approx(0.95)
