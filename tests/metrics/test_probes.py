"""Probes: cosines between gradients by the definition, and lengths and directions of features."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.metrics import probes
from stillhouse.metrics.probes import (
    feature_cosine,
    feature_norm,
    gradient_cosine,
    gradient_cosines,
    head_and_backbone,
    pull_and_push,
    simplex_vertices,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def both(model):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    logits = model(x)
    return F.cross_entropy(logits, torch.arange(8) % 3), logits.square().mean()


def flat(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def test_the_cosine_is_that_of_all_gradients_as_one_vector(model):
    first, second = both(model)
    a, b = (flat(loss, list(model.parameters())) for loss in (first, second))
    found = gradient_cosine(first, second, model.parameters())
    assert found.item() == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-6)
    assert gradient_cosine(first, 3 * first, model.parameters()).item() == pytest.approx(1)
    assert gradient_cosine(first, -first, model.parameters()).item() == pytest.approx(-1)
    assert all(parameter.grad is None for parameter in model.parameters())
    first.backward()


def test_groups_are_asked_at_once(model):
    first, second = both(model)
    groups = head_and_backbone(model, "2")
    found = gradient_cosines({"ce": first, "mse": second, "sum": first + second}, groups)
    assert list(found) == [
        f"{group}/{pair}" for group in ("head", "backbone") for pair in ("ce-mse", "ce-sum", "mse-sum")
    ]
    for group, parameters in groups.items():
        assert found[f"{group}/ce-mse"].item() == pytest.approx(gradient_cosine(first, second, parameters).item())


def test_what_a_loss_does_not_reach_counts_as_zero(model):
    first, _ = both(model)
    other = model[0].weight.sum()
    parameters = list(model.parameters())
    a = flat(first, parameters)
    expected = a[:20].sum() / (a.norm() * 20**0.5)
    assert gradient_cosine(first, other, parameters).item() == pytest.approx(expected.item(), abs=1e-6)
    assert gradient_cosine(first, torch.tensor(1.0), parameters) == 0
    model[0].requires_grad_(False)
    assert gradient_cosine(first, first, model.parameters()).item() == pytest.approx(1)


def test_head_and_backbone_share_nothing(model):
    groups = head_and_backbone(model, "2")
    assert groups["head"] == list(model[2].parameters())
    assert len(groups["head"]) + len(groups["backbone"]) == len(list(model.parameters()))
    with pytest.raises(UserError, match="Sequential has no module 'fc'"):
        head_and_backbone(model, "fc")


def test_lengths_and_directions():
    first, second = torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2)
    assert feature_norm(first).item() == pytest.approx(first.flatten(1).norm(dim=1).mean().item())
    expected = F.cosine_similarity(first.flatten(1), second.flatten(1)).mean()
    assert feature_cosine(first, second).item() == pytest.approx(expected.item(), abs=1e-6)
    assert feature_cosine(first, -2 * first).item() == pytest.approx(-1)


def test_bad_input_is_told_in_a_sentence(model):
    first, second = both(model)
    with pytest.raises(UserError, match="none of these parameters requires a gradient"):
        gradient_cosine(first, second, [torch.ones(2)])
    with pytest.raises(UserError, match="no parameter of the group 'head'"):
        gradient_cosines({"a": first, "b": second}, {"head": []})
    with pytest.raises(UserError, match="project one side"):
        feature_cosine(torch.ones(2, 3), torch.ones(2, 4))


def test_examples_run():
    assert doctest.testmod(probes).failed == 0


def test_pull_and_push_are_minus_the_gradient_by_the_weights():
    """With cross-entropy the pull is along the class's own embeddings, weighed by 1 - p, and the push away from the others'."""
    torch.manual_seed(0)
    f, labels, w = torch.randn(30, 5), torch.randint(4, (30,)), torch.randn(4, 5, requires_grad=True)
    z = f @ w.T
    (by_logits, by_weights) = torch.autograd.grad(F.cross_entropy(z, labels), [z, w])
    pull, push = pull_and_push(by_logits, f, labels)
    torch.testing.assert_close(pull + push, -by_weights)
    p, own = z.detach().softmax(1), F.one_hot(labels, 4).bool()
    torch.testing.assert_close(pull, ((1 - p) * own).T @ f / 30)
    torch.testing.assert_close(push, -(p * ~own).T @ f / 30)


def test_collapsed_classes_have_the_vertices_of_a_simplex():
    corners = torch.eye(4)[:, :4] - 0.25
    labels = torch.arange(40) % 4
    found = simplex_vertices(corners[labels] * 3 + 5, labels, 4)
    torch.testing.assert_close(found @ found.T, torch.eye(4) * 4 / 3 - 1 / 3)
    absent = simplex_vertices(corners[labels], labels, 6)
    assert absent[4:].abs().max() == 0
    torch.testing.assert_close(absent[:4], found)


def test_forces_of_other_shapes_are_refused():
    with pytest.raises(UserError, match="one gradient row, one embedding and one class number per sample"):
        pull_and_push(torch.zeros(3, 2), torch.zeros(4, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match="one class number per sample"):
        pull_and_push(torch.zeros(3, 2), torch.zeros(3, 5), torch.zeros(3))
