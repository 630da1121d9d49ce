"""The classics: each term is the loss on features taken by hand, gradients go where they should, and what is special to each."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import stillhouse as sh
from stillhouse.data import load_data
from stillhouse.engine import Modules, Run, RunDirectory
from stillhouse.engine.optim import weight_at
from stillhouse.errors import UserError
from stillhouse.losses import feature_matching as features
from stillhouse.losses import logit_matching as logit_losses
from stillhouse.losses import relations
from stillhouse.methods.knowledge.ema_teacher import EMATeacher
from stillhouse.methods.layerwise import maps
from stillhouse.methods.wiring import Wiring
from stillhouse.models import ModelSpec
from stillhouse.modules.moving_average import MovingAverage
from stillhouse.registry import method_class

TEACHER = {"kind": "trained", "model": {"kind": "cnn", "channels": [6, 6, 10]}, "epochs": 1}
SMALL = {"data": "digits", "teacher": TEACHER, "student": {"kind": "cnn", "channels": [4, 4, 6]}, "epochs": 1}
OWN = {"crd": {"negatives": 20}, **{name: {"init_epochs": 1} for name in ("ab", "ft", "fsp")}}
NAMES = [
    *("ab", "at", "cc", "crd", "dist", "dkd", "fitnet", "fsp", "ft", "kdsvd", "mgd", "nst", "ofd", "pkt", "reviewkd"),
    *("rkd", "sp", "vid"),
]
BEFORE_THE_STUDENT = {"ab": "boundary", "fsp": "fsp"}
COUPLED = ["cc", "dist", "pkt", "rkd", "sp"]


def weights_of(name, value):
    return {
        field: value
        for field in method_class(name).model_fields
        if field.startswith("weight_") and field != "weight_ce"
    }


@pytest.fixture(scope="module")
def few():
    """64 images of 8x8 and 4 classes: a run takes moments."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 4
    part = images[:16], labels[:16]
    return {"train": (images, labels), "validation": part, "test": part}


@pytest.fixture
def wired(tmp_path):
    """A method over networks that are not trained, its preparation done but for the stages that it yields."""

    def make(name, teachers=("cnn:6-6-10",), student="cnn:4-4-6", data="digits", **fields):
        shared = {"data": data, "teacher": ["cnn"] * len(teachers), "student": "cnn"}
        method = method_class(name)(**shared, **(fields or OWN.get(name, {})))
        run = Run(method, RunDirectory(tmp_path / "run"), data=load_data(data))
        torch.manual_seed(0)
        nets = [ModelSpec.parse(spec).build(run.data.facts).eval() for spec in (student, *teachers)]
        for norm in (m for net in nets for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            # Margins and boundaries of fresh batch norms are all alike.
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, std=0.3)
        named = {"teacher" if len(nets) == 2 else f"teacher-{i}": net for i, net in enumerate(nets[1:])}
        for net in named.values():
            net.requires_grad_(False)
        wiring = Wiring(method.objectives, nets[0], named, run)
        stages = list(method.ready(wiring, 0, run))
        return method, run, wiring, Modules({"student": nets[0], **named}), stages

    return make


def batch_of(run, count=16):
    return run.data.split("train").batch(range(count))


def seeded(run):
    run.enter("student", 3, 10)
    run.place("loss", "loss", 0, 0)


def computed(method, run, wiring, m, batch):
    """The terms, or what a stage before the student's has for one."""
    seeded(run)
    if method.name in BEFORE_THE_STUDENT:
        (pair,) = wiring.pairs(m, batch)[0]
        term = BEFORE_THE_STUDENT[method.name]
        return {term: getattr(method, term)(pair)}
    return {name: term() for name, term in wiring.terms(m, batch).items() if name != "ce"}


def by_hand(net, x):
    """Features at the end of both resolutions, the same before the activation, the embedding, the logits."""
    first, second, third = net.blocks
    one = first(x)
    two = second(one)
    before = [first.norm(first.conv(x)), third.norm(third.conv(two))]
    last = third(two)
    return [one, last], before, last.mean((2, 3)), net.classifier(last.mean((2, 3)))


def expected(name, mine, theirs, batch, parts, run):
    (fs, bs, es, ls), (ft, bt, et, lt) = mine, theirs
    pairs = list(zip(fs, ft, strict=True))
    match name:
        case "dkd":
            return dict(zip(("target", "non_target"), logit_losses.dkd(ls, lt, batch.labels, 4.0), strict=True))
        case "dist":
            return dict(zip(("inter", "intra"), logit_losses.dist(ls, lt, 1.0), strict=True))
        case "fitnet":
            return {"hint": F.mse_loss(parts["regressor"](fs[0]), ft[0])}
        case "at":
            return {"at": sum(features.attention_transfer(*pair) for pair in pairs)}
        case "nst":
            return {"nst": sum(features.neuron_selectivity(*pair) for pair in pairs)}
        case "vid":
            each = zip(parts["regressors"], pairs, strict=True)
            return {"vid": sum(features.variational_information(*regressor(a), b) for regressor, (a, b) in each)}
        case "mgd":
            kept = run.rand(len(ls), 1, 2, 2) >= 0.15
            return {"mgd": (parts["generator"](fs[1], kept=kept) - ft[1]).square().sum() / len(ls)}
        case "reviewkd":
            fused = parts["fusion"]([*fs, es[:, :, None, None]])
            both = zip(fused, [*bt, et[:, :, None, None]], strict=True)
            return {"review": sum(features.hierarchical_context(*pair) for pair in both)}
        case "ofd":
            each = zip(parts["connectors"], parts["margins"], bs, bt, strict=True)
            found = [features.overhaul(connector(a), b, margins.values) for connector, margins, a, b in each]
            return {"ofd": found[0] / 2 + found[1]}
        case "ab":
            each = zip(parts["connectors"], bs, bt, strict=True)
            found = [features.activation_boundary(connector(a), b) for connector, a, b in each]
            return {"boundary": found[0] / 2 + found[1]}
        case "ft":
            return {"ft": features.factor_transfer(parts["translator"](fs[1]), parts["paraphraser"](ft[1]))}
        case "fsp" | "kdsvd":
            widened = [connector(a) for connector, a in zip(parts["connectors"], fs, strict=True)]
            return {"fsp": features.fsp(widened, ft)} if name == "fsp" else {"svd": features.kdsvd(widened, ft)}
        case "sp":
            return {"sp": relations.similarity_preserving(fs[1], ft[1])}
        case "pkt":
            return {"pkt": relations.pkt(es, et)}
        case "rkd":
            return {"distance": relations.rkd_distance(es, et), "angle": relations.rkd_angle(es, et)}
        case "cc":
            return {"cc": relations.correlation_congruence(es, et)}
        case "crd":
            embedded = parts["projector"](es), parts["teacher-projector"](et)
            return {"crd": parts["memory"](*embedded, batch.index)}


# What holds for all of them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_terms_are_the_losses_on_features_taken_by_hand(name, wired):
    method, run, wiring, m, _ = wired(name)
    batch = batch_of(run)
    found = computed(method, run, wiring, m, batch)
    seeded(run)
    mine, theirs = (by_hand(m[net], batch["pixel_values"]) for net in ("student", "teacher"))
    wanted = expected(name, mine, theirs, batch, wiring.parts[0][0], run)
    assert found.keys() == wanted.keys()
    for term, value in found.items():
        assert value > 0
        torch.testing.assert_close(value, wanted[term], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_student_and_every_part_and_never_the_teacher(name, wired):
    method, run, wiring, m, _ = wired(name)
    for part in wiring.modules().values():
        part.requires_grad_(not isinstance(part, type(wiring.modules().get("paraphraser"))))
    sum(computed(method, run, wiring, m, batch_of(run)).values()).backward()
    assert m.student.blocks[0].conv.weight.grad.abs().sum() > 0
    for part, module in wiring.modules().items():
        if part != "paraphraser":
            assert all(p.grad is not None for p in module.parameters()), part
    assert all(p.grad is None for p in m.teacher.parameters())


def beside_kd(also, data, out):
    """A short run of kd: the student's weights, and what the log has of terms."""
    fields = {**SMALL, "data": data, "batch_size": 16, "compare_alone": False, "evaluations": 1}
    settings = {"threads": 1, "log_every": 1, "gradient_shares": False}
    result = sh.distil("kd", **fields, also=also, out=out, settings=settings)
    assert list(result.artefacts) == ["student"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return result.student.state_dict(), {key for row in rows for key in row if "/" in key and "/lr" not in key}


@pytest.fixture(scope="module")
def kd_alone(few, tmp_path_factory):
    return beside_kd([], few, tmp_path_factory.mktemp("kd") / "run")


@pytest.mark.parametrize("name", NAMES)
def test_beside_kd_it_ships_the_student_alone_and_without_weight_it_is_not_there(name, few, kd_alone, tmp_path):
    own, (alone, terms) = OWN.get(name, {}), kd_alone
    absent, none = beside_kd([{"kind": name, **own, **weights_of(name, 0.0)}], few, tmp_path / "absent")
    present, more = beside_kd([{"kind": name, **own}], few, tmp_path / "present")
    assert none == terms
    assert any(f"{name}." in key or key.startswith(f"{name}-") for key in more)
    assert present.keys() == absent.keys() == alone.keys()
    assert all(torch.equal(absent[key], alone[key]) for key in alone)
    assert any(not torch.equal(present[key], alone[key]) for key in alone)


@pytest.mark.parametrize("name", NAMES)
def test_several_teachers_each_have_their_parts_and_their_share(name, wired):
    method, run, wiring, m, _ = wired(name, teachers=("cnn:6-6-10", "cnn:5-5-8"))
    batch, (first, second) = batch_of(run), wiring.links
    assert (first.weight, second.weight) == (0.5, 0.5)
    if name in BEFORE_THE_STUDENT:
        assert len(wiring.parts[0]) == 2
        return
    seeded(run)
    found = {term: value() for term, value in wiring.terms(m, batch).items() if term != "ce"}
    seeded(run)
    each = [method.terms(pair, run) for pair in wiring.pairs(m, batch)[0]]
    for term, value in found.items():
        torch.testing.assert_close(value, 0.5 * each[0][term]() + 0.5 * each[1][term]())
    parts = wiring.parts[0]
    assert all(parts[0][part] is not parts[1][part] for part in parts[0])


VIT = {"kind": "vit", "patch": 2, "dim": 16, "depth": 2, "heads": 2}
WIDER = {**VIT, "dim": 24, "depth": 4}
NO_ACTIVATION = "does not end in an activation module"
REFUSED = {
    ("ab", "vit"): NO_ACTIVATION,
    ("ofd", "vit"): NO_ACTIVATION,
    ("reviewkd", "vit"): NO_ACTIVATION,
    ("at", "mlp"): "maps of one position have no attention",
    ("nst", "mlp"): "a layer of one position has no places",
    ("ofd", "mlp"): "'blocks.0.dropout' has no batch norm before its activation",
}


@pytest.mark.parametrize("kind", ["vit", "wrn", "mlp"])
@pytest.mark.parametrize("name", NAMES)
def test_other_networks(name, kind, wired):
    table = (torch.randn(120, 5), torch.arange(120) % 3)
    given = {
        "vit": {"student": VIT, "teachers": (WIDER,)},
        "wrn": {"student": "wrn:10-1", "teachers": ("wrn:10-2",)},
        "mlp": {"student": "mlp:6-7", "teachers": ("mlp:9-8",), "data": table},
    }[kind]

    def learn():
        method, run, wiring, m, _ = wired(name, **given)
        total = sum(computed(method, run, wiring, m, batch_of(run)).values())
        total.backward()
        assert torch.isfinite(total)
        assert sum(p.grad.abs().sum() for p in m.student.parameters() if p.grad is not None) > 0

    if (name, kind) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name, kind]):
            learn()
    else:
        learn()


@pytest.mark.parametrize("name", COUPLED)
def test_gathered_samples_are_those_of_all_processes(name, wired, monkeypatch):
    method, run, wiring, m, _ = wired(name, gather=True)
    monkeypatch.setattr(run, "gather", lambda x: torch.cat([x, 0.5 * x.flip(0) + 1]))
    batch = batch_of(run)
    found = computed(method, run, wiring, m, batch)
    mine, theirs = (by_hand(m[net], batch["pixel_values"]) for net in ("student", "teacher"))
    both = [
        [[run.gather(x) for x in part] if isinstance(part, list) else run.gather(part) for part in side]
        for side in (mine, theirs)
    ]
    wanted = expected(name, *both, batch, {}, run)
    assert all(torch.allclose(found[term], wanted[term], atol=1e-6) for term in wanted)


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_samples_is_not_accumulated(name, few):
    with pytest.raises(UserError, match="couples the samples of a batch"):
        sh.distil(name, **{**SMALL, "data": few}, accumulate=2)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_recipes_name_the_same_pairs_as_kds(name):
    small = sh.load_recipe(f"{name}/small").method
    kd = sh.load_recipe("kd/small").method
    for field in ("data", "teacher", "student", "optimizer", "epochs", "batch_size"):
        assert getattr(small, field) == getattr(kd, field)
    paper = sh.load_recipe(f"{name}/paper").method
    assert (paper.epochs, paper.batch_size, paper.optimizer.lr, paper.optimizer.weight_decay) == (240, 64, 0.05, 5e-4)
    assert (paper.teacher.model.depth, paper.student.depth, paper.student.stem_width) == (32, 8, 32)


# What is special to one ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight", "full"), [("dkd", "non_target", 8), ("dkd", "target", 1), ("reviewkd", "review", 5)]
)
def test_weights_that_grow_over_20_of_240_epochs(name, weight, full):
    ramp = getattr(method_class(name)(), f"weight_{weight}")
    for epoch in (0, 1, 18, 19, 20, 239):
        assert weight_at(ramp, 7 * epoch + 3, 7 * 240, 7) == pytest.approx(full * min((epoch + 1) / 20, 1))


def test_fitnets_first_stage_and_layers(wired, few, tmp_path):
    with pytest.raises(UserError, match="layer is 3, and there are 2 pairs"):
        wired("fitnet", layer=3)
    method, run, wiring, m, stages = wired("fitnet", init_epochs=2.0)
    (stage,) = stages
    assert (stage.name, set(stage.modules)) == ("fitnet-hint", {"student", "regressor", "teacher"})
    assert stage.updates[0].weights == {"hint": 100.0}
    seeded(run)
    batch = batch_of(run)
    (pair,) = wiring.pairs(m, batch)[0]
    assert torch.equal(stage.updates[0].loss(m, batch, run)["hint"], method.hint(pair))
    paper = {"init_epochs": 1, "weight_hint": 0, "also": [{"kind": "kd"}]}
    sh.distil("fitnet", **{**SMALL, "data": few}, **paper, compare_alone=False, out=tmp_path / "run")
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "fitnet-hint/hint" in log
    assert "loss/hint" not in log


def test_a_regressor_ends_in_a_relu_where_the_teacher_does(wired):
    *_, wiring, _, _ = wired("fitnet")
    assert isinstance(wiring.parts[0][0]["regressor"].layers[-1], torch.nn.ReLU)
    *_, wiring, _, _ = wired("fitnet", student=VIT, teachers=(WIDER,))
    assert not isinstance(wiring.parts[0][0]["regressor"].layers[-1], torch.nn.ReLU)


def test_tokens_of_images_are_laid_out_without_the_class_token():
    batch = load_data("digits").split("train").batch([0, 1])
    tokens = torch.arange(2 * 17 * 3.0).view(2, 17, 3)
    laid = maps(tokens, batch)
    assert laid.shape == (2, 3, 4, 4)
    assert torch.equal(laid[:, :, 0, 1], tokens[:, 2])


@pytest.mark.parametrize(("name", "part"), [("ab", "connectors"), ("fsp", "connectors")])
def test_boundaries_and_flows_are_learned_before_the_labels(name, part, wired, few, tmp_path):
    _, _, wiring, _, (stage,) = wired(name)
    assert set(stage.modules) == {"student", part, "teacher"}
    assert wiring.trains().keys() == {"student"}, "after its stage a connector has nothing more to do"
    fields = {**SMALL, "data": few, "batch_size": 16, "compare_alone": False}
    out = tmp_path / "run"
    result = sh.distil(name, **fields, init_epochs=20, out=out, settings={"log_every": 10, "threads": 1})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    term = f"{stage.name}/{BEFORE_THE_STUDENT[name]}"
    course = [row[term] for row in rows if term in row]
    assert course[-1] < 0.8 * course[0]
    assert {key for row in rows for key in row if key.startswith("loss/") and "lr" not in key} == {"loss/ce"}
    assert list(result.artefacts) == ["student"]


def test_the_classifier_is_left_alone_before_the_labels(wired):
    method, run, wiring, m, (stage,) = wired("ab")
    before = m.student.classifier.weight.clone()
    wiring.modules()["connectors"].requires_grad_(True)
    directory = RunDirectory(run.directory.path.parent / "stage")

    class Only(type(method)):
        def stages(self, run):
            yield stage
            from stillhouse.engine import Result

            return Result(artefacts={}, metrics={})

    Run(Only(**method.dump() | {"data": "digits"}), directory, data=run.data).execute()
    assert torch.equal(m.student.classifier.weight, before)


def test_flows_need_no_connectors_where_the_channels_agree(wired):
    *_, wiring, _, (stage,) = wired("fsp", teachers=("cnn:4-9-6",))
    assert wiring.modules() == {}
    assert set(stage.modules) == {"student", "teacher"}
    *_, stages = wired("fsp", weight_fsp=0.0)
    assert stages == []


def test_the_paraphraser_is_trained_first_and_then_stands_still(wired):
    _, run, wiring, m, (stage,) = wired("ft")
    assert set(stage.modules) == {"paraphraser", "teacher"}
    assert list(wiring.trains()) == [("student", "translator")]
    batch = batch_of(run)
    value = stage.updates[0].loss(m, batch, run)["reconstruction"]
    last = by_hand(m.teacher, batch["pixel_values"])[0][1]
    torch.testing.assert_close(value, F.mse_loss(wiring.parts[0][0]["paraphraser"].reconstruct(last), last))
    with torch.no_grad():
        wiring.terms(m, batch)["ft"]()
    assert all(p.grad is None for p in wiring.parts[0][0]["paraphraser"].parameters())


def test_margins_come_from_the_teachers_batch_norms(wired):
    _, _, wiring, m, _ = wired("ofd")
    norms = [m.teacher.blocks[0].norm, m.teacher.blocks[2].norm]
    for margins, norm in zip(wiring.parts[0][0]["margins"], norms, strict=True):
        assert torch.equal(margins.values, features.batch_norm_margins(norm.weight, norm.bias))
        assert (margins.values < 0).all()
    *_, wiring, _, _ = wired("ofd", variant="code")
    code = features.batch_norm_margins(norms[0].weight, norms[0].bias, variant="code")
    assert torch.equal(wiring.parts[0][0]["margins"][0].values, code)
    with pytest.raises(UserError, match=r"the teacher's layer 'blocks.0' has no batch norm .*teacher_layers"):
        wired("ofd", teachers=({"kind": "cnn", "channels": [6, 6, 10], "norm": "none"},))


def test_the_memory_moves_at_the_batchs_rows_once_the_step_is_done(wired):
    method, run, wiring, m, _ = wired("crd")
    memory, batch = wiring.parts[0][0]["memory"], run.data.split("train").batch([5, 2, 9])
    assert memory.num_samples == len(run.data.split("train"))
    before = memory.student.clone()
    computed(method, run, wiring, m, batch)
    assert torch.equal(memory.student, before)
    memory.after_step(run)
    moved = (memory.student != before).any(1).nonzero().flatten().tolist()
    assert moved == [2, 5, 9]
    embedded = wiring.parts[0][0]["projector"](by_hand(m.student, batch["pixel_values"])[2])
    torch.testing.assert_close(memory.student[batch.index], F.normalize(0.5 * before[batch.index] + 0.5 * embedded))
    assert torch.isfinite(memory.log_normalizers).all()


def test_angles_of_large_batches_are_taken_in_pieces(wired, monkeypatch):
    method, run, wiring, m, _ = wired("rkd")
    whole = computed(method, run, wiring, m, batch_of(run))["angle"]
    monkeypatch.setattr("stillhouse.methods.knowledge.rkd.COSINES", 3 * 16**2)
    torch.testing.assert_close(computed(method, run, wiring, m, batch_of(run))["angle"], whole)


def test_the_form_of_cc_that_toolkits_run_projects_both_sides(wired):
    method, run, wiring, m, _ = wired("cc", variant="code", width=7)
    batch = batch_of(run)
    mine, theirs = (by_hand(m[net], batch["pixel_values"])[2] for net in ("student", "teacher"))
    apart = (wiring.modules()["projector"](mine) - wiring.modules()["teacher-projector"](theirs)).abs()
    torch.testing.assert_close(
        computed(method, run, wiring, m, batch)["cc"], (apart[:-1] * apart[1:]).sum(1).mean(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("mask", "shape"), [("positions", (16, 1, 2, 2)), ("channels", (16, 10, 1, 1))])
def test_masks_are_drawn_for_each_sample_from_the_runs_generator(mask, shape, wired, monkeypatch):
    method, run, wiring, m, _ = wired("mgd", mask=mask, ratio=0.5)
    drawn = []
    draw = run.rand
    monkeypatch.setattr(run, "rand", lambda *size: drawn.append(size) or draw(*size))
    first, again = (computed(method, run, wiring, m, batch_of(run))["mgd"] for _ in range(2))
    assert drawn == [shape, shape]
    assert torch.equal(first, again)


def test_smoothed_labels_are_torchs_and_nothing_else_differs(few, tmp_path):
    shared = {"data": few, "model": "cnn:4", "epochs": 1, "batch_size": 16}
    train = partial(sh.distil, settings={"threads": 1, "log_every": 1, "gradient_shares": False})
    plain = train("supervised", **shared, out=tmp_path / "plain")
    same = train("label-smoothing", **shared, smoothing=0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), same.model.parameters(), strict=True))
    train("label-smoothing", **shared, smoothing=0.3, out=tmp_path / "smooth")
    first = [json.loads((tmp_path / one / "metrics.jsonl").read_text().splitlines()[0]) for one in ("plain", "smooth")]
    net = ModelSpec.parse("cnn:4").build(load_data(few).facts)
    said = net(few["train"][0])
    wanted = F.cross_entropy(said, few["train"][1], label_smoothing=0.3)
    torch.testing.assert_close(logit_losses.label_smoothing(said, few["train"][1], 0.3), wanted)
    assert first[0]["loss/ce"] != first[1]["loss/ce"]


class At:
    step = 0


def test_the_average_follows_the_weights_and_soon_forgets_the_first_ones():
    net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    net[0].weight.data.fill_(1.0)
    average, at, wanted = MovingAverage(net, decay=0.9), At(), 1.0
    for at.step in range(30):
        net[0].weight.data.fill_(at.step)
        net[1].running_mean.fill_(2.0 * at.step)
        average.after_step(at)
        decay = min(0.9, 1 - 1 / (at.step + 2))
        wanted = decay * wanted + (1 - decay) * at.step
        assert average.network[0].weight.item() == pytest.approx(wanted, rel=1e-5)
    assert average.network[1].running_mean.item() == 58.0
    average.train()
    assert not average.network.training
    assert not any(p.requires_grad for p in average.parameters())
    assert [name for name, _ in average.named_modules()] == ["", "network", "network.0", "network.1"]
    with pytest.raises(UserError, match="decay lies between 0 and 1, not 1"):
        MovingAverage(net, decay=1.0)


def test_a_student_of_its_own_average_keeps_both(few, tmp_path):
    shared = {"data": few, "model": "cnn:4", "epochs": 4, "batch_size": 16}
    train = partial(sh.distil, settings={"threads": 1, "log_every": 1, "gradient_shares": False})
    result = train("ema-teacher", **shared, weight_soft=1.0, decay=0.5, out=tmp_path / "run")
    assert list(result.artefacts) == ["model", "average"]
    assert {"test/accuracy", "test/average/accuracy"} <= set(result.metrics)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    soft = [row["loss/soft"] for row in rows if "loss/soft" in row]
    # Before the first step student and average are one network, but for the mode of their batch norms.
    assert min(soft) >= 0
    alone = train("supervised", **shared)
    without = train("ema-teacher", **shared, weight_soft=0.0)
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), without.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(alone.model.parameters(), result.model.parameters(), strict=True))
    assert EMATeacher().weight_soft.at(0.0) == 0


NUMBERS = (torch.randn(100, 4), torch.randn(100))


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("dkd", {"data": NUMBERS, "teacher": "mlp:4", "student": "mlp:4"}, "dkd reads class labels"),
        ("crd", {"data": NUMBERS, "teacher": "mlp:4", "student": "mlp:4"}, "crd reads class labels"),
        ("crd", {"mix": "mixup"}, "'crd' reads class labels, and mixed samples have soft ones"),
        ("crd", {"negatives": 0}, "negatives"),
        ("at", {"cache_teacher": True}, "'at' reads the teacher's features, and only its logits are stored"),
        ("reviewkd", {"cache_teacher": True}, "'reviewkd' reads the teacher's features"),
        ("ofd", {"weight_ofd": -1}, "weight_ofd.*a weight is 0 or more"),
        ("kdsvd", {"vectors": 40}, "k is between 1 and 4"),
        ("kdsvd", {"student": {"kind": "cnn", "channels": [4]}}, "at least 2 layers"),
        ("ft", {"rate": 0.01}, "raise the rate"),
        ("mgd", {"ratio": 1.0}, "ratio"),
        ("dist", {"temperature": 0}, "temperature"),
        ("dist", {"batch_size": 1}, "at least 2 samples"),
        ("rkd", {"batch_size": 1}, "rkd"),
    ],
)
def test_bad_input(name, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        sh.distil(name, **{**SMALL, "compare_alone": False, **fields})


@pytest.mark.parametrize("name", ["label-smoothing", "ema-teacher"])
def test_controls_are_no_objectives(name):
    with pytest.raises(UserError, match=f"'{name}' trains in stages of its own"):
        sh.distil("kd", **SMALL, also=[name])


def test_labels_that_are_numbers_are_not_smoothed():
    with pytest.raises(UserError, match=r"label-smoothing softens classes, which the data .* does not have"):
        sh.distil("label-smoothing", data=NUMBERS, model="mlp:4")
    result = sh.distil("ema-teacher", data=NUMBERS, model="mlp:4", epochs=1)
    assert result.metrics["test/average/mse"] > 0
