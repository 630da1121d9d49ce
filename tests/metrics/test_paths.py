"""Evenness of a path of weights, and the sharpness where it ends."""

from __future__ import annotations

import doctest
from functools import partial

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.metrics import paths
from stillhouse.metrics.paths import step_lengths, top_eigenvalue, variation


def quadratic(hessian: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return 0.5 * w @ hessian @ w


def test_examples() -> None:
    assert doctest.testmod(paths).failed == 0


def test_a_path_of_constant_speed_has_no_variation() -> None:
    path = torch.arange(5.0)[:, None] * torch.tensor([0.6, 0.8])
    torch.testing.assert_close(step_lengths(path), torch.ones(4))
    assert variation(step_lengths(path)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="at least two epochs, not 1"):
        step_lengths(path[:1])


def test_the_eigenvalue_is_the_one_of_largest_size() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    for values in ([5.0, 2.0, 1.0, 0.5, 0.1, 0.0], [-7.0, 2.0, 1.0, 0.5, 0.1, 0.0]):
        hessian = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
        found = top_eigenvalue(partial(quadratic, hessian), torch.randn(6, dtype=torch.float64), iterations=40)
        assert found == pytest.approx(values[0], rel=1e-6)
