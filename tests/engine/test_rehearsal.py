"""A rehearsal says what a run takes, exactly where time is simulated, and leaves everything as it was."""

import json
import os
import random
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from stillhouse.cli import forecasting
from stillhouse.data import Data, DataSpec, ObjectData, Split
from stillhouse.data.looks import Look, looking
from stillhouse.data.pixels import PixelScale
from stillhouse.data.sources import Source
from stillhouse.engine import (
    Compute,
    Evaluation,
    Later,
    Method,
    Paper,
    Record,
    Result,
    Run,
    RunDirectory,
    Settings,
    Stage,
    SubRun,
    Update,
    adam,
    frozen,
    scratch,
    sgd,
)
from stillhouse.engine import rehearsal as module
from stillhouse.engine.memory import PeakMemory
from stillhouse.engine.rehearsal import patterns, rehearse, spread
from stillhouse.errors import UnreachableError, UserError
from stillhouse.facts import Facts
from stillhouse.models import MLPSpec, ModelSpec
from stillhouse.offline import is_offline, offline
from stillhouse.recipe import load_recipe
from stillhouse.registry import entries, recipes

CPU = Settings(device="cpu")


def small_data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 4, generator=generator), torch.randint(0, 3, (48,), generator=generator)
    return ObjectData.from_object({"train": (x, y), "validation": (x[:16], y[:16]), "test": (x[:16], y[:16])}).load()


DATA = small_data()


class Clock:
    """Time that passes only when something says what it takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        self.now += seconds


def method(stages, **fields):
    """A method with these stages."""
    names = dict.fromkeys(("name", "family", "paper", "summary"), ClassVar)
    told = {"name": "scratch", "family": "tests", "paper": Paper("none", 2026), "summary": "made by a test"}
    annotations = {**names, **{key: type(value) for key, value in fields.items()}}
    body = {"__annotations__": annotations, "__module__": __name__, **told, **fields, "stages": stages}
    return type("Scratch", (Method,), body)()


def real(made, place, **options):
    """Run it."""
    directory = RunDirectory(place)
    directory.lock()
    try:
        return Run(made, directory, settings=CPU, data=DATA, **options).execute()
    finally:
        directory.release()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def ce(m, batch, run):
    return {"ce": F.cross_entropy(m.net(batch["features"]), batch.labels)}


def stage(name="one", made=None, steps=20, update=None, **fields):
    fields.setdefault("batches", DATA.split("train").batches(8))
    return Stage(name, {"net": made or net()}, [update or Update(ce, {"net": sgd(0.1)})], steps, **fields)


# What it costs --------------------------------------------------------------------------------------------------------


def two_speeds(clock, steps):
    """A generator every fifth step, a critic in each, a costly look every tenth; drawn into a picture now and then."""

    def critic(m, batch, run):
        clock.takes(1.0)
        return {"a": m.critic(batch["features"]).mean()}

    def generator(m, batch, run):
        clock.takes(5.0)
        return {"b": m.generator(batch["features"]).mean()}

    def prepare(m, batch, run):
        clock.takes(3.0 if run.step % 5 == 0 else 0.25)

    def measure(m):
        clock.takes(10.0)
        return {"x": 1.0}

    def show(m, run):
        clock.takes(2.0)
        return {"p": torch.zeros(1, 2, 2)}

    def take(m):
        clock.takes(0.5)
        return {"w": m.critic.weight}

    def stages(self, run):
        clock.takes(7.0)
        yield Stage(
            "adversaries",
            {"critic": net(), "generator": net(1)},
            [
                Update(generator, {"generator": sgd(0.1)}, every=5, name="generator"),
                Update(critic, {"critic": adam(0.1)}, times=2, name="critic"),
            ],
            steps,
            batches=DATA.split("train").batches(8),
            prepare=prepare,
            evaluate=Evaluation(measure, every=10, monitor="x"),
            show=show,
            show_every=20,
            records={"path": Record(take, every=25)},
        )
        yield Compute("measured", lambda _: clock.takes(11.0))
        return Result()

    return method(stages)


@pytest.mark.parametrize("steps", [1, 4, 103, 250])
def test_the_forecast_is_what_the_run_takes_to_the_second(tmp_path, steps):
    clock = Clock()
    found = rehearse(two_speeds(clock, steps), settings=CPU, data=DATA, clock=clock)
    clock.now = 0.0
    real(two_speeds(clock, steps), tmp_path / "run")
    assert found.seconds == pytest.approx(clock.now)
    assert found.complete
    first = found.steps[0]
    assert [u.firings for u in first.updates] == [-(-steps // 5), 2 * steps]
    assert [u.parameters for u in first.updates] == [15, 15]
    assert (first.evaluations, first.evaluation_seconds) == (-(-steps // 10), 10.0)
    assert first.modules["critic"] == {"class": "Linear", "parameters": 15, "mode": "trained"}


def test_a_cost_that_moves_with_progress_is_met_at_all_its_values():
    clock = Clock()

    def loss(m, batch, run):
        clock.takes(1.0 + run.progress)
        return ce(m, batch, run)

    found = rehearse(
        method(lambda self, run: (yield from only(stage(update=Update(loss, {"net": sgd(0.1)}), steps=1000)))),
        settings=CPU,
        data=DATA,
        clock=clock,
    )
    assert found.seconds == pytest.approx(1500, rel=0.05)


def only(*yields):
    for item in yields:  # noqa: UP028 (a tuple takes no replies)
        yield item
    return Result()


def test_where_a_function_says_when_to_fire_the_mean_is_taken():
    clock = Clock()

    def loss(m, batch, run):
        clock.takes(4.0)
        return ce(m, batch, run)

    update = Update(loss, {"net": sgd(0.1)}, every=lambda run: run.step % 4 < 2)
    found = rehearse(
        method(lambda self, run: (yield from only(stage(update=update, steps=1000)))),
        settings=CPU,
        data=DATA,
        clock=clock,
    )
    assert found.steps[0].updates[0].firings is None
    assert found.seconds == pytest.approx(2000, rel=0.25)


@pytest.mark.parametrize("every", [(1,), (5, 1), (2, 3), (7, 4, 1)])
@pytest.mark.parametrize("steps", [1, 6, 41, 300])
def test_steps_are_counted_by_what_fires_in_them(every, steps):
    updates = [Update(ce, {"net": sgd(0.1)}, every=one, name=str(place)) for place, one in enumerate(every)]
    made = Stage("one", {"net": net()}, updates, steps)
    kinds = [frozenset(place for place, one in enumerate(every) if step % one == 0) for step in range(steps)]
    assert patterns(made) == {kind: kinds.count(kind) for kind in kinds}
    for kind in set(kinds):
        places = spread(made, kind, 9)
        assert len(places) == 9
        assert all(kinds[place] == kind for place in places)


def test_equal_stages_of_a_list_are_timed_once_and_all_counted():
    clock, calls = Clock(), []

    def loss(m, batch, run):
        clock.takes(1.0)
        calls.append(run.stage)
        return ce(m, batch, run)

    update = Update(loss, {"net": sgd(0.1)}, name="loss")

    def stages(self, run):
        yield [Later(f"expert/{i}", lambda i=i: stage(f"expert/{i}", net(i), 60, update)) for i in range(5)]
        return Result()

    found = rehearse(method(stages), settings=CPU, data=DATA, clock=clock)
    assert set(calls) == {"expert/0"}
    assert [step.name for step in found.steps] == [f"expert/{i}" for i in range(5)]
    assert found.seconds == pytest.approx(300)


def test_checkpoints_count_by_their_cost(monkeypatch, tmp_path):
    clock = Clock()
    written = module.write_tree
    monkeypatch.setattr(module, "write_tree", lambda *a, **k: (clock.takes(3.0), written(*a, **k)))
    settings = Settings(device="cpu", checkpoint_every=10)
    made = method(lambda self, run: (yield from only(stage(steps=45))))
    found = rehearse(made, settings=settings, data=DATA, clock=clock)
    assert found.seconds == pytest.approx(5 * 3.0)  # at 10, 20, 30 and 40, and the end


def test_a_computation_that_can_do_a_part_is_not_done_in_full():
    clock, done = Clock(), []

    def part(place, share):
        clock.takes(3.0 + 64.0 * share)
        done.append(share)
        return {"rows": torch.zeros(64)}

    def stages(self, run):
        stored = yield Compute("heavy", lambda _: pytest.fail("it was run in full"), part=part)
        assert stored["rows"].shape == (64,)
        return Result()

    found = rehearse(method(stages), settings=CPU, data=DATA, clock=clock)
    assert found.seconds == pytest.approx(67.0)
    assert max(done) <= 1 / 8


class Many(Source):
    """Images by the million, made when they are asked for; counts how many were."""

    read = 0

    def __len__(self):
        return 10**6

    def fetch(self, index, seeds=None):
        Many.read += len(index)
        return {
            "pixel_values": (index[:, None, None, None] % 251).expand(-1, 1, 8, 8).to(torch.uint8),
            "labels": index % 3,
        }

    @property
    def labels(self):
        return torch.arange(len(self)) % 3


def many():
    facts = Facts(inputs={"pixel_values": (1, 8, 8)}, num_classes=3, task="classification", class_names=("a", "b", "c"))
    scale = PixelScale.of("unit", torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 255)
    splits = {name: Split(name, facts, Many(), scale=scale) for name in ("train", "validation", "test")}
    return Data("many", facts, splits, "many", scale)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("supervised", []),
        ("kd", ["cache_teacher=true"]),
        ("nd-loss", []),
        ("herding", ["eval_networks=1", "images_per_class=2"]),
        ("autoencoder", []),
    ],
)
def test_of_a_million_samples_few_are_read(name, overrides, monkeypatch, tmp_path):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "LOOK", 0.01)
    monkeypatch.setattr(module, "UNTIMED", 200)
    monkeypatch.setattr(module, "SECONDS", 0.1)
    monkeypatch.setattr(module, "LONGEST", 0.01)
    monkeypatch.setattr(Many, "read", 0)
    recipe = load_recipe(name, [*overrides, "run.device=cpu"])
    found = rehearse(recipe.method, settings=recipe.settings, data=many())
    assert found.complete, found.missing
    # A million is met again and again: only what is read is little.
    assert Many.read < 200_000
    assert found.seconds > 10


def test_of_a_large_split_evenly_spaced_samples_are_looked_at_and_the_rest_is_counted():
    clock = Clock()
    split = Split("test", Facts({}), {"labels": torch.arange(1000)})
    with looking(Look(20, clock)) as taken:
        seen = []
        for batch in split.in_order(8):
            assert torch.equal(batch.index, batch.labels)
            seen += batch.labels.tolist()
            clock.takes(5.0 if len(seen) == 8 else 0.5 * batch.size)
    assert seen == [50 * place for place in range(20)]
    assert clock.now + taken.left_out == pytest.approx(11.0 + 0.5 * 980)
    assert len(list(split.in_order(8))) == 125


def test_a_walk_that_is_not_timed_does_each_thing_once():
    clock, steps = Clock(), []

    def loss(m, batch, run):
        steps.append(run.step)
        return ce(m, batch, run)

    def part(place, share):
        steps.append(share)
        return 0.0

    def stages(self, run):
        yield stage(update=Update(loss, {"net": sgd(0.1)}))
        yield Compute("part", lambda _: pytest.fail("it was run in full"), part=part)
        return Result(metrics={"test/x": 1.0, "a": 2.0})

    found = rehearse(method(stages), settings=CPU, data=DATA, clock=clock, timed=False)
    assert found.metrics == ["a", "test/x"]
    assert len(steps) == 2


def test_a_computation_without_parts_is_run_and_its_value_is_the_stored_one():
    places = []

    def stages(self, run):
        def fn(place):
            places.append(place)
            (place / "file.txt").write_text("x")
            return {"pair": (1, 2), "path": place / "file.txt"}

        value = yield Compute("real", fn)
        assert value["pair"] == (1, 2)
        assert value["path"].read_text() == "x"
        return Result()

    found = rehearse(method(stages), settings=CPU, data=DATA)
    assert found.complete
    assert len(places) == 1
    assert not places[0].exists()


class Teacher(Method):
    """A run within the run."""

    name: ClassVar[str] = "inner"
    family: ClassVar[str] = "tests"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "made by a test"

    steps: int = Field(30, description="steps")

    def stages(self, run):
        made = net(5)
        evaluation = Evaluation(lambda m: {"acc": 0.5}, every=10, monitor="acc")
        yield stage("inner", made, self.steps, evaluate=evaluation)
        return Result(artefacts={"model": made})


def with_teacher(seen):
    def stages(self, run):
        teacher = yield SubRun("teacher", Teacher(), data=run.data)
        seen.append((teacher.model.weight.clone(), teacher.curve("acc")))
        made = net(1)
        yield Stage(
            "student",
            {"net": made, "teacher": frozen(teacher.model)},
            [Update(ce, {"net": sgd(0.1)})],
            10,
            batches=DATA.split("train").batches(8),
        )
        return Result(artefacts={"student": made})

    return method(stages)


def test_a_run_within_the_run_is_rehearsed_or_found(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    seen = []
    before = rehearse(with_teacher(seen), settings=CPU, data=DATA)
    assert [step.name for step in before.steps[0].within] == ["inner"]
    assert not before.steps[0].done
    assert not (tmp_path / "cache").exists()
    assert torch.equal(seen[0][0], net(5).weight)  # as it was drawn
    assert seen[0][1] == []

    real(with_teacher(seen), tmp_path / "run")
    listed = sorted(path for path in (tmp_path / "cache").rglob("*"))
    times = [path.stat().st_mtime_ns for path in listed]
    found = rehearse(with_teacher(seen), settings=CPU, data=DATA)
    assert found.steps[0].done
    assert found.steps[0].within == []
    assert found.steps[0].seconds < before.steps[0].seconds
    assert torch.equal(seen[2][0], seen[1][0])  # trained
    assert seen[2][1] == seen[1][1] != []
    assert sorted(path for path in (tmp_path / "cache").rglob("*")) == listed
    assert [path.stat().st_mtime_ns for path in listed] == times
    assert not rehearse(with_teacher(seen), settings=CPU, data=DATA, cache=False).steps[0].done


def test_a_stored_computation_is_found_and_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    calls = []

    def stages(self, run):
        value = yield Compute("outputs", lambda _: calls.append(1) or [7], key="the key")
        assert value == [7]
        return Result()

    real(method(stages), tmp_path / "run")
    found = rehearse(method(stages), settings=CPU, data=DATA)
    assert calls == [1]
    assert (found.steps[0].done, found.steps[0].seconds) == (True, 0.0)


# Without a trace ------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """A stateful part."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def after_step(self, run):
        self.count += 1
        self.hidden = self.hidden + 1


def test_weights_buffers_generators_and_disk_stay_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    modules = {
        "net": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)),
        "part": Counter(),
        "scratch": nn.Linear(4, 3),
        "teacher": nn.Linear(4, 3),
    }
    before = {n: [t.clone() for t in (*m.parameters(), *m.buffers())] for n, m in modules.items()}
    modes = [sub.training for m in modules.values() for sub in m.modules()]
    flags = [p.requires_grad for m in modules.values() for p in m.parameters()]

    def prepare(m, batch, run):
        nn.init.normal_(m.scratch.weight)
        np.random.rand()

    def stages(self, run):
        held = {"scratch": scratch(modules["scratch"]), "teacher": frozen(modules["teacher"])}
        trained = yield Stage(
            "one",
            {"net": modules["net"], "part": modules["part"], **held},
            [Update(ce, {"net": adam(0.1)})],
            50,
            batches=run.data.split("train").batches(8),
            prepare=prepare,
            evaluate=Evaluation(lambda m: {"x": float(m.net(torch.randn(4, 4)).mean())}, every=10, monitor="x"),
            ema={"net": 0.9},
            keep="ema",
            records={"path": Record(lambda m: {"w": m.net[0].weight}, every=10)},
            show=lambda m, run: {"p": torch.rand(1, 2, 2)},
        )
        assert trained.records["path"]["w"].shape == (6, 8, 4)
        assert torch.equal(trained.ema["net"]["0.weight"], before["net"][0])
        yield Compute("draws", lambda _: [random.random(), torch.rand(3)])
        return Result(artefacts={"net": modules["net"]}, pictures={"p": torch.rand(1, 2, 2)})

    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found = rehearse(method(stages), settings=CPU, data=DATA)
    assert found.complete
    after = {n: [*m.parameters(), *m.buffers()] for n, m in modules.items()}
    for name, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, after[name], strict=True)), name
    assert [sub.training for m in modules.values() for sub in m.modules()] == modes
    assert [p.requires_grad for m in modules.values() for p in m.parameters()] == flags
    assert all(p.grad is None for m in modules.values() for p in m.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_those_that_the_run_begins_with(tmp_path):
    drawn = []

    def stages(self, run):
        yield Compute("first", lambda _: 1)
        made = nn.Linear(4, 3)
        drawn.append(made.weight.detach().clone())
        yield stage(made=made)
        return Result()

    rehearse(method(stages), seed=3, settings=CPU, data=DATA)
    real(method(stages), tmp_path / "run", seed=3)
    assert torch.equal(*drawn)


# What is not here -----------------------------------------------------------------------------------------------------


class Wide(ModelSpec):
    """A model whose size a test chooses."""

    kind = "wide"
    width: int

    def build(self, facts):
        return nn.Sequential(nn.Linear(4, self.width), nn.BatchNorm1d(self.width), nn.Linear(self.width, 3))


def big(width, optimizer, **fields):
    def stages(self, run):
        made = Wide(width=width).build(run.data.facts)
        yield stage("big", made, 10, Update(ce, {"net": optimizer}), **fields)
        yield Compute("score", lambda _: pytest.fail("nothing can be computed"), form=lambda: {"acc": 0.0})
        yield stage("next")
        yield Compute("last", lambda _: 0.0)
        yield stage("never")

    return method(stages)


@pytest.mark.parametrize(
    ("optimizer", "fields", "copies"),
    [(adam(0.1), {}, 4), (sgd(0.1), {}, 2), (sgd(0.1, momentum=0.9), {"keep": "ema", "ema": {"net": 0.9}}, 4)],
)
def test_a_model_that_is_too_large_takes_no_memory(monkeypatch, optimizer, fields, copies):
    monkeypatch.setattr(module, "LARGEST", 1000)
    width = 10**7  # 440 MB, were it made
    peak = PeakMemory(torch.device("cpu"))
    peak.enter()
    before = peak.leave()
    peak.enter()
    found = rehearse(big(width, optimizer, **fields), settings=CPU, data=DATA)
    assert peak.leave() < before + 10**8
    parameters, buffers = 10 * width + 3, 2 * width
    first, score, after, last = found.steps
    assert first.at_least
    assert first.seconds is None
    in_average = buffers + 1 if fields else 0
    assert first.memory == 4 * (copies * parameters + buffers + in_average) + 8 + (4 if fields else 0)
    assert first.modules["net"]["parameters"] == parameters
    assert [step.name for step in (score, after, last)] == ["score", "next", "last"]
    assert not found.complete
    assert any("without memory" in sentence for sentence in found.missing)
    assert any("'last' is not known" in sentence for sentence in found.missing)


def test_data_that_are_not_here_are_stood_in_for_where_their_form_is_known(monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)

    def stages(self, run):
        made = MLPSpec(widths=(8,)).build(run.data.facts)
        yield Stage(
            "one",
            {"net": made},
            [Update(lambda m, b, r: pytest.fail("nothing is stepped"), {"net": sgd(0.1)}, name="loss")],
            run.data.split("train").batches(50).per_epoch(),
            batches=run.data.split("train").batches(50),
        )
        return Result()

    found = rehearse(method(stages, data=DataSpec.parse("cifar10")), settings=CPU)
    assert found.data["samples"] == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert (found.data["inputs"], found.data["classes"]) == ({"pixel_values": [3, 32, 32]}, 10)
    assert (found.steps[0].steps, found.steps[0].batch_size, found.steps[0].seconds) == (900, 50, None)
    (sentence,) = found.missing
    assert "cifar-10-binary.tar.gz" in sentence
    assert not found.complete


def test_a_hub_model_that_cannot_be_reached_is_one_sentence():
    def stages(self, run):
        yield Compute("first", lambda _: 1)
        ModelSpec.parse("hf:nobody/nothing").build(run.data.facts)
        yield Compute("second", lambda _: 2)
        return Result()

    found = rehearse(method(stages), settings=CPU, data=DATA)
    assert [step.name for step in found.steps] == ["first"]
    assert len(found.missing) == 1
    assert found.missing[0].startswith("The model 'hf:nobody/nothing' could not be made")


def test_a_pretrained_model_is_built_from_its_config_alone(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.save_pretrained(tmp_path / "model")
    spec = ModelSpec.parse(f"hf:{tmp_path / 'model'}")
    facts = Facts({"input_ids": (5,)}, num_classes=2)
    with pytest.raises(UnreachableError):
        spec.build(facts)  # there are no weights
    made = module.outlined(lambda: spec.build(facts))
    assert made is not None
    assert all(parameter.is_meta for parameter in made.parameters())
    assert sum(p.numel() for p in made.parameters()) > 100


def test_what_is_wrong_is_an_error_here_too():
    made = method(lambda self, run: (yield from only(stage(update=Update(ce, {"nett": sgd(0.1)})))))
    with pytest.raises(UserError, match="names the module 'nett'"):
        rehearse(made, settings=CPU, data=DATA)
    evaluation = Evaluation(lambda m: {"acc": 1.0}, every=2, monitor="accuracy")
    made = method(lambda self, run: (yield from only(stage(evaluate=evaluation))))
    with pytest.raises(UserError, match="not the monitored 'accuracy'"):
        rehearse(made, settings=CPU, data=DATA)


def test_a_loss_that_is_not_finite_yet_is_told():
    def loss(m, batch, run):
        return {"ce": m.net(batch["features"]).mean() * float("nan")}

    made = method(lambda self, run: (yield from only(stage(update=Update(loss, {"net": sgd(0.1)})))))
    found = rehearse(made, settings=CPU, data=DATA)
    assert "not finite" in found.steps[0].note
    assert not found.complete


def test_a_computation_that_fails_untrained_ends_the_forecast():
    def stages(self, run):
        yield Compute("fails", lambda _: torch.linalg.inv(torch.zeros(2, 2)))
        yield Compute("after", lambda _: 1)

    found = rehearse(method(stages), settings=CPU, data=DATA)
    assert not found.complete
    assert "'fails' fails on what is not trained yet" in found.missing[0]


@pytest.mark.parametrize("untrained", [False, True])
def test_a_refusal_counts_only_where_it_is_not_the_untrained_weights(untrained):
    def refuse(_):
        raise UserError("pool: none of 9 images is left.")

    def stages(self, run):
        if untrained:
            yield stage()
        yield Compute("mining", refuse)
        return Result()

    if not untrained:
        with pytest.raises(UserError, match="none of 9 images"):
            rehearse(method(stages), settings=CPU, data=DATA)
        return
    found = rehearse(method(stages), settings=CPU, data=DATA)
    assert found.missing == [
        "the computation 'mining' fails on what is not trained yet (pool: none of 9 images is left)."
    ]


def test_offline_holds_within_and_not_after():
    before = {flag: os.environ.get(flag) for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    with offline():
        assert is_offline()
        assert os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert not is_offline()
    assert {flag: os.environ.get(flag) for flag in before} == before


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_the_peak_of_an_inner_span_counts_for_the_outer_ones_and_not_for_the_next():
    peak = PeakMemory(torch.device("cpu"))
    peak.enter()
    peak.enter()
    large = torch.ones(60_000_000)
    del large
    inner = peak.leave()
    peak.enter()
    quiet = peak.leave()
    outer = peak.leave()
    assert outer >= inner
    assert inner - quiet > 200_000_000


def test_a_run_says_the_peak_of_each_yield(tmp_path):
    real(with_teacher([]), tmp_path / "run", cache=False)
    peaks = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert list(peaks) == ["teacher", "student"]
    inner = json.loads((tmp_path / "run" / "subruns" / "teacher" / "memory.json").read_text())
    assert peaks["teacher"] >= inner["inner"] > 10**7


# The command ----------------------------------------------------------------------------------------------------------

PAPER = [f"{e['name']}/{s}" for e in entries() for s in recipes(e["name"]) if s.startswith("paper")]


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_paper_scale_pass_without_network_and_data(name, monkeypatch, tmp_path):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    found = rehearse(recipe.method, seed=recipe.seed, settings=recipe.settings.model_copy(update={"device": "cpu"}))
    assert found.missing
    assert all("\n" not in sentence and sentence.endswith((".", "?")) for sentence in found.missing)
    assert found.models
    told = forecasting.lines(recipe, found)
    assert told[-1].startswith("the recipe is valid")
    assert list(Path(tmp_path).iterdir()) == []


def test_the_forecast_is_printed_for_people_and_as_json(capsys):
    small = ["epochs=1", "model.channels=[4]", "run.device=cpu"]
    forecasting.dry("supervised", small, seed=None, cache=True, as_json=False)
    told = capsys.readouterr().out
    assert "model: stage, 16 steps of 64 samples" in told
    assert "update loss: every step, trains" in told
    assert "parameters, trained" in told
    assert "of the whole process at the peak" in told
    forecasting.dry("supervised", small, seed=4, cache=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["seed"], found["complete"]) == ("supervised", 4, True)
    assert [step["name"] for step in found["steps"]] == ["model", "test"]
    assert found["steps"][0]["updates"][0]["firings"] == 16
