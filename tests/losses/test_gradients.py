"""Distances of gradients: the published loops written out, what they ignore, and what is refused."""

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.losses.gradients import gradient_matching


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3, 3, 3), (4,), (4,), (2, 16), (2,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_layers_is_one_minus_the_cosine_of_each_output_node_of_each_weight():
    ours, theirs = gradients(0), gradients(1)
    expected = 0.0
    for a, b in ((ours[0], theirs[0]), (ours[3], theirs[3])):
        for node in range(len(a)):
            x, y = a[node].flatten(), b[node].flatten()
            expected += 1 - (x @ y) / (x.norm() * y.norm() + 1e-6)
    torch.testing.assert_close(gradient_matching(ours, theirs), expected)
    changed = [part + 1 if part.ndim == 1 else part for part in ours]
    assert torch.equal(gradient_matching(changed, theirs), gradient_matching(ours, theirs)), "biases do not count"
    scaled = [part * 7 for part in ours]
    torch.testing.assert_close(gradient_matching(scaled, theirs), gradient_matching(ours, theirs), rtol=1e-6, atol=0)


def test_the_whole_gradient_by_its_square_and_its_cosine():
    ours, theirs = gradients(0), gradients(1)
    x, y = (torch.cat([part.flatten() for part in parts]) for parts in (ours, theirs))
    torch.testing.assert_close(gradient_matching(ours, theirs, "mse"), ((x - y) ** 2).sum())
    torch.testing.assert_close(gradient_matching(ours, theirs, "cosine"), 1 - x @ y / (x.norm() * y.norm() + 1e-6))
    assert gradient_matching(ours, ours, "mse") == 0
    for distance in ("layers", "cosine"):
        assert gradient_matching(ours, ours, distance) < 1e-6


def test_gradients_of_different_networks_and_of_none_are_refused():
    ours = gradients(0)
    with pytest.raises(UserError, match="of different parameters"):
        gradient_matching(ours, ours[:-1])
    with pytest.raises(UserError, match="needs a weight with two dimensions"):
        gradient_matching(ours[1:3], ours[1:3])
