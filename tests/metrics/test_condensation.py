"""The scores of DD-Ranking: their ends, their weights, and the formula of the paper."""

import math

import pytest

from stillhouse.metrics import augmentation_robust_score, label_robust_score


def test_the_label_robust_score_is_the_papers_formula():
    for improvement, gap, weight in ((0.3, 0.2, 0.5), (-0.1, 0.6, 0.25), (0.0, 0.0, 0.5)):
        alpha = weight * improvement - (1 - weight) * gap
        expected = (math.exp(alpha) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
        assert label_robust_score(improvement, gap, weight=weight) == pytest.approx(expected, abs=1e-15)
    assert label_robust_score(1, -1) == pytest.approx(1)
    assert label_robust_score(-1, 1) == pytest.approx(0)
    assert label_robust_score(0.4, 0.9, weight=1) == label_robust_score(0.4, 0.1, weight=1)


def test_the_augmentation_robust_score_is_the_papers_formula():
    beta = 0.5 * 0.2 + 0.5 * 0.1
    expected = (math.exp(beta) - math.exp(-1)) / (math.exp(1) - math.exp(-1))
    assert augmentation_robust_score(0.2, 0.1) == pytest.approx(expected, abs=1e-15)
    assert augmentation_robust_score(0.2, 0.9, weight=1) == augmentation_robust_score(0.2, 0.0, weight=1)
    assert (augmentation_robust_score(1, 1), augmentation_robust_score(-1, -1)) == (pytest.approx(1), pytest.approx(0))
