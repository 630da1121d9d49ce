"""Kernel ridge regression equals scikit-learn's, its primal form and its closed-form gradients; it is free of scale."""

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from stillhouse.errors import UserError
from stillhouse.losses.kernel_ridge import descent_predict, ridge_predict, with_bias


def drawn(samples=6, width=9, values=3, queries=11):
    generator = torch.Generator().manual_seed(0)
    sizes = ((samples, width), (samples, values), (queries, width))
    x, y, q = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return with_bias(x), y, with_bias(q)


@pytest.mark.parametrize("samples", [6, 10, 25])
def test_it_is_scikit_learns_and_the_primal_form(samples):
    x, y, q = drawn(samples)
    alpha = 1e-3 * x.square().sum()
    found = ridge_predict(x, y, q, ridge=1e-3)
    sklearn = KernelRidge(alpha=alpha.item(), kernel="linear").fit(x.numpy(), y.numpy()).predict(q.numpy())
    torch.testing.assert_close(found, torch.from_numpy(sklearn), rtol=1e-6, atol=1e-9)
    primal = q @ torch.linalg.solve(x.T @ x + alpha * torch.eye(10).double(), x.T @ y)
    dual = q @ x.T @ torch.linalg.solve(x @ x.T + alpha * torch.eye(samples).double(), y)
    torch.testing.assert_close(found, primal, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found, dual, rtol=1e-6, atol=1e-9)


def test_without_ridge_it_interpolates_while_there_are_enough_features():
    x, y, _ = drawn(6)
    torch.testing.assert_close(ridge_predict(x, y, x, ridge=1e-12), y, rtol=1e-6, atol=1e-6)


def test_the_scale_of_the_features_does_not_matter():
    x, y, q = drawn()
    plain = ridge_predict(x, y, q, ridge=0.1)
    torch.testing.assert_close(ridge_predict(50 * x, y, 50 * q, ridge=0.1), plain)
    torch.testing.assert_close(
        ridge_predict(1e-3 * x.float(), y, 1e-3 * q.float(), ridge=0.1), plain, rtol=1e-5, atol=1e-5
    )


def test_the_gradient_to_the_targets_is_the_closed_form():
    x, y, q = drawn()
    wanted = torch.randn(11, 3, dtype=torch.float64)
    y.requires_grad_()
    predicted = ridge_predict(x, y, q, ridge=1e-3)
    (found,) = torch.autograd.grad(torch.nn.functional.mse_loss(predicted, wanted), y)
    system = x @ x.T + 1e-3 * x.square().sum() * torch.eye(6).double()
    closed = torch.linalg.solve(system, x @ q.T @ (2 * (predicted.detach() - wanted) / wanted.numel()))
    torch.testing.assert_close(found, closed)


@pytest.mark.parametrize("samples", [4, 12])
def test_the_gradient_to_the_features_is_that_of_a_fixed_trace(samples):
    x, y, q = drawn(samples, width=6)
    x.requires_grad_()
    (found,) = torch.autograd.grad(ridge_predict(x, y, q, ridge=0.1).square().mean(), x)
    alpha = 0.1 * x.detach().square().sum()
    fixed = x.detach().requires_grad_()
    system = fixed @ fixed.T + alpha * torch.eye(samples).double()
    (wanted,) = torch.autograd.grad((q @ fixed.T @ torch.linalg.solve(system, y)).square().mean(), fixed)
    torch.testing.assert_close(found, wanted)
    # A trace that moved along would give another gradient.
    moving = x.detach().requires_grad_()
    system = moving @ moving.T + 0.1 * moving.square().sum() * torch.eye(samples).double()
    (other,) = torch.autograd.grad((q @ moving.T @ torch.linalg.solve(system, y)).square().mean(), moving)
    assert not torch.allclose(found, other, rtol=1e-3)


def test_descent_takes_the_steps_of_sgd_and_arrives_at_the_solution():
    x, y, q = drawn(8, width=3)
    head = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([head], lr=1.5 / x.square().sum().item())
    for _ in range(7):
        sgd.zero_grad()
        (0.5 * (x @ head - y).square().sum()).backward()
        sgd.step()
    torch.testing.assert_close(descent_predict(x, y, q, steps=7, lr=1.5), q @ head.detach())
    solved = ridge_predict(x, y, q, ridge=1e-12)
    torch.testing.assert_close(descent_predict(x, y, q, steps=3000, lr=1.5), solved, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_solved_says_how_badly():
    x, y, q = drawn(6)
    with pytest.raises(UserError, match=r"condition number is .*; raise the ridge"):
        ridge_predict(torch.cat([x, x])[:, :2].repeat(1, 40), torch.cat([y, y]), q[:, :2].repeat(1, 40), ridge=0.0)
    with pytest.raises(UserError, match="it is not finite"):
        ridge_predict(x / 0, y, q)
    with pytest.raises(UserError, match=r"not \(6, 10\), \(5, 3\)"):
        ridge_predict(x, y[:5], q)
