"""Accuracy by the size of the class in training."""

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.metrics import shot_accuracy


def test_groups_are_by_training_samples_and_empty_ones_are_left_out():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, -1])
    logits = torch.eye(3)[[0, 0, 0, 1, 1, 0, 2, 2, 2]]
    batches = [{"labels": labels[:5], "logits": logits[:5]}, {"labels": labels[5:], "logits": logits[5:]}]

    def measured(counts):
        return shot_accuracy(lambda batch: batch["logits"], batches, torch.tensor(counts))

    assert measured([101, 100, 19]) == pytest.approx({"many": 0.75, "medium": 0.5, "few": 1.0, "balanced": 0.75})
    assert measured([101, 200, 300]) == pytest.approx({"many": 0.75, "balanced": 0.75})
    assert measured([20, 19, 0]) == pytest.approx({"medium": 0.75, "few": 0.75, "balanced": 0.75})


def test_bad_groups_and_no_labels_are_refused():
    batch = {"labels": torch.tensor([-1]), "logits": torch.zeros(1, 3)}
    with pytest.raises(UserError, match="fewer than 30 samples cannot be few"):
        shot_accuracy(lambda b: b["logits"], [batch], torch.ones(3), many=20, few=30)
    with pytest.raises(UserError, match="no sample in these batches has a label"):
        shot_accuracy(lambda b: b["logits"], [batch], torch.ones(3))
