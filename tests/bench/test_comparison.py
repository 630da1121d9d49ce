"""A comparison is paired, fair, complete on disk, continued where it stopped, and strict about what it belongs to."""

import json
import math
import sys

import pytest
import torch
from scipy import stats

import stillhouse as sh
from stillhouse.bench.arms import PLAIN
from stillhouse.bench.comparison import Comparing, _difference, chosen, common, latencies, measured
from stillhouse.cli import main
from stillhouse.engine import Interrupted, Signals
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.recipe import build_recipe
from stillhouse.report.comparison import tables

TINY = ["teacher.epochs=1", "epochs=1", "evaluations=2", "student.channels=[4]", "run.device=cpu"]


def strict(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


class Seen:
    """Watches a worker."""

    def __init__(self, stop=None):
        self.began, self.ended = [], []
        self.stop = stop

    def __call__(self, worker):
        return self

    def begins(self, run):
        self.began.append(run)

    def ends(self, run, how):
        self.ended.append((run, how))

    def step(self, step):
        if self.stop is not None and (self.began[-1], step) == self.stop[:2]:
            self.stop[2].stop = True

    def stage(self, name, steps, done):
        pass

    def row(self, row):
        pass

    def measured(self, stage, step, metric, value, mode):
        pass

    def say(self, sentence):
        pass


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def found(home):
    return sh.compare("kd", "sinkd", seeds=2, out=home / "c", overrides=TINY, command=["stillhouse", "compare"])


def test_differences_are_paired_by_seed(found):
    line = found.arm(PLAIN)
    assert found.baseline == PLAIN
    assert (found.metric, found.mode) == ("test/accuracy", "max")
    for arm in found.arms[:2]:
        pairs = [a - b for a, b in zip(*(x.metrics["test/accuracy"]["values"] for x in (arm, line)), strict=True)]
        told = arm.differences["test/accuracy"]
        expected = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
        assert told["mean"] == pytest.approx(sum(pairs) / 2)
        assert told["interval"] == pytest.approx((expected.low, expected.high))
        assert told["pairs"] == 2
        clear = not expected.low <= 0 <= expected.high
        assert (told["verdict"] != "within noise") == clear
    assert line.differences == {}


def test_every_arm_is_a_run_of_its_recipe(found, home, tmp_path):
    for arm in found.arms:
        recipe = build_recipe({**arm.recipe, "seed": 1})
        alone = run_recipe(recipe, tmp_path / arm.name)
        number = alone.metrics["test/accuracy"]
        assert arm.metrics["test/accuracy"]["values"][1] == number
        assert (home / "c" / "runs" / f"{arm.name}-1" / "recipe.yaml").exists()
    assert found.arm("kd").recipe["compare_alone"] is False


def test_the_teacher_is_trained_once_for_all(found, home):
    # No run keeps one of its own, and the plain student has none.
    times = {p.parent.name: json.loads(p.read_text()).get("teacher") for p in (home / "c" / "runs").glob("*/cost.json")}
    assert not list((home / "c" / "runs").glob("*/subruns"))
    assert found.teachers.keys() == {"teacher"}
    assert times["plain-student-0"] is None


def test_budgets_and_costs_are_told(found):
    steps = {arm.budget["steps"] for arm in found.arms}
    assert len(steps) == 1
    assert all(arm.unequal is None for arm in found.arms)
    for arm in found.arms:
        assert arm.cost["seconds"] > 0
        assert arm.cost["peak_memory"] > 1e6
        assert arm.cost["latency"] > 0
        assert arm.cost["parameters"] == 94
        assert "teacher" not in arm.budget
    assert any("seconds" in arm.front for arm in found.arms)


def test_everything_is_in_the_json(found, home):
    stored = strict((home / "c" / "comparison.json").read_text())
    assert stored == json.loads(json.dumps(found.dump()))
    assert stored["seeds"] == [0, 1]
    assert stored["command"] == ["stillhouse", "compare"]
    assert {"torch", "python"} <= set(stored["environment"])
    assert {arm["digest"] for arm in stored["arms"]} == {arm.digest for arm in found.arms}
    assert stored["version"]


def test_the_page_says_it_all_and_loads_nothing(found, home):
    page = (home / "c" / "comparison.html").read_text()
    for word in (
        "kd",
        "sinkd",
        PLAIN,
        "baseline",
        "95 % interval",
        "Pareto front",
        "training time",
        "stillhouse compare",
    ):
        assert word in page
    assert "default-src 'none'" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page.replace("script-src", "").replace("default-src", "").replace("img-src", "").replace(
        "style-src", ""
    )
    page.encode("ascii")


def test_what_finished_is_not_repeated(found, home):
    seen = Seen()
    again = sh.compare(
        "kd", "sinkd", seeds=2, out=home / "c", overrides=TINY, command=["stillhouse", "compare"], watch=seen
    )
    assert seen.began == []
    assert again.dump() == found.dump()


def test_more_seeds_are_added(found, home):
    seen = Seen()
    more = sh.compare("kd", "sinkd", seeds=3, out=home / "c", overrides=TINY, watch=seen)
    assert [run for run, _ in seen.ended] == ["kd-2", "sinkd-2", "plain-student-2"]
    for arm in found.arms:
        assert more.arm(arm.name).metrics["test/accuracy"]["values"][:2] == arm.metrics["test/accuracy"]["values"]


@pytest.mark.parametrize(
    ("methods", "overrides", "sentence"),
    [
        (("kd", "sinkd"), ["epochs=2"], "arms.kd.epochs is 1.0, not 2.0"),
        (("kd",), [], "it has arms.sinkd"),
    ],
)
def test_a_directory_with_another_comparison_is_refused(found, home, methods, overrides, sentence):
    with pytest.raises(UserError) as error:
        sh.compare(*methods, out=home / "c", overrides=[*TINY, *overrides])
    assert sentence in str(error.value)
    assert "choose another --out" in str(error.value)


def test_directories_of_other_things_are_refused(found, home, tmp_path):
    with pytest.raises(UserError, match="holds a run, not a comparison"):
        sh.compare("kd", out=home / "c" / "runs" / "kd-0", overrides=TINY)
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(UserError, match="holds other files"):
        sh.compare("kd", out=tmp_path, overrides=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_interrupted_it_goes_on_to_the_same_numbers(found, home):
    signals = Signals()
    seen = Seen(stop=("sinkd-0", 12, signals))
    with pytest.raises(Interrupted):
        sh.compare("kd", "sinkd", seeds=2, out=home / "d", overrides=TINY, signals=signals, watch=seen)
    assert seen.began == ["kd-0", "sinkd-0"]
    assert list((home / "d" / "runs" / "sinkd-0" / "checkpoints" / "student").glob("step-*"))
    again = Seen()
    went_on = sh.compare("kd", "sinkd", seeds=2, out=home / "d", overrides=TINY, watch=again)
    assert again.began == ["sinkd-0", PLAIN + "-0", "kd-1", "sinkd-1", PLAIN + "-1"]
    for arm in found.arms:
        assert went_on.arm(arm.name).metrics == arm.metrics


def test_an_arm_that_diverges_is_a_row_and_not_repeated(home, tmp_path, command):
    (tmp_path / "wild.yaml").write_text("method: kd\noptimizer: {name: sgd, lr: 1.0e30}\n")
    overrides = [*TINY, "student.channels=[4, 8]"]
    arguments = {"seeds": 1, "out": home / "e", "overrides": overrides, "own": ["optimizer"]}
    told = sh.compare("kd", str(tmp_path / "wild.yaml"), **arguments)
    assert told.arm("wild").metrics["test/accuracy"]["mean"] is None
    assert told.arm("wild").cost["seconds"] is None
    assert told.arm("kd").differences["test/accuracy"]["pairs"] == 1
    seen = Seen()
    again = sh.compare("kd", str(tmp_path / "wild.yaml"), watch=seen, **arguments)
    assert seen.began == []
    [failure] = [run["failure"] for run in again.arm("wild").runs]
    assert "NaN or infinite" in failure
    assert f"wild failed with every seed: {failure}" in again.findings
    files = ["kd", str(tmp_path / "wild.yaml")]
    code, said = command("compare", *files, "--seeds", "1", "--out", "e", "--own", "optimizer", *overrides)
    assert code == 1
    assert "failed: stage" in " ".join(said.out.split()) or "NaN or infinite" in said.out
    assert "NaN or infinite" in (home / "e" / "comparison.html").read_text()


def test_an_arm_that_fails_stops_no_other_and_is_tried_again(home, monkeypatch):
    from stillhouse.methods.language.sinkd import SinKD

    overrides, whole = [*TINY, "data.train_size=200"], SinKD.terms

    def broken(self, pair, run):
        if run.step == 1:
            raise RuntimeError("the tensor is too long\nand more")
        return whole(self, pair, run)

    monkeypatch.setattr(SinKD, "terms", broken)
    seen = Seen()
    told = sh.compare("kd", "sinkd", seeds=2, out=home / "o", overrides=overrides, watch=seen)
    assert [run for run, how in seen.ended if how.startswith("finished")] == [
        "kd-0",
        "plain-student-0",
        "kd-1",
        "plain-student-1",
    ]
    assert {run["failure"] for run in told.arm("sinkd").runs} == {"RuntimeError: the tensor is too long"}
    assert told.arm("kd").differences["test/accuracy"]["pairs"] == 2
    monkeypatch.undo()
    seen = Seen()
    told = sh.compare("kd", "sinkd", seeds=2, out=home / "o", overrides=overrides, watch=seen)
    assert seen.began == ["sinkd-0", "sinkd-1"]
    assert told.arm("sinkd").differences["test/accuracy"]["pairs"] == 2


@pytest.mark.parametrize(
    ("methods", "arguments", "sentence"),
    [
        (
            ("kd", "sinkd"),
            {"metric": "test/acuracy"},
            "not every arm measures 'test/acuracy'; did you mean 'test/accuracy'",
        ),
        (("kd", "sinkd"), {"metric": "test/accuracy:biggest"}, "'biggest' says not whether"),
        (("kd",), {"data": "digits", "student": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, 10))}, "kd"),
        (("kd",), {"data": "digits", "teacher": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))}, "kd"),
    ],
)
def test_what_is_wrong_with_an_arm_is_said_before_anything_is_run(methods, arguments, sentence, home):
    seen, overrides = Seen(), ["epochs=1", "run.device=cpu", "data.train_size=100"]
    with pytest.raises(UserError) as error:
        sh.compare(*methods, seeds=1, out=home / "p", overrides=overrides, watch=seen, **arguments)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert seen.began == []
    assert not (home / "p").exists()


def pairs(ours, theirs, metric="test/accuracy", sign=1):
    return _difference([a - b for a, b in zip(ours, theirs, strict=True)], [*ours, *theirs], metric, sign)


def test_without_variation_over_seeds_there_is_no_verdict():
    told = pairs([0.9, 0.9, 0.9], [0.8, 0.8, 0.8])
    assert (told["interval"], told["verdict"]) == (None, "no variation over seeds")
    assert pairs([0.9, 0.7], [0.9, 0.7])["verdict"] == "equal in every seed"
    assert pairs([1.0, 1.0], [1.0, 1.0])["verdict"] == "both at the limit"
    assert pairs([0.0, 0.0], [0.0, 0.0], "test/mse", -1)["verdict"] == "both at the limit"
    assert pairs([0.9], [0.8])["verdict"] == "one seed"
    assert pairs([0.9, 0.91, 0.9], [0.5, 0.5, 0.5])["verdict"] == "better"
    assert pairs([0.9, 0.5], [0.5, 0.9])["verdict"] == "within noise"


def test_runs_that_are_equal_in_every_seed_are_said_to_be(home, tmp_path):
    for name, temperature in (("one", 2), ("two", 4)):
        (tmp_path / f"{name}.yaml").write_text(f"method: kd\nweight_soft: 0.0\ntemperature: {temperature}\n")
    files = [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    told = sh.compare(*files, seeds=2, out=home / "q", overrides=[*TINY, "data.train_size=200"], baseline="one")
    assert told.arm("two").differences["test/accuracy"]["verdict"] == "equal in every seed"
    assert "two and one are equal in test/accuracy with every seed: there is nothing to judge by." in told.findings
    assert "equal in every seed" in (home / "q" / "comparison.html").read_text()


def test_an_arm_that_is_not_run_as_its_recipe_says_is_marked(home, tmp_path):
    (tmp_path / "best.yaml").write_text(
        "method: sinkd\ndata: digits\nteacher: {kind: trained, model: mlp}\nstudent: mlp\ntemperature: 3\n"
    )
    methods = ("kd", str(tmp_path / "best.yaml"))
    told = sh.compare(*methods, seeds=1, out=home / "r", overrides=[*TINY, "data.train_size=200"])
    [note] = [note for note in told.notes if "best is not run as its recipe says" in note]
    assert "teacher, student" in note
    assert "of kd; " in note
    assert "--own student" in note
    [(_, _, quality), *_] = tables(told.dump())
    assert [row[0] for row in quality] == ["kd", "best \N{DAGGER}", PLAIN]
    assert "best &#8224;" in (home / "r" / "comparison.html").read_text()


def test_one_failed_seed_leaves_the_others_paired(found, home):
    place = home / "c" / "runs" / "sinkd-1"
    (place / "failed.json").write_text(json.dumps({"error": "the 'kd' term is NaN"}))
    try:
        told = sh.compare("kd", "sinkd", seeds=2, out=home / "c", overrides=TINY)
    finally:
        (place / "failed.json").unlink()
    arm = told.arm("sinkd")
    assert arm.metrics["test/accuracy"]["values"][1] is None
    assert arm.differences["test/accuracy"]["pairs"] == 1
    assert any("sinkd failed with 1 of 2 seeds: the 'kd' term is NaN" in note for note in told.notes)
    assert "1 failed" in (home / "c" / "comparison.html").read_text()


def test_an_unequal_budget_is_flagged(tmp_path, home):
    text = "method: kd\nteacher: {kind: trained, model: cnn, epochs: 1}\nstudent: {kind: cnn, channels: [4]}\n"
    for name, epochs in (("short", 1), ("long", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"{text}epochs: {epochs}\ntemperature: {epochs}\n")
    files = [str(tmp_path / "short.yaml"), str(tmp_path / "long.yaml")]
    told = sh.compare(*files, seeds=1, out=home / "f", own=["epochs"], baseline="long", settings={"threads": 1})
    assert "steps where long has" in told.arm("short").unequal
    assert any(note.startswith("the budget of short differs") for note in told.notes)
    assert "differs" in (home / "f" / "comparison.html").read_text()


def test_objects_of_ones_own_are_compared_in_this_process(home):
    x = torch.randn(120, 6)
    y = (x[:, 0] > 0).long()
    own = {"teacher": torch.nn.Linear(6, 2), "student": torch.nn.Linear(6, 2), "data": (x, y), "epochs": 1}
    found = sh.compare("kd", "sinkd", seeds=1, out=home / "g", settings={"device": "cpu"}, **own)
    assert {arm.name for arm in found.arms} == {"kd", "sinkd", PLAIN}
    seen = Seen()
    sh.compare("kd", "sinkd", seeds=1, out=home / "g", settings={"device": "cpu"}, watch=seen, **own)
    assert seen.began == []
    with pytest.raises(UserError, match="jobs: recipes with Python objects"):
        sh.compare("kd", "sinkd", seeds=1, out=home / "h", jobs=2, settings={"device": "cpu"}, **own)


def test_training_sets_are_compared(home):
    fields = {"eval_networks": 1, "eval_epochs": 2, "features_epochs": 1}
    found = sh.compare("herding", seeds=1, out=home / "i", settings={"device": "cpu"}, **fields)
    assert (found.baseline, found.metric) == ("random-selection", "test/accuracy")
    assert found.arm("herding").cost["latency"] is None


def test_the_students_numbers_are_the_runs():
    numbers = measured(
        {"test/student/nll": 0.5, "test/teacher/nll": 0.1, "test/accuracy": 0.9, "test/student/accuracy": None}
    )
    assert numbers["test/nll"] == 0.5
    assert numbers["test/accuracy"] == 0.9
    assert math.isnan(numbers["test/student/accuracy"])


def test_quality_is_the_first_test_number_that_all_have_or_the_named_one():
    runs = {
        "a": [{"validation/nll": 1.0, "test/x": 1.0, "test/nll": 1.0}],
        "b": [{"test/nll": 2.0, "test/x": 2.0, "fid": 1.0}],
    }
    metrics = common(runs)
    assert metrics == ["test/x", "test/nll"]
    assert chosen(metrics, None, runs) == ("test/nll", "min")
    assert chosen(metrics, "test/x:max", runs) == ("test/x", "max")
    with pytest.raises(UserError, match="does not say what is better"):
        chosen(metrics, "test/x", runs)
    with pytest.raises(UserError, match="not every arm measures 'fid'"):
        chosen(metrics, "fid", runs)
    with pytest.raises(UserError, match="measure no number in common"):
        chosen([], None, runs)


def test_latencies_are_those_of_the_students(found):
    recipes = {arm.name: build_recipe(arm.recipe) for arm in found.arms}
    known = {arm.digest: 1.5 for arm in found.arms[:2]}
    told = latencies(recipes, known)
    assert told["kd"] == told["sinkd"] == 1.5
    assert 0 < told[PLAIN] < 0.5


def test_runs_alternate_between_arms(found):
    recipes = {arm.name: build_recipe(arm.recipe) for arm in found.arms}
    assert Comparing(None, recipes, range(2)).runs == [
        "kd-0",
        "sinkd-0",
        "plain-student-0",
        "kd-1",
        "sinkd-1",
        "plain-student-1",
    ]


@pytest.fixture
def command(home, monkeypatch, capsys):
    """Calls ``stillhouse`` where the comparisons of this file are."""
    monkeypatch.chdir(home)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stillhouse", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr()

    return call


def test_the_command_prints_tables_and_names_the_page(found, command):
    code, said = command("compare", "kd", "sinkd", "--seeds", "2", "--out", "c", *TINY)
    assert code == 0
    text = " ".join(said.out.split())
    assert "equal in all that have it, from kd: data, optimizer, epochs" in text
    assert "95 % interval" in text
    assert "training time" in text
    assert "page: c/comparison.html" in text


def test_the_page_is_written_again(found, command, home):
    page = home / "c" / "comparison.html"
    before = page.read_text()
    page.unlink()
    code, said = command("report", "c")
    assert (code, said.out) == (0, "c/comparison.html\n")
    assert page.read_text() == before
    (home / "begun").mkdir()
    (home / "begun" / "plan.json").write_text("{}")
    code, said = command("report", "begun")
    assert code == 2
    assert "has not ended, which has no page yet" in said.err


def test_json_is_alone_on_standard_output(found, command, home):
    code, said = command("compare", "kd", "sinkd", "--seeds", "2", "--out", "c", "--json", *TINY)
    assert code == 0
    assert strict(said.out) == strict((home / "c" / "comparison.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["epochs=1"], "compare needs a method's name"),
        (["kd", "--baseline", "sinkd"], "--baseline: there is no arm 'sinkd'"),
        (["qlae"], "there is only qlae to compare"),
        (["kd", "--own", "epoch"], "did you mean 'epochs'?"),
    ],
)
def test_mistakes_exit_with_2(command, arguments, sentence):
    code, said = command("compare", *arguments)
    assert code == 2
    assert said.err.count("\n") == 1
    assert sentence in said.err
