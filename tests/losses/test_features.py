"""Attention and mean matching: closed forms, invariants, and the exact properties DataDAM rests on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.features import attention_map, attention_matching, class_means, mean_matching
from stillhouse.modules.siamese import DSA, apply

CLASSES, REAL, SYNTHETIC = 4, 6, 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


class Blocks(nn.Module):
    """Two blocks of the distillation ConvNet: the map after the first activation, and the flattened output."""

    def __init__(self, norm) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), norm(5), nn.ReLU()).double()
        self.rest = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(5, 5, 3, padding=1), norm(5), nn.ReLU(), nn.AvgPool2d(2))
        self.rest.double()
        self.requires_grad_(False)

    def forward(self, x):
        first = self.first(x)
        return first, self.rest(first).flatten(1)


def instance(channels):
    return nn.GroupNorm(channels, channels)


def datadam(net, real, synthetic, params, weight_mean=0.01, power=4):
    """100 (L_SAM + weight L_MMD) for images [classes, per class, ...]."""
    with torch.no_grad():
        real_maps, real_last = net(apply(real, params).flatten(0, 1))
    maps, last = net(apply(synthetic, params).flatten(0, 1))
    grouped = [
        (x.unflatten(0, real.shape[:2]), y.unflatten(0, synthetic.shape[:2]))
        for x, y in ((real_maps, maps), (real_last, last))
    ]
    return 100 * (attention_matching(*grouped[0], power=power) + weight_mean * mean_matching(*grouped[1]))


@pytest.fixture
def images():
    real = maps(CLASSES, REAL, 2, 8, 8, seed=1)
    return real, maps(CLASSES, SYNTHETIC, 2, 8, 8, seed=2).requires_grad_()


@pytest.mark.parametrize("power", [1, 2, 3.5, 4, 8])
def test_map_is_its_definition(power):
    features = maps(3, 5, 4, 6)
    sums = features.abs().pow(power).sum(1).flatten(1)
    expected = sums / sums.norm(dim=1, keepdim=True)
    torch.testing.assert_close(attention_map(features, power), expected)
    torch.testing.assert_close(attention_map(features.unflatten(0, (3, 1)), power), expected[:, None])


@pytest.mark.parametrize("power", [1, 2, 4, 8])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_map_has_unit_norm_and_forgets_the_scale(power, factor):
    features = torch.randn(3, 5, 4, 6, generator=seeded(0))
    plain = attention_map(features, power)
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(attention_map(factor * features, power), plain)


def test_small_activations_of_the_fourth_power_keep_unit_norm():
    features = torch.tensor([1e-8, 10.0]).view(2, 1, 1, 1) * torch.rand(2, 3, 4, 4, generator=seeded(0))
    torch.testing.assert_close(attention_map(features).norm(dim=1), torch.ones(2))
    assert F.normalize(features.pow(4).sum(1).flatten(1))[0].norm() < 1e-6, "where the plain formula loses it"


@pytest.mark.parametrize("power", [1, 2, 4, 8])
def test_map_gradient_is_that_of_the_definition(power):
    features = maps(2, 3, 3, 4).relu().requires_grad_()
    weights = maps(2, 12, seed=5)
    (gradient,) = torch.autograd.grad((attention_map(features, power) * weights).sum(), features)
    (expected,) = torch.autograd.grad(
        (F.normalize(features.abs().pow(power).sum(1).flatten(1)) * weights).sum(), features
    )
    torch.testing.assert_close(gradient, expected)
    away = maps(2, 3, 3, 4, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_map(x, power), away)
    # Degree 0: no gradient along the features themselves.
    (along,) = torch.autograd.grad((attention_map(away, power) * weights).sum(), away)
    torch.testing.assert_close((along * away).sum((1, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [1, 4])
def test_a_dead_map_stays_zero_with_zero_gradient(power):
    features = torch.zeros(2, 3, 4, 4)
    features[1] = torch.rand(3, 4, 4, generator=seeded(0))
    features[1, :, 0, 0] = 0
    features.requires_grad_()
    out = attention_map(features, power)
    assert out[0].count_nonzero() == 0
    (gradient,) = torch.autograd.grad((out * torch.randn(2, 16, generator=seeded(1))).sum(), features)
    assert gradient.isfinite().all()
    assert gradient[0].count_nonzero() == 0
    assert gradient[1].count_nonzero() > 0


def test_half_precision_is_computed_in_single():
    features = torch.randn(2, 8, 4, 4, generator=seeded(0)).bfloat16()
    assert torch.equal(attention_map(features), attention_map(features.float()))
    means, _ = class_means(features)
    assert means.dtype == torch.float32


def test_matching_is_the_sum_over_classes_and_positions():
    real, synthetic = maps(CLASSES, REAL, 5, 3, 3, seed=1), maps(CLASSES, SYNTHETIC, 5, 3, 3, seed=2)
    expected = 0.0
    for k in range(CLASSES):
        means = []
        for side in (real, synthetic):
            rows = [(x.abs() ** 4).sum(0).flatten() for x in side[k]]
            means.append(sum(row / row.norm() for row in rows) / len(rows))
        expected += ((means[0] - means[1]) ** 2).sum()
    torch.testing.assert_close(attention_matching(real, synthetic), expected)


def test_mean_matching_is_distribution_matching():
    real, synthetic = maps(CLASSES, REAL, 7, seed=1), maps(CLASSES, SYNTHETIC, 7, seed=2).requires_grad_()
    difference = real.mean(1) - synthetic.mean(1)
    loss = mean_matching(real, synthetic)
    torch.testing.assert_close(loss, difference.square().sum())
    (gradient,) = torch.autograd.grad(loss, synthetic)
    torch.testing.assert_close(gradient, (-2 / SYNTHETIC * difference)[:, None].expand_as(synthetic))


@pytest.mark.parametrize("loss", [mean_matching, attention_matching])
def test_grouped_and_flat_layouts_agree(loss):
    real, synthetic = maps(CLASSES, REAL, 5, 3, 3, seed=1), maps(CLASSES, SYNTHETIC, 5, 3, 3, seed=2)
    labels = [torch.arange(CLASSES).repeat_interleave(n) for n in (REAL, SYNTHETIC)]
    orders = [torch.randperm(len(one), generator=seeded(7)) for one in labels]
    flat = [x.flatten(0, 1)[order] for x, order in zip((real, synthetic), orders, strict=True)]
    shuffled = [one[order] for one, order in zip(labels, orders, strict=True)]
    torch.testing.assert_close(loss(*flat, *shuffled, CLASSES), loss(real, synthetic))
    # A class that one side lacks adds nothing: dropping its synthetic images equals dropping the class.
    keep = shuffled[1] != 2
    without = loss(flat[0], flat[1][keep], shuffled[0], shuffled[1][keep], CLASSES)
    others = torch.tensor([0, 1, 3])
    torch.testing.assert_close(without, loss(real[others], synthetic[others]))


def test_class_means_of_flat_features_have_the_gradient_of_a_mean():
    features = maps(5, 2, 3).requires_grad_()
    means, counts = class_means(features, torch.tensor([2, 0, 2, 2, 0]), 4)
    assert counts.tolist() == [2, 0, 3, 0]
    torch.testing.assert_close(means[2], features[[0, 2, 3]].mean(0).flatten())
    (gradient,) = torch.autograd.grad(means.sum(), features)
    torch.testing.assert_close(gradient[:, 0, 0], torch.tensor([1 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 2]).double())


def test_zero_loss_and_zero_gradient_when_the_set_is_the_real_batch(images):
    real, _ = images
    synthetic = real.clone().requires_grad_()
    params = DSA().draw(CLASSES, (8, 8), generator=seeded(0))
    loss = datadam(Blocks(instance), real, synthetic, params)
    (gradient,) = torch.autograd.grad(loss, synthetic)
    assert loss == 0
    assert gradient.count_nonzero() == 0
    other = DSA().draw(CLASSES, (8, 8), generator=seeded(1))
    with torch.no_grad():
        shifted = apply(real, other)
    assert datadam(Blocks(instance), shifted, synthetic, params) > 1e-3, "two augmentations are not siamese"


def test_loss_does_not_see_the_order_within_a_class(images):
    real, synthetic = images
    params = DSA().draw(CLASSES, (8, 8), generator=seeded(0))
    net = Blocks(instance)
    loss = datadam(net, real, synthetic, params)
    mixed = datadam(net, real[:, torch.randperm(REAL)], synthetic[:, [2, 0, 1]], params)
    torch.testing.assert_close(mixed, loss, rtol=1e-12, atol=0)
    across = datadam(net, real[[1, 0, 2, 3]], synthetic, params)
    assert abs(across - loss) > 1e-6 * loss, "classes must be paired"


def test_scaling_all_activations_of_the_layer_changes_nothing(images):
    real, synthetic = (x.flatten(0, 1) for x in images)
    net = Blocks(instance)
    a, b = (net(x)[0].unflatten(0, (CLASSES, -1)) for x in (real, synthetic))
    torch.testing.assert_close(attention_matching(37 * a, 37 * b), attention_matching(a, b), rtol=1e-12, atol=0)


def test_groups_of_classes_accumulate_to_the_whole(images):
    real, synthetic = images
    params = DSA().draw(CLASSES, (8, 8), generator=seeded(0))
    net = Blocks(instance)
    whole = datadam(net, real, synthetic, params)
    (expected,) = torch.autograd.grad(whole, synthetic)
    total = torch.zeros(())
    for group in (slice(0, 1), slice(1, 3), slice(3, 4)):
        loss = datadam(net, real[group], synthetic[group], params[group])
        loss.backward()
        total = total + loss.detach()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(synthetic.grad, expected, rtol=1e-6, atol=1e-12)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(("norm", "independent"), [(instance, True), (nn.BatchNorm2d, False)])
def test_gradient_of_a_class_is_its_own_with_instance_norm_only(images, norm, independent):
    real, synthetic = images
    params = DSA(strategy="none").draw(CLASSES, (8, 8))
    net = Blocks(norm)

    def gradient(real, synthetic):
        loss = datadam(net, real, synthetic, params, weight_mean=0)
        return torch.autograd.grad(loss, synthetic)[0]

    before = gradient(real, synthetic)
    changed, other = real.clone(), synthetic.detach().clone()
    changed[1:], other[1:] = maps(3, REAL, 2, 8, 8, seed=8), maps(3, SYNTHETIC, 2, 8, 8, seed=9)
    after = gradient(changed, other.requires_grad_())
    assert torch.allclose(before[0], after[0], rtol=1e-9, atol=1e-12) == independent
    assert not torch.allclose(before[1:], after[1:])


def test_bad_input_is_told_in_a_sentence():
    with pytest.raises(UserError, match=r"shape \[8, 64\] have no spatial map"):
        attention_map(torch.zeros(8, 64))
    for power in (0, -1, 0.5):
        with pytest.raises(UserError, match="power must be at least 1"):
            attention_map(torch.zeros(1, 2, 3, 3), power)
    with pytest.raises(UserError, match="need one label each and num_classes"):
        mean_matching(torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4).long(), torch.zeros(3).long())
    with pytest.raises(UserError, match=r"\[classes, per_class, \.\.\.\], not \[4, 2\]"):
        mean_matching(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(UserError, match="4 classes of 2 values and synthetic ones 3 of 2"):
        mean_matching(torch.zeros(4, 5, 2), torch.zeros(3, 1, 2))
