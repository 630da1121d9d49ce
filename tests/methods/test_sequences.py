"""KD, SinKD and plain training of models that predict a token at each position, from their losses to whole runs."""

import json

import pytest
import torch
import torch.nn.functional as F

import stillhouse as sh
from stillhouse import losses
from stillhouse.data import Batch, load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.methods.knowledge.kd import KD
from stillhouse.methods.language.sinkd import SinKD, transport_over_positions
from stillhouse.methods.supervised import Supervised
from stillhouse.methods.wiring import Wiring
from stillhouse.models import logits, targets

transformers = pytest.importorskip("transformers")

WORDS = 11
GENERATOR = torch.Generator().manual_seed(0)
IDS = (torch.randint(0, 10, (80, 1), generator=GENERATOR) + torch.arange(6)) % 10 + 1
MASK = (torch.arange(6) < torch.randint(3, 7, (80, 1), generator=GENERATOR)).long()
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
LABELLED = {"input_ids": IDS, "labels": IDS.masked_fill(MASK == 0, -100)}
PAIRS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS[:, :4].masked_fill(MASK[:, :4] == 0, -100)}
TAGGED = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS % 3}


class Table(torch.nn.Module):
    """A user's own model: logits of each position from its token alone."""

    def __init__(self, outputs=WORDS):
        super().__init__()
        self.table = torch.nn.Embedding(WORDS, outputs)

    def forward(self, input_ids):
        return self.table(input_ids)


def gpt2(layers):
    sizes = {"vocab_size": WORDS, "n_embd": 8, "n_layer": layers, "n_head": 2, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def t5(layers):
    sizes = {"vocab_size": WORDS, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": layers, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def started(method, data, home, pair):
    """A run in the midst of a stage, its modules and a batch of its data."""
    torch.manual_seed(0)
    run = Run(method, RunDirectory(home / "run"), data=load_data(data))
    run.enter("student", 3, 100)
    teacher, student = pair(2), pair(1)
    m = Modules(teacher=teacher.eval().requires_grad_(False), student=student.eval())
    return run, m, run.data.split("train").batch(range(8))


def losses_of(method, run, m, batch):
    if isinstance(method, Supervised):
        return method.loss(m, batch, run)
    teachers = {name: module for name, module in m.items() if name.startswith("teacher")}
    return Wiring(method.objectives, m.student, teachers, run).terms(m, batch)


def terms(method, run, m, batch):
    return {name: term() if callable(term) else term for name, term in losses_of(method, run, m, batch).items()}


def table(_):
    return Table()


@pytest.mark.parametrize(("data", "pair"), [(TEXTS, table), (TEXTS, gpt2), (LABELLED, gpt2), (LABELLED, table)])
def test_every_term_looks_at_the_same_predictions_of_the_next_token(data, pair, tmp_path):
    method = SinKD(temperature=3.0)
    run, m, batch = started(method, data, tmp_path, pair)
    student, teacher = logits(m.student, batch)[:, :-1], logits(m.teacher, batch)[:, :-1]
    ids = batch["input_ids"][:, 1:]
    kept = (batch["labels"][:, 1:] != -100) if "labels" in batch else batch["attention_mask"][:, 1:] == 1
    found = terms(method, run, m, batch)
    torch.testing.assert_close(found["ce"], F.cross_entropy(student[kept], ids[kept]))
    torch.testing.assert_close(found["kd"], losses.soft_cross_entropy(student[kept], teacher[kept], 3.0))
    expected = losses.sinkhorn_distance(student[kept], teacher[kept], reduction="sum")
    torch.testing.assert_close(found["sinkhorn"], expected)
    found = terms(KD(), run, m, batch)
    torch.testing.assert_close(found["ce"], F.cross_entropy(student[kept], ids[kept]))
    torch.testing.assert_close(found["soft"], losses.kl(student[kept], teacher[kept], 4.0))


@pytest.mark.parametrize(("data", "pair"), [(PAIRS, t5), (TAGGED, lambda _: Table(3))], ids=["t5", "tagger"])
def test_every_term_looks_at_the_labels_where_they_stand(data, pair, tmp_path):
    method = SinKD()
    run, m, batch = started(method, data, tmp_path, pair)
    labels, student, teacher = batch.labels, logits(m.student, batch), logits(m.teacher, batch)
    kept = labels != -100 if pair is t5 else batch["attention_mask"] == 1
    found = terms(method, run, m, batch)
    torch.testing.assert_close(found["ce"], F.cross_entropy(student[kept], labels[kept]))
    torch.testing.assert_close(found["kd"], losses.soft_cross_entropy(student[kept], teacher[kept], 2.0))
    expected = losses.sinkhorn_distance(student[kept], teacher[kept], reduction="sum")
    torch.testing.assert_close(found["sinkhorn"], expected)
    torch.testing.assert_close(terms(KD(), run, m, batch)["soft"], losses.kl(student[kept], teacher[kept], 4.0))


@pytest.mark.parametrize("method", [SinKD(), KD(), Supervised()], ids=["sinkd", "kd", "supervised"])
def test_padding_and_what_lies_under_it_change_no_term(method, tmp_path):
    run, m, batch = started(method, TEXTS, tmp_path, gpt2)
    m["model"] = m.student
    before = terms(method, run, m, batch)
    wide = Batch(
        input_ids=F.pad(torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7), (0, 2), value=5),
        attention_mask=F.pad(batch["attention_mask"], (0, 2)),
    )
    for name, value in terms(method, run, m, wide).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [SinKD(), KD()], ids=["sinkd", "kd"])
def test_what_a_model_makes_of_padding_is_never_looked_at(method, tmp_path):
    """Attention from padding to nothing is NaN in some models; a factor of 0 would not undo it."""
    run, m, batch = started(method, TEXTS, tmp_path, table)
    spoil = torch.where(targets(m.student, batch, next_token=True) == -100, torch.nan, 0.0)[..., None]
    for name in ("student", "teacher"):
        m[name].register_forward_hook(lambda *given: given[-1] + spoil)
    sum(terms(method, run, m, batch).values()).backward()
    assert m.student.table.weight.grad.isfinite().all()
    assert m.student.table.weight.grad.abs().sum() > 0


def test_at_most_so_many_positions_are_transported(tmp_path):
    method = SinKD(max_positions=5)
    run, m, batch = started(method, TEXTS, tmp_path, table)
    student, teacher = (logits(m[name], batch) for name in ("student", "teacher"))
    assert [len(rows) for rows in method.coupled(student, teacher, batch["input_ids"], run)] == [5, 5]


def test_a_batch_without_a_labelled_position_adds_nothing(tmp_path):
    method = SinKD()
    run, m, batch = started(method, LABELLED, tmp_path, table)
    found = terms(method, run, m, batch.replace(labels=torch.full_like(batch["input_ids"], -100)))
    assert {name: value.item() for name, value in found.items()} == {"ce": 0.0, "kd": 0.0, "sinkhorn": 0.0}
    sum(found.values()).backward()
    assert m.student.table.weight.grad.abs().sum() == 0


def test_variant_code_is_the_released_sequence_form(tmp_path):
    method = SinKD(variant="code")
    run, m, batch = started(method, TEXTS, tmp_path, table)
    student, teacher = logits(m.student, batch), logits(m.teacher, batch)
    p, q = F.softmax(student / 2, 1), F.softmax(teacher / 2, 1)
    cost = torch.cdist(p, q, p=1)
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    torch.testing.assert_close(transport_over_positions(student, teacher, 2.0, 0.1, 20, "sum"), (plan * cost).sum())
    torch.testing.assert_close(terms(method, run, m, batch)["sinkhorn"], (plan * cost).sum())


def test_what_texts_are_for_is_seen_from_the_data():
    assert load_data(TEXTS).next_token
    assert load_data(LABELLED).next_token
    for other in (PAIRS, TAGGED, {"input_ids": IDS, "labels": (IDS + 1) % 11}, {"input_ids": IDS, "labels": IDS[:, 0]}):
        assert not load_data(other).next_token


FAST = {"epochs": 1, "batch_size": 16, "cache": False, "settings": {"threads": 1}}
FORMS = [("texts", TEXTS, gpt2), ("ids", {"input_ids": IDS}, gpt2), ("labelled", LABELLED, table), ("pairs", PAIRS, t5)]


@pytest.mark.parametrize("method", ["sinkd", "kd"])
@pytest.mark.parametrize(("form", "data", "pair"), FORMS, ids=[form[0] for form in FORMS])
def test_a_run_from_tensors_to_the_table(method, form, data, pair, tmp_path):
    torch.manual_seed(0)
    teacher, student = pair(2), pair(1)
    fields = {"teacher": teacher, "student": student, "compare_alone": False, "keep": "best", "evaluations": 2}
    result = sh.distil(method, data=data, out=tmp_path / "run", **fields, **FAST)
    names = {"accuracy", "nll", "perplexity", "agreement", "mean_total_variation"}
    assert {f"test/student/{name}" for name in names} <= result.metrics.keys()
    assert result.metrics["test/student/perplexity"] > 1
    assert result.tables[0].columns[1:3] == ["test accuracy", "test perplexity"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in rows if "validation/perplexity" in row][-1]["validation/perplexity"] > 1
    if method == "sinkd":
        assert "over the labelled positions of each process" in " ".join(result.notes)
    if form == "pairs":
        test = load_data(data).split("test")
        batch = test.batch(range(len(test)))
        theirs = result.student.eval()(**batch.inputs, labels=batch.labels).loss
        assert result.metrics["test/student/nll"] == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize(("data", "pair"), [(TEXTS, gpt2), (PAIRS, t5), (TAGGED, lambda _: Table(3))])
def test_plain_training_learns(data, pair):
    torch.manual_seed(0)
    slow = sh.distil("supervised", model=pair(1), data=data, **{**FAST, "epochs": 0.1}, optimizer={"lr": 1e-5})
    quick = sh.distil("supervised", model=pair(1), data=data, **{**FAST, "epochs": 12}, optimizer={"lr": 2e-2})
    assert quick.metrics["test/nll"] < slow.metrics["test/nll"] - 0.5


def test_cached_outputs_of_a_teacher_of_positions_train_the_same_student():
    torch.manual_seed(0)
    fields = {"data": TEXTS, "teacher": gpt2(2), "student": gpt2(1), "compare_alone": False, **FAST}
    plain, cached = (sh.distil("kd", **fields, cache_teacher=cache) for cache in (False, True))
    for a, b in zip(plain.student.parameters(), cached.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": TEXTS, "teacher": Table(7), "student": Table()}, "the teacher has 7 outputs and the student 11"),
        ({"data": TEXTS, "teacher": t5(1), "student": t5(1)}, "whose batches need 'labels' or 'decoder_input_ids'"),
        ({"data": TEXTS, "teacher": Table(), "student": Table(), "gather": True}, "so sequences are not gathered"),
        (
            {"data": {"input_ids": IDS, "labels": IDS[:, :4]}, "teacher": Table(), "student": Table()},
            "and labels of shape (8, 4) do not belong together; they are (batch, positions, vocabulary)",
        ),
    ],
    ids=["outputs", "no labels", "gather", "shapes"],
)
def test_one_sentence_for_what_is_wrong(fields, message):
    with pytest.raises(UserError) as caught:
        sh.distil("sinkd", **fields, compare_alone=False, **FAST)
    assert message in str(caught.value)
