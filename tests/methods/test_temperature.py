"""Temperatures as a field: a number, a schedule, each sample's own deviation, for every method on logits."""

import pytest
import torch

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Ramp, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.losses import kl
from stillhouse.losses.logit_matching import standardize
from stillhouse.methods.temperature import softened
from stillhouse.methods.wiring import Outputs, Pair
from stillhouse.registry import method_class

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [8, 8]}, "epochs": 1}
SMALL = {"data": "digits", "teacher": TEACHER, "student": {"kind": "cnn", "channels": [4, 4]}, "epochs": 1}
FALLING = {"start": 4.0, "end": 2.0}
TERMS = {"kd": ["soft"], "dkd": ["target", "non_target"], "dist": ["inter", "intra"], "mixkd": ["kd"], "trg": ["kd"]}


@pytest.fixture
def valued(tmp_path):
    """The terms of a method that read logits alone, at step 5 of 10."""
    run = Run(method_class("kd")(data="digits"), RunDirectory(tmp_path / "run"), data=load_data("digits"))
    rows = []
    run.log = rows.append
    run.enter("student", 5, 10)
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(16, 10, dtype=torch.float64), 3 * torch.randn(16, 10, dtype=torch.float64)
    batch = run.data.split("train").batch(range(16))

    def value(name, student=student, teacher=teacher, **fields):
        method = method_class(name)(**fields)
        pair = Pair(Outputs(student), lambda: Outputs(teacher), batch, None, {}, None, None)
        terms = method.terms(pair, run)
        return torch.stack([terms[term]() for term in TERMS[name]])

    value.student, value.teacher, value.run, value.rows = student, teacher, run, rows
    return value


@pytest.mark.parametrize("name", TERMS)
def test_a_schedule_is_the_number_that_it_is_at(name, valued):
    moving = valued(name, temperature=FALLING)
    torch.testing.assert_close(moving, valued(name, temperature=3.0), rtol=0, atol=0)
    assert not torch.equal(moving, valued(name, temperature=4.0))


@pytest.mark.parametrize("name", TERMS)
def test_each_samples_own_leaves_scale_and_shift_of_its_logits_free(name, valued):
    own = valued(name, temperature="std")
    sides = {"student": standardize(valued.student), "teacher": standardize(valued.teacher)}
    torch.testing.assert_close(own, valued(name, temperature=1.0, **sides))
    factors = torch.rand(16, 1, dtype=torch.float64) + 0.5
    moved = {"student": factors * valued.student + 3, "teacher": valued.teacher / factors - 1}
    torch.testing.assert_close(own, valued(name, temperature="std", **moved), rtol=1e-5, atol=1e-8)


def test_what_a_loss_is_given(valued):
    student, teacher, run = valued.student, valued.teacher, valued.run
    assert softened(student, teacher, 4.0, run)[2] == 4.0
    assert softened(student, teacher, Ramp(start=4.0, end=2.0), run)[2] == 3.0
    mine, theirs, number = softened(student, teacher, "std", run)
    assert number == 1.0
    deviations = student.std(-1, keepdim=True), teacher.std(-1, keepdim=True)
    expected = kl(student / deviations[0], teacher / deviations[1], scale_by_temperature_squared=False)
    torch.testing.assert_close(kl(mine, theirs, number), expected)


def test_samples_without_a_deviation_are_counted(valued):
    valued.run.enter("student", 9, 10)
    student = valued.student.clone()
    student[:3] = 1.0
    softened(student, valued.teacher, "std", valued.run)
    assert valued.rows == [{"stage": "student", "step": 10, "std/constant": 3.0}]


@pytest.mark.parametrize("name", ["kd", "ema-teacher"])
@pytest.mark.parametrize("temperature", [FALLING, "std"])
def test_runs_with_it(name, temperature):
    cls = method_class(name)
    fields = SMALL if "student" in cls.model_fields else {"data": "digits", "model": SMALL["student"], "epochs": 1}
    more = {"compare_alone": False} if "compare_alone" in cls.model_fields else {}
    result = sh.distil(name, **fields, **more, temperature=temperature, settings={"threads": 1})
    assert 0 < result.metrics["test/accuracy"] <= 1


@pytest.mark.parametrize("name", [*TERMS, "ema-teacher"])
@pytest.mark.parametrize("bad", [0, -1.0, True, "sdt", {"start": 4.0, "end": 0.0}])
def test_others_are_refused_in_a_sentence(name, bad):
    with pytest.raises(UserError, match="temperature"):
        sh.distil(name, temperature=bad)
