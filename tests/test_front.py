"""The front door: what people pass in Python, and the sentences they get back."""

import pytest
import torch
from torch import nn

import stillhouse as sh
from stillhouse.errors import NonFiniteError, UserError

GOOD = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
BRIEF = {"data": "digits", "epochs": 0.1, "compare_alone": False, "cache": False}


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_model_that_cannot_read_the_data_is_named_before_anything_is_trained(side):
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(100, 10))
    with pytest.raises(UserError) as caught:
        sh.distil("kd", **{"teacher": GOOD, "student": GOOD, side: wrong}, **BRIEF)
    assert str(caught.value) == (
        f"{side}: Sequential cannot read pixel_values of 1x8x8 of this data: its layer '1' (Linear) takes 100 features and "
        "was given 64."
    )


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 1)),
            "student: Sequential gives 1 outputs, and the data has 10 classes",
        ),
        (nn.Conv2d(1, 10, 3), "student: Conv2d gives 10x6x6 outputs, and the data has 10 classes"),
    ],
)
def test_a_student_answers_in_the_classes_of_the_data(student, said):
    with pytest.raises(UserError, match=said):
        sh.distil("kd", teacher=GOOD, student=student, **BRIEF)


def test_a_regressor_gives_one_number():
    x = torch.randn(200, 4)
    with pytest.raises(UserError, match=r"Linear gives \(2,\) numbers a sample, and the data has 1 to predict"):
        sh.distil("supervised", data=(x, x[:, 0] + 0.1), model=nn.Linear(4, 2), epochs=1)


def test_a_model_of_the_callers_needs_data_of_the_callers():
    with pytest.raises(UserError, match=r"student is a model of yours and there is no data for it; pass data="):
        sh.distil("kd", student=torch.nn.Linear(4, 2))


def test_one_class_is_nothing_to_learn():
    x, y = torch.randn(60, 4), torch.zeros(60, dtype=torch.long)
    with pytest.raises(UserError, match="one class, so there is nothing to learn"):
        sh.distil("supervised", model=torch.nn.Linear(4, 2), data=(x, y), epochs=1)


def test_a_missing_number_is_named_by_its_place():
    x, y = torch.randn(600, 4), torch.arange(600) % 2
    x[::7, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"and so is '.*' of sample"):
        sh.distil("supervised", model=torch.nn.Linear(4, 2), data=(x, y), epochs=1)


def test_a_student_that_learned_nothing_is_said_to_be_under_trained():
    torch.manual_seed(0)
    x = torch.randn(600, 4)
    y = (x[:, 0] > 0).long()
    with pytest.warns(UserWarning, match="the student is under-trained"):
        result = sh.distil(
            "kd",
            teacher=Sure(),
            student=torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)),
            data=(x, y),
            optimizer={"name": "sgd", "lr": 1e-9},
            epochs=1,
            settings={"device": "cpu", "threads": 1},
        )
    assert not any("distillation changed" in note for note in result.notes)


class Sure(torch.nn.Module):
    """A teacher that knows the rule."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        return torch.stack([-self.scale * x[:, 0], self.scale * x[:, 0]], -1)
