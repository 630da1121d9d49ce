"""Shares of the gradient, reference lines, curves and pictures: exact, said once, and without a trace in the training."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import nn
from torch.utils.checkpoint import checkpoint

from stillhouse.engine import (
    SKIP,
    Evaluation,
    Interrupted,
    Line,
    Method,
    Paper,
    Result,
    Signals,
    Silent,
    Stage,
    SubRun,
    Update,
    adam,
    sgd,
)
from stillhouse.engine.health import Streaks, judge_terms
from stillhouse.engine.shares import MOST, SPACING
from stillhouse.errors import UserError


class Vector(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def rows(path, name="run"):
    return [json.loads(line) for line in (path / name / "metrics.jsonl").read_text().splitlines()]


def shares(path, name="run"):
    found = {}
    for row in rows(path, name):
        for key, value in row.items():
            if key.endswith("/gradient_share"):
                found.setdefault(key.split("/")[1], []).append((row["step"], value))
    return found


def one(update, modules, *, steps=6, **fields):
    def stages(self, run):
        batches = run.data.split("train").batches(8)
        stages.trained = yield Stage("one", modules, [update], steps=steps, batches=batches, **fields)
        return Result()

    return stages


class Listen(Silent):
    def __init__(self):
        self.said, self.measurements = [], []

    def say(self, sentence):
        self.said.append(sentence)

    def measured(self, stage, step, metric, value, mode):
        self.measurements.append((stage, step, metric, value, mode))


# Shares of the gradient -----------------------------------------------------------------------------------------------

A, B = torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0, 0.0])


def two(m, batch, run):
    return {"a": (A * m.v.w).sum(), "b": lambda: (B * m.v.w).sum()}


def pieces(m, batch, run):
    # Term b in two pieces whose gradients are orthogonal: (0, 0, 4, 0) as 4 e_2 cos + ... keeps its norm of 4.
    yield {"a": (A * m.v.w).sum()}
    yield {"b": m.v.w[2] * 4 * 0.6}
    yield {"b": m.v.w[3] * 4 * 0.8}


@pytest.mark.parametrize("loss", [two, pieces])
@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_share_is_the_weighted_norm_over_the_sum_of_norms(engine, tmp_path, loss, precision):
    update = Update(loss, {"v": sgd(0.1)}, name="fit", weights={"a": 1.0, "b": 0.5})
    engine(one(update, {"v": Vector()}), log_every=3, precision=precision)
    # 3 against 0.5 x 4.
    assert shares(tmp_path) == {"a": [(3, pytest.approx(0.6))], "b": [(3, pytest.approx(0.4))]}


def test_a_term_without_a_gradient_has_no_share_of_it(engine, tmp_path):
    def loss(m, batch, run):
        return {"a": (A * m.v.w).sum(), "constant": torch.tensor(5.0)}

    engine(one(Update(loss, {"v": sgd(0.1)}), {"v": Vector()}), log_every=2)
    assert [value for _, value in shares(tmp_path)["constant"]] == [0.0]


def test_terms_that_cancel_out_everywhere_leave_no_row(engine, tmp_path):
    def loss(m, batch, run):
        return {"a": (0 * m.v.w).sum(), "b": (0 * m.v.w).sum()}

    engine(one(Update(loss, {"v": sgd(0.1)}), {"v": Vector()}), log_every=2)
    assert shares(tmp_path) == {}


@pytest.mark.parametrize(("steps", "spacing"), [(4 * SPACING + 10, 2 * SPACING), (100 * SPACING, 5 * SPACING)])
def test_samples_are_rare(engine, tmp_path, steps, spacing):
    assert spacing == max(2 * SPACING, -(-steps // MOST))
    engine(one(Update(two, {"v": sgd(0.1)}), {"v": Vector()}, steps=steps), log_every=1)
    assert [step for step, _ in shares(tmp_path)["a"]] == list(range(1, steps + 1, spacing))


def test_a_single_term_is_not_sampled(engine, tmp_path):
    backwards = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, gradient):
            backwards.append(1)
            return gradient.expand(4)

    engine(one(Update(lambda m, b, r: {"only": Count.apply(m.v.w)}, {"v": sgd(0.1)}, name="u"), {"v": Vector()}))
    assert len(backwards) == 6
    assert shares(tmp_path) == {}


def test_a_firing_that_skips_is_not_the_sample(engine, tmp_path):
    def loss(m, batch, run):
        return SKIP if run.step < 2 else two(m, batch, run)

    engine(one(Update(loss, {"v": sgd(0.1)}), {"v": Vector()}), log_every=1)
    assert [step for step, _ in shares(tmp_path)["a"]] == [3]


class Awkward(nn.Module):
    """What a careless sample would leave a trace in: batch norm and dropout in a forward that the backward repeats."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return checkpoint(self.body, x, use_reentrant=False)


class Once(torch.autograd.Function):
    """A gradient made by hand, which cannot be differentiated again; it draws in its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 2 * x / x.numel() + 0.01 * torch.randn_like(x)


def awkward(m, batch, run):
    out = m.net(batch["features"])
    noise = run.generator()
    return {
        "ce": F.cross_entropy(out, batch.labels),
        "once": lambda: Once.apply(out),
        "noise": lambda: (out * torch.randn(out.shape, generator=noise)).mean() + run.randn(4)[0] * out.mean(),
    }


def in_pieces(m, batch, run):
    terms = awkward(m, batch, run)
    yield {"ce": terms["ce"], "once": terms["once"]}
    yield {"noise": lambda: (m.net(batch["features"]) * run.rand(1)).mean()}


@pytest.mark.parametrize("loss", [awkward, in_pieces])
def test_training_is_the_same_bit_for_bit_with_and_without_samples(engine, tmp_path, loss):
    nets = {}
    for sampled in (True, False):
        net = nets[sampled] = Awkward()
        update = Update(loss, {"net": adam(0.01)}, name="fit")
        engine(one(update, {"net": net}, steps=30), name=str(sampled), log_every=5, gradient_shares=sampled)
    assert len(shares(tmp_path, "True")["once"]) == 1
    assert shares(tmp_path, "False") == {}
    state, other = nets[True].state_dict(), nets[False].state_dict()
    assert all(torch.equal(state[key], other[key]) for key in state)
    stripped = [{k: v for k, v in row.items() if "gradient_share" not in k} for row in rows(tmp_path, "True")]
    assert stripped == rows(tmp_path, "False")


def test_gradients_accumulate_as_without_samples(engine, tmp_path):
    nets = {}
    for sampled in (True, False):
        net = nets[sampled] = Vector()

        def loss(m, batch, run):
            return {"x": (m.v.w * batch["features"]).sum(), "y": m.v.w.square().sum() + m.v.w.sum()}

        engine(one(Update(loss, {"v": sgd(0.1)}), {"v": net}, accumulate=3), name=str(sampled), gradient_shares=sampled)
    assert torch.equal(nets[True].w, nets[False].w)


@pytest.mark.parametrize("stop", [4, 6, 101])
def test_an_interrupted_run_logs_the_same_shares_and_warnings(engine, tmp_path, stop):
    update = Update(two, {"v": sgd(0.1)}, weights={"a": 1.0, "b": 1e-5})

    class Stop(Listen):
        def step(self, step):
            signals.stop = signals.stop or (step == stop and not stopped)

    engine(one(update, {"v": Vector()}, steps=310), name="straight", log_every=7)
    signals, stopped = Signals(), []
    with pytest.raises(Interrupted):
        engine(one(update, {"v": Vector()}, steps=310), name="again", log_every=7, signals=signals, listener=Stop())
    stopped.append(True)
    signals.stop = False
    listen = Listen()
    engine(one(update, {"v": Vector()}, steps=310), name="again", log_every=7, signals=signals, listener=listen)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "again")]
    assert logs[0] == logs[1]
    assert len(listen.said) == 1


def test_a_dead_term_is_said_once_in_words(engine, tmp_path):
    listen = Listen()
    update = Update(two, {"v": sgd(0.1)}, weights={"a": 1.0, "b": 1e-5}, name="critic")
    engine(one(update, {"v": Vector()}, steps=12 * SPACING), listener=listen)
    (sentence,) = listen.said
    assert sentence == (
        "stage one, step 250: b gives 0.0013 % of the gradient of the loss of critic, 3 samples in a row: it may do "
        "nothing; raise its weight, or set it to 0 and compare."
    )
    warned = [(row["step"], row["warning"]) for row in rows(tmp_path) if "warning" in row]
    assert warned == [(250, sentence.partition(": ")[2])]


def test_terms_are_judged_by_samples_in_a_row():
    streaks = Streaks()
    dominated = {"a": 0.995, "b": 0.003, "c": 0.002}
    assert [len(judge_terms("loss", dominated, streaks)) for _ in range(5)] == [0, 0, 1, 0, 0]
    streaks = Streaks()
    broken = [{"a": 0.9995, "b": 0.0005}, {"a": 0.9995, "b": 0.0005}, {"a": 0.5, "b": 0.5}] * 3
    assert [judge_terms("loss", shares, streaks) for shares in broken] == [[]] * 9
    # Where the others are dead, that one dominates is no news.
    streaks = Streaks()
    (sentence,) = [s for _ in range(4) for s in judge_terms("loss", {"a": 0.9999, "b": 0.0001}, streaks)]
    assert sentence.startswith("b gives 0.01 % of the gradient of the loss")


# Reference lines ------------------------------------------------------------------------------------------------------


def measured_as(values, lines, mode="max", **more):
    """A stage that measures these values, one a step."""
    values = list(values)
    remaining = iter(values)
    evaluation = Evaluation(lambda m: {"acc": next(remaining)}, every=1, monitor="acc", mode=mode, lines=lines, **more)
    update = Update(lambda m, b, r: {"a": m.v.w.sum()}, {"v": sgd(0.1)}, name="loss")
    return one(update, {"v": Vector()}, steps=len(values), evaluate=evaluation)


def below(values):
    return Line(values, "better", "the student is below its no-teacher line")


TEACHER = Line(0.5, "worse", "the teacher is worse than the student")


@pytest.mark.parametrize(
    ("values", "line", "mode", "at"),
    [
        ([0.4, 0.6, 0.6, 0.6, 0.6], TEACHER, "max", 4),
        ([0.6, 0.6, 0.4, 0.6, 0.6, 0.4], TEACHER, "max", None),
        ([0.504] * 5, TEACHER, "max", None),
        ([0.4] * 5, TEACHER, "min", 3),
        ([0.3] * 4, below(0.5), "max", 3),
        ([0.7] * 4, below(0.5), "max", None),
        ([0.1, 0.2, 0.3, 0.4, 0.5], below([(2, 0.4), (4, 0.6)]), "max", 4),
        ([float("nan")] * 4, TEACHER, "max", None),
    ],
)
def test_a_line_that_is_crossed_clearly_and_for_long_is_said_once(engine, tmp_path, values, line, mode, at):
    listen = Listen()
    engine(measured_as(values, {"reference": line}, mode), listener=listen)
    warned = [row["step"] for row in rows(tmp_path) if "warning" in row]
    assert warned == ([] if at is None else [at])
    assert len(listen.said) == len(warned)
    assert [m[:3] for m in listen.measurements] == [("one", step, "acc") for step in range(1, len(values) + 1)]


def test_the_sentence_names_the_numbers_and_the_log_has_the_line(engine, tmp_path):
    listen = Listen()
    curve = [(1, 0.5), (3, 0.7)]
    engine(measured_as([0.4, 0.45, 0.5], {"student-alone": below(curve)}), listener=listen)
    assert listen.said == [
        "stage one, step 3: the student is below its no-teacher line (acc 0.5, and student-alone 0.7 at the same step, 3; "
        "so it was 3 times in a row)."
    ]
    assert [row["acc/line/student-alone"] for row in rows(tmp_path) if "acc" in row] == pytest.approx([0.5, 0.6, 0.7])


def test_a_line_says_nothing_before_its_first_step_and_stays_after_its_last():
    line = below([(10, 0.5), (20, 0.9)])
    assert [line.at(step) for step in (5, 10, 15, 20, 99)] == [None, 0.5, pytest.approx(0.7), 0.9, 0.9]
    assert below([]).at(3) is None
    assert not below([(10, 0.5)]).crossed(0.1, 5, "max")


# Curves of runs within the run ----------------------------------------------------------------------------------------


class Nested(Method):
    """A run that measures something along the way."""

    name: ClassVar[str] = "nested"
    family: ClassVar[str] = "tests"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "made by a test"

    def stages(self, run):
        net = Vector()
        evaluation = Evaluation(lambda m: {"acc": float(m.v.w.sum())}, every=2, monitor="acc")
        update = Update(lambda m, b, r: {"a": m.v.w.sum()}, {"v": sgd(0.1)}, name="loss")
        yield Stage("inner", {"v": net}, [update], 5, evaluate=evaluation)
        return Result(artefacts={"v": net})


def test_a_curve_is_the_same_whether_the_run_was_trained_or_found(engine, tmp_path):
    curves = []

    def stages(self, run):
        result = yield SubRun("inner", Nested(), seed=3, data=run.data)
        curves.append(result.curve("acc"))
        assert result.curve("nothing") == []
        assert result.curve("acc", stage="other") == []
        return Result()

    for name in ("trained", "found", "trained"):
        engine(stages, name=name)
    assert curves[0] == curves[1] == curves[2]
    assert curves[0] == [(2, pytest.approx(-0.8)), (4, pytest.approx(-1.6)), (5, pytest.approx(-2.0))]
    assert Result().curve("acc") == []


# Pictures -------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)


def train(m, batch, run):
    return {"ce": F.cross_entropy(m.net(batch["features"]), batch.labels)}


def look(m, run):
    assert not m.net.body[2].training
    assert not torch.is_grad_enabled()
    m.net(torch.randn(8, 4))
    run.randn(3)
    return {"noise": torch.rand(1, 2, 2), "weights": m.net.body[0].weight.view(1, 8, 4).sigmoid()}


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"show_every": 3}, [3, 6, 7]),
        ({"show_every": 7, "keep": "ema", "ema": {"net": 0.5}}, [7]),
    ],
)
def test_pictures_appear_and_change_nothing(engine, tmp_path, fields, steps):
    nets = {}
    for show in (None, look):
        net = nets[show] = Noisy()
        kept = {k: v for k, v in fields.items() if show is not None or k != "show_every"}
        update = Update(train, {"net": adam(0.05)})
        engine(one(update, {"net": net}, steps=7, show=show, **kept), name="shown" if show else "plain")
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in nets.values()), strict=True))
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("shown", "plain")]
    assert logs[0] == logs[1]
    home = tmp_path / "shown" / "samples" / "one"
    assert sorted(p.name for p in home.iterdir()) == sorted(
        f"{step:09d}-{name}.png" for step in steps for name in ("noise", "weights")
    )
    assert not (tmp_path / "plain" / "samples").exists()
    # Noise stays the same from step to step, so that only the training shows.
    assert len({path.read_bytes() for path in home.glob("*-noise.png")}) == 1
    assert len({path.read_bytes() for path in home.glob("*-weights.png")}) == len(steps)


def test_an_average_that_is_kept_is_what_is_shown(engine, tmp_path):
    net = Noisy()

    def weights(m, run):
        return {"w": m.net.body[0].weight.view(1, 8, 4).sigmoid()}

    fields = {"steps": 5, "keep": "ema", "ema": {"net": 0.5}, "show": weights, "show_every": 5}
    engine(one(Update(train, {"net": adam(0.05)}), {"net": net}, **fields))
    shown = imread(tmp_path / "run" / "samples" / "one" / "000000005-w.png")[..., 0]
    assert torch.allclose(torch.tensor(shown), net.body[0].weight.sigmoid(), atol=1 / 255)


def test_pictures_as_often_as_measurements(engine, tmp_path):
    evaluation = Evaluation(lambda m: {"x": 1.0}, every=4, monitor="x")
    engine(one(Update(train, {"net": adam(0.05)}), {"net": Noisy()}, steps=9, evaluate=evaluation, show=look))
    found = {int(path.name[:9]) for path in Path(tmp_path / "run" / "samples" / "one").iterdir()}
    assert found == {4, 8, 9}
    with pytest.raises(UserError, match="show_every is 0"):
        Stage("x", {"net": Noisy()}, [], 1, show_every=0)
