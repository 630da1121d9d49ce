"""ND loss: the teacher's class means, the projector, the growing KD term, bad input. The loss itself: tests/losses."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.errors import UserError
from stillhouse.methods.knowledge.nd_loss import Directions, NDLoss, class_means
from stillhouse.methods.wiring import Reader, Wiring
from stillhouse.models import ModelSpec

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [8, 8]}, "epochs": 1}
SMALL = {"data": "digits", "teacher": TEACHER, "student": {"kind": "cnn", "channels": [4, 4]}, "epochs": 2}


def wired(tmp_path, method, widths):
    run = Run(method, RunDirectory(tmp_path / "run"), data=load_data("digits"))
    torch.manual_seed(0)
    teacher, student = (ModelSpec.parse({"kind": "cnn", "channels": [w]}).build(run.data.facts).eval() for w in widths)
    return run, teacher, student, Wiring(method.objectives, student, {"teacher": teacher}, run)


def test_class_means_are_those_of_numpy(tmp_path):
    run, teacher, _, _ = wired(tmp_path, NDLoss(**SMALL), (6, 6))
    train = run.data.split("train")
    with torch.no_grad():
        found = class_means(Reader(teacher, classifier="classifier"), train, run)
        rows = teacher.features(train.tensors["pixel_values"]).numpy()
    labels = train.labels.numpy()
    for label in range(10):
        assert np.allclose(found["means"][label], rows[labels == label].mean(0), atol=1e-5)
        assert found["counts"][label] == (labels == label).sum()


def test_directions_are_unit_and_their_scale_does_not_matter():
    means, counts = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1, 1])
    one, other = Directions(2, 2), Directions(2, 2)
    one.fill(means, counts)
    other.fill(7 * means, counts)
    assert torch.allclose(one.rows, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert torch.allclose(one.rows, other.rows)
    with pytest.raises(UserError, match="no sample of the class 1"):
        one.fill(means, torch.tensor([1, 0]))
    with pytest.raises(UserError, match="is 0, which has no direction"):
        one.fill(0 * means, counts)


def test_the_projector_is_there_only_where_widths_differ(tmp_path):
    *_, wiring = wired(tmp_path, NDLoss(**SMALL), (6, 6))
    assert isinstance(wiring.parts[0][0]["projector"], nn.Identity)
    assert set(wiring.trains()) == {"student"}
    *_, wiring = wired(tmp_path, NDLoss(**SMALL), (6, 4))
    layers = wiring.parts[0][0]["projector"].layers
    assert [type(layer) for layer in layers] == [nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert layers[1].p == 0.5
    assert not layers[2].bias.any()
    assert set(wiring.trains()) == {("student", "projector")}
    with pytest.raises(
        UserError, match="the student's embedding has 4 numbers and the teacher's 6; set projector=true"
    ):
        wired(tmp_path, NDLoss(**SMALL, projector=False), (6, 4))


def test_the_term_is_the_formula_and_leaves_the_teacher_and_the_classifier_alone(tmp_path):
    method = NDLoss(**SMALL)
    run, teacher, student, wiring = wired(tmp_path, method, (6, 6))
    directions = wiring.parts[0][0]["directions"]
    torch.manual_seed(1)
    directions.fill(torch.randn(10, 6), torch.ones(10))
    batch = run.data.split("train").batch(range(32))
    term = wiring.terms(Modules(student=student, teacher=teacher), batch)["nd"]()
    z, f = student.features(batch["pixel_values"]), teacher.features(batch["pixel_values"])
    expected = 0.0
    for zi, fi, y in zip(z, f, batch.labels, strict=True):
        expected = expected + 1 - zi @ directions.rows[y] / max(zi.norm(), fi.norm())
    torch.testing.assert_close(term, expected / 32)
    term.backward()
    assert student.classifier.weight.grad is None
    assert student.blocks[0].conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_kd_grows_by_the_epoch_from_exactly_nothing(tmp_path):
    ramp = {"start": 0.0, "end": 1.0, "until": 0.5, "by": "epoch"}
    also = [{"kind": "kd", "weight_soft": ramp}]
    fields = {**SMALL, "epochs": 4, "also": also, "compare_alone": False}
    result = sh.distil("nd-loss", **fields, out=tmp_path / "run", settings={"log_every": 1, "threads": 1})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "student" and "loss/nd" in row]
    per_epoch = len(rows) // 4
    assert all("loss/kd.soft" not in row for row in rows[:per_epoch])
    scales = [row.get("loss/kd.soft/scale", row["loss/kd.soft"]) / row["loss/kd.soft"] for row in rows[per_epoch:]]
    assert scales == pytest.approx([0.5] * per_epoch + [1.0] * 2 * per_epoch)
    assert all(row["loss/nd/scale"] == pytest.approx(2 * row["loss/nd"]) for row in rows)
    assert {"test/embedding_norm", "test/embedding_norm_ratio", "test/embedding_cosine"} <= set(result.metrics)
    assert list(result.artefacts) == ["student"]


def test_without_kd_beside_it_and_as_an_objective_beside_others():
    alone = sh.distil("nd-loss", **SMALL, also=[], compare_alone=False)
    beside = sh.distil("sinkd", **SMALL, also=["nd-loss"], compare_alone=False)
    assert -1 <= alone.metrics["test/embedding_cosine"] <= 1
    assert -1 <= beside.metrics["test/embedding_cosine"] <= 1


def test_the_defaults_are_the_papers():
    method = NDLoss()
    assert (method.weight_nd, method.dropout, method.weight_ce, method.form) == (2.0, 0.5, 1.0, "norm-direction")
    (kd,) = method.also
    assert (kd.name, kd.temperature) == ("kd", 4.0)
    assert (kd.weight_soft.start, kd.weight_soft.end, kd.weight_soft.by) == (0.0, 1.0, "epoch")
    assert kd.weight_soft.until * method.epochs == pytest.approx(20)
    assert method.optimizer.nesterov


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weight_nd": -1}, "weight_nd.*a weight is 0 or more"),
        ({"cache_teacher": True}, "'nd-loss' reads the teacher's features"),
        ({"batch_size": 1}, "nd-loss: the projector's batch norm has no statistics of one sample"),
        ({"data": (torch.randn(60, 4), torch.randn(60)), "teacher": "mlp:4", "student": "mlp:4"}, "reads class labels"),
    ],
)
def test_bad_input(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        sh.distil("nd-loss", **{**SMALL, **fields})


def test_the_distillation_token_of_deit_is_an_embedding_as_any_other(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    config.num_channels, config.num_labels = 1, 10
    student = transformers.DeiTForImageClassificationWithTeacher(config)
    fields = {**SMALL, "student": student, "student_classifier": "distillation_classifier", "compare_alone": False}
    result = sh.distil("nd-loss", **fields, settings={"threads": 1})
    moved = dict(result.student.named_parameters())
    assert not torch.equal(moved["distillation_classifier.weight"], student.distillation_classifier.weight)
    batch = load_data("digits").split("test").batch(range(50))
    with torch.no_grad():
        seen = result.student.eval()(pixel_values=batch["pixel_values"])
    torch.testing.assert_close(seen.logits, (seen.cls_logits + seen.distillation_logits) / 2)
    assert result.metrics["test/embedding_norm"] > 0
