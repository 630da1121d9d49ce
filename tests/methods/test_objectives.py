"""Objectives side by side, several teachers, layers and parts; and the teacher's outputs, stored in full or in part."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse as sh
from stillhouse.data import Augment, load_data
from stillhouse.engine import Modules, Paper, Run, RunDirectory, Weight
from stillhouse.errors import UserError
from stillhouse.methods.distillation import KnowledgeDistillation
from stillhouse.methods.knowledge.kd import KD
from stillhouse.methods.teacher_outputs import TeacherCache, TeacherOutputs, dense, sparse
from stillhouse.methods.wiring import Wiring
from stillhouse.models import ModelSpec
from stillhouse.recipe import build_recipe

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [8, 8]}, "epochs": 1}
SMALL = {"data": "digits", "teacher": TEACHER, "student": {"kind": "cnn", "channels": [4, 4]}, "epochs": 1}


class Hint(KnowledgeDistillation):
    """The features of each stage through a projector, and the embedding's length: every kind of read at once."""

    name = "hint"
    family = "knowledge"
    paper = Paper("none", 2026)
    summary = "for tests"
    reads = frozenset({"labels", "features", "embedding"})

    weight_hint: Weight = 2.0
    weight_length: Weight = 0.5

    def parts(self, pair, run):
        channels = [(s.shape[1], t.shape[1]) for s, t in zip(pair.student.features, pair.teacher.features, strict=True)]
        return {"projector": nn.ModuleList(nn.Conv2d(s, t, 1) for s, t in channels)}

    def terms(self, pair, run):
        def hint():
            mine = [p(f) for p, f in zip(pair.parts["projector"], pair.student.features, strict=True)]
            return sum(F.mse_loss(a, b) for a, b in zip(mine, pair.teacher.features, strict=True))

        return {"hint": hint, "length": lambda: (pair.student.embedding.norm(dim=1).mean() - 1) ** 2}


@pytest.fixture
def started(tmp_path):
    def make(method):
        run = Run(method, RunDirectory(tmp_path / "run"), data=load_data("digits"))
        torch.manual_seed(0)
        facts = run.data.facts
        nets = [ModelSpec.parse({"kind": "cnn", "channels": c}).build(facts) for c in ([8, 8], [4, 4])]
        teacher = nets[0].eval().requires_grad_(False)
        return run, teacher, nets[1].eval(), run.data.split("train").batch(range(16))

    return make


def test_each_network_runs_once_for_all_objectives_and_the_terms_are_those_of_each_alone(started):
    method = KD(**SMALL, also=(Hint(),))
    run, teacher, student, batch = started(method)
    wiring = Wiring(method.objectives, student, {"teacher": teacher}, run)
    m = Modules(student=student, teacher=teacher)
    calls = []
    student.register_forward_hook(lambda *_: calls.append("student"))
    teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    terms = wiring.terms(m, batch)
    assert calls == ["student"]
    assert set(terms) == {"ce", "soft", "hint.hint", "hint.length"}
    values = {name: term() for name, term in terms.items()}
    assert calls == ["student", "teacher"]
    assert wiring.weights() == {"ce": 0.1, "soft": 0.9, "hint.hint": 2.0, "hint.length": 0.5}

    images = batch["pixel_values"]
    x, features = images, []
    for block in student.blocks:
        x = block(x)
        features.append(x)
    assert torch.allclose(values["hint.length"], (x.mean((2, 3)).norm(dim=1).mean() - 1) ** 2)
    soft = 16 * F.kl_div(
        F.log_softmax(student(images) / 4, -1),
        F.log_softmax(teacher(images) / 4, -1),
        log_target=True,
        reduction="batchmean",
    )
    assert torch.allclose(values["soft"], soft)
    values["hint.hint"].backward()
    assert all(p.grad is not None for p in wiring.parts[1][0]["projector"].parameters())
    assert all(p.grad is None for p in teacher.parameters())
    wiring.close()
    assert not any(module._forward_hooks for module in student.blocks)


def test_a_run_with_several_objectives_ships_the_student_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("stillhouse.methods.distillation.method_class", lambda name: {"hint": Hint, "kd": KD}[name])
    result = sh.distil("kd", **SMALL, also=["hint"], compare_alone=False, out=tmp_path / "run", settings={"threads": 1})
    assert list(result.artefacts) == ["student"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "loss/soft" in row)
    assert {"loss/ce", "loss/soft", "loss/hint.hint", "loss/hint.length"} <= set(first)
    assert first["loss/hint.hint/scale"] == pytest.approx(2 * first["loss/hint.hint"])
    keys = ModelSpec.parse(SMALL["student"]).build(load_data("digits").facts).state_dict().keys()
    assert result.student.state_dict().keys() == keys


def test_objectives_are_written_back_as_they_were_given(monkeypatch):
    monkeypatch.setattr("stillhouse.methods.distillation.method_class", lambda name: {"hint": Hint, "kd": KD}[name])
    recipe = build_recipe({"method": "sinkd", "also": ["hint", {"kind": "kd", "temperature": 2.0}]})
    dumped = recipe.dump()
    assert dumped["also"] == [
        {"kind": "hint", "weight_hint": 2.0, "weight_length": 0.5},
        {"kind": "kd", "temperature": 2.0, "divergence": "kl", "weight_soft": 0.9},
    ]
    assert build_recipe(dumped).dump() == dumped


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"also": ["nonsense"]}, "also.*there is no method 'nonsense'"),
        ({"also": ["supervised"]}, "also.*'supervised' trains in stages of its own"),
        ({"also": ["kd"]}, "'kd' is there twice"),
        ({"also": [{"kind": "sinkd", "epochs": 3}]}, "sinkd: 'epochs' belongs to the recipe as a whole"),
        (
            {"also": [{"kind": "sinkd", "temprature": 3}]},
            "sinkd: 'temprature' is no field of it; did you mean 'temperature'",
        ),
        ({"also": [{"kind": "sinkd", "epsilon": -1}]}, "also.*epsilon"),
        ({"also": [3]}, "an objective is the name of a method"),
        (
            {"also": [Hint()], "cache_teacher": True},
            "'hint' reads the teacher's features, and only its logits are stored",
        ),
        ({"cache_teacher": {"views": 3}}, "without an augmentation all views of a sample are alike"),
        ({"teacher": [TEACHER, TEACHER], "ensemble": "probabilities", "also": [Hint()]}, "which have no mean"),
        ({"teacher": [TEACHER, TEACHER], "teacher_weights": [1.0]}, "there are 2 teachers and 1 weights"),
        ({"teacher": [TEACHER, TEACHER], "teacher_weights": [0, 0]}, "weights are 0 or more"),
        ({"also": ["sinkd"], "accumulate": 2}, "couples the samples of a batch"),
        ({"also": [Hint()], "student_layers": ["blocks.7"]}, "student_layers: CNN has no module 'blocks.7'"),
        (
            {"also": [Hint()], "student_layers": ["blocks.0"], "teacher_layers": ["blocks.0", "blocks.1"]},
            "student_layers names 1 layers and teacher_layers 2",
        ),
        ({"student_layers": ["blocks.0"]}, "student_layers: 'kd' reads no layers of the student; leave it out"),
        (
            {"teacher_layers": ["blocks.0"], "also": ["rkd"]},
            "teacher_layers: 'kd' and 'rkd' read no layers of the teacher",
        ),
        ({"student_classifier": "classifier"}, "student_classifier: 'kd' reads no embedding of the student"),
        ({"teacher_classifier": "classifier", "also": ["dhkd"]}, "'kd' and 'dhkd' read no embedding of the teacher"),
        (
            {"also": ["sp"], "student_layers": ["blocks.0", "blocks.1"]},
            "student_layers: 'sp' reads one layer, so name one",
        ),
        ({"also": ["trg"], "teacher_layers": ["blocks.0", "blocks.1"]}, "teacher_layers: 'trg' reads one layer"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        sh.distil("kd", **{**SMALL, **fields}, compare_alone=False)


def test_objectives_that_mix_exclude_each_other_and_the_cache():
    class Mixing(Hint):
        name = "mixing"
        mixes = True
        reads = frozenset()

    class Other(Mixing):
        name = "other"

    with pytest.raises(ValueError, match="'mixing' and 'other' both mix the samples"):
        Mixing(also=(Other(),))
    with pytest.raises(
        ValueError, match="'mixing' mixes the samples of a batch, so no two steps ask the teacher the same"
    ):
        Mixing(cache_teacher=True)


def test_class_labels_are_asked_for_where_they_are_read():
    x = torch.randn(60, 3)
    with pytest.raises(UserError, match="hint reads class labels, which the data"):
        sh.distil("kd", data=(x, x[:, 0]), student="mlp:4", teacher="mlp:4", also=(Hint(),), epochs=1)


def test_teachers_have_weights_and_may_agree_before_the_loss(started):
    two = {**SMALL, "teacher": [TEACHER, TEACHER], "teacher_weights": [3.0, 1.0]}
    method = KD(**two)
    run, teacher, student, batch = started(method)
    other = ModelSpec.parse({"kind": "cnn", "channels": [6]}).build(run.data.facts).eval().requires_grad_(False)
    m = Modules({"student": student, "teacher-0": teacher, "teacher-1": other})
    teachers = {"teacher-0": teacher, "teacher-1": other}
    x = batch["pixel_values"]

    def soft(logits):
        return 16 * F.kl_div(
            F.log_softmax(student(x) / 4, -1), F.log_softmax(logits / 4, -1), log_target=True, reduction="batchmean"
        )

    mean = Wiring(method.objectives, student, teachers, run).terms(m, batch)["soft"]()
    assert torch.allclose(mean, 0.75 * soft(teacher(x)) + 0.25 * soft(other(x)), rtol=1e-3)
    method = KD(**two, ensemble="probabilities")
    agreed = Wiring(method.objectives, student, teachers, run).terms(m, batch)["soft"]()
    mixture = (0.75 * teacher(x).softmax(-1) + 0.25 * other(x).softmax(-1)).log()
    assert torch.allclose(agreed, soft(mixture), rtol=1e-3)


# Stored outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_kept_distribution_is_within_its_bound(temperature):
    torch.manual_seed(0)
    full = 3 * torch.randn(50, 20, dtype=torch.float64)
    kept, mass = sparse(full, 5, temperature)
    again = dense(kept, 20)
    p, q = (x.double().div(temperature).softmax(-1) for x in (full, again))
    top = full.topk(5).indices
    assert torch.allclose(p.gather(1, top), q.gather(1, top), atol=1e-6)
    assert torch.allclose(mass.double(), 1 - p.gather(1, top).sum(1), atol=1e-6)
    variation = (p - q).abs().sum(1) / 2
    assert (variation <= mass + 1e-6).all()
    assert variation.max() > 0.01


def test_outputs_are_looked_up_by_sample_and_view():
    logits = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    module = TeacherOutputs({"logits": logits}, 4)
    index, view = torch.tensor([2, 0]), torch.tensor([1, 0])
    assert torch.equal(module(index), logits[0, [2, 0]])
    assert torch.equal(module(index, view), torch.stack([logits[1, 2], logits[0, 0]]))


def test_fixed_views_are_those_that_the_teacher_was_asked_about(tmp_path):
    """Student and stored outputs meet the same view of each sample: the loss is that of asking the teacher anew."""
    data = load_data("digits")
    torch.manual_seed(0)
    teacher = ModelSpec.parse({"kind": "cnn", "channels": [4]}).build(data.facts).eval()
    seen = []

    class Watching(KD):
        name = "kd"

        def terms(self, pair, run):
            with torch.no_grad():
                seen.append((teacher(pair.batch["pixel_values"]) - pair.teacher.logits).abs().max())
            return super().terms(pair, run)

    fields = {"teacher": teacher, "student": SMALL["student"], "epochs": 3, "compare_alone": False}
    method = Watching(**fields, augment="shift", cache_teacher={"views": 2})
    directory = RunDirectory(tmp_path / "run")
    Run(method, directory, data=data).execute()
    assert len(seen) > 30
    assert max(seen) < 1e-4
    store = tmp_path / "store"
    assert not store.exists()


def test_every_method_and_seed_shares_one_computation(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    said = []

    class Ear:
        def __getattr__(self, name):
            return (lambda sentence: said.append(sentence)) if name == "say" else (lambda *_: None)

    shared = {**SMALL, "cache_teacher": {"top": 3, "temperature": 4.0}, "compare_alone": False}
    runs = [("kd", 0), ("kd", 1), ("sinkd", 0)]
    results = [sh.distil(name, **shared, seed=seed, listener=Ear()) for name, seed in runs]
    computed = [sentence for sentence in said if "computed once" in sentence]
    assert len(computed) == 1
    # 3 logits of 4 bytes, their places of 8, one number for the rest.
    samples = len(load_data("digits").split("train"))
    assert f"{samples:,} samples are computed once; they take {samples * 40 / 2**20:.3g} MB" in computed[0]
    assert all(any("differ by at most" in note for note in result.notes) for result in results)


def test_a_silly_store_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(
        UserError, match=r"would take .* more than the limit of 1e-06 GB; keep fewer with cache_teacher.top"
    ):
        sh.distil("kd", **SMALL, cache_teacher={"limit": 1e-6}, cache=False)
    with pytest.raises(UserError, match="teacher has 10 outputs, so there is nothing to leave out with top=10"):
        sh.distil("kd", **SMALL, cache_teacher={"top": 10}, cache=False)


def test_sizes_are_exact():
    assert TeacherCache().size(100, 1, 10) == 100 * 10 * 4
    assert TeacherCache(top=2, views=3).size(100, 7, 1000) == 100 * 3 * 7 * (2 * 12 + 4)


def test_views_of_pixels_are_drawn_by_a_counter():
    pixels = torch.rand(6, 1, 8, 8)
    for kind in ("shift", "crop-flip"):
        augment = Augment.parse(kind)
        index = torch.tensor([5, 3, 9, 9, 0, 7])
        first = augment.fixed(pixels, index, 0)
        torch.manual_seed(7)
        assert torch.equal(augment.fixed(pixels, index, 0), first)
        order = torch.tensor([4, 2, 0, 5, 1, 3])
        assert torch.equal(augment.fixed(pixels[order], index[order], 0), first[order])
        assert not torch.equal(augment.fixed(pixels, index, 1), first)
    with pytest.raises(UserError, match="'kornia' draws for a batch as a whole"):
        Augment.parse("kornia:RandomHorizontalFlip").fixed(pixels, index, 0)


def test_the_counter_draws_evenly():
    from stillhouse.data.augment import counted

    drawn = counted(torch.arange(30000), 2)(9, 2)
    assert drawn.min() == 0
    assert drawn.max() == 8
    counts = torch.bincount(drawn[:, 0], minlength=9).double()
    assert ((counts - 30000 / 9).abs() < 5 * (30000 / 9) ** 0.5).all()
    joint = torch.bincount(9 * drawn[:, 0] + drawn[:, 1], minlength=81).double()
    assert ((joint - 30000 / 81).abs() < 6 * (30000 / 81) ** 0.5).all()


def test_a_teacher_of_other_classes_teaches_features_and_stays_out_of_the_table():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    layers = {"teacher_layers": ["2"], "student_layers": ["2"], "compare_alone": False, "epochs": 1, "cache": False}
    result = sh.distil("fitnet", data="digits", teacher=teacher, student=student, **layers)
    assert [row[0] for row in result.tables[0].rows] == ["student"]
    assert "teacher has other outputs than the student, so it is not in the table" in result.notes
    assert "test/student/accuracy" in result.metrics
