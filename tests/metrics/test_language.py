"""Measures of positions: those of a classifier on the labelled ones, whatever the batches."""

import math

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.metrics import (
    agreement,
    classification,
    language,
    mean_total_variation,
    token_agreement,
    token_prediction,
)

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(9, 5, 7, generator=GENERATOR)
OTHERS = torch.randn(9, 5, 7, generator=GENERATOR)
LABELS = torch.randint(0, 7, (9, 5), generator=GENERATOR)
LABELS[torch.rand(9, 5, generator=GENERATOR) < 0.4] = -100
COUNTED = LABELS >= 0


def parts(size, *tensors):
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize("elements", [1, 30, 2**24])
def test_positions_are_measured_like_samples(size, elements, monkeypatch):
    monkeypatch.setattr(language, "_ELEMENTS", elements)
    rows = classification(lambda batch: LOGITS[COUNTED], [{"labels": LABELS[COUNTED]}])
    found = token_prediction(lambda part: part, parts(size, LOGITS, LABELS))
    assert found["accuracy"] == rows["accuracy"]
    assert found["nll"] == pytest.approx(rows["nll"], abs=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(rows["nll"]), abs=1e-12)
    alike = token_agreement(lambda part: part, parts(size, LOGITS, OTHERS, LABELS))
    assert alike["agreement"] == pytest.approx(float(agreement(LOGITS[COUNTED], OTHERS[COUNTED])), abs=1e-12)
    varied = float(mean_total_variation(LOGITS[COUNTED], OTHERS[COUNTED]))
    assert alike["mean_total_variation"] == pytest.approx(varied, abs=1e-12)


def test_what_does_not_count_is_never_looked_at():
    spoilt = LOGITS.masked_fill(~COUNTED[..., None], math.nan)
    clean = token_prediction(lambda part: part, parts(9, LOGITS, LABELS))
    assert token_prediction(lambda part: part, parts(9, spoilt, LABELS)) == clean
    alike = token_agreement(lambda part: part, parts(9, spoilt, spoilt, LABELS))
    assert alike == {"agreement": 1.0, "mean_total_variation": 0.0}


def test_a_hopeless_model_has_an_infinite_perplexity():
    found = token_prediction(lambda part: part, [(torch.tensor([[[0.0, 2000.0]]]), torch.tensor([[0]]))])
    assert found == {"accuracy": 0.0, "nll": 2000.0, "perplexity": math.inf}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_prediction(lambda part: part, []), "no position in these batches has a label."),
        (lambda: token_prediction(lambda part: part, [(LOGITS, LABELS * 0 - 100)]), "no position in these batches has"),
        (
            lambda: token_prediction(lambda part: part, [(LOGITS, LABELS[:, 1:])]),
            "(9, 5, 7) and labels of shape (9, 4)",
        ),
        (lambda: token_agreement(lambda part: part, [(LOGITS, LOGITS[..., 1:], LABELS)]), "(9, 5, 7) and (9, 5, 6)"),
        (lambda: token_agreement(lambda part: part, []), "no position in these batches has a label."),
    ],
    ids=range(5),
)
def test_one_sentence_for_what_is_wrong(call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
