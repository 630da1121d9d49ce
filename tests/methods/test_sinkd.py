"""SinKD and its base over the engine: the terms, the switches, bad input, the cache. Sequences: test_sequences.py."""

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F

import stillhouse as sh
from stillhouse import losses
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.knowledge.kd import KD
from stillhouse.methods.language.sinkd import SinKD
from stillhouse.methods.wiring import Wiring
from stillhouse.models import fingerprint
from stillhouse.recipe import load_recipe

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [8, 8]}, "epochs": 1}
SMALL = {"data": "digits", "teacher": TEACHER, "student": {"kind": "cnn", "channels": [4, 4]}, "epochs": 1}


@pytest.fixture
def run(tmp_path):
    def make(method):
        return Run(method, RunDirectory(tmp_path / "run"))

    return make


def modules_and_batch(outputs=(10, 10)):
    torch.manual_seed(0)
    batch = load_data("digits").split("train").batch(list(range(16)))
    nets = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, n)) for n in outputs]
    return Modules(teacher=nets[0].eval().requires_grad_(False), student=nets[1]), batch


def losses_of(method, run, m, batch):
    teachers = {name: module for name, module in m.items() if name.startswith("teacher")}
    return Wiring(method.objectives, m.student, teachers, run).terms(m, batch)


def terms(method, run, m, batch):
    return {name: term() if callable(term) else term for name, term in losses_of(method, run, m, batch).items()}


def test_the_three_terms_are_the_papers(run):
    method = SinKD(**SMALL)
    m, batch = modules_and_batch()
    found = terms(method, run(method), m, batch)
    student, teacher = m.student(batch["pixel_values"]), m.teacher(batch["pixel_values"])
    soft = -(F.softmax(teacher / 2, -1) * F.log_softmax(student / 2, -1)).sum(-1).mean()
    p, q = F.softmax(student / 2, -1), F.softmax(teacher / 2, -1)
    cost = torch.cdist(p, q, p=1)
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    torch.testing.assert_close(found["ce"], F.cross_entropy(student, batch.labels))
    torch.testing.assert_close(found["kd"], soft)
    torch.testing.assert_close(found["sinkhorn"], (plan * cost).sum(), rtol=1e-5, atol=1e-6)


def test_defaults_are_the_papers():
    method = SinKD()
    assert (method.temperature_sinkhorn, method.epsilon, method.num_iterations) == (2.0, 0.1, 20)
    assert method.weight_sinkhorn == pytest.approx(0.8 * 0.001)
    assert method.weight_ce + method.weight_kd == pytest.approx(1.0)
    assert (method.reduction, method.form, method.plan_grad, method.gather) == ("sum", "batch", True, False)
    optimizer = method.optimizer
    assert (optimizer.name, optimizer.eps, optimizer.weight_decay) == ("adamw", 1e-8, 0.0)
    assert (optimizer.schedule, optimizer.warmup, optimizer.clip_norm) == ("linear", 0, 1.0)


def test_the_temperature_anneals_by_epoch(run):
    method = SinKD(**SMALL, anneal=True).model_copy(update={"temperature": 4.0})
    m, batch = modules_and_batch()
    r = run(method)
    student, teacher = m.student(batch["pixel_values"]), m.teacher(batch["pixel_values"])
    for step, temperature in ((0, 4.0), (9, 4.0), (10, 2.5), (29, 1.0)):
        r.enter("student", step, 30, per_epoch=10)
        expected = losses.soft_cross_entropy(student, teacher, temperature)
        torch.testing.assert_close(method.per_sample(student, teacher, None, r), expected)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "tv"])
def test_other_divergences_come_from_the_same_path(run, divergence):
    method = SinKD(**SMALL, divergence=divergence)
    m, batch = modules_and_batch()
    student, teacher = m.student(batch["pixel_values"]), m.teacher(batch["pixel_values"])
    expected = losses.DIVERGENCES[divergence](student, teacher, 2.0, scale_by_temperature_squared=False)
    torch.testing.assert_close(method.per_sample(student, teacher, None, run(method)), expected)


def test_several_teachers_are_averaged(run):
    method = SinKD(**{**SMALL, "teacher": [TEACHER, TEACHER]})
    m, batch = modules_and_batch()
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    both = Modules({"teacher-0": m.teacher, "teacher-1": other, "student": m.student})
    r = run(method)
    one = terms(method, r, m, batch)["sinkhorn"]
    two = terms(method, r, Modules(teacher=other, student=m.student), batch)["sinkhorn"]
    torch.testing.assert_close(terms(method, r, both, batch)["sinkhorn"], (one + two) / 2)


def test_different_outputs_name_both_numbers(run):
    method = SinKD(**SMALL)
    m, batch = modules_and_batch((7, 10))
    with pytest.raises(UserError, match="the teacher has 7 outputs and the student 10"):
        terms(method, run(method), m, batch)


def test_the_teacher_is_asked_once_a_loss(run):
    """And not at all by a loss that takes nothing from it."""
    for method in (SinKD(**SMALL), KD(**SMALL)):
        m, batch = modules_and_batch()
        asked = []
        m.teacher.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        losses_ = losses_of(method, run(method), m, batch)
        losses_["ce"]()
        assert not asked
        for term in losses_.values():
            term()
        assert len(asked) == 1


def test_the_log_says_how_far_the_rows_of_the_plan_are_from_their_mass(tmp_path):
    settings = {"log_every": 7, "threads": 1}
    result = sh.distil("sinkd", **SMALL, compare_alone=False, num_iterations=1, out=tmp_path / "run", settings=settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["sinkhorn/row_deviation"] for row in rows if "sinkhorn/row_deviation" in row}
    assert set(found) == {row["step"] for row in rows if "loss/sinkhorn" in row} > {7, 14}
    assert all(0 < value < 40 for value in found.values())
    assert "the Sinkhorn term was taken over the samples of each process on its own (1 process" in " ".join(
        result.notes
    )
    settled = sh.distil("sinkd", **SMALL, compare_alone=False, epsilon=5, out=tmp_path / "settled", settings=settings)
    rows = [json.loads(line) for line in (tmp_path / "settled" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sinkhorn/row_deviation"] < 1e-4 for row in rows if "sinkhorn/row_deviation" in row)
    assert settled.metrics


def test_the_logged_deviation_is_that_of_the_plan(run):
    method = SinKD(**SMALL, num_iterations=2)
    m, batch = modules_and_batch()
    r, said = run(method), []
    r.log = said.append
    r.enter("student", 3, 100)
    terms(method, r, m, batch)
    assert not said
    r.enter("student", 49, 100)
    terms(method, r, m, batch)
    p, q = (F.softmax(net(batch["pixel_values"]) / 2, -1) for net in (m.student, m.teacher))
    plan = torch.exp(-torch.cdist(p, q, p=1) / 0.1).detach()
    for _ in range(2):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    expected = pytest.approx(float((plan.sum(1) - 1).abs().max()), abs=1e-5)
    assert said == [{"stage": "student", "step": 50, "sinkhorn/row_deviation": expected}]


def state_digest(module):
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_distil_takes_the_users_own_modules_and_tensors():
    torch.manual_seed(0)
    x = torch.randn(240, 10)
    y = (x[:, 0] > 0).long()
    teacher, student = torch.nn.Sequential(torch.nn.Linear(10, 2)), torch.nn.Linear(10, 2)
    before = state_digest(teacher)
    start = state_digest(student)
    result = sh.distil("sinkd", teacher=teacher, student=student, data=(x, y), epochs=2, optimizer={"lr": 1e-2})
    assert type(result.student) is type(student)
    assert state_digest(result.student) != start
    assert state_digest(student) == start, "a run starts from the weights that were given, also the second time"
    assert state_digest(teacher) == before
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert 0 <= result.metrics["test/accuracy"] <= 1


@pytest.mark.parametrize("method", ["sinkd", "kd"])
def test_regression_matches_the_teachers_outputs_and_says_so(method, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    teacher, student = torch.nn.Linear(5, 1), torch.nn.Linear(5, 1)
    fields = {"epochs": 60, "optimizer": {"lr": 3e-2}, "weight_ce": 0.0, "compare_alone": False}
    data = (x, x.sum(1))
    result = sh.distil(method, teacher=teacher, student=student, data=data, out=tmp_path / "run", **fields)
    assert "test/mse" in result.metrics
    torch.testing.assert_close(result.student(x), teacher(x), rtol=0, atol=1e-2)
    said = {"sinkd": "the Sinkhorn term was left out", "kd": "the soft term is the squared error"}[method]
    assert said in " ".join(result.notes)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    term = {"sinkd": "loss/kd", "kd": "loss/soft"}[method]
    assert next(row[term] for row in logged if term in row) > 0.01
    assert not any("sinkhorn" in key for row in logged for key in row)


def test_the_squared_error_between_regressors_is_exact(run):
    from stillhouse.methods.distillation import output_error

    a, b = torch.tensor([[1.0], [4.0]]), torch.tensor([3.0, 4.0])
    assert output_error(a, b) == 2.0
    assert output_error(a, b, 2.0) == 0.5


def test_cached_teacher_outputs_train_the_same_student(tmp_path):
    plain = sh.distil("kd", **SMALL, compare_alone=False)
    cached = sh.distil("kd", **SMALL, compare_alone=False, cache_teacher=True)
    for a, b in zip(plain.student.parameters(), cached.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="augment=shift makes new inputs each time; set cache_teacher"):
        sh.distil("kd", **SMALL, cache_teacher=True, augment="shift")


def test_kd_is_hintons(run):
    method = KD(**SMALL)
    m, batch = modules_and_batch()
    found = terms(method, run(method), m, batch)
    student, teacher = m.student(batch["pixel_values"]), m.teacher(batch["pixel_values"])
    kl = F.kl_div(F.log_softmax(student / 4, -1), F.softmax(teacher / 4, -1), reduction="batchmean") * 16
    torch.testing.assert_close(found["soft"], kl)


def test_the_result_is_the_student_alone_and_loads_again(tmp_path):
    from stillhouse.models import load

    result = sh.distil("sinkd", **SMALL, out=tmp_path / "run")
    assert list(result.artefacts) == ["student"]
    assert {p.name for p in (tmp_path / "run" / "result" / "student").iterdir()} == {"model.safetensors", "model.json"}
    again = load(tmp_path / "run" / "result" / "student")
    assert fingerprint(again) == fingerprint(result.student)
    again = sh.distil("sinkd", **SMALL, out=tmp_path / "run")
    assert fingerprint(again.student) == fingerprint(result.student), "continuing a finished run loads it"


def test_the_paper_recipe_trains_with_local_stand_ins_for_the_hub(tmp_path):
    """The real recipe with its hub ids exchanged for directories of the same formats: tokenised text, BERTs, bf16."""
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    rows = {
        "sentence": [f"a {'fine' if i % 2 else 'dull'} film {i}" for i in range(64)],
        "label": [i % 2 for i in range(64)],
    }
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    hidden = {"sentence": rows["sentence"], "label": [-1] * 64}
    splits = {"train": rows, "validation": rows, "test": hidden}
    made = datasets.DatasetDict({k: datasets.Dataset.from_dict(v, features=features) for k, v in splits.items()})
    made.save_to_disk(tmp_path / "sst2")
    for name, layers in (("teacher", 2), ("student", 1)):
        config = transformers.BertConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16
        )
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
    overrides = [
        f"data.path={tmp_path / 'sst2'}",
        "data.config=null",
        "data.tokenizer=bytes",
        "data.max_length=24",
        f"teacher=hf:{tmp_path / 'teacher'}",
        f"student=hf:{tmp_path / 'student'}",
        "compare_alone=false",
        "run.device=cpu",
    ]
    recipe = load_recipe("sinkd/paper", overrides)
    result = run_recipe(recipe, tmp_path / "run")
    assert 0 <= result.metrics["test/student/accuracy"] <= 1
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "result" / "student")
    assert fingerprint(again) == fingerprint(result.student)
