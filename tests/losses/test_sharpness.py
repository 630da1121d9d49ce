"""Sharpness-aware gradients and the penalty on the input's gradient: closed forms, what they reduce to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.losses.sharpness import gsam, input_gradient_penalty


def quadratic(matrix: Tensor):
    return lambda weights: 0.5 * weights[0] @ matrix @ weights[0]


@pytest.fixture
def matrix() -> Tensor:
    torch.manual_seed(0)
    a = torch.randn(5, 5, dtype=torch.float64)
    return a @ a.T + torch.eye(5, dtype=torch.float64)


@pytest.mark.parametrize("adaptive", [True, False])
def test_sam_is_the_gradient_at_the_climbed_place(matrix: Tensor, adaptive: bool) -> None:
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    gsam(quadratic(matrix), [w], rho=0.3, alpha=0.0, adaptive=adaptive).backward()
    g0 = matrix @ w.detach()
    step = w.detach() ** 2 * g0 / (w.detach().abs() * g0).norm() if adaptive else g0 / g0.norm()
    torch.testing.assert_close(w.grad, matrix @ (w.detach() + 0.3 * step), rtol=1e-12, atol=1e-12)


def test_what_is_taken_away_stands_upright_on_the_climbed_gradient(matrix: Tensor) -> None:
    found = []
    for alpha in (0.0, 0.5):
        torch.manual_seed(1)
        w = torch.randn(5, dtype=torch.float64, requires_grad=True)
        gsam(quadratic(matrix), [w], rho=0.3, alpha=alpha).backward()
        found.append(w.grad)
    g1, upright = found[0], (found[0] - found[1]) / 0.5
    assert upright.norm() > 1e-3
    assert abs(float(upright @ g1)) < 1e-10 * float(upright.norm() * g1.norm())


def test_without_climb_it_is_the_plain_loss_bit_for_bit() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(6, 4)
    plain = net(x).square().mean()
    expected = torch.autograd.grad(plain, list(net.parameters()))
    value = gsam(lambda w: (x @ w[0].T + w[1]).square().mean(), list(net.parameters()), rho=0.0, alpha=0.0)
    for found, reference in zip(torch.autograd.grad(value, list(net.parameters())), expected, strict=True):
        torch.testing.assert_close(found, reference)
    w = torch.randn(3, requires_grad=True)
    (found,) = torch.autograd.grad(gsam(lambda one: one[0].exp().sum(), [w], rho=0.0, alpha=0.0), [w])
    assert torch.equal(found, w.detach().exp())


def test_the_value_is_that_at_the_weights_and_the_weights_stay(matrix: Tensor) -> None:
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    before = w.detach().clone()
    value = gsam(quadratic(matrix), [w], rho=0.3, alpha=0.5)
    assert value.item() == quadratic(matrix)([before]).item()
    value.backward()
    assert torch.equal(w.detach(), before)
    with torch.no_grad():
        w -= 0.1 * w.grad
    torch.testing.assert_close(before - w.detach(), 0.1 * w.grad)


def test_the_norm_is_one_over_all_tensors() -> None:
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    gsam(lambda w: 0.5 * (w[0] ** 2 + w[1] ** 2).sum(), [a, b], rho=1.0, alpha=0.0, adaptive=False).backward()
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([3.6, 4.8]))


def test_the_penalty_of_a_linear_model_is_that_of_its_weights() -> None:
    torch.manual_seed(0)
    weights = torch.randn(2 * 3 * 3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    summed = weights.detach().sum(1)
    image = input_gradient_penalty(x.flatten(1) @ weights, x, norm="image")
    torch.testing.assert_close(image, (summed.norm() - 1) ** 2)
    pixel = input_gradient_penalty(x.flatten(1) @ weights, x)
    torch.testing.assert_close(pixel, (summed.view(2, 9).norm(dim=0) - 1).square().mean())
    (reached,) = torch.autograd.grad(pixel, weights)
    assert reached.abs().min() > 0


def test_bad_input_is_told_in_a_sentence() -> None:
    w = torch.ones(2, requires_grad=True)
    for rho, alpha in ((-0.1, 0.0), (0.1, -1.0)):
        with pytest.raises(UserError, match="rho and alpha of GSAM are 0 or more"):
            gsam(lambda one: one[0].sum(), [w], rho=rho, alpha=alpha)
    images = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UserError, match="floating-point images that require a gradient"):
        input_gradient_penalty(images.flatten(1), images)
