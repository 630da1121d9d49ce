"""The front door: what people pass in Python, and the sentences they get back."""

import pytest
import torch
from torch import nn

import stillhouse as sh
from stillhouse.errors import UserError

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
