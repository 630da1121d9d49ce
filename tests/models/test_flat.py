"""A network whose parameters are one vector."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ConvNetSpec, flat
from stillhouse.models.flat import FlatNetwork


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return ConvNetSpec(width=4, depth=2).build(Facts(inputs={"pixel_values": (1, 8, 8)}, num_classes=3))


def test_examples() -> None:
    assert doctest.testmod(flat).failed == 0


def test_a_call_is_the_networks_own_and_leaves_it_alone(network: nn.Module) -> None:
    net, x = FlatNetwork(network), torch.randn(2, 1, 8, 8)
    own = net.weights()
    torch.testing.assert_close(net.logits(own, {"pixel_values": x}), network(x))
    other = own + 1
    assert not torch.allclose(net.logits(other, {"pixel_values": x}), network(x))
    assert torch.equal(net.weights(), own)
    net.load(other)
    assert torch.equal(net.weights(), other)
    assert own.data_ptr() != next(network.parameters()).data_ptr(), "a copy, not the live weights"


def test_gradients_reach_the_vector_and_not_the_network(network: nn.Module) -> None:
    net = FlatNetwork(network)
    theta = net.weights().requires_grad_()
    net.logits(theta, {"pixel_values": torch.randn(2, 1, 8, 8)}).square().sum().backward()
    assert theta.grad is not None
    assert theta.grad.abs().max() > 0
    assert all(p.grad is None for p in network.parameters())


def test_running_statistics_and_no_parameters_are_refused() -> None:
    with pytest.raises(UserError, match=r"'1' \(BatchNorm2d\) keeps running statistics"):
        FlatNetwork(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    with pytest.raises(UserError, match="has no parameters"):
        FlatNetwork(nn.ReLU())
