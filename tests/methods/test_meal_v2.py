"""MEAL V2: the ensemble's target, the discriminator's game, what the student starts from."""

import json

import pytest
import torch
import torch.nn.functional as F

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Optimizer, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.methods.knowledge.meal_v2 import MEALV2
from stillhouse.methods.teacher import PretrainedTeacher
from stillhouse.methods.wiring import Wiring
from stillhouse.models import Adapted, fingerprint

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [8, 8]}, "epochs": 1}
TABLE = {"name": "sgd", "momentum": 0.9, "schedule": "table", "table": [[0, 0, 0.01], [1, 9, 0.001]]}
SMALL = {
    "data": "digits",
    "teacher": [TEACHER, {**TEACHER, "seed": 1}],
    "student": {"kind": "cnn", "channels": [4, 4]},
    "start": {"kind": "trained", "epochs": 1},
    "optimizer": TABLE,
    "epochs": 2,
    "batch_size": 64,
}


@pytest.fixture
def game(tmp_path):
    """The terms of a method with linear networks; the discriminator has the same weights each time."""

    def make(labels=None, order=(0, 1), classes=10, teachers=2, **fields):
        method = MEALV2(**{**SMALL, **fields})
        run = Run(method, RunDirectory(tmp_path / "run"), data=load_data("digits"))
        run.log = lambda row: None
        run.enter("student", 0, 10)
        torch.manual_seed(0)
        nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes)) for _ in range(teachers + 1)]
        named = {f"teacher-{i}": nets[1 + order[i]].eval().requires_grad_(False) for i in range(teachers)}
        torch.manual_seed(5)
        wiring = Wiring(method.objectives, nets[0], named, run)
        batch = run.data.split("train").batch(range(16))
        if labels is not None:
            batch = batch.replace(labels=labels)
        m = Modules({"student": nets[0], **named, **wiring.modules()})
        return m, batch, wiring.terms(m, batch), wiring

    return make


def gradients(term, *modules):
    """Gradients of a term for the parameters of modules, flattened."""
    value = term()
    return [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()), retain_graph=True)])
        for module in modules
    ]


def test_the_target_is_the_mean_of_probabilities_and_not_of_logits(game):
    m, batch, terms, _ = game()
    x = batch["pixel_values"]
    said = [m[f"teacher-{i}"](x) for i in range(2)]
    q = sum(t.softmax(-1) for t in said) / 2
    p = m.student(x)
    torch.testing.assert_close(terms["sim"](), -(q * p.log_softmax(-1)).sum(-1).mean())
    of_logits = (sum(said) / 2).softmax(-1)
    assert (q - of_logits).abs().max() > 1e-3
    torch.testing.assert_close(game(order=(1, 0))[2]["sim"](), terms["sim"]())


def test_with_one_teacher_it_is_kl_and_the_teachers_entropy(game):
    m, batch, terms, _ = game(teachers=1, teacher=TEACHER, adversary="off")
    assert set(terms) == {"ce", "sim"}
    q = m["teacher-0"](batch["pixel_values"]).softmax(-1)
    logits = m.student(batch["pixel_values"])
    entropy = -(q * q.log()).sum(-1).mean()
    kl = F.kl_div(logits.log_softmax(-1), q, reduction="batchmean")
    torch.testing.assert_close(terms["sim"](), kl + entropy)
    s = logits.detach().requires_grad_()
    MEALV2(**SMALL).similarity(s, m["teacher-0"](batch["pixel_values"])).backward()
    torch.testing.assert_close(s.grad, (s.softmax(-1) - q).detach() / 16)


def test_the_reversal_turns_the_students_gradient_and_not_the_discriminators(game):
    m, batch, terms, wiring = game(adversary="reversal")
    d = wiring.parts[0][0]["discriminator"]
    student, own = gradients(terms["adversary"], m.student, d)
    other, _, released, wired = game(adversary="released")
    again = wired.parts[0][0]["discriminator"]
    assert fingerprint(again) == fingerprint(d)
    theirs, their_own = gradients(released["adversary"], other.student, again)
    torch.testing.assert_close(terms["adversary"](), released["adversary"]())
    torch.testing.assert_close(student, -theirs)
    torch.testing.assert_close(own, their_own)
    assert student.abs().max() > 0
    # Student rows are (1, 0), those of the teachers' mean logits (0, 1).
    x = batch["pixel_values"]
    rows = torch.cat([m.student(x), (m["teacher-0"](x) + m["teacher-1"](x)) / 2])
    wanted = torch.tensor([[1.0, 0.0]] * 16 + [[0.0, 1.0]] * 16)
    torch.testing.assert_close(terms["adversary"](), F.binary_cross_entropy_with_logits(d(rows), wanted))


def test_labels_do_not_matter(game, tmp_path):
    plain, hidden = game()[2], game(labels=torch.full((16,), -1))[2]
    assert all(torch.equal(plain[name](), hidden[name]()) for name in ("sim", "adversary"))
    x = torch.randn(160, 6)
    teacher, student = torch.nn.Linear(6, 10), torch.nn.Linear(6, 10)
    runs = []
    for number, labels in enumerate((torch.arange(160) % 10, (torch.arange(160) * 7) % 10)):
        data = dict.fromkeys(("train", "validation", "test"), (x, labels))
        fields = {"data": data, "epochs": 1, "batch_size": 16, "compare_alone": False, "out": tmp_path / str(number)}
        runs.append(sh.distil("meal-v2", teacher=teacher, student=student, optimizer=TABLE, **fields))
    states = [result.student.state_dict() for result in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["weight"], student.weight)


def test_a_run_goes_on_from_the_trained_student_and_ships_it_alone(tmp_path):
    result = sh.distil("meal-v2", **SMALL, out=tmp_path / "run", settings={"log_every": 5, "threads": 1})
    assert list(result.artefacts) == ["student"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row for row in rows if "loss/sim" in row}
    per_epoch = len(load_data("digits").split("train")) // 64
    student, critic = "loss/lr/student", "loss/lr/discriminator"
    assert {round(row[student], 6) for step, row in rates.items() if step <= per_epoch} == {0.01}
    assert {round(row[student], 6) for step, row in rates.items() if step > per_epoch} == {0.001}
    assert not any(critic in row for row in rows), "its rate is constant"
    accuracy = [row["discriminator/accuracy"] for row in rows if "discriminator/accuracy" in row]
    assert len(accuracy) == len(rates)
    assert all(0 <= value <= 1 for value in accuracy)
    assert not any("loss/ce" in row for row in rows)
    assert "test/student-alone/accuracy" in result.metrics
    # The baseline goes on from the same weights as the student.
    scratch = sh.distil("meal-v2", **{**SMALL, "start": "scratch"}, settings={"threads": 1})
    assert scratch.metrics["test/student-alone/nll"] != result.metrics["test/student-alone/nll"]


def test_the_teachers_are_frozen_and_in_eval_mode(tmp_path):
    torch.manual_seed(0)
    teachers = [
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 10))
        for _ in range(2)
    ]
    student = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 10)
    )
    before = [fingerprint(teacher) for teacher in teachers]
    fields = {"data": "digits", "epochs": 1, "batch_size": 64, "optimizer": TABLE, "compare_alone": False}
    result = sh.distil("meal-v2", teacher=teachers, student=student, **fields, settings={"threads": 1})
    assert [fingerprint(teacher) for teacher in teachers] == before
    assert not torch.equal(result.student[2].running_mean, student[2].running_mean), "the student's batch norm trains"


def test_one_of_the_teachers_is_drawn_each_step(game):
    m, batch, _, wiring = game(ensemble="random", adversary="off", teacher_weights=[0.25, 0.75])
    x = batch["pixel_values"]
    drawn = []
    for step in range(200):
        wiring.run.enter("student", step, 200)
        said = wiring.links[0].read(batch).logits
        drawn.append(next(i for i in range(2) if torch.equal(said, m[f"teacher-{i}"](x))))
    assert 125 < sum(drawn) < 175
    wiring.run.enter("student", 3, 200)
    assert torch.equal(wiring.links[0].read(batch).logits, m[f"teacher-{drawn[3]}"](x))


def test_the_discriminator_has_an_optimiser_of_its_own(game):
    *_, wiring = game(discriminator_lr=3e-4)
    trains = wiring.trains()
    assert trains["discriminator"].lr == 3e-4
    assert trains["student"].table == ((0, 0, 0.01), (1, 9, 0.001))
    assert not any(isinstance(layer, torch.nn.ReLU) for layer in wiring.parts[0][0]["discriminator"].layers[-1:])
    *_, released = game(variant="code")
    assert set(released.trains()) == {("student", "discriminator")}
    assert isinstance(released.parts[0][0]["discriminator"].layers[-1], torch.nn.ReLU)


def test_a_table_of_learning_rates_has_no_gaps():
    def rates(*rows):
        return Optimizer(schedule="table", table=rows)

    for rows, sentence in (
        (((0, 4, 0.1), (6, 9, 0.01)), r"the row \(6, 9, 0.01\) starts at epoch 6 where epoch 5 is next"),
        (((0, 4, 0.1), (4, 9, 0.01)), "starts at epoch 4 where epoch 5 is next"),
        (((1, 4, 0.1),), "starts at epoch 1 where epoch 0 is next"),
        (((0, 4, 0.0),), "its rate is not above 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rates(*rows)
    with pytest.raises(ValueError, match="belong together"):
        Optimizer(schedule="table")
    with pytest.raises(UserError, match="ends with epoch 1, and the training has epochs 0 to 2; add a row"):
        sh.distil(
            "meal-v2", **{**SMALL, "epochs": 3, "optimizer": {**TABLE, "table": [[0, 1, 0.01]]}}, compare_alone=False
        )
    assert rates((0, 1, 0.5), (2, 3, 0.25)).scaled(0.5).table == ((0, 1, 0.25), (2, 3, 0.125))


def test_defaults_are_the_papers():
    method = MEALV2()
    assert (method.ensemble, method.adversary, method.variant, method.weight_ce) == (
        "probabilities",
        "reversal",
        "paper",
        0,
    )
    assert (method.weight_sim, method.weight_adversary, method.discriminator_lr) == (1, 1, 1e-4)
    assert (method.optimizer.momentum, method.optimizer.weight_decay) == (0.9, 0)
    assert method.optimizer.table == ((0, 100, 0.01), (101, 300, 0.001))
    assert (method.epochs, method.batch_size, method.start.kind, method.mix.kind) == (180, 512, "pretrained", "none")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"teacher": []}, "teacher: there is none; give at least one"),
        ({"start": "pretrained"}, "start: the student 'cnn' comes without weights"),
        ({"start": "pretraind"}, "did you mean 'pretrained'"),
        (
            {"teacher": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))},
            "the teacher has 7 classes and the student 10; MEAL V2 needs the same ones in the same order",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        sh.distil("meal-v2", **{**SMALL, **fields}, compare_alone=False)


def test_few_classes_need_no_discriminator():
    x, y = torch.randn(64, 3), torch.arange(64) % 4
    fields = {"data": (x, y), "teacher": torch.nn.Linear(3, 4), "student": torch.nn.Linear(3, 4), "optimizer": TABLE}
    with pytest.raises(UserError, match="narrows C logits to C/8 and on to 2, for which 4 classes are too few"):
        sh.distil("meal-v2", **fields, epochs=1, batch_size=8)
    assert sh.distil("meal-v2", **fields, epochs=1, batch_size=8, adversary="off").metrics


class Named(torch.nn.Module):
    """A classifier that says what its classes are and what pictures it takes."""

    def __init__(self, names, side=8):
        super().__init__()
        self.config = type("Config", (), {"id2label": dict(enumerate(names)), "image_size": side})()
        self.layer = torch.nn.Linear(side * side, len(names))

    def forward(self, pixel_values):
        return self.layer(pixel_values.flatten(1))


def test_each_teacher_sees_the_picture_in_its_own_form(tmp_path):
    data = load_data("digits")
    names = [str(digit) for digit in reversed(range(10))]
    run = Run(MEALV2(**SMALL), RunDirectory(tmp_path / "run"), data=data)

    def made(module, **fields):
        try:
            next(PretrainedTeacher(model=module, **fields).ready(run))
        except StopIteration as stop:
            return stop.value

    teacher = Named(names)
    with pytest.raises(UserError, match=r"stand in another order; set teacher\.classes=names"):
        made(teacher)
    fitted = made(teacher, classes="names", mean=(0.5,), std=(0.25,))
    assert isinstance(fitted, Adapted)
    batch = data.split("test").batch(range(6))
    unit = data.to_unit(batch["pixel_values"])
    torch.testing.assert_close(
        fitted(batch["pixel_values"]), teacher((unit - 0.5) / 0.25).flip(1), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match=r"takes pictures of 16x16 and the data's are 8x8; set teacher\.size=16"):
        made(Named(names[::-1], side=16))
    large = made(Named(names[::-1], side=16), size=16)
    assert large(batch["pixel_values"]).shape == (6, 10)
    with pytest.raises(UserError, match="there are 10 classes and 3 outputs named"):
        made(teacher, classes=(0, 1, 2))
    with pytest.raises(UserError, match="does not name all classes"):
        made(Named(["a", "b"]), classes="names")
    with pytest.raises(ValueError, match="mean and std belong together"):
        PretrainedTeacher(model=teacher, mean=(0.5,))
