"""Effective dimensions of known covariances, and a readout that finds what is linear and no more."""

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.metrics import effective_dimensions, linear_readout


def test_effective_dimensions_of_lines_balls_and_points():
    line = torch.arange(10.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]]) + 5
    assert effective_dimensions(line) == pytest.approx(1)
    ball = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_dimensions(ball) == pytest.approx(6)
    assert effective_dimensions(ball @ torch.linalg.qr(torch.randn(6, 6)).Q.mul(4) + 1) == pytest.approx(6, rel=1e-4)
    # More components than samples.
    assert effective_dimensions(torch.cat([ball, torch.zeros(12, 30)], 1)) == pytest.approx(6)
    assert effective_dimensions(torch.ones(7, 3)) == 0.0
    with pytest.raises(UserError, match="at least 2 samples"):
        effective_dimensions(torch.ones(1, 3))


def test_a_readout_is_exact_on_separable_classes_and_blind_without_information():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 4, generator=generator)
    x[:, 0] += 20 * labels
    assert linear_readout(x, labels, 1000 * x - 3, labels, penalty=1e4) <= 1.0
    assert linear_readout(x, labels, x, labels, penalty=1e4) == 1.0
    # The scale of the features is standardised away.
    small = linear_readout(1e-3 * x[:30], labels[:30], 1e-3 * x[30:], labels[30:])
    assert small == linear_readout(x[:30], labels[:30], x[30:], labels[30:])
    noise = torch.randn(600, 4, generator=generator)
    assert linear_readout(noise[:300], torch.arange(300) % 3, noise[300:], torch.arange(300) % 3) < 0.45


def test_a_readout_refuses_what_it_cannot_fit():
    x = torch.randn(4, 2)
    with pytest.raises(UserError, match="at least 2 classes"):
        linear_readout(x, torch.zeros(4).long(), x, torch.zeros(4).long())
    with pytest.raises(UserError, match="finite"):
        linear_readout(x / 0, torch.arange(4), x, torch.arange(4))
