"""Joint labels of class and view: the layout, the loss, what views say together, and who gets a gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses import cross_entropy
from stillhouse.losses.joint_labels import (
    aggregation_distillation,
    first_view_logits,
    joint_cross_entropy,
    joint_labels,
    matched_logits,
)

BATCH, CLASSES, VIEWS = 3, 5, 4
LABELS = torch.tensor([4, 0, 2])


def logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH * VIEWS, CLASSES * VIEWS, generator=generator, dtype=torch.float64)


def test_layout_goes_there_and_back():
    labels = joint_labels(LABELS, VIEWS)
    assert (labels // VIEWS).tolist() == [4] * 4 + [0] * 4 + [2] * 4
    assert (labels % VIEWS).tolist() == [0, 1, 2, 3] * 3


def test_loss_is_the_mean_over_rows_of_all_joint_classes():
    joint = logits()
    rows = [F.cross_entropy(joint[b * VIEWS + j], LABELS[b] * VIEWS + j) for b in range(BATCH) for j in range(VIEWS)]
    torch.testing.assert_close(joint_cross_entropy(joint, LABELS, VIEWS), torch.stack(rows).mean())
    large = joint_cross_entropy(joint, LABELS, VIEWS, reduction="sum")
    assert large == VIEWS * joint_cross_entropy(joint, LABELS, VIEWS)


def test_aggregation_is_a_double_loop():
    joint, found = logits(), matched_logits(logits(), VIEWS)
    for b in range(BATCH):
        for i in range(CLASSES):
            expected = sum(joint[b * VIEWS + j, i * VIEWS + j] for j in range(VIEWS)) / VIEWS
            torch.testing.assert_close(found[b, i], expected)
    torch.testing.assert_close(matched_logits(joint.bfloat16(), VIEWS), matched_logits(joint.bfloat16().float(), VIEWS))


def test_single_view_is_the_conditional_of_view_zero():
    joint = logits()
    found = first_view_logits(joint, VIEWS).softmax(-1)
    whole = joint.softmax(-1).view(BATCH, VIEWS, CLASSES, VIEWS)[:, 0, :, 0]
    torch.testing.assert_close(found, whole / whole.sum(-1, keepdim=True))


def test_one_view_is_the_plain_classifier():
    plain = logits()[:, :CLASSES]
    labels = torch.arange(len(plain)) % CLASSES
    assert torch.equal(joint_cross_entropy(plain, labels, 1), cross_entropy(plain, labels))
    assert torch.equal(matched_logits(plain, 1), plain)
    assert torch.equal(first_view_logits(plain, 1), plain)


def test_equal_blocks_and_an_invariant_network_make_both_inferences_equal():
    same = torch.randn(BATCH, CLASSES).repeat_interleave(VIEWS, 0).repeat_interleave(VIEWS, 1)
    torch.testing.assert_close(matched_logits(same, VIEWS), first_view_logits(same, VIEWS))


def test_distillation_teaches_the_single_head_alone():
    joint, single = logits().requires_grad_(), torch.randn(BATCH, CLASSES, dtype=torch.float64, requires_grad=True)
    loss = aggregation_distillation(single, joint, VIEWS, 2.0)
    target = (matched_logits(joint, VIEWS) / 2).softmax(-1)
    expected = 4 * F.kl_div((single / 2).log_softmax(-1), target, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    of_single, of_joint = torch.autograd.grad(loss, (single, joint), allow_unused=True)
    assert of_joint is None
    assert of_single.abs().max() > 1e-3


def test_bad_input_is_told_in_a_sentence():
    with pytest.raises(UserError, match="num_views is at least 1, not 0"):
        joint_labels(LABELS, 0)
    with pytest.raises(UserError, match="one class index per image"):
        joint_labels(torch.rand(3, 5), VIEWS)
    with pytest.raises(UserError, match=r"classes x 3\), which the shape \(12, 20\) is not"):
        matched_logits(logits(), 3)
    with pytest.raises(UserError, match="12 rows are 3 images of 4 views, but there are 2 labels"):
        joint_cross_entropy(logits(), LABELS[:2], VIEWS)
    with pytest.raises(UserError, match="'mean' or 'sum' over views"):
        joint_cross_entropy(logits(), LABELS, VIEWS, reduction="none")
    with pytest.raises(UserError, match=r"0 to 19"):
        joint_cross_entropy(logits(), LABELS + 3, VIEWS)
