"""Smoothness of predictions, and spread of features, in closed forms."""

import math

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.metrics import fgsm_accuracy, noise_accuracy, smoothness, spread


def test_smoothness_of_known_predictions():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    found = smoothness(probabilities.log(), torch.tensor([0, 0]))
    entropies = [-sum(p * math.log(p) for p in row) for row in probabilities.tolist()]
    assert found["entropy"] == pytest.approx(sum(entropies) / 2, rel=1e-6)
    assert found["confidence"] == pytest.approx(0.75)
    assert found["other_mass"] == pytest.approx(1 - 0.4)
    assert found["logit_std"] == pytest.approx(float(probabilities.log().std(1).mean()))
    hot = smoothness(5 * torch.randn(50, 10), temperature=4.0)
    assert hot["entropy"] > smoothness(5 * torch.randn(50, 10))["entropy"]
    assert smoothness(torch.tensor([[0.0, -math.inf]]))["entropy"] == 0
    with pytest.raises(UserError, match="nothing to measure"):
        smoothness(torch.zeros(0, 3))


def test_the_spread_adds_up_to_that_of_all():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 5).double(), torch.randint(4, (60,))
    found = spread(features, labels)
    assert found["within"] + found["between"] == pytest.approx(
        float((features - features.mean(0)).square().sum(1).mean())
    )
    with pytest.raises(UserError, match="at least two"):
        spread(features, torch.zeros(60, dtype=torch.long))


def test_an_attack_moves_a_linear_classifier_by_its_norm():
    """A sample at distance d of the boundary, in the L1-dual sense, falls at epsilon > d."""
    weight = torch.tensor([1.0, -2.0, 0.5])
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(7))
    margin = x @ weight
    batches = [{"pixel_values": x, "labels": (margin < 0).long()}]

    def predict(batch):
        score = batch["pixel_values"] @ weight
        return torch.stack([score, -score], 1)

    for epsilon in (0.0, 0.2, 1.0):
        expected = float((margin.abs() > epsilon * weight.abs().sum()).double().mean())
        assert fgsm_accuracy(predict, batches, epsilon) == pytest.approx(expected)
    assert noise_accuracy(predict, batches, 0.0) == 1.0
    noisy = noise_accuracy(predict, batches, 1.0)
    assert noisy == noise_accuracy(predict, batches, 1.0) < 1.0
    assert noise_accuracy(predict, batches, 5.0) < noisy
    assert noise_accuracy(predict, batches, 9.0, low=x, high=x) == 1.0
    with pytest.raises(UserError, match="lacks; it holds labels"):
        fgsm_accuracy(predict, [{"labels": torch.zeros(1)}], 0.1)
