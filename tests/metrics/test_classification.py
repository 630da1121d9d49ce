"""Classification metrics: closed forms, equality with scikit-learn, one pass without synchronisation."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score, top_k_accuracy_score

from stillhouse.data import Batch
from stillhouse.errors import UserError
from stillhouse.metrics import (
    accuracy,
    agreement,
    classification,
    expected_calibration_error,
    mean_total_variation,
    negative_log_likelihood,
    roc_auc,
    topk_accuracy,
)

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(200, 12, generator=GENERATOR)
LABELS = torch.randint(12, (200,), generator=GENERATOR)


def batches(logits, labels, size=64):
    parts = zip(logits.split(size), labels.split(size), strict=True)
    return [Batch(features=part, labels=label) for part, label in parts]


def measure(logits, labels, **options):
    return classification(lambda batch: batch["features"], batches(logits, labels), **options)


def test_equal_to_scikit_learn():
    probabilities = LOGITS.double().softmax(-1).numpy()
    assert accuracy(LOGITS, LABELS).item() == pytest.approx(accuracy_score(LABELS, LOGITS.argmax(1)), abs=1e-12)
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(LABELS, probabilities, k=k, labels=range(12))
        assert topk_accuracy(LOGITS, LABELS, k).item() == pytest.approx(expected, abs=1e-12)
    expected = log_loss(LABELS, probabilities, labels=range(12))
    assert negative_log_likelihood(LOGITS, LABELS).item() == pytest.approx(expected, abs=1e-9)


def test_top_k_over_fewer_classes_is_one():
    assert topk_accuracy(LOGITS, LABELS, 12).item() == topk_accuracy(LOGITS, LABELS, 99).item() == 1


def test_the_likelihood_of_ignorance_is_the_log_of_the_number_of_classes():
    assert negative_log_likelihood(torch.zeros(4, 7), LABELS[:4] % 7).item() == pytest.approx(math.log(7), abs=1e-12)


def test_calibration_by_the_definition():
    probabilities = LOGITS.double().softmax(-1)
    confidence, predicted = (values.numpy() for values in probabilities.max(-1))
    correct = predicted == LABELS.numpy()
    expected, edges = 0.0, np.linspace(0, 1, 11)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(LOGITS, LABELS, bins=10).item() == pytest.approx(expected, abs=1e-12)


def test_calibration_is_zero_where_confidence_is_the_accuracy_and_one_where_all_is_wrong():
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64).repeat(4, 1)
    assert expected_calibration_error(logits, torch.tensor([0, 0, 0, 1])).item() == pytest.approx(0, abs=1e-12)
    sure = torch.tensor([[1000.0, 0.0]]).repeat(3, 1)
    assert expected_calibration_error(sure, torch.ones(3, dtype=torch.long)).item() == 1
    assert expected_calibration_error(sure, torch.zeros(3, dtype=torch.long)).item() == 0


def test_a_bin_contains_its_upper_edge():
    # One right guess at confidence 1/2 and one wrong at 3/4: two bins keep the gaps of +1/2 and -3/4 apart.
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    assert expected_calibration_error(logits, torch.tensor([0, 1]), bins=2).item() == pytest.approx(0.625, abs=1e-12)


def test_one_bin_is_the_gap_of_the_means():
    confidence = LOGITS.double().softmax(-1).amax(-1).mean()
    expected = abs(accuracy(LOGITS, LABELS) - confidence).item()
    assert expected_calibration_error(LOGITS, LABELS, bins=1).item() == pytest.approx(expected, abs=1e-12)


def test_agreement_and_total_variation_of_a_model_with_itself():
    assert agreement(LOGITS, LOGITS).item() == 1
    assert mean_total_variation(LOGITS, LOGITS).item() == 0
    assert mean_total_variation(LOGITS, LOGITS + 5).item() == pytest.approx(0, abs=1e-7)


def test_total_variation_closed_forms():
    apart = torch.tensor([[1000.0, 0.0]])
    assert mean_total_variation(apart, apart.flip(1)).item() == 1
    half = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -1000.0, -1000.0]])
    assert mean_total_variation(*half).item() == pytest.approx(0.5, abs=1e-12)
    other = LOGITS.roll(1, 0)
    assert mean_total_variation(LOGITS, other) == mean_total_variation(other, LOGITS)


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_batches_do_not_matter(size):
    found = classification(lambda batch: batch["features"], batches(LOGITS, LABELS, size))
    assert found == pytest.approx(
        {
            "accuracy": accuracy(LOGITS, LABELS).item(),
            "nll": negative_log_likelihood(LOGITS, LABELS).item(),
            "ece": expected_calibration_error(LOGITS, LABELS).item(),
            "top5": topk_accuracy(LOGITS, LABELS).item(),
        },
        abs=1e-12,
    )


def test_top_five_only_with_more_than_ten_classes():
    assert "top5" in measure(LOGITS[:, :11], LABELS % 11)
    assert "top5" not in measure(LOGITS[:, :10], LABELS % 10)


def test_missing_labels_are_left_out():
    labels = LABELS.clone()
    labels[::3] = -100
    known = labels >= 0
    assert measure(LOGITS, labels) == pytest.approx(measure(LOGITS[known], labels[known]), abs=1e-12)


def test_what_a_model_says_of_unlabelled_samples_does_not_matter():
    logits, labels = LOGITS.clone(), LABELS.clone()
    labels[::3] = -1
    logits[::3] = torch.nan
    known = labels >= 0
    assert measure(logits, labels) == pytest.approx(measure(LOGITS[known], LABELS[known]), abs=1e-12)


def test_a_model_that_diverged_shows_it():
    logits = LOGITS.clone()
    logits[0] = torch.nan
    assert math.isnan(measure(logits, LABELS)["nll"])


def test_soft_labels_count_by_their_largest_entry():
    soft = torch.nn.functional.one_hot(LABELS, 12).float() * 0.8 + 0.01
    assert measure(LOGITS, soft) == measure(LOGITS, LABELS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_measured_in_double(dtype):
    logits = LOGITS.to(dtype)
    assert measure(logits, LABELS) == pytest.approx(measure(logits.double(), LABELS), abs=1e-12)


def test_no_gradients_and_no_logits_are_kept():
    weights = torch.ones(12, requires_grad=True)
    seen = []

    def predict(batch):
        logits = batch["features"] * weights
        seen.append(logits.requires_grad)
        return logits

    classification(predict, batches(LOGITS, LABELS))
    assert seen == [False] * 4


def test_the_device_is_waited_for_once(monkeypatch):
    asked = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, _name=name, _original=original, **kwargs):
            asked.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)
    measure(LOGITS, LABELS)
    assert asked == ["tolist"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: accuracy(LOGITS, LABELS[:3]),
            "Logits of shape (200, 12) and labels of shape (3,) do not belong together",
        ),
        (lambda: accuracy(LOGITS[0], LABELS[:1]), "Logits of shape (12,) and labels of shape (1,) do not belong"),
        (lambda: accuracy(LOGITS[:0], LABELS[:0]), "There is nothing to measure: the logits have the shape (0, 12)."),
        (lambda: topk_accuracy(LOGITS, LABELS, 0), "A top-k accuracy needs a k of at least 1, not 0."),
        (lambda: expected_calibration_error(LOGITS, LABELS, 0), "needs at least one bin, not 0."),
        (lambda: agreement(LOGITS, LOGITS[:, 1:]), "have the shapes (200, 12) and (200, 11); they must be equal."),
        (lambda: mean_total_variation(LOGITS[:0], LOGITS[:0]), "There is nothing to measure"),
        (lambda: classification(lambda batch: batch, []), "no sample in these batches has a label."),
        (lambda: measure(LOGITS, torch.full_like(LABELS, -100)), "no sample in these batches has a label."),
        (lambda: measure(LOGITS[:, :, None], LABELS), "do not belong together"),
    ],
    ids=range(10),
)
def test_one_sentence_for_what_is_wrong(call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)


def test_a_model_for_other_classes_is_named_as_such():
    with pytest.raises(UserError, match="1 labels are of classes beyond the 7 of these predictions"):
        classification(lambda batch: torch.zeros(2, 7), [{"labels": torch.tensor([0, 9])}])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_area_under_the_curve_is_sklearns_with_ties(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(-2, 3, (60, classes), generator=generator).double()
    labels = torch.randint(classes, (60,), generator=generator)
    scores = logits.log_softmax(-1) if classes > 2 else (logits[:, 1:] - logits[:, :1])
    each = range(classes) if classes > 2 else [1]
    expected = [roc_auc_score(labels == c, column) for c, column in zip(each, scores.T, strict=True)]
    assert roc_auc(logits, labels).item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_the_area_under_the_curve_needs_samples_of_both_kinds():
    with pytest.raises(UserError, match="needs samples of class 1 and of others"):
        roc_auc(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
