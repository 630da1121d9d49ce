"""Losses on logits: closed forms, what each is invariant to, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses import cross_entropy, js, kl, reverse_kl, soft_cross_entropy
from stillhouse.losses.logit_matching import (
    adversarial_logits,
    binary_kl,
    binary_kl_norm,
    dist,
    dkd,
    ensemble_log_probabilities,
    jeffreys,
    label_smoothing,
    logit_mse,
    pearson,
    standardize,
)

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


STUDENT, TEACHER, LABELS = 3 * random(6, 5), 2 * random(6, 5, seed=1), torch.tensor([0, 4, 2, 2, 1, 3])
PAIRWISE = {
    "dkd": lambda s, t: sum(dkd(s, t, LABELS)),
    "dist": lambda s, t: sum(dist(s, t)),
    "standardised kl": lambda s, t: kl(standardize(s), standardize(t), 2.0),
    "mse": logit_mse,
    "binary kl": binary_kl,
    "binary kl norm": binary_kl_norm,
    "jeffreys": jeffreys,
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_zero_with_zero_gradient_where_both_agree_and_positive_elsewhere(name):
    student = STUDENT.clone().requires_grad_()
    loss = PAIRWISE[name](student, STUDENT)
    # DIST's guard in the division leaves a speck.
    torch.testing.assert_close(loss.detach(), torch.zeros((), dtype=DOUBLE), rtol=0, atol=1e-4)
    torch.testing.assert_close(gradient(loss, student), torch.zeros_like(student), rtol=0, atol=1e-4)
    assert PAIRWISE[name](student, TEACHER) > 0.01


@pytest.mark.parametrize("name", PAIRWISE)
def test_no_order_among_classes_or_samples(name):
    classes = torch.tensor([3, 0, 4, 1, 2])
    rows = torch.tensor([5, 2, 0, 1, 4, 3])
    loss = PAIRWISE[name](STUDENT, TEACHER)
    if name != "dkd":
        torch.testing.assert_close(PAIRWISE[name](STUDENT[:, classes], TEACHER[:, classes]), loss)
        torch.testing.assert_close(PAIRWISE[name](STUDENT[rows], TEACHER[rows]), loss)
    else:
        moved = torch.argsort(classes)[LABELS]
        torch.testing.assert_close(sum(dkd(STUDENT[:, classes], TEACHER[:, classes], moved)), loss)
        torch.testing.assert_close(sum(dkd(STUDENT[rows], TEACHER[rows], LABELS[rows])), loss)


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_are_those_of_finite_differences(name):
    student = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: PAIRWISE[name](s, TEACHER), student)


@pytest.mark.parametrize("name", PAIRWISE)
def test_half_precision_and_autocast_are_computed_in_single(name):
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    expected = PAIRWISE[name](student.float(), teacher.float())
    assert torch.equal(PAIRWISE[name](student, teacher), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(PAIRWISE[name](student.float(), teacher.float()), expected)


@pytest.mark.parametrize("name", PAIRWISE)
def test_shapes_that_differ_are_told(name):
    with pytest.raises(
        UserError, match=r"has the shape \(6, 5\) but teacher_logits|has 5 classes but teacher_logits has 4"
    ):
        PAIRWISE[name](STUDENT, TEACHER[:, :4])


# Label smoothing ----------------------------------------------------------------------------------------------------------


def test_label_smoothing_is_a_mix_with_the_uniform_distribution():
    logs = STUDENT.log_softmax(-1)
    expected = 0.8 * -logs[torch.arange(6), LABELS].mean() + 0.2 * -logs.mean()
    torch.testing.assert_close(label_smoothing(STUDENT, LABELS, 0.2), expected)
    soft = F.one_hot(LABELS, 5).double()
    torch.testing.assert_close(label_smoothing(STUDENT, soft, 0.2), expected)
    torch.testing.assert_close(label_smoothing(STUDENT, LABELS, 0.0), cross_entropy(STUDENT, LABELS))


def test_label_smoothing_leaves_out_ignored_rows():
    labels = LABELS.clone()
    labels[1] = -100
    keep = torch.tensor([0, 2, 3, 4, 5])
    torch.testing.assert_close(label_smoothing(STUDENT, labels), label_smoothing(STUDENT[keep], LABELS[keep]))
    rows = label_smoothing(STUDENT.view(2, 3, 5), labels.view(2, 3), reduction="none")
    assert rows.shape == (2, 3)
    assert rows[0, 1] == 0
    torch.testing.assert_close(label_smoothing(STUDENT, labels, reduction="sum"), rows.sum())
    with pytest.raises(
        UserError, match=r"labels has the shape \(3,\), but student_logits of shape \(6, 5\) need \(6,\)"
    ):
        label_smoothing(STUDENT, LABELS[:3])
    with pytest.raises(UserError, match=r"smoothing lies between 0 and 1, not 1\.5"):
        label_smoothing(STUDENT, LABELS, 1.5)


# DKD ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_is_the_paper_in_plain_words(temperature):
    parts = dkd(STUDENT, TEACHER, LABELS, temperature)
    target = non_target = 0.0
    for s, t, y in zip(STUDENT / temperature, TEACHER / temperature, LABELS, strict=True):
        p, q = s.softmax(-1), t.softmax(-1)
        target += q[y] * (q[y] / p[y]).log() + (1 - q[y]) * ((1 - q[y]) / (1 - p[y])).log()
        others = [k for k in range(5) if k != y]
        p_, q_ = p[others] / (1 - p[y]), q[others] / (1 - q[y])
        non_target += (q_ * (q_ / p_).log()).sum()
    torch.testing.assert_close(parts.target, temperature**2 * target / 6)
    torch.testing.assert_close(parts.non_target, temperature**2 * non_target / 6)


def test_kd_is_tckd_plus_the_rest_times_nckd():
    parts = dkd(STUDENT, TEACHER, LABELS, 1.0, reduction="none")
    rest = 1 - TEACHER.softmax(-1)[torch.arange(6), LABELS]
    torch.testing.assert_close(parts.target + rest * parts.non_target, kl(STUDENT, TEACHER, reduction="none"))


def test_dkd_survives_a_teacher_who_is_entirely_sure():
    student = torch.zeros(1, 3, requires_grad=True)
    parts = dkd(student, torch.tensor([[200.0, 1.0, 0.0]]), torch.tensor([0]), 1.0)
    assert math.isclose(parts.target.item(), math.log(3), rel_tol=1e-6)
    p = torch.tensor([1.0, 0.0]).softmax(0)
    torch.testing.assert_close(parts.non_target, (p * (2 * p).log()).sum())
    assert gradient(sum(parts), student).isfinite().all()
    far = torch.tensor([[-300.0, 1.0, 0.0]], requires_grad=True)
    assert gradient(sum(dkd(far, torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([0]), 1.0)), far).isfinite().all()


def test_dkd_masks_rows_and_takes_a_temperature_for_each():
    labels = LABELS.clone()
    labels[[1, 4]] = -100
    keep = torch.tensor([0, 2, 3, 5])
    broken = STUDENT.clone()
    broken[1] = math.nan
    broken.requires_grad_()
    parts = dkd(broken, TEACHER, labels, 2.0)
    for part, expected in zip(parts, dkd(STUDENT[keep], TEACHER[keep], LABELS[keep], 2.0), strict=True):
        torch.testing.assert_close(part, expected)
    assert gradient(sum(parts), broken).isfinite().all()
    masked = dkd(STUDENT, TEACHER, LABELS, 2.0, mask=labels != -100)
    torch.testing.assert_close(masked.target, parts.target)
    temperatures = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=DOUBLE)
    rows = dkd(STUDENT, TEACHER, LABELS, temperatures, reduction="none")
    for i, temperature in enumerate(temperatures.tolist()):
        single = dkd(STUDENT[i : i + 1], TEACHER[i : i + 1], LABELS[i : i + 1], temperature)
        torch.testing.assert_close(rows.target[i], single.target)
        torch.testing.assert_close(rows.non_target[i], single.non_target)


def test_dkd_says_what_is_wrong_with_labels():
    with pytest.raises(UserError, match=r"not soft ones of shape \(6, 5\)"):
        dkd(STUDENT, TEACHER, STUDENT.softmax(-1))
    with pytest.raises(UserError, match="labels holds 7, but there are 5 classes, 0 to 4"):
        dkd(STUDENT, TEACHER, LABELS + 3)
    with pytest.raises(UserError, match="no class besides the label's among 1"):
        dkd(STUDENT[:, :1], TEACHER[:, :1], 0 * LABELS)


# DIST, correlation, standardised logits ---------------------------------------------------------------------------------


def test_pearson_is_the_correlation_coefficient():
    first, second = random(7), random(7, seed=3)
    expected = torch.corrcoef(torch.stack([first, second]))[0, 1]
    torch.testing.assert_close(pearson(first, second, eps=0.0), expected)
    assert pearson(first, torch.ones_like(first)) == 0


def test_dist_is_one_minus_the_mean_correlations():
    p, q = (STUDENT / 4).softmax(-1), (TEACHER / 4).softmax(-1)
    inter = sum(1 - torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(6)) / 6
    intra = sum(1 - torch.corrcoef(torch.stack([p[:, k], q[:, k]]))[0, 1] for k in range(5)) / 5
    parts = dist(STUDENT, TEACHER, 4.0)
    torch.testing.assert_close(parts.inter, 16 * inter, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.intra, 16 * intra, rtol=1e-5, atol=0)


def test_dist_refuses_a_batch_of_one():
    with pytest.raises(UserError, match=r"at least 2 samples, not \(1, 5\)"):
        dist(STUDENT[:1], TEACHER[:1])
    with pytest.raises(UserError, match="temperature is above 0, not 0"):
        dist(STUDENT, TEACHER, 0)


def test_standardised_logits_are_free_of_shift_and_scale():
    standard = standardize(STUDENT)
    torch.testing.assert_close(standard.mean(-1), torch.zeros(6, dtype=DOUBLE))
    torch.testing.assert_close(standard.std(-1), torch.ones(6, dtype=DOUBLE), rtol=1e-6, atol=0)
    torch.testing.assert_close(standardize(5 * STUDENT - 2), standard, rtol=1e-6, atol=1e-6)
    uncentred = standardize(STUDENT, center=False)
    torch.testing.assert_close(uncentred.softmax(-1), standard.softmax(-1))
    torch.testing.assert_close(uncentred * (STUDENT.std(-1, keepdim=True) + 1e-7), STUDENT)


def test_mixkd_is_kl_at_each_sides_own_temperature():
    p, q = (STUDENT / STUDENT.std(-1, keepdim=True)).softmax(-1), (TEACHER / TEACHER.std(-1, keepdim=True)).softmax(-1)
    expected = (q * (q / p).log()).sum(-1).mean()
    loss = kl(standardize(STUDENT), standardize(TEACHER), scale_by_temperature_squared=False)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_the_students_deviation_is_differentiated():
    student = STUDENT.clone().requires_grad_()
    along = gradient(kl(standardize(student), standardize(TEACHER)), student)
    # The loss is of degree 0 in the logits, so nothing pulls along them.
    torch.testing.assert_close((along * STUDENT).sum(-1), torch.zeros(6, dtype=DOUBLE), rtol=0, atol=1e-6)


def test_constant_logits_have_a_gradient_of_zero():
    student = torch.ones(2, 4, requires_grad=True)
    assert gradient(kl(standardize(student), standardize(TEACHER[:2, :4].float())), student).isfinite().all()
    with pytest.raises(UserError, match="it takes 2 classes"):
        standardize(torch.ones(3, 1))


# Binary losses ------------------------------------------------------------------------------------------------------------


def test_binary_kl_is_a_sum_over_classes_of_bernoulli_divergences():
    p, q = (STUDENT / 2).sigmoid(), (TEACHER / 2).sigmoid()
    expected = 4 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum(-1).mean()
    torch.testing.assert_close(binary_kl(STUDENT, TEACHER), expected)
    assert binary_kl(STUDENT + 1, STUDENT) > 0.1, "a constant per row is not free, as it is under a softmax"
    assert kl(STUDENT + 1, STUDENT).abs() < 1e-12


def test_binary_kl_norm_is_log_cosh_with_its_gradient():
    u = (STUDENT - TEACHER) / 2
    torch.testing.assert_close(binary_kl_norm(STUDENT, TEACHER), 4 * (u / 2).cosh().log().sum(-1).mean())
    p = u.sigmoid()
    bernoulli = 0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()
    torch.testing.assert_close(binary_kl_norm(STUDENT, TEACHER, reduction="none"), 4 * bernoulli.sum(-1))
    student = STUDENT.clone().requires_grad_()
    torch.testing.assert_close(gradient(binary_kl_norm(student, TEACHER), student), (u / 2).tanh() / 6)
    torch.testing.assert_close(binary_kl_norm(TEACHER, STUDENT), binary_kl_norm(STUDENT, TEACHER))


@pytest.mark.parametrize("difference", [1e-6, 1e-3, 0.5, 1.99, 2.01, 33.0, 34.0, -40.0, 1e4])
def test_binary_kl_norm_holds_in_float32_for_any_difference(difference):
    student = torch.tensor([[difference]], requires_grad=True)
    loss = binary_kl_norm(student, torch.zeros(1, 1), 2.0)
    half = torch.tensor(difference, dtype=DOUBLE) / 4
    value = 4 * (half.abs() + torch.log1p(torch.expm1(-2 * half.abs()) / 2) if half.abs() > 1e-2 else half**2 / 2)
    torch.testing.assert_close(loss.double().detach(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(loss, student).squeeze().double(), half.tanh(), rtol=1e-6, atol=0)


# SSLD and MEAL V2 ---------------------------------------------------------------------------------------------------------


def test_jeffreys_is_the_mean_of_both_divergences_and_symmetric():
    p, q = STUDENT.softmax(-1), TEACHER.softmax(-1)
    torch.testing.assert_close(jeffreys(STUDENT, TEACHER), 0.5 * ((q - p) * (q / p).log()).sum(-1).mean())
    torch.testing.assert_close(jeffreys(STUDENT, TEACHER), jeffreys(TEACHER, STUDENT))
    torch.testing.assert_close(
        jeffreys(STUDENT, TEACHER, 3.0), (kl(STUDENT, TEACHER, 3.0) + reverse_kl(STUDENT, TEACHER, 3.0)) / 2
    )
    mask = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(jeffreys(STUDENT, TEACHER, mask=mask), jeffreys(STUDENT[mask], TEACHER[mask]))
    # Near agreement a true JS is a quarter of it.
    near = STUDENT + 1e-3 * TEACHER
    torch.testing.assert_close(js(near, STUDENT), jeffreys(near, STUDENT) / 4, rtol=1e-3, atol=0)


def test_an_ensemble_is_the_mean_of_probabilities_not_of_logits():
    one, other = STUDENT, TEACHER
    target = ensemble_log_probabilities([one, other])
    torch.testing.assert_close(target.exp(), (one.softmax(-1) + other.softmax(-1)) / 2)
    torch.testing.assert_close(ensemble_log_probabilities([other, one]), target)
    assert ((((one + other) / 2).softmax(-1) - target.exp()).abs() > 0.05).any()
    torch.testing.assert_close(ensemble_log_probabilities([one], temperature=2.0), (one / 2).log_softmax(-1))
    weighted = ensemble_log_probabilities([one, other], weights=[3, 1])
    torch.testing.assert_close(weighted.exp(), 0.75 * one.softmax(-1) + 0.25 * other.softmax(-1))
    torch.testing.assert_close(ensemble_log_probabilities([one, other], weights=[1, 0]), one.log_softmax(-1))
    student = random(6, 5, seed=9).requires_grad_()
    expected = (student.softmax(-1) - target.exp()) / 6
    torch.testing.assert_close(gradient(soft_cross_entropy(student, target), student), expected)


def test_an_ensemble_needs_teachers_that_fit():
    with pytest.raises(UserError, match="there is no teacher"):
        ensemble_log_probabilities([])
    with pytest.raises(UserError, match="differ in shape"):
        ensemble_log_probabilities([STUDENT, TEACHER[:3]])
    with pytest.raises(UserError, match=r"weights are one per teacher \(1\)"):
        ensemble_log_probabilities([STUDENT], weights=[0.0])


def test_the_discriminator_loss_is_binary_cross_entropy_of_both_outputs():
    student, teacher = random(4, 2), random(4, 2, seed=1)
    targets = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4, dtype=DOUBLE)
    expected = F.binary_cross_entropy_with_logits(torch.cat([student, teacher]), targets)
    torch.testing.assert_close(adversarial_logits(student, teacher), expected)
    with pytest.raises(UserError, match=r"teacher_scores are two per row, \(batch, 2\), not \(4, 3\)"):
        adversarial_logits(student, random(4, 3))
