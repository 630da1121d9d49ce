"""Knowledge review: shapes, the gates, which layers see which, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import hierarchical_context
from stillhouse.modules.fusion import AttentionFusion, ReviewFusion

STUDENT = [(4, 16, 16), (6, 8, 8), (8, 4, 4), (8,)]
TEACHER = [(5, 16, 16), (7, 8, 8), (9, 8, 8), (12,)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def features(batch: int = 3) -> list[torch.Tensor]:
    return [torch.randn(batch, *shape, requires_grad=True) for shape in STUDENT]


def test_layers_come_out_in_the_teachers_shapes():
    review = ReviewFusion(STUDENT, TEACHER)
    fused = review(features())
    assert [tuple(layer.shape[1:]) for layer in fused] == [(5, 16, 16), (7, 8, 8), (9, 8, 8), (12, 1, 1)]
    assert sum(hierarchical_context(a, torch.zeros_like(a)) for a in fused) > 0
    assert [fusion.gates is not None for fusion in review.fusions] == [True, True, True, False]
    assert review.fusions[0].reduce[0].out_channels == 8, "the channels of the student's last layer"
    assert ReviewFusion([(1024, 2, 2)], [(4, 2, 2)]).fusions[0].reduce[0].out_channels == 512


def test_a_layer_sees_itself_and_all_above_it():
    review, given = ReviewFusion(STUDENT, TEACHER).eval(), features()
    for at, layer in enumerate(review(given)):
        gradients = torch.autograd.grad(layer.sum(), given, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in gradients] == [False] * at + [True] * (4 - at)


def test_tokens_and_non_square_maps():
    review = ReviewFusion([(9, 6), (4, 8)], [(3, 6, 4), (5, 2, 3)])
    fused = review([torch.randn(2, 9, 6), torch.randn(2, 4, 8)])
    assert [tuple(layer.shape[1:]) for layer in fused] == [(3, 6, 4), (5, 2, 3)]


def test_gates_weigh_the_two_at_each_position():
    fusion = AttentionFusion(3, 4, 5, (4, 4), fuses=True).eval()
    x, above = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 2, 2)
    reduced = fusion.reduce(x)
    large = above.repeat_interleave(2, 2).repeat_interleave(2, 3)
    gates = fusion.gates(torch.cat([reduced, large], 1))
    expected = reduced * gates[:, [0]] + large * gates[:, [1]]
    out, passed = fusion(x, above)
    torch.testing.assert_close(passed, expected)
    torch.testing.assert_close(out, fusion.expand(expected))


def test_layers_that_are_not_pairs_are_refused():
    with pytest.raises(UserError, match="4 of the student and 3 of the teacher"):
        ReviewFusion(STUDENT, TEACHER[:3])
    with pytest.raises(UserError, match="made for 4 layers, not 3"):
        ReviewFusion(STUDENT, TEACHER)(features()[:3])
