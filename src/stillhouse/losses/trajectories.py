"""Trajectory matching: how far training on a learned set ends from where training on the real one did, differentiated.

A network starts at the weights of an expert and takes N steps of SGD on the learned set; the loss compares where it ends
with the expert's later weights. Backward through N steps kept as one graph costs the memory of N forward passes. Here the
forward pass keeps weights only, and the backward pass rebuilds one step at a time and carries the adjoint through it: the
same gradient, with the activations of a single step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stillhouse.errors import UserError

InnerLoss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Loss of one inner step: (flat weights [P], images, labels, number of the step) to a scalar.

It is called more than once for a step and must give the same each time: draw what is random (augmentation) beforehand.
"""


def trajectory_matching(
    loss: InnerLoss,
    start: Float[Tensor, " weights"],
    targets: Mapping[int, Float[Tensor, " weights"]],
    images: Float[Tensor, "samples ..."],
    labels: Shaped[Tensor, "samples ..."],
    lr: Float[Tensor, ""],
    order: Sequence[Int[Tensor, " batch"]],
    *,
    momentum: float = 0.0,
    weights: Mapping[int, float] | None = None,
    exact: bool = True,
    keep_every: int = 1,
) -> Float[Tensor, ""]:
    r"""Normalised distance of N inner steps of SGD from given weights (MTT, arXiv 2203.11932, Eq. 2).

    ``m_{i+1} = momentum m_i + g_i`` and ``theta_{i+1} = theta_i - lr m_{i+1}`` from ``theta_0 = start`` and ``m_0 = 0``,
    with the gradient ``g_i`` of ``loss`` on the samples ``order[i]``; then
    ``sum_k w_k ||theta_k - target_k||^2 / ||start - target_k||^2`` over the steps k of ``targets``.

    The gradient with respect to images, soft labels and lr is that of the whole unroll. With ``a_k`` the adjoint of
    ``theta_k`` and ``b_i = a_{i+1} + momentum b_{i+1}``, a step is rebuilt at its stored weights, ``s = <g_i, -lr b_i>`` is
    differentiated once more, and ``a_i = a_{i+1} + ds/dtheta_i``, ``dL/dlr = -sum_i <g_i, b_i>``. Memory holds
    ``N / keep_every`` weight vectors and the activations of one step.

    Args:
        loss: the inner loss.
        start: weights of the expert from which the inner training starts.
        targets: weights to match, by the number of inner steps after which they are to be reached (1 to N). One that
            equals the start has no distance to be relative to, and its squared distance counts as it is.
        images: the learned samples.
        labels: their labels; class numbers have no gradient.
        lr: step size of the inner training.
        order: the samples of each of the N steps.
        momentum: of the inner training (AST, arXiv 2310.10541, uses 0.9).
        weights: weight of each target; 1 where not given.
        exact: False drops ``ds/dtheta_i``, which treats all ``theta_i`` as constants: TESLA's gradient (arXiv 2211.10586),
            biased for N > 1 and hardly cheaper here.
        keep_every: keep the weights of every so many steps and go through the steps between twice.

    Raises:
        UserError: no step, a target that is not among them, or weights of different shapes.

    >>> pull = lambda theta, x, y, i: 0.5 * (theta - x.mean(0)).square().sum()
    >>> images, lr = torch.tensor([[1.0], [3.0]], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    >>> order = [torch.tensor([0, 1]), torch.tensor([1])]
    >>> value = trajectory_matching(pull, torch.zeros(1), {2: torch.tensor([4.0])}, images, torch.zeros(2), lr, order)
    >>> value.backward()
    >>> value.item(), images.grad.tolist(), lr.grad.item()
    (0.25, [[-0.03125], [-0.15625]], -0.75)
    """
    if not order or keep_every < 1:
        raise UserError("Trajectory matching needs at least one inner step, and keeps weights every 1 step or fewer.")
    if not targets or not all(1 <= step <= len(order) for step in targets):
        raise UserError(
            f"Targets of trajectory matching lie after 1 to {len(order)} inner steps, not {sorted(targets) or 'nowhere'}."
        )
    for step, target in targets.items():
        if target.shape != start.shape or start.ndim != 1:
            raise UserError(
                f"Weights are flat vectors of one length: the start is {list(start.shape)}, the target after {step} steps "
                f"{list(target.shape)}."
            )
    aims = {}
    for step, target in targets.items():
        distance = (start - target).square().sum()
        weight = 1.0 if weights is None else weights.get(step, 1.0)
        aims[step] = (target.detach(), weight / torch.where(distance > 0, distance, 1.0))
    unroll = _Unroll(loss, start.detach(), aims, list(order), momentum, exact, keep_every, _autocast(start.device.type))
    value: Tensor = _Match.apply(unroll, images, labels, lr)  # type: ignore[no-untyped-call]
    return value


def inner_batches(
    samples: int, batch_size: int | None, steps: int, generator: torch.Generator | None = None
) -> list[Int[Tensor, " batch"]]:
    """The samples of each inner step: chunks of a random permutation, and of a new one when it is used up.

    Args:
        samples: number of learned samples.
        batch_size: samples of a step; the last chunk of a permutation may be smaller. None: all of them.
        steps: number of steps.
        generator: source of randomness; torch's global CPU generator by default.

    >>> [len(batch) for batch in inner_batches(5, 2, 4)]
    [2, 2, 1, 2]
    """
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.split(torch.randperm(samples, generator=generator), min(batch_size or samples, samples))
    return found[:steps]


def start_window(step: int, *, first: int, last: int, begin: int | None = None, end: int = 0) -> tuple[int, int]:
    """Epochs from which an expert may be matched at an outer step: ``first <= t < U(step)`` (DATM, arXiv 2310.05773).

    ``U`` grows from ``begin`` to ``last`` over the outer steps up to ``end``, so that easy epochs come first:
    ``U(step) = min(last, begin + floor((last - begin) step / end))``.

    Args:
        step: the outer step, from 0.
        first: first epoch.
        last: upper end, exclusive.
        begin: upper end at step 0; ``last`` from the start when not given.
        end: step at which the window has grown to ``last``.

    >>> [start_window(step, first=0, last=20, begin=10, end=1000) for step in (0, 150, 999, 5000)]
    [(0, 10), (0, 11), (0, 19), (0, 20)]
    """
    if begin is None or step >= end:
        return first, last
    return first, min(last, begin + (last - begin) * step // end)


@dataclass(frozen=True, eq=False)
class _Unroll:
    """N inner steps from ``start``, and what is asked of them."""

    loss: InnerLoss
    start: Tensor
    aims: Mapping[int, tuple[Tensor, Tensor]]
    order: list[Tensor]
    momentum: float
    exact: bool
    keep_every: int
    autocast: Callable[[], AbstractContextManager[Any]]

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor, step: int, *, graph: bool = False) -> Tensor:
        """``g_i`` at ``theta``; with a graph when it is to be differentiated once more."""
        with torch.enable_grad(), self.autocast():
            value = self.loss(theta, images, labels, step)
        (found,) = torch.autograd.grad(value, theta, create_graph=graph)
        return found

    def walk(
        self, theta: Tensor, velocity: Tensor | None, steps: range, images: Tensor, labels: Tensor, lr: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weights and velocity before each of ``steps`` and after the last, without a graph."""
        yield theta, velocity
        for step in steps:
            index = self.order[step].to(images.device)
            g = self.gradient(theta.detach().requires_grad_(), images[index], labels[index], step)
            velocity = g if velocity is None or not self.momentum else velocity.mul(self.momentum).add_(g)
            theta = theta - lr * velocity
            yield theta, velocity


class _Match(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unroll: _Unroll, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        steps, kept, reached = len(unroll.order), [], {}
        walk = unroll.walk(unroll.start, None, range(steps), images.detach(), labels.detach(), lr.detach())
        for step, (theta, velocity) in enumerate(walk):
            if step < steps and step % unroll.keep_every == 0:
                # The velocity is only needed where steps are gone through again.
                kept.append((theta, velocity if unroll.keep_every > 1 and unroll.momentum else None))
            if step in unroll.aims:
                target, scale = unroll.aims[step]
                reached[step] = (theta - target, scale)
        ctx.unroll, ctx.kept, ctx.reached = unroll, kept, reached
        ctx.save_for_backward(images, labels, lr)
        return torch.stack([scale * away.square().sum() for away, scale in reached.values()]).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        unroll: _Unroll = ctx.unroll
        images, labels, lr = (saved.detach() for saved in ctx.saved_tensors)
        _, for_images, for_labels, for_lr = ctx.needs_input_grad
        d_images = torch.zeros_like(images) if for_images else None
        d_labels = torch.zeros_like(labels) if for_labels else None
        d_lr = torch.zeros_like(lr)
        adjoint, carried = torch.zeros_like(unroll.start), torch.zeros_like(unroll.start)
        for step, theta in _backwards(unroll, ctx.kept, images, labels, lr):
            if step + 1 in ctx.reached:
                away, scale = ctx.reached[step + 1]
                adjoint = adjoint + 2 * scale * away
            carried = adjoint + unroll.momentum * carried if unroll.momentum else adjoint
            index = unroll.order[step].to(images.device)
            theta, x, y = theta.detach().requires_grad_(), images[index], labels[index]
            x, y = x.requires_grad_(for_images), y.requires_grad_(for_labels)
            with torch.enable_grad():
                g = unroll.gradient(theta, x, y, step, graph=True)
                along = g @ carried
                wanted = {"theta": theta} if unroll.exact and step else {}
                wanted |= {"x": x} if for_images else {}
                wanted |= {"y": y} if for_labels else {}
                found: Sequence[Tensor | None] = ()
                if wanted and along.requires_grad:
                    found = torch.autograd.grad(along, list(wanted.values()), -lr, allow_unused=True)
            d_lr -= along.detach()
            for name, part in zip(wanted, found, strict=False):
                if part is None:
                    continue
                if name == "theta":
                    adjoint = adjoint + part
                elif name == "x":
                    d_images = d_images.index_add_(0, index, part)  # type: ignore[union-attr]
                else:
                    d_labels = d_labels.index_add_(0, index, part)  # type: ignore[union-attr]
        (factor,) = outer
        return (
            None,
            None if d_images is None else d_images.mul_(factor),
            None if d_labels is None else d_labels.mul_(factor),
            d_lr.mul_(factor) if for_lr else None,
        )


def _backwards(
    unroll: _Unroll, kept: list[tuple[Tensor, Tensor | None]], images: Tensor, labels: Tensor, lr: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Steps from the last to the first with the weights before each; those between kept ones are gone through again."""
    for block in reversed(range(len(kept))):
        first = block * unroll.keep_every
        last = min(first + unroll.keep_every, len(unroll.order)) - 1
        theta, velocity = kept[block]
        thetas = [one for one, _ in unroll.walk(theta, velocity, range(first, last), images, labels, lr)]
        for step in range(last, first - 1, -1):
            yield step, thetas[step - first]


def _autocast(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """The mixed precision that holds now, for the backward pass, which runs outside of it."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype)
