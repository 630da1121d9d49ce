"""The contract at a yield, line by line, and what updates, terms, modules and evaluations promise."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

import stillhouse as sh
from stillhouse.engine import (
    SKIP,
    Compute,
    Evaluation,
    Later,
    Method,
    Record,
    Result,
    Silent,
    Stage,
    SubRun,
    Update,
    adam,
    adamw,
    frozen,
    frozen_through,
    scratch,
    sgd,
)
from stillhouse.engine import run as run_module
from stillhouse.engine.checkpoint import LAYOUT
from stillhouse.engine.storage import CorruptError, read_tree, write_tree
from stillhouse.errors import NonFiniteError, RunError, UserError
from stillhouse.models import fingerprint
from stillhouse.spec import Spec

SGD = sgd(0.1)


def linear(inputs=4, outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def ce(m, batch, run):
    return {"ce": F.cross_entropy(m.net(batch["features"]), batch.labels)}


def one_stage(net, update=None, **fields):
    def stages(self, run):
        update_ = update or Update(ce, {"net": SGD})
        fields.setdefault("batches", run.data.split("train").batches(8))
        fields.setdefault("steps", 6)
        fields.setdefault("modules", {"net": net})
        trained = yield Stage("one", updates=[update_], **fields)
        stages.trained = trained
        return Result(artefacts={"net": net})

    return stages


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# 1. Code between yields runs again on resume, under seeds of its own place -------------------------------------------


def test_code_between_yields_is_seeded_by_its_place(engine):
    drawn = []

    def stages(self, run):
        first = (torch.rand(()).item(), np.random.rand())
        yield Compute("noise", lambda _: [torch.rand(()).item() for _ in range(3)])
        drawn.append((first, torch.rand(()).item(), np.random.rand()))
        return Result()

    engine(stages)
    engine(stages)  # resumes: the computation is loaded and draws nothing
    engine(stages, name="other", seed=1)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


# 2. Undeclared memory is lost: methods are frozen ---------------------------------------------------------------------


def test_assigning_to_a_method_raises(engine):
    def stages(self, run):
        self.counter = 1
        yield Compute("never", lambda _: 0)

    with pytest.raises(ValidationError, match="frozen"):
        engine(stages)


def test_a_field_that_shadows_a_method_raises_at_class_creation():
    class Base(Spec):
        def loss(self):
            return 0

    with pytest.raises(TypeError, match="the field 'loss' shadows a method"):

        class Shadow(Base):
            loss: float = 1.0


# 3. Yields are recorded and compared ----------------------------------------------------------------------------------


def test_a_changed_sequence_stops_with_one_sentence(engine):
    net = linear()
    engine(one_stage(net))
    with pytest.raises(UserError, match="yield 0 was steps 6 when this run was started and is steps 7 now") as caught:
        engine(one_stage(linear(), steps=7))
    assert "\n" not in str(caught.value)


def test_a_name_used_twice_stops_with_one_sentence(engine):
    def stages(self, run):
        yield Compute("a", lambda _: 1)
        yield Compute("a", lambda _: 2)

    with pytest.raises(UserError, match="two yields are named 'a'"):
        engine(stages)


# 4. No yield inside a with --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "named"),
    [
        (torch.no_grad, "gradients"),
        (torch.inference_mode, "gradients|inference mode"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
    ],
)
def test_a_yield_inside_a_with_is_refused(engine, context, named):
    def stages(self, run):
        with context():
            yield Compute("a", lambda _: 1)

    with pytest.raises(UserError, match=f"yielded with ({named})"):
        engine(stages)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_changed_default_dtype_is_refused(engine):
    def stages(self, run):
        torch.set_default_dtype(torch.float64)
        yield Compute("a", lambda _: 1)

    try:
        with pytest.raises(UserError, match="default dtype"):
            engine(stages)
    finally:
        torch.set_default_dtype(torch.float32)


# 5. Modules keep their identity ---------------------------------------------------------------------------------------


def test_modules_are_trained_and_loaded_in_place(engine):
    net = linear()
    before, parameter = weights(net), net.weight
    _, result = engine(one_stage(net))
    assert result.net is net
    assert net.weight is parameter
    assert not same(before, weights(net))
    again = linear()
    parameter = again.weight
    _, result = engine(one_stage(again))
    assert result.net is again
    assert again.weight is parameter
    assert same(weights(again), weights(net))


# 6. A stage's end state -----------------------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def after_step(self, run):
        self.steps += 1


def test_the_end_state_holds_what_is_not_frozen_and_parts_count_training_steps(engine, tmp_path):
    net, teacher, norm, counter = linear(), linear(seed=1), nn.BatchNorm1d(4), Counter()

    def loss(m, batch, run):
        return {"ce": F.cross_entropy(m.net(m.norm(batch["features"])), batch.labels)}

    def stages(self, run):
        modules = {"net": net, "norm": norm, "teacher": frozen(teacher), "counter": counter}
        evaluation = Evaluation(lambda m: {"x": float(m.net.weight.sum())}, every=2, monitor="x")
        batches = run.data.split("train").batches(8)
        update = Update(loss, {"net": SGD}, times=2)
        yield Stage("one", modules, [update], steps=6, batches=batches, evaluate=evaluation)
        return Result()

    engine(stages)
    state = read_tree(tmp_path / "run" / "checkpoints" / "one" / "end")
    assert set(state["modules"]) == {"net", "norm", "counter"}
    assert counter.steps == 6
    assert torch.equal(state["modules"]["counter"]["steps"], torch.tensor(6))
    assert not torch.equal(norm.running_mean, torch.zeros(4)), "untrained batch norm moves"
    assert torch.equal(state["modules"]["norm"]["running_mean"], norm.running_mean)
    assert state["turns"]["loss"]["firings"] == 12


def test_only_the_last_two_checkpoints_of_a_running_stage_are_kept(engine, tmp_path):
    kept = []

    class Look(Silent):
        def step(self, step):
            kept.append(len(list((tmp_path / "run" / "checkpoints" / "one").glob("step-*"))))

    engine(one_stage(linear(), steps=12), checkpoint_every=2, listener=Look())
    assert max(kept) == 2
    assert [p.name for p in (tmp_path / "run" / "checkpoints" / "one").iterdir()] == ["end"]


# 7. A Compute's value comes back through its stored form --------------------------------------------------------------


def test_computed_values_come_back_stored_also_the_first_time(engine):
    seen = []

    def make(directory):
        (directory / "file.txt").write_text("x")
        return {
            "tensor": torch.arange(3),
            "numbers": (1, 2.5, True, None),
            "path": directory / "file.txt",
            "np": np.eye(2),
        }

    def stages(self, run):
        value = yield Compute("a", make)
        seen.append(value)
        return Result()

    engine(stages)
    engine(stages)
    for value in seen:
        assert torch.equal(value["tensor"], torch.arange(3))
        assert value["numbers"] == (1, 2.5, True, None)
        assert value["path"].read_text() == "x"
        assert np.array_equal(value["np"], np.eye(2))
    assert seen[0] is not seen[1]


def test_what_cannot_be_stored_is_refused(engine):
    def stages(self, run):
        yield Compute("a", lambda _: {"thing": object()})

    with pytest.raises(RunError, match="thing is a object; only tensors"):
        engine(stages)


# 8. Each update owns its gradients ------------------------------------------------------------------------------------


def test_a_generator_loss_never_fills_the_critics_gradients(engine):
    gen, critic = linear(4, 4), linear(4, 1, seed=1)
    seen = {}

    def generator(m, batch, run):
        seen.setdefault("critic", []).append(m.critic.weight.grad)
        return {"fool": m.critic(m.gen(batch["features"])).mean()}

    def discriminator(m, batch, run):
        return {"real": m.critic(batch["features"]).mean() - m.critic(m.gen(batch["features"]).detach()).mean()}

    class Look(nn.Module):
        def after_step(self, run):
            seen.setdefault("after", []).append((critic.weight.grad.clone(), gen.weight.grad.clone()))

    def stages(self, run):
        updates = [Update(discriminator, {"critic": sgd(0.0 + 1e-9)}), Update(generator, {"gen": sgd(1e-9)})]
        modules = {"gen": gen, "critic": critic, "look": Look()}
        yield Stage("gan", modules, updates, steps=2, batches=run.data.split("train").batches(8))
        return Result()

    engine(stages)
    for critic_grad, _ in seen["after"]:
        # The difference of the two batch means is all that the discriminator's loss asks for.
        assert torch.isfinite(critic_grad).all()
    assert critic.weight.grad is None, "no gradient is left behind"


def test_a_parameter_that_no_term_reaches_is_an_error_unless_sparse(engine):
    net = nn.ModuleDict({"used": linear(), "unused": linear(seed=1)})

    def loss(m, batch, run):
        return {"ce": F.cross_entropy(m.net["used"](batch["features"]), batch.labels)}

    with pytest.raises(UserError, match=r"no loss term reaches net\.unused\.weight and 1 more trained parameters"):
        engine(one_stage(net, Update(loss, {"net": SGD})))
    engine(one_stage(net, Update(loss, {"net": SGD}, sparse=True)), name="sparse")


@pytest.mark.parametrize(
    ("trains", "moved"),
    [
        ({"net": SGD}, {"0.weight", "0.bias", "1.weight", "1.bias"}),
        ({"net.0": SGD}, {"0.weight", "0.bias"}),
        ({"net.1.weight": SGD}, {"1.weight"}),
        ({"net:*.bias": SGD}, {"0.bias", "1.bias"}),
        ({("net.0.weight", "net.1.bias"): SGD}, {"0.weight", "1.bias"}),
        ({("net", "!net:*.bias"): SGD, "net.0.bias": adam(0.1)}, {"0.weight", "1.weight", "0.bias"}),
    ],
)
def test_patterns_choose_what_is_trained(engine, trains, moved):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    engine(one_stage(net, Update(ce, trains)))
    assert {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])} == moved


@pytest.mark.parametrize(
    ("trains", "sentence"),
    [
        ({"nett": SGD}, "names the module 'nett', which is not there; did you mean 'net'"),
        ({"net.wieght": SGD}, "matches no trainable parameter of 'net'; did you mean"),
        ({"net": SGD, "net.weight": SGD}, "net.weight is matched by two patterns"),
        ({"teacher": SGD}, "which is frozen in this stage"),
        ({("net", "!net"): SGD}, "take away every parameter"),
    ],
)
def test_patterns_that_are_wrong_say_so(engine, trains, sentence):
    net, teacher = linear(), linear(seed=1)
    with pytest.raises(UserError, match=sentence):
        engine(one_stage(net, Update(ce, trains), modules={"net": net, "teacher": frozen(teacher)}))


# 9. Data parallelism: see test_processes.py. Accumulation -------------------------------------------------------------


def test_micro_batches_equal_the_larger_batch(engine):
    small, large = linear(), linear()

    def stages_for(net, size, accumulate):
        def stages(self, run):
            batches = run.data.split("train").batches(size, shuffle=False)
            yield Stage(
                "one", {"net": net}, [Update(ce, {"net": SGD})], steps=3, batches=batches, accumulate=accumulate
            )
            return Result()

        return stages

    engine(stages_for(small, 4, 4), name="micro")
    engine(stages_for(large, 16, 1), name="whole")
    for a, b in zip(weights(small), weights(large), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulation_is_refused_for_losses_that_couple_samples(engine):
    with pytest.raises(UserError, match="accumulate is 2, but the loss 'ce' couples the samples"):
        engine(one_stage(linear(), Update(ce, {"net": SGD}, couples=True), accumulate=2))


# 10. Evaluation -------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, features):
        return self.net(features)


def looking(m):
    torch.rand(7)
    np.random.rand()
    assert not m.net.training
    assert not torch.is_grad_enabled()
    return {"x": float(m.net(torch.ones(2, 4)).sum())}


def test_looking_does_not_change_the_training(engine):
    plain, looked = Noisy(), Noisy()
    engine(one_stage(plain), name="plain")
    engine(one_stage(looked, evaluate=Evaluation(looking, every=1, monitor="x")), name="looked")
    assert fingerprint(plain) == fingerprint(looked)


def test_modes_are_put_back_per_sub_module(engine):
    net = Noisy()
    net.net[1].eval()
    engine(one_stage(net, evaluate=Evaluation(looking, every=2, monitor="x")))
    assert net.training
    assert net.net[2].training
    assert not net.net[1].training


@pytest.mark.parametrize("keep", ["last", "best", "ema"])
def test_keep_names_the_weights_that_the_modules_hold(engine, keep):
    net, seen = linear(), []

    def measure(m):
        seen.append(weights(m.net))
        return {"score": [1.0, 5.0, 2.0][len(seen) - 1]}

    stages = one_stage(
        net,
        evaluate=Evaluation(measure, every=2, monitor="score"),
        keep=keep,
        ema={"net": 0.5} if keep == "ema" else {},
    )
    engine(stages)
    assert stages.trained.best == {"score": 5.0}
    assert stages.trained.metrics == {"score": 2.0}
    assert same(weights(net), seen[1] if keep == "best" else seen[2])
    if keep == "ema":
        assert same(weights(net), [stages.trained.ema["net"]["weight"], stages.trained.ema["net"]["bias"]])


def test_the_average_is_the_closed_form(engine):
    net, path = linear(), []

    class Look(nn.Module):
        def after_step(self, run):
            path.append(net.weight.detach().clone())

    start = net.weight.detach().clone()
    stages = one_stage(net, modules={"net": net, "look": Look()}, ema={"net": 0.8}, steps=4)
    engine(stages)
    expected = start
    for weight in path:
        expected = 0.8 * expected + 0.2 * weight
    torch.testing.assert_close(stages.trained.ema["net"]["weight"], expected)


def test_patience_ends_a_stage_early_and_is_replayed(engine):
    scores = iter([1.0, 0.5, 0.4, 0.3, 0.2])
    evaluation = Evaluation(lambda m: {"s": next(scores)}, every=1, monitor="s", patience=2)
    stages = one_stage(linear(), evaluate=evaluation, steps=100)
    engine(stages)
    assert (stages.trained.steps, stages.trained.stopped_early) == (3, True)
    engine(stages)
    assert (stages.trained.steps, stages.trained.stopped_early) == (3, True), "the finished stage was not trained again"


def test_a_monitored_number_that_is_not_measured_is_named(engine):
    with pytest.raises(UserError, match=r"gives \['x'\], not the monitored 'y'"):
        engine(one_stage(Noisy(), evaluate=Evaluation(looking, every=1, monitor="y")))


# 11. The guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_term_leaves_everything_untouched_and_is_named(engine, bad, tmp_path):
    net = Noisy()
    at = {}

    def loss(m, batch, run):
        fine = F.cross_entropy(m.net(batch["features"]), batch.labels)
        if run.step == 3:
            at["weights"] = {k: v.clone() for k, v in m.net.state_dict().items()}
            return {"fine": fine, "broken": fine * bad}
        at["before"] = {k: v.clone() for k, v in m.net.state_dict().items()}
        return {"fine": fine, "broken": fine}

    with pytest.raises(NonFiniteError, match="'broken' term of update 'loss' is NaN or infinite") as caught:
        engine(one_stage(net, Update(loss, {"net": adamw(0.1)})), checkpoint_every=1)
    assert (caught.value.term, caught.value.step, caught.value.exit_code) == ("broken", 3, 1)
    checkpoint = read_tree(tmp_path / "run" / "checkpoints" / "one" / "step-000000003")
    for key, value in net.state_dict().items():
        assert torch.equal(value, checkpoint["modules"]["net"][key]), key


def test_a_non_finite_gradient_of_a_finite_loss_is_caught_before_the_step(engine):
    net = linear()
    before = weights(net)

    def loss(m, batch, run):
        return {"root": (m.net.weight - m.net.weight.detach()).square().sum().sqrt()}

    with pytest.raises(NonFiniteError, match="'gradient'"):
        engine(one_stage(net, Update(loss, {"net.weight": SGD})))
    assert same(before, weights(net))


# 12. Teachers ---------------------------------------------------------------------------------------------------------


def test_frozen_teachers_are_untouched_and_without_a_graph(engine):
    net, teacher = linear(), Noisy()
    before = fingerprint(teacher)

    def loss(m, batch, run):
        features = batch["features"].requires_grad_()
        out = m.teacher(features)
        assert not out.requires_grad
        assert not m.teacher.training
        return {"match": F.mse_loss(m.net(features), out)}

    engine(one_stage(net, Update(loss, {"net": SGD}), modules={"net": net, "teacher": frozen(teacher)}))
    assert fingerprint(teacher) == before
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert teacher.training


def test_gradients_flow_through_frozen_through_to_the_input_only(engine):
    gen, teacher = linear(4, 4), linear(seed=1)
    before = weights(teacher)

    def loss(m, batch, run):
        return {"up": -m.teacher(m.gen(batch["features"])).logsumexp(-1).mean()}

    start = weights(gen)
    engine(one_stage(gen, Update(loss, {"gen": SGD}), modules={"gen": gen, "teacher": frozen_through(teacher)}))
    assert not same(start, weights(gen))
    assert same(before, weights(teacher))
    assert teacher.weight.grad is None


def test_scratch_modules_are_drawn_afresh_and_in_no_checkpoint(engine, tmp_path):
    net, random_net, seen = linear(), linear(4, 4), []

    def prepare(m, batch, run):
        m.rand.reset_parameters()
        seen.append(m.rand.weight.detach().clone())

    def loss(m, batch, run):
        return {"ce": F.cross_entropy(m.net(m.rand(batch["features"])), batch.labels)}

    modules = {"net": net, "rand": scratch(random_net)}
    engine(one_stage(net, Update(loss, {"net": SGD}), modules=modules, prepare=prepare))
    assert len({tuple(w.flatten().tolist()) for w in seen}) == 6
    state = read_tree(tmp_path / "run" / "checkpoints" / "one" / "end")
    assert set(state["modules"]) == {"net"}


class Trainee(Method):
    """Trained within another run."""

    name = "trainee"
    family = "tests"
    steps: int = 5

    def stages(self, run):
        net = linear(seed=2)
        yield Stage(
            "train",
            {"net": net},
            [Update(ce, {"net": SGD})],
            steps=self.steps,
            batches=run.data.split("train").batches(8),
        )
        return Result(artefacts={"net": net})


Trainee.name, Trainee.family = "trainee", "tests"


def teaching(steps=5, seed=0):
    def stages(self, run):
        result = yield SubRun("teacher", Trainee(steps=steps), seed=seed, data=run.data)
        stages.teacher = result.net
        net = linear()
        yield Stage(
            "student", {"net": net}, [Update(ce, {"net": SGD})], steps=3, batches=run.data.split("train").batches(8)
        )
        return Result(artefacts={"net": net})

    return stages


def test_a_run_that_trains_its_teacher_equals_one_that_finds_it(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    first, second, third = teaching(), teaching(), teaching(steps=6)
    _, a = engine(first, name="a")
    homes = list((tmp_path / "cache" / "runs").iterdir())
    _, b = engine(second, name="b", seed=0)
    assert list((tmp_path / "cache" / "runs").iterdir()) == homes, "found, not trained again"
    assert fingerprint(first.teacher) == fingerprint(second.teacher)
    assert fingerprint(a.net) == fingerprint(b.net)
    engine(third, name="c")
    assert len(list((tmp_path / "cache" / "runs").iterdir())) == 2, "other fields are another teacher"


def test_the_cache_key_changes_with_the_version(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    engine(teaching(), name="a")
    monkeypatch.setattr(Trainee, "version", 2)
    engine(teaching(), name="b")
    engine(teaching(seed=1), name="c")
    assert len(list((tmp_path / "cache" / "runs").iterdir())) == 3


def test_sums_for_the_log_pass_to_another_number_of_processes_by_their_mean(engine):
    run, _ = engine(one_stage(linear()))
    turn = run._fit.turns[0]
    turn.load({**turn.state(), "sums": {"ce": torch.tensor([1.0, 3.0])}})
    assert turn.sums == {"ce": torch.tensor(2.0)}
    turn.load({**turn.state(), "sums": {"ce": torch.tensor([3.0])}})
    assert turn.sums == {"ce": torch.tensor(3.0)}


# The layout of stored states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [None, 1, LAYOUT + 1])
def test_a_run_of_another_layout_is_refused_with_one_sentence(engine, tmp_path, layout):
    engine(one_stage(linear()))
    file = tmp_path / "run" / "checkpoints" / "layout.json"
    assert json.loads(file.read_text()) == LAYOUT
    if layout is None:
        file.unlink()  # As versions left it that knew of no layouts.
    else:
        file.write_text(json.dumps(layout))
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    sentence = (
        rf"in another form \(layout {layout or 1}, here {LAYOUT}\); continue it with that version, or start a new run"
    )
    with pytest.raises(UserError, match=sentence) as caught:
        engine(one_stage(linear()))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_what_is_cached_in_another_layout_is_not_found(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    made = []

    def stages(self, run):
        yield Compute("outputs", lambda _: made.append(0) or 1, key="outputs")
        return (yield from teaching()(self, run))

    def cached():
        return [len(list((tmp_path / "cache" / kind).iterdir())) for kind in ("computes", "runs")]

    engine(stages, name="a")
    engine(stages, name="b")
    assert (made, cached()) == ([0], [1, 1])
    monkeypatch.setattr(run_module, "LAYOUT", LAYOUT + 1)
    engine(stages, name="c")
    assert (made, cached()) == ([0, 0], [2, 2])


# 13. Precision --------------------------------------------------------------------------------------------------------


def test_autocast_is_entered_around_the_loss(engine):
    seen = []

    def loss(m, batch, run):
        out = m.net(batch["features"])
        seen.append(out.dtype)
        return {"ce": lambda: F.cross_entropy(out.float(), batch.labels)}

    engine(one_stage(linear(), Update(loss, {"net": SGD}), steps=1), precision="bf16")
    assert seen == [torch.bfloat16]


def test_an_overflow_in_one_update_touches_no_other(engine):
    a, b = linear(), linear(seed=1)
    before_a, before_b = weights(a), weights(b)

    def overflowing(m, batch, run):
        return {"big": (m.a(batch["features"]).float() * 1e30).square().mean() * 1e-30}

    def fine(m, batch, run):
        return {"ce": F.cross_entropy(m.b(batch["features"]).float(), batch.labels)}

    def stages(self, run):
        updates = [Update(overflowing, {"a": SGD}), Update(fine, {"b": SGD})]
        yield Stage("two", {"a": a, "b": b}, updates, steps=1, batches=run.data.split("train").batches(8))
        return Result()

    with pytest.raises(NonFiniteError):
        engine(stages)

    def scaled(m, batch, run):
        # Finite as a loss, beyond float16 once scaled and differentiated.
        return {"big": (m.a(batch["features"]).float() * 1e33).mean()}

    def stages_scaled(self, run):
        updates = [Update(scaled, {"a": SGD}), Update(fine, {"b": SGD})]
        yield Stage("two", {"a": a, "b": b}, updates, steps=1, batches=run.data.split("train").batches(8))
        return Result()

    engine(stages_scaled, name="fp16", precision="fp16")
    assert same(before_a, weights(a)), "the overflowing update was skipped"
    assert not same(before_b, weights(b)), "the other one was not"


# Updates and terms ----------------------------------------------------------------------------------------------------


def test_cadences_and_repeats(engine):
    fired = {"five": [], "called": [], "twice": []}
    a, b, c = linear(), linear(), linear()

    def make(key, name):
        def loss(m, batch, run):
            fired[key].append((run.step, batch.index.tolist()))
            return {"ce": F.cross_entropy(m[name](batch["features"]), batch.labels)}

        return loss

    def stages(self, run):
        updates = [
            Update(make("five", "a"), {"a": SGD}, every=5, name="five"),
            Update(make("called", "b"), {"b": SGD}, every=lambda run: run.step in (1, 2), name="called"),
            Update(make("twice", "c"), {"c": SGD}, times=2, name="twice"),
        ]
        batches = run.data.split("train").batches(4)
        yield Stage("one", {"a": a, "b": b, "c": c}, updates, steps=12, batches=batches)
        return Result()

    engine(stages)
    assert [step for step, _ in fired["five"]] == [0, 5, 10]
    assert [step for step, _ in fired["called"]] == [1, 2]
    assert len(fired["twice"]) == 24
    assert all(fired["twice"][2 * i][1] != fired["twice"][2 * i + 1][1] for i in range(12)), "each on a fresh batch"


def test_a_later_update_sees_the_earlier_ones_new_weights_and_the_same_prepared_batch(engine):
    net, seen, prepared = linear(), [], []

    def prepare(m, batch, run):
        prepared.append(run.step)
        return batch.replace(noise=run.randn(batch.size, 2))

    def first(m, batch, run):
        seen.append((m.net.weight.detach().clone(), batch["noise"]))
        return ce(m, batch, run)

    def second(m, batch, run):
        seen.append((m.net.weight.detach().clone(), batch["noise"]))
        return ce(m, batch, run)

    def stages(self, run):
        updates = [Update(first, {"net.weight": SGD}), Update(second, {"net.bias": SGD})]
        yield Stage("s", {"net": net}, updates, steps=3, batches=run.data.split("train").batches(8), prepare=prepare)
        return Result()

    engine(stages)
    assert prepared == [0, 1, 2]
    for (weight, noise), (later_weight, later_noise) in zip(seen[::2], seen[1::2], strict=True):
        assert not torch.equal(weight, later_weight)
        assert noise is later_noise


def test_an_update_may_draw_from_a_stream_of_its_own(engine):
    seen = []

    def loss(m, batch, run):
        seen.append(batch.size)
        return ce(m, batch, run)

    net = linear()

    def stages(self, run):
        update = Update(loss, {"net": SGD}, batches=run.data.split("validation").batches(3))
        yield Stage("s", {"net": net}, [update], steps=4, batches=run.data.split("train").batches(8))
        return Result()

    engine(stages)
    assert seen == [3] * 4


def test_skip_moves_nothing_and_the_step_counts(engine):
    net, counter, seen = linear(), Counter(), []

    def loss(m, batch, run):
        seen.append(weights(m.net))
        return SKIP if run.step in (1, 2) else ce(m, batch, run)

    stages = one_stage(net, Update(loss, {"net": adam(0.1)}), modules={"net": net, "counter": counter})
    engine(stages)
    assert same(seen[1], seen[2])
    assert same(seen[2], seen[3])
    assert not same(seen[3], seen[4])
    assert counter.steps == 6


def test_a_term_of_weight_0_is_not_computed_and_equals_its_absence(engine):
    with_zero, without = linear(), linear()

    def dead():
        raise AssertionError("computed")

    def zero(m, batch, run):
        return {**ce(m, batch, run), "dead": dead}

    engine(one_stage(with_zero, Update(zero, {"net": SGD}, weights={"dead": 0.0})), name="zero")
    engine(one_stage(without), name="without")
    assert same(weights(with_zero), weights(without))


def test_weights_are_fields_named_by_their_term(engine, tmp_path):
    double, by_hand = linear(), linear()

    def doubled(m, batch, run):
        return {"ce": 2 * ce(m, batch, run)["ce"]}

    engine(one_stage(double), name="field", fields={"weight_ce": 2.0}, log_every=1)
    engine(one_stage(by_hand, Update(doubled, {"net": SGD})), name="hand")
    for a, b in zip(weights(double), weights(by_hand), strict=True):
        torch.testing.assert_close(a, b)
    row = json.loads((tmp_path / "field" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["ce/ce/scale"] == pytest.approx(2 * row["ce/ce"])


def test_a_loss_in_pieces_equals_its_sum(engine):
    whole, pieces = linear(), linear()

    def in_pieces(m, batch, run):
        for part in (slice(0, 3), slice(3, 8)):
            out = m.net(batch["features"][part])
            yield {"ce": F.cross_entropy(out, batch.labels[part], reduction="sum") / batch.size}

    engine(one_stage(whole), name="whole")
    engine(one_stage(pieces, Update(in_pieces, {"net": SGD})), name="pieces")
    for a, b in zip(weights(whole), weights(pieces), strict=True):
        torch.testing.assert_close(a, b)


def test_schedules_count_firings(engine, tmp_path):
    update = Update(ce, {"net": sgd(1.0, schedule="linear")}, every=2)
    engine(one_stage(linear(), update, steps=8), log_every=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["ce/lr/net"] for row in rows] == [1.0, 0.75, 0.5, 0.25]


def test_several_optimisers_share_one_loss(engine):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    reference = copy.deepcopy(net)
    seen = []

    def loss(m, batch, run):
        seen.append(batch)
        return ce(m, batch, run)

    engine(one_stage(net, Update(loss, {"net.0": sgd(0.5), "net.1": sgd(0.01)}), steps=1))
    F.cross_entropy(reference(seen[0]["features"]), seen[0].labels).backward()
    for (name, parameter), trained in zip(reference.named_parameters(), net.parameters(), strict=True):
        lr = 0.5 if name.startswith("0") else 0.01
        torch.testing.assert_close(trained, parameter - lr * parameter.grad)


def test_elementwise_clipping_and_norm_clipping(engine):
    a, b = linear(), linear()
    engine(one_stage(a, Update(ce, {"net": sgd(1.0, clip_value=1e-3)}), steps=1), name="value")
    assert (a.weight - linear().weight).abs().max() <= 1e-3 + 1e-7
    engine(one_stage(b, Update(ce, {"net": sgd(1.0, clip_norm=1e-3)}), steps=1), name="norm")
    moved = torch.cat([(p - q).flatten() for p, q in zip(b.parameters(), linear().parameters(), strict=True)])
    assert moved.detach().norm() == pytest.approx(1e-3, rel=1e-3)


def test_reset_clears_what_optimisers_remember(engine):
    net = linear()
    sizes = []

    def loss(m, batch, run):
        sizes.append(len(run._fit.turns[0].groups[0][3].state))
        if run.step == 2:
            run.reset(m.net)
        return ce(m, batch, run)

    engine(one_stage(net, Update(loss, {"net": adam(0.1)})))
    assert sizes[1] == 2
    assert net is not None


# Parallel stages and records ------------------------------------------------------------------------------------------


def test_independent_stages_do_not_depend_on_their_order(engine):
    nets = {}

    def expert(run, name):
        def build():
            net = nn.Linear(4, 3)
            nets.setdefault(name, []).append(net)
            return Stage(
                name, {"net": net}, [Update(ce, {"net": SGD})], steps=4, batches=run.data.split("train").batches(8)
            )

        return build

    def stages(names):
        def generate(self, run):
            trained = yield [Later(name, expert(run, name)) for name in names]
            assert [t.name for t in trained] == names
            return Result()

        return generate

    engine(stages(["a", "b", "c"]), name="one")
    engine(stages(["c", "a", "b"]), name="two")
    for pair in nets.values():
        assert fingerprint(pair[0]) == fingerprint(pair[1])
    assert fingerprint(nets["a"][0]) != fingerprint(nets["b"][0])


def test_records_are_memory_mapped_by_index(engine):
    net, path = linear(), []

    class Look(nn.Module):
        def after_step(self, run):
            path.append(net.weight.detach().clone())

    start = net.weight.detach().clone()
    record = Record(lambda m: {"weight": m.net.weight}, every=2)
    stages = one_stage(net, modules={"net": net, "look": Look()}, records={"path": record})
    engine(stages)
    kept = stages.trained.records["path"]["weight"]
    assert isinstance(kept, np.memmap)
    assert kept.shape == (4, 3, 4)
    assert np.array_equal(kept[0], start.numpy())
    assert np.array_equal(kept[2], path[3].numpy())


# Storage --------------------------------------------------------------------------------------------------------------


def test_tied_tensors_are_stored_once_and_come_back_as_one(tmp_path):
    tensor = torch.arange(6.0)
    write_tree(tmp_path / "t", {"a": tensor, "b": tensor, "view": tensor[:3], "whole": tensor.view(2, 3), 3: (1, None)})
    tree = read_tree(tmp_path / "t")
    assert tree["a"] is tree["b"]
    assert torch.equal(tree["view"], tensor[:3])
    assert torch.equal(tree["whole"], tensor.view(2, 3))
    assert tree[3] == (1, None)


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing"])
def test_a_damaged_checkpoint_is_detected_and_the_one_before_is_used(engine, tmp_path, damage):
    class Stop(Exception):
        pass

    said = []

    class Listen(Silent):
        def say(self, sentence):
            said.append(sentence)

        def step(self, step):
            if step == 5 and not said and not self.resumed:
                raise Stop

        resumed = False

    straight, net = linear(), linear()
    engine(one_stage(straight), name="straight")
    with pytest.raises(Stop):
        engine(one_stage(net), listener=Listen(), checkpoint_every=2)
    file = tmp_path / "run" / "checkpoints" / "one" / "step-000000004" / "tensors.safetensors"
    raw = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        raw[-3] ^= 1
        file.write_bytes(raw)
    else:
        file.unlink()
    with pytest.raises(CorruptError):
        read_tree(file.parent)
    listener = Listen()
    listener.resumed = True
    again = linear()
    engine(one_stage(again), listener=listener, checkpoint_every=2)
    assert any("is damaged and is left aside" in sentence for sentence in said)
    assert same(weights(again), weights(straight))


# Trackers -------------------------------------------------------------------------------------------------------------


def test_trackers_by_name_get_the_rows(engine, tmp_path):
    pytest.importorskip("tensorboard")
    engine(one_stage(linear()), log_every=2, trackers=("tensorboard",))
    events = list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))
    assert events
    assert sum(path.stat().st_size for path in events) > 200
    with pytest.raises(UserError, match="there is no tracker 'tensorbord'; did you mean 'tensorboard'"):
        engine(one_stage(linear()), name="typo", trackers=("tensorbord",))


def test_data_that_are_not_finite_are_named(tmp_path):
    x = torch.randn(200, 4)
    x[::17, 2] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        sh.distil("supervised", model="mlp", data=(x, torch.arange(200) % 2), epochs=1, settings={"device": "cpu"})
    assert "NaN or infinite (and so is 'features' of sample" in str(caught.value)
    assert "of the split 'train')" in str(caught.value)
