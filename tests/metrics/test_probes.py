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
