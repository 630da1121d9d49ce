"""What a representation holds: how many directions it uses, and how well a linear readout finds classes in it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError


def effective_dimensions(features: Float[Tensor, "samples width"]) -> float:
    """Participation ratio of the covariance's eigenvalues, ``(sum l)^2 / sum l^2``: 1 for a line, the width for a ball.

    A collapsed representation (all samples alike) has 0.

    Raises:
        UserError: fewer than 2 samples.

    >>> round(effective_dimensions(torch.cat([torch.eye(3), -torch.eye(3)])), 4)
    3.0
    """
    if features.dim() != 2 or len(features) < 2:
        raise UserError(f"Features are (samples, width) of at least 2 samples, not {tuple(features.shape)}.")
    centred = features.double() - features.double().mean(0)
    # trace(C)^2 / trace(C^2), from the smaller of the two Gram matrices.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    whole, squares = gram.diagonal().sum(), gram.square().sum()
    return 0.0 if squares <= 1e-24 else float(whole.square() / squares)


def linear_readout(
    features: Float[Tensor, "samples width"],
    labels: Int[Tensor, " samples"],
    test_features: Float[Tensor, "others width"],
    test_labels: Int[Tensor, " others"],
    *,
    penalty: float = 1.0,
    iterations: int = 300,
) -> float:
    """Accuracy, on other samples, of a logistic regression on frozen features.

    Features are standardised by the mean and deviation of the first ones; scikit-learn's regression is fitted, the same in
    every run.

    Args:
        features: of the samples to fit.
        labels: their classes.
        test_features: of the samples to judge by.
        test_labels: their classes.
        penalty: inverse strength ``C`` of the L2 penalty.
        iterations: at most so many.

    Raises:
        UserError: one class only, or features that are not finite.

    >>> x = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> linear_readout(x, torch.tensor([0, 0, 1, 1]), x, torch.tensor([0, 0, 1, 1]))
    1.0
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if not bool(torch.isfinite(features).all() and torch.isfinite(test_features).all()):
        raise UserError("A readout needs finite features.")
    if len(torch.unique(labels)) < 2:
        raise UserError("A readout needs samples of at least 2 classes.")
    x = features.double().cpu()
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    fitted = LogisticRegression(C=penalty, max_iter=iterations)
    with warnings.catch_warnings():
        # The first few hundred iterations are the protocol, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(((x - mean) / deviation).numpy(), labels.cpu().numpy())
    other = (test_features.double().cpu() - mean) / deviation
    return float(fitted.score(other.numpy(), test_labels.cpu().numpy()))


def linear_probe(
    features: Float[Tensor, "samples width"],
    labels: Int[Tensor, " samples"],
    test_features: Float[Tensor, "others width"],
    test_labels: Int[Tensor, " others"],
    *,
    steps: int = 5000,
    batch_size: int = 512,
    lr: float = 0.2,
    momentum: float = 0.9,
) -> float:
    """Accuracy, on other samples, of a linear layer trained by SGD with a cosine rate on frozen features as they are.

    The protocol of linear evaluation; the layer and the order are drawn from torch's global generator.

    Args:
        features: of the samples to train on.
        labels: their classes.
        test_features: of the samples to judge by.
        test_labels: their classes.
        steps: steps of training.
        batch_size: samples of a step; all where there are fewer.
        lr: learning rate at first, falling to 0 as a cosine.
        momentum: that of SGD.

    Raises:
        UserError: features that are not finite.

    >>> x = torch.tensor([[-1.0], [-1.1], [1.0], [1.1]])
    >>> linear_probe(x, torch.tensor([0, 0, 1, 1]), x, torch.tensor([0, 0, 1, 1]), steps=50)
    1.0
    """
    if not bool(torch.isfinite(features).all() and torch.isfinite(test_features).all()):
        raise UserError("A probe needs finite features.")
    classes = int(max(labels.max(), test_labels.max())) + 1
    layer = torch.nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, size = torch.empty(0, dtype=torch.long), min(batch_size, len(features))
    with torch.enable_grad():
        for _ in range(steps):
            if len(order) < size:
                order = torch.randperm(len(features))
            rows, order = order[:size], order[size:]
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(features[rows]), labels[rows])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((layer(test_features).argmax(1) == test_labels).double().mean())
