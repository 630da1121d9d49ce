"""SLA: joint labels, aggregation and self-distillation exact to the paper's equations, and what ships."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stillhouse as sh
from stillhouse.data import Batch, load_data
from stillhouse.engine import Modules
from stillhouse.errors import UserError
from stillhouse.methods.knowledge.sla import SLA, Heads, aggregated
from stillhouse.methods.wiring import Reader
from stillhouse.models import fingerprint, load
from stillhouse.modules.joint_head import JointHead
from stillhouse.modules.views import Views
from stillhouse.recipe import load_recipe

STUDENT = {"kind": "cnn", "channels": [4, 6]}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
SMALL = {
    "data": {"kind": "digits", "train_size": 120},
    "student": STUDENT,
    "optimizer": SGD,
    "batch_size": 30,
    "epochs": 2,
    "compare_alone": False,
    "settings": {"threads": 1},
}


class Net(nn.Module):
    def __init__(self, classes=5, channels=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.fixture
def heads():
    made = []

    def make(method, net=None):
        torch.manual_seed(0)
        net = net or Net().double()
        joint = JointHead(8, 5, method.transformations, net.fc).double() if method.joint else None
        second = nn.Linear(8, method.transformations.count).double() if method.mode == "mt" else None
        made.append(Heads(net, "fc", Reader(net, classifier="fc"), 5, joint, second))
        return made[-1]

    yield make
    for one in made:
        one.reader.close()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return Batch(pixel_values=torch.randn(6, 3, 8, 8, dtype=torch.float64), labels=torch.tensor([0, 4, 2, 2, 1, 3]))


def test_the_terms_are_the_papers_written_as_loops(heads, batch):
    method = SLA(mode="sla+sd", temperature=3.0)
    h = heads(method)
    terms = method.whole(h, batch)
    x, y = batch["pixel_values"], batch.labels
    joint, agg = [], torch.zeros(6, 5, dtype=torch.float64)
    for b in range(6):
        for j in range(4):
            scores = h.joint.linear(h.student.body(torch.rot90(x[b : b + 1], j, (2, 3))))[0]
            joint.append(-scores.log_softmax(0)[y[b] * 4 + j])
            for i in range(5):
                agg[b, i] += scores[i * 4 + j] / 4
    u = h.student(x)
    torch.testing.assert_close(terms["joint"], torch.stack(joint).mean())
    torch.testing.assert_close(terms["ce"], F.cross_entropy(u, y))
    kl = F.kl_div((u / 3).log_softmax(1), (agg / 3).softmax(1), reduction="batchmean") * 9
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(method.aggregate(h)(batch), agg)
    large = SLA(mode="sla+sd", temperature=3.0, large=True).whole(h, batch)
    torch.testing.assert_close(large["joint"], 4 * terms["joint"])
    assert torch.equal(large["ce"], terms["ce"])
    assert torch.equal(large["kl"], terms["kl"])


def test_the_baselines(heads, batch):
    x, y = batch["pixel_values"], batch.labels
    views = torch.stack([torch.rot90(x, j, (2, 3)) for j in range(4)], 1).flatten(0, 1)
    h = heads(SLA(mode="mt"))
    base, da, mt = (
        SLA(mode=mode).whole(h if mode == "mt" else heads(SLA(mode=mode), h.student), batch)
        for mode in ("base", "da", "mt")
    )
    assert set(base) == {"ce"} == set(da)
    torch.testing.assert_close(base["ce"], F.cross_entropy(h.student(x), y))
    torch.testing.assert_close(da["ce"], F.cross_entropy(h.student(views), y.repeat_interleave(4)))
    torch.testing.assert_close(mt["ce"], da["ce"])
    torch.testing.assert_close(mt["view"], F.cross_entropy(h.second(h.student.body(views)), torch.arange(4).repeat(6)))


def test_the_distillation_reaches_the_single_head_and_never_the_joint_one(heads, batch):
    method = SLA(mode="sla+sd")
    h = heads(method)
    method.whole(h, batch)["kl"].backward()
    assert all(p.grad is None or not p.grad.any() for p in h.joint.parameters())
    assert h.student.fc.weight.grad.abs().sum() > 0
    assert h.student.body[0].weight.grad.abs().sum() > 0
    h.student.zero_grad()
    method.whole(h, batch)["joint"].backward()
    assert h.student.fc.weight.grad is None or not h.student.fc.weight.grad.any()
    assert h.joint.linear.weight.grad.abs().sum() > 0


def test_single_inference_is_the_posterior_given_the_identity(heads, batch):
    method = SLA(mode="sla")
    h = heads(method)
    nn.init.normal_(h.joint.linear.weight)
    scores = h.joint(h.student.body(batch["pixel_values"])).softmax(1).view(6, 5, 4)[:, :, 0]
    torch.testing.assert_close(method.single(h)(batch).softmax(1), scores / scores.sum(1, keepdim=True))
    h.joint.write_first_view(h.single)
    torch.testing.assert_close(h.student(batch["pixel_values"]), method.single(h)(batch))


def test_all_views_say_what_one_does_where_nothing_depends_on_the_view(heads, batch):
    method = SLA(mode="sla")
    net = Net().double()
    net.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8)).double()
    h = heads(method, net)
    with torch.no_grad():
        h.joint.linear.weight.copy_(h.single.weight.repeat_interleave(4, 0))
        h.joint.linear.bias.copy_(h.single.bias.repeat_interleave(4, 0))
    torch.testing.assert_close(method.aggregate(h)(batch), method.single(h)(batch))


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("mode", ["sla", "sla+sd"])
@pytest.mark.parametrize("large", [False, True])
def test_views_a_few_at_a_time_give_the_same_gradients(heads, batch, at_once, mode, large):
    whole = SLA(mode=mode, large=large, temperature=2.0)
    pieces = SLA(mode=mode, large=large, temperature=2.0, views_at_once=at_once)
    h = heads(whole)
    parameters = [*h.student.parameters(), *h.joint.parameters()]
    terms = whole.whole(h, batch)
    total = sum(terms.values())
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    summed = {}
    for piece in pieces.loss_of(h)(Modules(), batch, None):
        sum(piece.values()).backward()
        for name, value in piece.items():
            summed[name] = summed.get(name, 0) + value.detach()
    assert set(summed) == set(terms)
    for name, value in terms.items():
        # The divergence computes the target in float32 where it is collected view by view.
        torch.testing.assert_close(summed[name].double(), value.detach().double(), rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def trained(**fields):
    return sh.distil("sla", **{**SMALL, **fields})


def test_with_the_identity_alone_it_is_plain_training_bit_for_bit():
    alone = {"kind": "rotation", "turns": [0]}
    plain, joint = trained(mode="base"), trained(mode="sla", transformations=alone)
    for a, b in zip(plain.student.parameters(), joint.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["base", "da", "mt", "sla", "sla+sd"])
def test_every_mode_ships_a_plain_network(mode, tmp_path):
    result = trained(mode=mode, out=tmp_path / "run")
    assert list(result.artefacts) == ["student"]
    again = load(tmp_path / "run" / "result" / "student")
    assert fingerprint(again) == fingerprint(result.student)
    assert [len(again(torch.randn(2, 1, 8, 8))[0])] == [10]
    assert result.metrics["test/accuracy"] == result.metrics["test/single/accuracy"]
    assert ("test/aggregated/accuracy" in result.metrics) == mode.startswith("sla")
    split = load_data(SMALL["data"]).split("test").batch(range(100))
    found = result.single(split["pixel_values"])
    assert torch.equal(found, again(split["pixel_values"]))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {key.split("/")[1] for row in logged for key in row if key.startswith("loss/")}
    expected = {"base": {"ce"}, "da": {"ce"}, "mt": {"ce", "view"}, "sla": {"joint"}, "sla+sd": {"joint", "ce", "kl"}}
    assert expected[mode] <= names


def test_the_joint_head_ships_when_asked_and_aggregates_again(tmp_path):
    result = trained(inference="aggregated", transformations="rotation2", out=tmp_path / "run")
    assert set(result.artefacts) == {"student", "joint"}
    assert result.metrics["test/accuracy"] == result.metrics["test/aggregated/accuracy"]
    test = load_data(SMALL["data"]).split("test").batch(range(359))
    found = result.aggregate(test["pixel_values"])
    accuracy = float((found.argmax(1) == test.labels).float().mean())
    assert accuracy == pytest.approx(result.metrics["test/accuracy"], abs=1e-6)
    home = tmp_path / "run" / "result"
    student, joint = load(home / "student"), JointHead.load(home / "joint")
    again = aggregated(student, joint, test["pixel_values"], classifier="classifier")
    torch.testing.assert_close(again, found)
    assert not any(module._forward_hooks for module in student.modules())
    with pytest.raises(UserError, match="was trained with the transformations"):
        JointHead.load(home / "joint", Views.parse("rotation"))


def test_a_run_in_pieces_says_so_and_trains(tmp_path):
    result = trained(views_at_once=1, out=tmp_path / "run")
    assert any("batch norms saw 1 of the 4 views" in note for note in result.notes)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = trained()
    assert result.metrics["test/accuracy"] != 0
    assert any(math.isfinite(value) for row in rows for key, value in row.items() if key.endswith("/joint"))
    assert fingerprint(whole.student) != fingerprint(result.student), "batch norms see other batches"


def test_series_and_vectors_learn_from_being_reversed():
    torch.manual_seed(0)
    x = torch.randn(120, 1, 16).cumsum(-1)
    y = (x[:, 0, -1] > x[:, 0, 0]).long()
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    fields = {k: v for k, v in SMALL.items() if k not in ("data", "student")}
    data = {"features": x, "labels": y}
    result = sh.distil("sla", **fields, data=data, student=net, transformations="reverse", inference="aggregated")
    assert result.aggregate({"features": x[:3]}).shape == (3, 2)
    result = sh.distil("sla", **fields, data=data, student=net, transformations=[lambda t: t, lambda t: -t])
    assert 0 <= result.metrics["test/accuracy"] <= 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"transformations": "colors"}, "Orders of 3 channels need inputs with 3, not 1"),
        ({"transformations": [lambda t: t.flip(-1)]}, "list the identity first"),
        ({"transformations": {"kind": "rotation", "turns": []}}, "transformations.turns"),
        ({"temperature": 0}, "temperature"),
        ({"views_at_once": 0}, "views_at_once"),
        ({"mode": "sd"}, "mode"),
        ({"mode": "da", "inference": "aggregated"}, "the mode 'da' has no joint head"),
        ({"mix": "mixup"}, "a joint label is of one class"),
        (
            {"student": {"kind": "cnn", "channels": [4], "num_outputs": 7}},
            "a label is [789], but the student tells 7 classes",
        ),
        ({"student_classifier": "clasifier"}, "student_classifier.*did you mean 'classifier'"),
        ({"student_classifier": "blocks", "mode": "sla"}, "'blocks' is a Sequential"),
    ],
)
def test_bad_input_is_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        trained(**fields)
    assert "\n" not in str(caught.value)


def test_images_that_are_not_square_and_data_without_classes():
    x, y = torch.rand(60, 1, 8, 6), torch.arange(60) % 3
    fields = {k: v for k, v in SMALL.items() if k != "data"}
    with pytest.raises(UserError, match="A quarter turn needs square images, not 8 x 6"):
        sh.distil("sla", **fields, data=(x, y))
    assert sh.distil("sla", **fields, data=(x, y), transformations="rotation2").metrics
    with pytest.raises(UserError, match="sla reads class labels"):
        sh.distil("sla", **fields, data=(x, y + 0.5), mode="base")


def test_a_head_of_another_width_is_refused(heads, batch):
    h = heads(SLA(mode="sla", transformations="rotation2"))
    with pytest.raises(UserError, match="has 10 outputs, and 5 classes in 4 views are 20"):
        SLA(mode="sla").whole(h, batch)


def test_the_best_weights_are_those_of_the_asked_inference(tmp_path):
    result = trained(epochs=3, keep="best", evaluations=3, inference="aggregated", out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [row["validation/accuracy"] for row in rows if "validation/accuracy" in row]
    assert len(seen) >= 3
    assert result.metrics["validation/accuracy"] == max(seen)


def test_defaults_are_the_papers():
    method = SLA()
    assert (method.temperature, method.weight_kl, method.weight_ce, method.weight_joint) == (1.0, 1.0, 1.0, 1.0)
    assert (method.batch_size, method.large, method.transformations.count) == (128, False, 4)
    optimizer = method.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.nesterov) == (0.1, 0.9, 1e-4, False)
    assert optimizer.milestones == (0.5, 0.75)


def test_batches_may_be_drawn_anew_as_released(tmp_path):
    images, labels = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    data = {"train": (images, labels), "test": (images[:8], labels[:8])}
    fields = {"data": data, "student": "cnn:4", "batch_size": 10, "epochs": 2, "compare_alone": False}
    found = {}
    for draws in ("passes", "anew"):
        result = sh.distil("sla", **fields, draws=draws, out=tmp_path / draws, settings={"threads": 1})
        found[draws] = torch.cat([p.flatten() for p in result.student.parameters()])
    assert not torch.equal(found["passes"], found["anew"])
    assert SLA().draws == "passes"
    assert load_recipe("sla/paper").method.draws == "anew"
