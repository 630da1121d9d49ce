"""MIX-KD: the terms on mixed samples, each sample's own temperature, the study; mixing itself is in tests/modules."""

import pytest
import torch
import torch.nn.functional as F

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.losses import kl
from stillhouse.methods.knowledge.kd import KD
from stillhouse.methods.knowledge.mixkd import MixKD, described
from stillhouse.methods.wiring import Wiring
from stillhouse.models import load
from stillhouse.modules.mixing import CutMix, Mixup, NoMixing

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [8, 8]}, "epochs": 1}
SMALL = {"data": "digits", "teacher": TEACHER, "student": {"kind": "cnn", "channels": [4, 4]}, "epochs": 1}
FULL = {"kind": "mixup", "fraction": 1.0}


@pytest.fixture
def started(tmp_path):
    """A run with linear networks, a batch, and the terms of a method on what it makes of the batch."""

    def make(method, classes=(10, 10)):
        run = Run(method, RunDirectory(tmp_path / "run"), data=load_data("digits"))
        run.log = lambda row: None
        run.enter("student", 0, 10)
        torch.manual_seed(0)
        nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, n)) for n in classes]
        m = Modules(teacher=nets[0].eval().requires_grad_(False), student=nets[1])
        wiring = Wiring(method.objectives, m.student, {"teacher": m.teacher}, run)
        batch = run.data.split("train").batch(range(32))
        torch.manual_seed(1)
        mixed = batch if method.mix.kind == "none" else method.blended(m, batch, run)
        terms = {name: term() for name, term in wiring.terms(m, mixed).items()}
        return m, batch, mixed, terms, run

    return make


def test_the_terms_are_the_papers_on_the_mixed_samples(started):
    m, batch, mixed, terms, _ = started(MixKD(**SMALL, mix=FULL))
    assert mixed.labels.shape == (32, 10)
    assert not torch.equal(mixed["pixel_values"], batch["pixel_values"])
    student, teacher = m.student(mixed["pixel_values"]), m.teacher(mixed["pixel_values"])
    s, t = student / student.std(-1, keepdim=True), teacher / teacher.std(-1, keepdim=True)
    torch.testing.assert_close(terms["ce"], -(mixed.labels * F.log_softmax(s, -1)).sum(-1).mean())
    torch.testing.assert_close(terms["kd"], F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean"))
    (terms["ce"] + terms["kd"]).backward()
    assert all(p.grad is None for p in m.teacher.parameters())
    assert all(p.grad is not None for p in m.student.parameters())


def test_the_deviation_is_the_temperature_of_each_side(started):
    """Equal to KL with T_i = std_i; and scale and shift of a sample's logits are free, also in the gradient."""
    m, _, mixed, terms, run = started(MixKD(**SMALL, mix=FULL))
    student, teacher = m.student(mixed["pixel_values"]).detach(), m.teacher(mixed["pixel_values"])
    deviations = student.std(-1), teacher.std(-1)
    expected = kl(
        student / deviations[0][:, None], teacher / deviations[1][:, None], scale_by_temperature_squared=False
    )
    torch.testing.assert_close(terms["kd"].detach(), expected)
    method = MixKD(**SMALL)
    factor = torch.rand(32, 1) * 5 + 0.1
    moved = method.match(factor * student + torch.randn(32, 1), 3 * teacher - 1, None, run)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)
    free = student.clone().requires_grad_()
    method.match(free, teacher, None, run).backward()
    # Along the logits themselves (their scale) the loss does not change: the deviation is not detached.
    assert (free.grad * student).sum(-1).abs().max() < 1e-6
    assert free.grad.abs().max() > 1e-4


def test_a_number_as_temperature_is_hintons_loss_on_soft_labels(started):
    m, _, mixed, terms, run = started(MixKD(**SMALL, mix=FULL, temperature=4.0))
    student, teacher = m.student(mixed["pixel_values"]), m.teacher(mixed["pixel_values"])
    torch.testing.assert_close(terms["ce"], -(mixed.labels * F.log_softmax(student, -1)).sum(-1).mean())
    soft = 16 * F.kl_div(F.log_softmax(student / 4, -1), F.softmax(teacher / 4, -1), reduction="batchmean")
    torch.testing.assert_close(terms["kd"], soft)
    ramp = MixKD(**SMALL, temperature={"start": 4.0, "end": 1.0})
    run.enter("student", 5, 10)
    torch.testing.assert_close(ramp.match(student, teacher, None, run), kl(student, teacher, 2.5))


def test_no_mixing_is_kd_on_the_same_samples_in_another_order(started):
    _, _, mixed, terms, _ = started(MixKD(**SMALL, mix={"kind": "mixup", "fraction": 0.0}, temperature=4.0))
    assert sorted(mixed.index.tolist()) == list(range(32))
    assert mixed.index.tolist() != list(range(32))
    *_, plain, _ = started(KD(**SMALL))
    torch.testing.assert_close(terms["ce"], plain["ce"])
    torch.testing.assert_close(terms["kd"], plain["soft"])


def test_the_teacher_may_see_the_parts_instead(started):
    m, batch, mixed, terms, _ = started(MixKD(**SMALL, mix=FULL, teacher_sees="parts", temperature=1.0))
    assert list(mixed.inputs) == ["pixel_values"], "what comes along is no input"
    said = m.teacher(batch["pixel_values"])
    share = mixed["share"][:, None]
    theirs = share * said[mixed["first"]] + (1 - share) * said[mixed["second"]]
    student = m.student(mixed["pixel_values"])
    torch.testing.assert_close(terms["kd"], kl(student, theirs))
    # The teacher here is linear, so both see the same; one with a ReLU does not.
    torch.testing.assert_close(kl(student, m.teacher(mixed["pixel_values"])), terms["kd"], rtol=1e-4, atol=1e-6)


def test_constant_logits_have_no_deviation_and_stay_finite(started):
    *_, run = started(MixKD(**SMALL))
    said = []
    run.log = said.append
    run.enter("student", 9, 10)
    student = torch.zeros(4, 10, requires_grad=True)
    MixKD(**SMALL).match(student, torch.randn(4, 10), None, run).backward()
    assert student.grad.abs().max() < 1
    assert {"stage": "student", "step": 10, "std/constant": 4.0} in said


def test_a_study_trains_the_grid_and_says_what_to_use(tmp_path):
    study = {"temperatures": [4.0, "std"], "student_mix": ["none", {"kind": "mixup", "fraction": 0.1}], "seeds": 2}
    result = sh.distil(
        "mixkd",
        **SMALL,
        study=study,
        compare_alone=False,
        export_scaled=True,
        seed=3,
        settings={"threads": 1},
        out=tmp_path,
    )
    table = next(table for table in result.tables if table.title == "Study")
    assert len(table.rows) == 2 * 2 * 2
    assert {tuple(row[:3]) for row in table.rows} >= {("none", "mixup-10%", "std"), ("mixup", "none", "T=4")}
    accuracy = {tuple(row[:3]): row[3] for row in table.rows}
    best = max(accuracy, key=accuracy.get)
    told = next(note for note in result.notes if note.startswith("study: best"))
    assert f"mix={best[0]}, a student with mix={best[1]}" in told
    assert "mean of 2 seeds" in told
    assert result.metrics["study/none/none/T=4/accuracy"] == accuracy["none", "none", "T=4"]
    assert result.pictures["study"].shape[0] == 3
    assert (tmp_path / "result" / "study.png").exists()
    # One of the cells is what the method alone gives with that seed.
    alone = sh.distil(
        "mixkd", **SMALL, temperature=4.0, mix="none", compare_alone=False, seed=3, settings={"threads": 1}
    )
    other = sh.distil(
        "mixkd", **SMALL, temperature=4.0, mix="none", compare_alone=False, seed=4, settings={"threads": 1}
    )
    mean = (alone.metrics["test/accuracy"] + other.metrics["test/accuracy"]) / 2
    assert accuracy["none", "none", "T=4"] == pytest.approx(mean)
    x = torch.randn(5, 1, 8, 8)
    scaled = load(tmp_path / "result" / "student-scaled")
    with torch.no_grad():
        logits = load(tmp_path / "result" / "student")(x)
        torch.testing.assert_close(scaled(pixel_values=x).std(-1), torch.ones(5))
        assert torch.equal(scaled(pixel_values=x).argmax(-1), logits.argmax(-1))
    assert {"probe/student/ece_scaled", "probe/teacher/entropy", "probe/student/accuracy_fgsm"} <= set(result.metrics)


def test_mixing_serves_every_method_and_teacher(tmp_path):
    for mix in ("cutmix", {"kind": "mixup", "alpha": 0.4, "fraction": 0.5}):
        out = tmp_path / str(mix)[:4]
        result = sh.distil(
            "kd", **{**SMALL, "teacher": {**TEACHER, "mix": "mixup"}}, mix=mix, compare_alone=False, out=out
        )
        mixed = [value for _, value in result.curve("mix/mixed", "student")]
        assert mixed == pytest.approx([0.5] if isinstance(mix, dict) else [1.0], abs=0.2)


def test_defaults_are_the_papers():
    method = MixKD()
    assert (method.weight_ce, method.weight_kd, method.temperature, method.teacher_sees) == (0.1, 0.9, "std", "mixed")
    assert method.mix == Mixup(alpha=1.0, fraction=0.1)
    assert (method.epochs, method.batch_size) == (240, 64)
    o = method.optimizer
    assert (o.name, o.lr, o.momentum, o.weight_decay) == ("sgd", 0.05, 0.9, 5e-4)
    assert [round(o.lr_at(240 * epoch // 240, 240), 8) for epoch in (149, 150, 180, 210)] == [
        0.05,
        0.005,
        0.0005,
        0.00005,
    ]


def test_mixings_have_short_names():
    assert [described(mix) for mix in (NoMixing(), Mixup(), Mixup(fraction=0.1, alpha=0.2), CutMix())] == [
        "none",
        "mixup",
        "mixup-0.2-10%",
        "cutmix",
    ]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mix": {"kind": "mixup", "fraction": 1.1}}, "mix.fraction"),
        ({"mix": {"kind": "mixup", "alpha": 0}}, "mix.alpha"),
        ({"batch_size": 1}, "A batch of 1 sample has no two to mix"),
        ({"batch_size": 4}, "0.1 of a batch of 4 is not one sample"),
        ({"temperature": 0}, "temperature: expected more than 0, not 0"),
        ({"temperature": "sdt"}, "temperature"),
        ({"cache_teacher": True, "mix": FULL}, "'mix=mixup' mixes the samples of a batch"),
        ({"cache_teacher": True, "teacher_sees": "parts"}, "teacher_sees=parts asks the teacher of two samples"),
        ({"teacher": torch.nn.Linear(3, 3), "study": True}, "study: it trains the teacher in several ways"),
        ({"also": ["nd-loss"]}, "mix: 'nd-loss' reads class labels, and mixed samples have soft ones"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        sh.distil("mixkd", **{**SMALL, **fields}, compare_alone=False)


def test_other_data_and_other_classes_are_refused(started):
    with pytest.raises(UserError, match="student_logits has 10 classes but teacher_logits has 7"):
        started(MixKD(**SMALL), classes=(7, 10))
    x = torch.randn(60, 3)
    with pytest.raises(UserError, match="distributions over classes, which the data"):
        sh.distil("mixkd", data=(x, x[:, 0]), student="mlp:4", teacher="mlp:4", epochs=1)
    ids = torch.randint(0, 12, (60, 8))
    with pytest.raises(UserError, match="do not mix token ids"):
        sh.distil("mixkd", data={"input_ids": ids}, student=Words(), teacher=Words(), epochs=1, batch_size=16)


class Words(torch.nn.Module):
    """A language model of one layer."""

    def __init__(self):
        super().__init__()
        self.table, self.out = torch.nn.Embedding(12, 4), torch.nn.Linear(4, 12)

    def forward(self, input_ids):
        return self.out(self.table(input_ids))


@pytest.mark.parametrize("mix", [{"kind": "mixup", "fraction": 0.25}, {"kind": "cutmix", "fraction": 0.5}])
def test_whole_samples_are_looked_up_and_mixed_ones_asked_about(mix, tmp_path):
    asked = []

    class Teacher(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, pixel_values):
            asked.append(len(pixel_values))
            return self.layer(pixel_values.flatten(1))

    shared = {**SMALL, "teacher": Teacher(), "mix": mix, "compare_alone": False, "settings": {"threads": 1}}
    plain = sh.distil("mixkd", **shared, out=tmp_path / "plain")
    asked.clear()
    stored = sh.distil("mixkd", **shared, cache_teacher=True, out=tmp_path / "stored")
    for mine, theirs in zip(stored.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    number = round(mix["fraction"] * 64)
    steps = asked.count(number) if mix["kind"] == "mixup" else sum(size <= number for size in asked)
    assert steps >= 15, "in training the teacher sees the mixed samples alone"
    assert "probe/teacher/entropy" in stored.metrics
