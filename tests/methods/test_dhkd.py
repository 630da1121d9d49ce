"""DHKD: two heads kept apart, the alignment, what ships, bad input. The losses: tests/losses; the projection: tests/engine."""

import dataclasses
import json

import pytest
import torch

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.losses.logit_matching import binary_kl, binary_kl_norm
from stillhouse.methods.knowledge.dhkd import DHKD
from stillhouse.methods.wiring import Wiring
from stillhouse.models import ModelSpec

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [8, 8]}, "epochs": 1}
SMALL = {"data": "digits", "teacher": TEACHER, "student": {"kind": "cnn", "channels": [4, 4]}, "epochs": 1}


def network(outputs, *after):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs), *after)


def wired(tmp_path, **fields):
    method = DHKD(**SMALL, **fields)
    run = Run(method, RunDirectory(tmp_path / "run"), data=load_data("digits"))
    torch.manual_seed(0)
    teacher, student = (ModelSpec.parse({"kind": "cnn", "channels": [w]}).build(run.data.facts) for w in (6, 4))
    m = Modules(teacher=teacher.eval().requires_grad_(False), student=student)
    return m, Wiring(method.objectives, student, {"teacher": teacher}, run), run.data.split("train").batch(range(32))


@pytest.mark.parametrize("head", ["linear", "nonlinear"])
def test_no_label_reaches_the_second_head_and_no_teacher_the_first(head, tmp_path):
    m, wiring, batch = wired(tmp_path, head=head)
    auxiliary = wiring.parts[0][0]["head"]
    terms = wiring.terms(m, batch)
    terms["ce"]().backward(retain_graph=True)
    assert all(p.grad is None for p in auxiliary.parameters())
    assert m.student.classifier.weight.grad.abs().sum() > 0
    m.student.zero_grad(set_to_none=True)
    terms["logit"]().backward()
    assert m.student.classifier.weight.grad is None
    assert m.student.blocks[0].conv.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in auxiliary.parameters())


@pytest.mark.parametrize(("form", "loss"), [("normalised", binary_kl_norm), ("plain", binary_kl)])
def test_the_term_is_that_of_the_auxiliary_head(form, loss, tmp_path):
    m, wiring, batch = wired(tmp_path, head="linear", logit_loss=form)
    x = batch["pixel_values"]
    m.student.eval()
    auxiliary = wiring.parts[0][0]["head"](m.student.features(x))
    expected = loss(auxiliary, m.teacher(x), 2.0)
    torch.testing.assert_close(wiring.terms(m, batch)["logit"](), expected)


def test_one_head_for_both_is_the_ablation(tmp_path):
    m, wiring, batch = wired(tmp_path, head="main")
    assert wiring.modules() == {}
    m.student.eval()
    x = batch["pixel_values"]
    torch.testing.assert_close(wiring.terms(m, batch)["logit"](), binary_kl_norm(m.student(x), m.teacher(x), 2.0))


def test_the_alignment_says_what_gives_way(tmp_path):
    _, wiring, _ = wired(tmp_path)
    assert (wiring.projection().terms, wiring.projection().onto, wiring.projection().scope) == (("logit",), ("ce",), ())
    _, wiring, _ = wired(tmp_path, align_scope="backbone")
    assert wiring.projection().scope == ("student", "!student.classifier")
    _, wiring, _ = wired(tmp_path, alignment=False)
    assert wiring.projection() is None


@pytest.mark.parametrize("alignment", [False, True])
def test_only_the_student_ships_and_the_log_has_the_cosines(alignment, tmp_path):
    fields = {**SMALL, "compare_alone": False, "alignment": alignment}
    result = sh.distil("dhkd", **fields, out=tmp_path / "run", settings={"threads": 1, "log_every": 5})
    plain = ModelSpec.parse(SMALL["student"]).build(load_data("digits").facts)
    assert result.student.state_dict().keys() == plain.state_dict().keys()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    cosines = [row["gradient_cosine/backbone"] for row in rows if "gradient_cosine/backbone" in row]
    assert len(cosines) >= 3
    assert all(-1 <= value <= 1 for value in cosines)
    assert 0 <= result.metrics["test/auxiliary_head/accuracy"] <= 1


@pytest.mark.parametrize("head", ["linear", "nonlinear", "main"])
def test_the_table_of_forces_is_the_gradient_by_a_row_of_one_head(head, tmp_path):
    m, wiring, _ = wired(tmp_path, head=head)
    method, split = wiring.objectives[0], wiring.run.data.split("train").take(40)
    wiring.run.data = dataclasses.replace(wiring.run.data, splits={"train": split})
    m.student.eval()
    wiring.parts[0][0].get("head", m.student).eval()
    with torch.no_grad():
        (table,) = method.shown(wiring, 0, wiring.run)
    batch = split.batch(range(40))
    f, labels = m.student.features(batch["pixel_values"]).detach(), batch.labels
    z = m.student.classifier(f).detach()
    a = wiring.parts[0][0]["head"](f).detach() if head != "main" else z
    t = m.teacher(batch["pixel_values"])
    means = torch.stack([f[labels == k].mean(0) for k in range(10)])
    vertices = torch.nn.functional.normalize(means - means.mean(0))
    # One linear head, whose output the loss sees as if it were the head's own.
    w = torch.zeros(10, f.shape[1], requires_grad=True)
    (ce,) = torch.autograd.grad(torch.nn.functional.cross_entropy(f @ w.T + z, labels), w)
    (logit,) = torch.autograd.grad(binary_kl_norm(f @ w.T + a, t), w)
    found = torch.tensor([row[1:] for row in table.rows])
    assert [row[0] for row in table.rows] == list(wiring.run.data.facts.class_names)
    torch.testing.assert_close(found[:, 0] + found[:, 1], -(ce * vertices).sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[:, 2] + found[:, 3], -(logit * vertices).sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[:, 4], torch.cosine_similarity(ce, logit, dim=1), rtol=1e-4, atol=1e-6)


def test_the_forces_are_in_the_result_as_table_note_and_picture(tmp_path):
    two = {**SMALL, "teacher": [TEACHER, {**TEACHER, "seed": 1}], "compare_alone": False}
    result = sh.distil("dhkd", **two, settings={"threads": 1}, out=tmp_path / "run")
    titles = [table.title for table in result.tables]
    assert titles[1:] == ["Pull and push on one head, teacher-0", "Pull and push on one head, teacher-1"]
    assert (tmp_path / "run" / "result" / "pull-and-push-on-one-head-teacher-1.png").exists()
    assert sum("would oppose each other in" in note for note in result.notes) == 2


def test_alignment_changes_the_training_and_single_heads_are_probed_in_both_places(tmp_path):
    fields = {**SMALL, "compare_alone": False, "head": "main", "epochs": 2}
    runs = {}
    for alignment in (False, True):
        result = sh.distil(
            "dhkd", **fields, alignment=alignment, out=tmp_path / str(alignment), settings={"threads": 1}
        )
        runs[alignment] = torch.cat([p.flatten() for p in result.student.parameters()])
        text = (tmp_path / str(alignment) / "metrics.jsonl").read_text()
        assert "gradient_cosine/head" in text
        assert "gradient_cosine/backbone" in text
    assert not torch.equal(runs[False], runs[True])


def test_defaults_are_the_papers():
    method = DHKD()
    assert (method.temperature, method.weight_ce, method.weight_logit) == (2.0, 1.0, 1.0)
    assert (method.head, method.hidden, method.alignment, method.align_scope) == ("nonlinear", 200, True, "all")
    assert (method.epochs, method.optimizer.lr, method.optimizer.weight_decay) == (240, 0.05, 5e-4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weight_logit": -0.1}, "a weight is 0 or more"),
        ({"temperature": 0}, "temperature"),
        ({"batch_size": 1}, "dhkd: the nonlinear head's batch norm has no statistics of one sample"),
        ({"accumulate": 2}, "projects the gradients of its terms"),
        ({"student": network(10, torch.nn.ReLU())}, "does not end in a linear"),
        ({"teacher": network(7)}, "the teacher has 7 outputs and the student 10"),
        ({"also": [{"kind": "dhkd"}]}, "'dhkd' is there twice"),
    ],
)
def test_bad_input(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        sh.distil("dhkd", **{**SMALL, **fields})
