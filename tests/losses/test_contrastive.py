"""Contrastive losses: equality with cross-entropies, the noise-contrastive estimate, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.contrastive import info_nce, log_partition, noise_contrastive


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_info_nce_is_a_cross_entropy_over_the_batch():
    student, teacher = random(6, 4), random(6, 4, seed=1)
    cosine = F.cosine_similarity(student[:, None], teacher[None], dim=2)
    expected = F.cross_entropy(cosine / 0.2, torch.arange(6))
    torch.testing.assert_close(info_nce(student, teacher, 0.2), expected)
    torch.testing.assert_close(info_nce(3 * student, 0.1 * teacher, torch.tensor(0.2)), expected)
    order = torch.tensor([2, 0, 5, 1, 3, 4])
    torch.testing.assert_close(info_nce(student[order], teacher[order], 0.2), expected)
    assert torch.autograd.gradcheck(lambda s: info_nce(s, teacher, 0.2), student.requires_grad_())


def test_info_nce_tends_to_zero_for_orthogonal_teachers_and_low_temperatures():
    teacher = torch.eye(5)
    values = [info_nce(teacher, teacher, temperature).item() for temperature in (1.0, 0.5, 0.1, 0.03)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-6


def test_false_negatives_are_left_out():
    teacher = torch.eye(4)
    teacher[1] = teacher[0]
    student = random(4, 4).float()
    with_, without = info_nce(student, teacher, 0.5), info_nce(student, teacher, 0.5, false_negatives=0.95)
    assert without < with_
    logits = F.normalize(student) @ teacher.T / 0.5
    logits[0, 1] = logits[1, 0] = -math.inf
    torch.testing.assert_close(without, F.cross_entropy(logits, torch.arange(4)))
    assert info_nce(student, torch.ones(4, 4), 0.5, false_negatives=0.95) == 0, "the positive itself always stays"


def test_noise_contrastive_by_its_definition():
    scores, samples, log_z = 4 * random(3, 6), 40, 2.5
    h = (scores - log_z).exp()
    real = h / (h + 5 / samples)
    expected = -(real[:, 0].log().sum() + (1 - real[:, 1:]).log().sum()) / 3
    torch.testing.assert_close(noise_contrastive(scores, samples, log_z), expected)
    assert torch.autograd.gradcheck(lambda s: noise_contrastive(s, samples, log_z), scores.requires_grad_())


def test_noise_contrastive_holds_for_scores_of_any_size():
    scores = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True)
    loss = noise_contrastive(scores, 10)
    torch.testing.assert_close(loss, torch.tensor(300.0), rtol=1e-2, atol=0)
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [-0.5, 0.5]]))


def test_log_partition_is_the_mean_times_the_number_of_samples():
    scores = random(3, 6).requires_grad_()
    found = log_partition(scores, 40)
    torch.testing.assert_close(found, (scores.exp().mean() * 40).log().detach())
    assert not found.requires_grad
    assert log_partition(torch.full((1, 2), 500.0), 40).isfinite()


def test_precision_under_autocast():
    student, teacher = random(6, 4).float(), random(6, 4, seed=1).float()
    expected = info_nce(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(student, teacher), expected)


def test_bad_input_is_told_in_a_sentence():
    with pytest.raises(UserError, match=r"not \(6, 4\) and \(6, 5\); project the student's side"):
        info_nce(random(6, 4), random(6, 5))
    with pytest.raises(UserError, match="at least 2 nodes"):
        info_nce(random(1, 4), random(1, 4))
    with pytest.raises(UserError, match="temperature is above 0, not 0"):
        info_nce(random(6, 4), random(6, 4), 0)
    with pytest.raises(UserError, match=r"at least 1 negative per row, not of shape \(6, 1\)"):
        noise_contrastive(random(6, 1), 10)
