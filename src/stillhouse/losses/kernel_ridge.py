"""Ridge regression on features, in closed form and differentiable in all it is given: the head of KRR-ST and its like.

Both heads predict the targets of some samples (queries) from features and targets of others. Systems are solved in
float64 (float32 on devices without it), also under autocast.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError


def with_bias(features: Float[Tensor, "samples width"]) -> Float[Tensor, "samples wider"]:
    """Features with a column of ones, so that a linear head on them has a bias.

    >>> with_bias(torch.tensor([[2.0], [3.0]])).tolist()
    [[2.0, 1.0], [3.0, 1.0]]
    """
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def ridge_predict(
    features: Float[Tensor, "samples width"],
    targets: Float[Tensor, "samples values"],
    queries: Float[Tensor, "queries width"],
    ridge: float = 1e-6,
) -> Float[Tensor, "queries values"]:
    """``K_qs (K_ss + l I)^-1 Y_s`` with linear kernels K and ``l = ridge * trace(K_ss)`` (KRR-ST, arXiv 2310.06511).

    The trace carries no gradient, and makes the ridge free of the features' scale. The smaller of two equal systems is
    solved: over the samples, or over the features where these are fewer.

    Args:
        features: of the samples that are known, with :func:`with_bias` where the head has a bias.
        targets: of the same samples.
        queries: features of the samples to predict.
        ridge: strength relative to the trace.

    Raises:
        UserError: shapes that do not fit, or a system that cannot be solved.

    >>> x, y = torch.eye(3), torch.tensor([[1.0], [2.0], [3.0]])
    >>> ridge_predict(x, y, x, ridge=1 / 3).flatten().round(decimals=4).tolist()  # l = 1 halves everything
    [0.5, 1.0, 1.5]
    """
    _check(features, targets, queries)
    phi, wanted, asked = (_exact(x) for x in (features, targets, queries))
    with torch.autocast(phi.device.type, enabled=False):
        penalty = ridge * phi.detach().square().sum()
        if len(phi) <= phi.shape[1]:
            return asked @ (phi.T @ _solve(phi @ phi.T, penalty, wanted, ridge))
        return asked @ _solve(phi.T @ phi, penalty, phi.T @ wanted, ridge)


def descent_predict(
    features: Float[Tensor, "samples width"],
    targets: Float[Tensor, "samples values"],
    queries: Float[Tensor, "queries width"],
    steps: int = 100,
    lr: float = 1.0,
) -> Float[Tensor, "queries values"]:
    """What a linear head predicts after some steps of gradient descent from zero, unrolled: the ablation of a solved head.

    Args:
        features: as in :func:`ridge_predict`.
        targets: as there.
        queries: as there.
        steps: steps on half the sum of squared errors.
        lr: step size relative to 1 / trace(K_ss), which carries no gradient; stable below 2.

    Raises:
        UserError: shapes that do not fit.

    >>> x, y = torch.eye(2), torch.tensor([[2.0], [4.0]])
    >>> descent_predict(x, y, x, steps=1).flatten().tolist()  # half a step of each weight, as the trace is 2
    [1.0, 2.0]
    """
    _check(features, targets, queries)
    phi, wanted, asked = (_exact(x) for x in (features, targets, queries))
    with torch.autocast(phi.device.type, enabled=False):
        rate = lr / phi.detach().square().sum()
        head = torch.zeros(phi.shape[1], wanted.shape[1], dtype=phi.dtype, device=phi.device)
        for _ in range(steps):
            head = head - rate * (phi.T @ (phi @ head - wanted))
        return asked @ head


def _solve(system: Tensor, penalty: Tensor, right: Tensor, ridge: float) -> Tensor:
    """The solution of ``(system + penalty I) x = right``."""
    shifted = system + penalty * torch.eye(len(system), dtype=system.dtype, device=system.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed.item():
        finite = bool(torch.isfinite(shifted).all())
        number = f"its condition number is {torch.linalg.cond(shifted).item():.2g}" if finite else "it is not finite"
        raise UserError(
            f"Kernel ridge regression cannot solve a system of {len(system)} with ridge {ridge:g}: {number}; raise the ridge."
        )
    return torch.cholesky_solve(right, factor)


def _exact(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()


def _check(features: Tensor, targets: Tensor, queries: Tensor) -> None:
    fits = features.dim() == targets.dim() == queries.dim() == 2
    if not fits or len(features) != len(targets) or features.shape[1] != queries.shape[1]:
        raise UserError(
            "Kernel ridge regression takes features (samples, width), targets (samples, values) and queries (queries, width), "
            f"not {tuple(features.shape)}, {tuple(targets.shape)} and {tuple(queries.shape)}."
        )
