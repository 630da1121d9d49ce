"""The critic of logits: its widths, and who ascends and who descends."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.losses.logit_matching import adversarial_logits
from stillhouse.modules import adversary
from stillhouse.modules.adversary import LogitDiscriminator, reverse_gradient


def widths(discriminator: LogitDiscriminator) -> list[int]:
    linear = [m for m in discriminator.layers if isinstance(m, nn.Linear)]
    return [linear[0].in_features, *(m.out_features for m in linear)]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(1000, [1000, 125, 15, 2]), (100, [100, 12, 2, 2]), (10, [10, 2, 2, 2]), (2, [2, 2, 2, 2])],
)
def test_widths(classes, expected):
    assert widths(LogitDiscriminator(classes)) == expected


def test_the_last_relu_is_asked_for():
    assert isinstance(LogitDiscriminator(100).layers[-1], nn.Linear)
    assert LogitDiscriminator(100, last_relu=True)(torch.randn(50, 100)).min() >= 0


def test_reversal_turns_the_students_gradient_and_leaves_the_discriminators():
    torch.manual_seed(0)
    discriminator = LogitDiscriminator(100)
    student, teacher = torch.randn(8, 100, requires_grad=True), torch.randn(8, 100)
    gradients = []
    for reversed_ in (False, True):
        seen = reverse_gradient(student) if reversed_ else student
        loss = adversarial_logits(discriminator(seen), discriminator(teacher))
        gradients.append(torch.autograd.grad(loss, [student, *discriminator.parameters()]))
    (plain, *of_plain), (turned, *of_turned) = gradients
    assert torch.equal(turned, -plain)
    assert plain.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(of_plain, of_turned, strict=True))
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(reverse_gradient(x), x)
    assert torch.autograd.grad(reverse_gradient(x, 0.5).sum(), x)[0].tolist() == [-0.5] * 3


def test_bad_input_is_told_in_a_sentence():
    with pytest.raises(UserError, match="at least 2 classes and reduces by at least 1, not 1 and 8"):
        LogitDiscriminator(1)


def test_examples_run():
    assert doctest.testmod(adversary).failed == 0
