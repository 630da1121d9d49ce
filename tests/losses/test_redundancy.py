"""Barlow Twins' terms equal the published formula and a correlation matrix; collapse and decorrelation have their values."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stillhouse.errors import UserError
from stillhouse.losses.redundancy import barlow_twins, cross_correlation


def views(count=40, width=5):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return first, first + 0.5 * torch.randn(count, width, generator=generator, dtype=torch.float64)


def test_the_cross_correlation_is_numpys():
    first, second = views()
    found = cross_correlation(first, second, eps=0.0)
    wanted = np.corrcoef(first.T.numpy(), second.T.numpy())[:5, 5:]
    torch.testing.assert_close(found, torch.from_numpy(wanted))


def test_the_terms_are_those_of_the_published_code():
    first, second = views()
    norm = torch.nn.BatchNorm1d(5, affine=False).double()
    c = norm(first).T @ norm(second) / len(first)
    on = torch.diagonal(c).add(-1).pow(2).sum()
    off = c.flatten()[:-1].view(4, 6)[:, 1:].flatten().pow(2).sum()
    torch.testing.assert_close(barlow_twins(first, second), (on, off))


def test_scale_and_shift_of_a_component_change_nothing_and_order_of_samples_neither():
    first, second = views(200)
    plain = torch.stack(barlow_twins(first, second))
    changed = torch.stack(barlow_twins(3 * first + 7, 0.5 * second - 2))
    torch.testing.assert_close(changed, plain, rtol=1e-4, atol=1e-4)
    order = torch.randperm(200)
    torch.testing.assert_close(torch.stack(barlow_twins(first[order], second[order])), plain)


def test_equal_views_have_no_invariance_term_and_a_collapsed_one_costs_every_component():
    first, _ = views()
    assert barlow_twins(first, first)[0] < 1e-8
    invariance, redundancy = barlow_twins(torch.ones(8, 5), torch.ones(8, 5))
    assert (invariance.item(), redundancy.item()) == (5.0, 0.0)
    copied = first[:, :1].expand(-1, 5)
    assert barlow_twins(copied, copied)[1].item() == pytest.approx(20, rel=1e-4)


def test_half_precision_is_computed_in_single():
    first, second = (side.bfloat16() for side in views())
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_correlation(first, second)
    assert found.dtype == torch.float32
    a, b = (F.batch_norm(side.float(), None, None, training=True) for side in (first, second))
    torch.testing.assert_close(found, a.T @ b / 40)


@pytest.mark.parametrize("sides", [((4, 3), (4, 2)), ((1, 3), (1, 3)), ((4, 3, 2), (4, 3, 2))])
def test_what_has_no_correlation_is_refused(sides):
    with pytest.raises(UserError, match="both sides are"):
        cross_correlation(*(torch.randn(*shape) for shape in sides))
