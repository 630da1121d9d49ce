"""Batch norms that follow the batch while nothing else of the network moves."""

import doctest

import pytest
import torch
from torch import nn

from stillhouse.models import BatchStatistics, batch_norm, batch_norms, fingerprint


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(36, 3),
        nn.BatchNorm1d(3),
    )
    with torch.no_grad():
        for norm in batch_norms(net):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
    return net.eval().requires_grad_(False)


def test_outputs_are_those_of_the_batchs_statistics_and_buffers_stay():
    net, x = network(), torch.randn(8, 2, 5, 5)
    before, plain = fingerprint(net), net(x)
    with BatchStatistics(net) as switched:
        seen = net(x)
        assert switched.count == 2
        again = net(x)
    by_hand = nn.Sequential(*net[:1])(x)
    by_hand = nn.functional.batch_norm(by_hand, None, None, net[1].weight, net[1].bias, training=True)
    by_hand = nn.functional.linear(by_hand.relu().flatten(1), net[5].weight, net[5].bias)
    by_hand = nn.functional.batch_norm(by_hand, None, None, net[6].weight, net[6].bias, training=True)
    torch.testing.assert_close(seen, by_hand)
    assert torch.equal(seen, again), "dropout stays off"
    assert not torch.allclose(seen, plain)
    assert fingerprint(net) == before
    assert torch.equal(net(x), plain), "closed, it is as it was"
    assert not any(module.training or module._forward_hooks for module in net.modules())


def test_a_sample_depends_on_its_mates_only_while_open():
    net, x = network(), torch.randn(8, 2, 5, 5)
    assert torch.allclose(net(x)[:4], net(x[:4]), atol=1e-6)
    with BatchStatistics(net):
        assert not torch.allclose(net(x)[:4], net(x[:4]), atol=1e-3)


def test_norms_come_back_as_they_were_also_after_an_error():
    net = network()
    net[1].track_running_stats = True
    with BatchStatistics(net), pytest.raises(RuntimeError):
        net(torch.randn(2, 3, 5, 5))
    with BatchStatistics(net), pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 2, 5, 5))
    assert all(norm.track_running_stats and not norm.training for norm in batch_norms(net))


def test_gradients_of_other_modules_flow_through_it():
    net, x = network(), torch.randn(4, 2, 5, 5, requires_grad=True)
    with BatchStatistics(net):
        net(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_a_network_without_batch_norms():
    with BatchStatistics(nn.Linear(2, 2)) as switched:
        assert switched.count == 0


def test_the_examples_run():
    assert doctest.testmod(batch_norm, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
