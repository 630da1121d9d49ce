"""SinKD and its base over the engine: the terms, the switches, the sequence forms, bad input, the cache."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

import stillhouse as sh
from stillhouse import losses
from stillhouse.data import Batch, load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.knowledge.kd import KD
from stillhouse.methods.language.sinkd import SinKD, transport_over_positions
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


def terms(method, run, m, batch):
    return {name: term() if callable(term) else term for name, term in method.loss(m, batch, run).items()}


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
        torch.testing.assert_close(method.per_sample(student, teacher, batch, r), expected)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "tv"])
def test_other_divergences_come_from_the_same_path(run, divergence):
    method = SinKD(**SMALL, divergence=divergence)
    m, batch = modules_and_batch()
    student, teacher = m.student(batch["pixel_values"]), m.teacher(batch["pixel_values"])
    expected = losses.DIVERGENCES[divergence](student, teacher, 2.0, scale_by_temperature_squared=False)
    torch.testing.assert_close(method.per_sample(student, teacher, batch, run(method)), expected)


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


class FakeLM(torch.nn.Module):
    """Logits per position."""

    def __init__(self, vocabulary=11):
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids):
        return self.table(input_ids)


@pytest.fixture
def language_run(run):
    from stillhouse.facts import Facts

    class Language:
        facts = Facts({"input_ids": (6,)}, task="language")

    method = SinKD(**SMALL)
    r = run(method)
    r.__dict__["data"] = Language()
    return method, r


def test_sequences_use_labelled_positions_shifted_for_causal_models(language_run):
    method, r = language_run
    torch.manual_seed(0)
    m = Modules(teacher=FakeLM(), student=FakeLM())
    ids = torch.randint(0, 11, (3, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    batch = Batch(input_ids=ids, labels=labels)
    student, teacher = m.student(ids), m.teacher(ids).detach()
    keep = labels[:, 1:] != -100
    expected = losses.sinkhorn_distance(student[:, :-1][keep], teacher[:, :-1][keep], reduction="sum")
    torch.testing.assert_close(method.transport(student, teacher, batch, r), expected)
    with pytest.raises(UserError, match="0 valid positions"):
        method.transport(student, teacher, Batch(input_ids=ids, labels=torch.full_like(ids, -100)), r)


def test_variant_code_is_the_released_sequence_form(language_run):
    method, r = language_run
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 6, 11, requires_grad=True), torch.randn(3, 6, 11)
    p, q = F.softmax(student / 2, 1), F.softmax(teacher / 2, 1)
    cost = torch.cdist(p, q, p=1)
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    found = transport_over_positions(student, teacher, 2.0, 0.1, 20, "sum")
    torch.testing.assert_close(found, (plan * cost).sum())
    code = method.model_copy(update={"variant": "code"})
    torch.testing.assert_close(code.transport(student, teacher, Batch(labels=torch.zeros(3, 6)), r), found)


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


def test_regression_has_no_transport_and_matches_targets():
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    y = x.sum(1)
    result = sh.distil("sinkd", teacher=torch.nn.Linear(5, 1), student=torch.nn.Linear(5, 1), data=(x, y), epochs=1)
    assert "test/mse" in result.metrics


def test_cached_teacher_outputs_train_the_same_student(tmp_path):
    plain = sh.distil("kd", **SMALL, compare_alone=False)
    cached = sh.distil("kd", **SMALL, compare_alone=False, cache_teacher=True)
    for a, b in zip(plain.student.parameters(), cached.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="cache_teacher: the outputs can be computed once only for fixed inputs"):
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
