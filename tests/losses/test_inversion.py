"""Inversion losses in closed form, and against what batch norms themselves compute."""

import pytest
import torch
from torch import nn

from stillhouse.losses.inversion import batch_norm_matching, mean_norm, roughness


def test_matching_is_zero_where_the_batch_has_the_remembered_statistics():
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    norm = nn.BatchNorm2d(3, momentum=1.0).double()
    norm(x)
    # The norm remembers the variance with Bessel's correction.
    remembered = norm.running_var * (79 / 80)
    assert batch_norm_matching([(x, norm.running_mean, remembered)]).item() == pytest.approx(0, abs=1e-12)


def test_matching_adds_the_norms_of_all_layers_with_a_factor_on_the_first():
    layers = [(torch.randn(6, c, 2, 3), torch.randn(c), torch.rand(c)) for c in (2, 4)]
    parts = [
        (x.mean((0, 2, 3)) - mean).norm() + (x.var((0, 2, 3), unbiased=False) - var).norm() for x, mean, var in layers
    ]
    torch.testing.assert_close(batch_norm_matching(layers), parts[0] + parts[1])
    torch.testing.assert_close(batch_norm_matching(layers, first=10), 10 * parts[0] + parts[1])


def test_matching_couples_samples_but_not_their_order():
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    own = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(batch_norm_matching([(x, *own)]), batch_norm_matching([(x.flip(0), *own)]))


def test_roughness_by_hand_and_in_gradient():
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    x[0, 0, 0, 0] = 3.0
    # Right 3, down 3, one diagonal 3, the other 0.
    assert roughness(x).item() == 9.0
    y = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(roughness, y)
    assert torch.autograd.gradcheck(mean_norm, y)


def test_a_shift_of_all_pixels_changes_no_roughness():
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(roughness(x + 5), roughness(x), rtol=1e-4, atol=1e-5)
