"""A network that cannot read its inputs says in one sentence what it takes and what it was given."""

import pytest
import torch
from torch import nn

from stillhouse.data import Batch
from stillhouse.errors import UserError
from stillhouse.models import MisfitError, logits

IMAGES = Batch(pixel_values=torch.zeros(2, 1, 8, 8))
ROWS = Batch(features=torch.zeros(2, 10))
IDS = Batch(input_ids=torch.full((2, 7), 30))


class Views(nn.Module):
    def forward(self, x):
        return x.view(-1, 100)


class Buggy(nn.Module):
    def forward(self, x):
        raise RuntimeError("the printer is on fire")


class Gone(nn.Module):
    def forward(self, x):
        return self.missing(x)


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.mark.parametrize(
    ("module", "batch", "said"),
    [
        (flat(nn.Linear(100, 10)), IMAGES, "layer '1' (Linear) takes 100 features and was given 64."),
        (
            nn.Linear(64, 10),
            IMAGES,
            "Linear cannot read pixel_values of 1x8x8 of this data: it takes 64 features and was given 8.",
        ),
        (nn.Conv2d(3, 8, 3), IMAGES, "it takes 3 channels and was given 1."),
        (nn.Conv2d(3, 8, 3), ROWS, "it takes inputs of 3 dimensions (channels first) and was given 1."),
        (nn.BatchNorm1d(5), ROWS, "it takes 5 channels and was given 10."),
        (nn.LayerNorm(5), ROWS, "it takes (5,) and was given (10,)."),
        (nn.Embedding(20, 4), IDS, "it knows ids from 0 to 19 and was given 30."),
        (nn.Embedding(20, 4), ROWS, "it takes whole numbers (ids) and was given floats."),
        (nn.Linear(7, 2), IDS, "it takes floats and was given whole numbers; ids need an embedding first."),
        (flat(nn.Linear(10, 2)).double(), ROWS, "has weights of float64 and was given float32; bring the model to"),
        (
            Views(),
            IMAGES,
            "Views cannot read pixel_values of 1x8x8 of this data: shape '[-1, 100]' is invalid for input of",
        ),
    ],
)
def test_one_sentence(module, batch, said):
    with pytest.raises(MisfitError) as caught:
        logits(module, batch)
    assert said in str(caught.value)
    assert isinstance(caught.value, UserError)
    assert caught.value.__cause__ is not None


def test_several_inputs_are_all_named():
    class Two(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids.float() @ attention_mask.float()

    with pytest.raises(MisfitError, match="input_ids of size 7 and attention_mask of size 7"):
        logits(Two(), Batch(input_ids=torch.ones(2, 7), attention_mask=torch.ones(2, 7)))


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="on fire"):
        logits(Buggy(), ROWS)
    with pytest.raises(AttributeError, match="missing"):
        logits(Gone(), ROWS)
