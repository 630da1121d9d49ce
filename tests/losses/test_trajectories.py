"""Trajectory matching: the adjoint is the gradient of the whole unroll, and costs one step's activations."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.errors import UserError
from stillhouse.losses.trajectories import InnerLoss, inner_batches, start_window, trajectory_matching

CLASSES, SAMPLES = 3, 7


class Setting:
    """A small convolutional network, a learned set with soft labels and a step size, and weights to match."""

    def __init__(self, steps: int, *, soft: bool = True, batch: int = 3, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(4, 4),
            nn.ReLU(inplace=True),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        ).to(dtype)
        self.shapes = {name: p.shape for name, p in self.net.named_parameters()}
        self.start = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        self.targets = {steps: self.start + 0.1 * torch.randn_like(self.start)}
        self.images = torch.randn(SAMPLES, 2, 4, 4, dtype=dtype, requires_grad=True)
        logits = torch.randn(SAMPLES, CLASSES, dtype=dtype, requires_grad=True)
        self.labels = logits if soft else torch.arange(SAMPLES) % CLASSES
        self.lr = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        self.order = inner_batches(SAMPLES, batch, steps)
        self.scales = torch.rand(steps, dtype=dtype) + 0.5

    @property
    def learned(self) -> list[Tensor]:
        return [self.images, self.lr, *([self.labels] if self.labels.is_floating_point() else [])]

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Cross-entropy of the step; each step scales its images, as an augmentation would."""
        weights, offset = {}, 0
        for name, shape in self.shapes.items():
            weights[name] = theta[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
        logits = functional_call(self.net, weights, (self.scales[step] * images,))
        return F.cross_entropy(logits, labels.softmax(-1) if labels.is_floating_point() else labels)

    def matched(self, **fields: object) -> Tensor:
        return trajectory_matching(
            self.loss, self.start, self.targets, self.images, self.labels, self.lr, self.order, **fields
        )

    def unrolled(
        self, momentum: float = 0.0, weights: Mapping[int, float] | None = None, *, constant: bool = False
    ) -> Tensor:
        """The same with one graph for all steps; ``constant`` cuts it between them, which is TESLA's gradient."""
        theta, velocity, value = self.start, torch.zeros_like(self.start), torch.zeros_like(self.lr)
        for step, index in enumerate(self.order):
            at = (
                (theta.detach() if constant else theta).clone().requires_grad_()
                if theta.grad_fn is None or constant
                else theta
            )
            inner = self.loss(at, self.images[index], self.labels[index], step)
            (g,) = torch.autograd.grad(inner, at, create_graph=True)
            velocity = momentum * velocity + g
            theta = theta - self.lr * velocity
            if step + 1 in self.targets:
                target = self.targets[step + 1]
                weight = (weights or {}).get(step + 1, 1.0)
                value = value + weight * (theta - target).square().sum() / (self.start - target).square().sum()
        return value

    def gradients(self, value: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(value, self.learned))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("keep_every", [1, 3, 20])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
@pytest.mark.parametrize("soft", [True, False])
def test_the_adjoint_is_the_gradient_of_the_unroll(soft: bool, steps: int, momentum: float, keep_every: int) -> None:
    s = Setting(steps, soft=soft)
    value, expected = s.matched(momentum=momentum, keep_every=keep_every), s.unrolled(momentum)
    assert relative(value.detach(), expected.detach()) < 1e-12
    for found, reference in zip(s.gradients(value), s.gradients(expected), strict=True):
        assert relative(found, reference) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_intermediate_targets_add_their_own_share(momentum: float) -> None:
    s = Setting(8)
    s.targets |= {step: s.start + 0.1 * torch.randn_like(s.start) for step in (2, 5)}
    weights = {2: 0.25, 5: 0.5}
    value, expected = s.matched(momentum=momentum, weights=weights), s.unrolled(momentum, weights)
    assert relative(value.detach(), expected.detach()) < 1e-12
    for found, reference in zip(s.gradients(value), s.gradients(expected), strict=True):
        assert relative(found, reference) < 1e-12


def test_without_the_exact_part_it_is_teslas_gradient() -> None:
    s = Setting(8)
    found, cut = s.gradients(s.matched(exact=False)), s.gradients(s.unrolled(constant=True))
    for one, reference in zip(found, cut, strict=True):
        assert relative(one, reference) < 1e-12
    exact = s.gradients(s.matched())
    assert relative(found[0], exact[0]) > 0.01, "it is another gradient than the true one"


def test_teslas_closed_form() -> None:
    s = Setting(4)
    target = s.targets[4]
    thetas, gradients = [s.start], []
    for step, index in enumerate(s.order):
        theta = thetas[-1].clone().requires_grad_()
        (g,) = torch.autograd.grad(s.loss(theta, s.images[index], s.labels[index], step), theta, create_graph=True)
        gradients.append(g)
        thetas.append((theta - s.lr * g).detach())
    total = torch.stack([g.detach() for g in gradients]).sum(0)
    distance = (s.start - target).square().sum()
    beta = s.lr.detach()
    bracket = beta * (target - s.start) + beta**2 * total
    expected = torch.autograd.grad(sum(2 / distance * (bracket @ g) for g in gradients), [s.images, s.labels])
    images, lr, labels = s.gradients(s.matched(exact=False))
    assert relative(images, expected[0]) < 1e-12
    assert relative(labels, expected[1]) < 1e-12
    assert relative(lr, -2 / distance * (total @ (s.start - beta * total - target))) < 1e-12


def test_one_step_leaves_nothing_to_drop() -> None:
    s = Setting(1)
    for one, other in zip(s.gradients(s.matched(exact=False)), s.gradients(s.matched()), strict=True):
        assert torch.equal(one, other)


def test_a_step_size_of_zero_stays_at_the_start() -> None:
    s = Setting(5)
    s.lr = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    value = s.matched()
    assert value.item() == pytest.approx(1, abs=1e-14)
    images, lr, labels = s.gradients(value)
    assert not images.any()
    assert not labels.any()
    assert lr.item() != 0


def test_samples_that_no_step_uses_have_no_gradient() -> None:
    s = Setting(2)
    s.order = [torch.tensor([4, 1]), torch.tensor([1])]
    images, _, labels = s.gradients(s.matched())
    assert images.flatten(1).any(1).nonzero().flatten().tolist() == [1, 4]
    assert labels.any(1).nonzero().flatten().tolist() == [1, 4]


def test_what_needs_no_gradient_gets_none_and_changes_nothing() -> None:
    s = Setting(4)
    expected = s.gradients(s.matched())
    s.images.requires_grad_(False)
    s.lr.requires_grad_(False)
    (labels,) = torch.autograd.grad(s.matched(), [s.labels])
    assert torch.equal(labels, expected[2])


def test_a_factor_on_the_loss_is_a_factor_on_its_gradient() -> None:
    s = Setting(3)
    for three, one in zip(s.gradients(3 * s.matched()), s.gradients(s.matched()), strict=True):
        torch.testing.assert_close(three, 3 * one, rtol=1e-14, atol=0)


def test_a_target_at_the_start_is_not_divided_by_zero() -> None:
    s = Setting(2)
    s.targets = {2: s.start.clone()}
    value = s.matched()
    assert 0 < value.item() < 1
    assert all(torch.isfinite(g).all() for g in s.gradients(value))


def test_the_graph_of_one_step_is_alive_at_a_time() -> None:
    s = Setting(12)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def loss(theta: Tensor, images: Tensor, labels: Tensor, step: int) -> Tensor:
        nonlocal most
        made = images * 2
        alive.add(made)
        most = max(most, len(alive))
        return s.loss(theta, made, labels, step)

    watched: InnerLoss = loss
    value = trajectory_matching(watched, s.start, s.targets, s.images, s.labels, s.lr, s.order)
    value.backward()
    assert most <= 2


@pytest.mark.parametrize("exact", [True, False])
def test_mixed_precision_holds_in_the_backward_pass_too(exact: bool) -> None:
    s = Setting(3, dtype=torch.float32)
    expected = s.gradients(s.matched(exact=exact))
    seen: list[bool] = []
    original = s.loss

    def loss(theta: Tensor, images: Tensor, labels: Tensor, step: int) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(theta, images, labels, step)

    s.loss = loss  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        value = s.matched(exact=exact)
    for found, reference in zip(s.gradients(value), expected, strict=True):
        assert relative(found, reference) < 0.5
    assert seen == [True] * 6


def test_batches_are_permutations_cut_into_chunks() -> None:
    found = inner_batches(7, 3, 8, torch.Generator().manual_seed(1))
    assert [len(batch) for batch in found] == [3, 3, 1, 3, 3, 1, 3, 3]
    assert sorted(torch.cat(found[:3]).tolist()) == sorted(torch.cat(found[3:6]).tolist()) == list(range(7))
    assert not torch.equal(torch.cat(found[:3]), torch.cat(found[3:6]))
    whole = inner_batches(7, None, 2)
    assert [sorted(batch.tolist()) for batch in whole] == [list(range(7))] * 2
    assert [len(batch) for batch in inner_batches(7, 100, 2)] == [7, 7]


def test_the_window_grows_and_then_stays() -> None:
    ends = [start_window(step, first=2, last=20, begin=10, end=50)[1] for step in range(80)]
    assert ends == [min(20, 10 + 10 * step // 50) for step in range(80)]
    assert start_window(0, first=2, last=20) == (2, 20)


def test_bad_input_is_told_in_a_sentence() -> None:
    s = Setting(3)
    for change, sentence in {
        "no steps": "at least one inner step",
        "no target": "lie after 1 to 3 inner steps, not nowhere",
        "late": r"lie after 1 to 3 inner steps, not \[4\]",
        "short": "flat vectors of one length",
    }.items():
        bad = Setting(3)
        match change:
            case "no steps":
                bad.order = []
            case "no target":
                bad.targets = {}
            case "late":
                bad.targets = {4: s.start}
            case _:
                bad.targets = {3: s.start[1:]}
        with pytest.raises(UserError, match=sentence):
            bad.matched()
