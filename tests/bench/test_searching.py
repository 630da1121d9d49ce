"""A search chooses by the validation split alone, goes on where it stopped, and leaves a recipe that runs."""

import json
import sys

import pytest
import torch

import stillhouse as sh
from stillhouse.bench import Unwatched
from stillhouse.bench.ranges import Range, default_ranges, read_range
from stillhouse.bench.searching import Judge, Pruned, Searching, read_base, read_ranges
from stillhouse.cli import main
from stillhouse.engine import Interrupted, Signals
from stillhouse.errors import UserError
from stillhouse.recipe import load_recipe

FIELDS = ["teacher.epochs=1", "epochs=1", "student.channels=[4]", "evaluations=4", "run.device=cpu"]
RANGES = ["temperature=1..8", "divergence=kl|js", "optimizer.lr=1e-4..1e-1"]
TRIALS = 7


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def found(home):
    return sh.search("kd", RANGES, trials=TRIALS, overrides=FIELDS, out=home / "s")


def drawn(search):
    return [(trial["run"], trial["values"], trial["state"], trial["value"]) for trial in search.trials]


def test_the_best_recipe_is_that_of_the_best_finished_trial(found, home):
    finished = [trial for trial in found.trials if trial["state"] == "finished"]
    assert len(found.trials) == TRIALS
    assert found.metric == "validation/accuracy"
    assert found.best["value"] == max(trial["value"] for trial in finished)
    best = load_recipe(home / "s" / "best.yaml")
    assert best.method == found.best_recipe.method
    assert best.method.temperature == found.best["values"]["temperature"]
    assert best.method.divergence == found.best["values"]["divergence"]
    assert best.method.optimizer.lr == found.best["values"]["optimizer.lr"]
    assert best.method.epochs == 1
    assert best.method.compare_alone, "the best recipe is the user's in everything that was not searched"


def test_values_lie_in_their_ranges(found):
    for trial in found.trials:
        assert 1 <= trial["values"]["temperature"] <= 8
        assert 1e-4 <= trial["values"]["optimizer.lr"] <= 1e-1
        assert trial["values"]["divergence"] in ("kl", "js")
    assert len({trial["values"]["temperature"] for trial in found.trials}) == TRIALS


def test_no_trial_knows_the_test_split(found, home):
    sizes = {name: len(split) for name, split in load_recipe("kd").method.data.load().splits.items()}
    assert sizes["test"] > 0
    for run in (home / "s" / "runs").iterdir():
        if (run / "metrics.json").exists():
            names = json.loads((run / "metrics.json").read_text())
            assert not [
                name for name in names if name.startswith("test/") and name.endswith(("accuracy", "nll", "ece"))
            ]
            assert "validation/accuracy" in names
    bench = Searching(home, load_recipe("kd"), [], 0)
    assert set(bench.data.splits) == {"train", "validation"}
    assert bench.data.fingerprint != load_recipe("kd").method.data.load().fingerprint


def test_what_decides_is_what_the_log_says(found, home):
    for trial in found.trials:
        log = [
            json.loads(line) for line in (home / "s" / "runs" / trial["run"] / "metrics.jsonl").read_text().splitlines()
        ]
        logged = [row["validation/accuracy"] for row in log if "validation/accuracy" in row]
        assert [row[2] for row in trial["measured"]] == logged
        if trial["state"] == "finished":
            assert trial["value"] == logged[-1]


def test_the_same_search_makes_nothing_anew_and_more_trials_are_added(found, home):
    began = []

    class Seen(Unwatched):
        def begins(self, run):
            began.append(run)

    more = sh.search("kd", RANGES, trials=TRIALS + 1, overrides=FIELDS, out=home / "s", watch=lambda worker: Seen())
    assert began == [f"trial-{TRIALS:03}"]
    assert drawn(more)[:TRIALS] == drawn(found)
    again = sh.search("kd", RANGES, trials=TRIALS, overrides=FIELDS, out=home / "s", watch=lambda worker: Seen())
    assert began == [f"trial-{TRIALS:03}"]
    assert again.dump() == found.dump()


def test_an_interrupted_search_draws_what_it_would_have_drawn(found, home):
    signals = Signals()

    class Stopper(Unwatched):
        def begins(self, run):
            self.run = run

        def step(self, step):
            signals.stop |= (self.run, step) == ("trial-003", 9)

    arguments = {"trials": TRIALS, "overrides": FIELDS, "out": home / "i"}
    with pytest.raises(Interrupted):
        sh.search("kd", RANGES, signals=signals, watch=lambda worker: Stopper(), **arguments)
    assert json.loads((home / "i" / "runs" / "trial-003" / "measured.json").read_text())
    went_on = sh.search("kd", RANGES, **arguments)
    assert drawn(went_on) == drawn(found)
    for old, new in zip(found.trials, went_on.trials, strict=True):
        assert old["measured"] == new["measured"]


class Trial:
    """A trial that is pruned when it is told so."""

    def __init__(self, prune):
        self.prune, self.told = prune, []

    def report(self, value, step):
        self.told.append((step, value))

    def should_prune(self):
        return self.prune


def judge(place, *, prune=False, rows=()):
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Judge(place, Trial(prune), Unwatched())


def row(step, **measured):
    return {"stage": "student", "step": step, **{name.replace("__", "/"): value for name, value in measured.items()}}


def test_a_trial_is_given_up_only_past_its_half_and_before_its_end(tmp_path):
    rows = [row(step, validation__nll=1.0 / step) for step in (2, 5, 10)]
    hopeless = judge(tmp_path, prune=True, rows=rows)
    hopeless.stage("student", 10, 0)
    hopeless.measured("student", 2, "validation/nll", 0.5, "min")
    hopeless.measured("student", 10, "validation/nll", 0.1, "min")
    assert hopeless.trial.told == [(0, -0.5), (1, -0.1)], "what should be small is told as what should be large"
    with pytest.raises(Pruned):
        hopeless.measured("student", 5, "validation/nll", 0.2, "min")


def test_only_validation_numbers_of_the_runs_own_stages_count(tmp_path):
    own = judge(tmp_path, rows=[row(5, validation__accuracy=0.5, test__accuracy=0.9)])
    own.measured("student", 5, "test/accuracy", 0.9, "max")
    own.measured("model", 5, "validation/accuracy", 0.7, "max")
    assert own.score({}, best=False) is None
    own.measured("student", 5, "validation/accuracy", 0.5, "max")
    assert own.score({}, best=False) == 0.5


def test_who_goes_on_with_a_trial_knows_what_was_measured(tmp_path):
    rows = [row(step, validation__accuracy=step / 10) for step in (1, 2, 3)]
    first = judge(tmp_path, rows=rows)
    for step in (1, 2):
        first.measured("student", step, "validation/accuracy", step / 10, "max")
    second = judge(tmp_path, rows=rows)
    for step in (2, 3):
        second.measured("student", step, "validation/accuracy", step / 10, "max")
    assert second.trial.told == [(0, 0.1), (1, 0.2), (2, 0.3)]
    assert second.score({}, best=False) == second.score({}, best=True) == 0.3


def test_the_weights_that_are_kept_decide(tmp_path):
    rows = [row(step, validation__accuracy=value) for step, value in ((1, 0.9), (2, 0.4))]
    told = judge(tmp_path, rows=rows)
    for step, value in ((1, 0.9), (2, 0.4)):
        told.measured("student", step, "validation/accuracy", value, "max")
    assert (told.score({}, best=True), told.score({}, best=False)) == (0.9, 0.4)


def test_the_number_of_the_result_decides_where_it_has_one(tmp_path):
    told = judge(tmp_path, rows=[row(1, validation__accuracy=0.9)])
    told.measured("student", 1, "validation/accuracy", 0.9, "max")
    assert told.score({"validation/accuracy": 0.5, "test/accuracy": 0.1}, best=True) == 0.5
    assert told.score({"validation/accuracy": float("nan")}, best=True) == 0.9


def test_the_best_trials_number_is_that_of_its_result(found, home):
    import json

    for trial in found.trials:
        if trial["state"] == "finished":
            ended = json.loads((home / "s" / "runs" / trial["run"] / "metrics.json").read_text())
            assert trial["value"] == ended[found.metric]
            assert not [name for name in ended if name.startswith("test/")]


def test_a_trial_that_diverges_is_no_candidate(home):
    found = sh.search(
        "kd", ["optimizer.lr=0.01|1e30"], trials=4, overrides=[*FIELDS, "student.channels=[4, 8]"], out=home / "w"
    )
    states = {trial["values"]["optimizer.lr"]: trial["state"] for trial in found.trials}
    assert states == {"0.01": "finished", "1e30": "failed"}
    assert "NaN or infinite" in next(trial["reason"] for trial in found.trials if trial["state"] == "failed")
    assert found.best["values"] == {"optimizer.lr": "0.01"}


def test_ones_own_objects_are_searched(home):
    x = torch.randn(120, 6)
    own = {"teacher": torch.nn.Linear(6, 2), "student": torch.nn.Linear(6, 2), "data": (x, (x[:, 0] > 0).long())}
    found = sh.search("kd", ["temperature=1..4"], trials=2, out=home / "o", epochs=1, **own)
    assert found.metric == "validation/accuracy"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature=1..8", Range("temperature", 1, 8)),
        ("temperature=1..20", Range("temperature", 1, 20, log=True)),
        ("temperature=lin:1..20", Range("temperature", 1, 20)),
        ("temperature=log:1..8", Range("temperature", 1, 8, log=True)),
        ("optimizer.lr=1e-4..1e-1", Range("optimizer.lr", 1e-4, 1e-1, log=True)),
        ("batch_size=16..64", Range("batch_size", 16, 64, whole=True)),
        ("batch_size=4..64", Range("batch_size", 4, 64, log=True, whole=True)),
        ("weight_soft=0..1", Range("weight_soft", 0, 1)),
        ("divergence=kl|js", Range("divergence", choices=("kl", "js"))),
        ("student=mlp|cnn", Range("student", choices=("mlp", "cnn"))),
    ],
)
def test_ranges_are_read_by_the_fields_type(text, expected):
    assert read_range(text, load_recipe("kd")) == expected
    assert Range.load(json.loads(json.dumps(expected.dump()))) == expected


def test_without_ranges_weights_and_temperatures_are_searched():
    ranges = default_ranges(load_recipe("sinkd"))
    assert {one.key for one in ranges} == {"weight_kd", "weight_sinkhorn", "temperature", "temperature_sinkhorn"}
    told = {one.key: one for one in ranges}
    assert told["temperature"] == Range("temperature", 0.5, 8.0, log=True)
    assert told["weight_sinkhorn"] == Range("weight_sinkhorn", 0.1, 10.0, log=True)
    with pytest.raises(UserError, match="has no weights or temperatures to search"):
        default_ranges(load_recipe("supervised"))


@pytest.mark.parametrize(
    ("source", "arguments", "sentence"),
    [
        ("kd", ["temprature=1..8"], "did you mean 'temperature'?"),
        ("kd", ["temperature=8..1"], "the range begins at 8 and must end above that"),
        ("kd", ["temperature=log:-1..8"], "a logarithmic range begins above 0"),
        ("kd", ["temperature=-1..8"], "temperature: "),
        ("kd", ["batch_size=1.5..8"], "takes integers"),
        ("kd", ["divergence=kl|"], "names two or more different values"),
        ("kd", ["divergence=kl|jss"], "divergence: "),
        ("kd", ["temperature=1..4", "temperature=2..8"], "temperature has two ranges"),
        ("datadam", [], "scores its set on the test split alone"),
        ("dmd2", ["guidance_scale=1..2"], "dmd2 measures nothing on the validation split while it trains"),
        ("qlae", [], "data: 'scenes' has no validation split, and a search never looks at the test split"),
        ("supervised", [], "has no weights or temperatures"),
        ("autoencoder", ["batch_size=8..16", "num_steps=2", "data.size=16"], "no validation split"),
    ],
)
def test_mistakes_are_one_sentence(source, arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stillhouse", "search", source, *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert sentence in " ".join(stderr.split())
    assert stderr.count("\n") == 1


def test_a_method_that_measures_nothing_on_validation_is_refused_before_anything_is_made(home):
    with pytest.raises(UserError, match="measures nothing on the validation split"):
        sh.search(
            "autoencoder",
            ["batch_size=8..16"],
            trials=1,
            out=home / "a",
            overrides=["num_steps=2", "data=digits", "data.pixels=unit"],
        )
    assert not (home / "a").exists()


def test_the_command_says_what_was_searched_and_what_the_test_number_is(found, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(
        sys, "argv", ["stillhouse", "search", "kd", *RANGES, *FIELDS, "--trials", str(TRIALS), "--out", "s"]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "optimizer.lr from 0.0001 to 0.1 (logarithmic)",
        "divergence one of kl, js",
        "no trial has seen the test split",
        "stillhouse run s/best.yaml",
        "page: s/search.html",
    ):
        assert part in said
    page = (home / "s" / "search.html").read_text()
    assert "No trial has seen the test split" in page
    assert page.count('class="chosen"') >= 3, "the best trial is marked in each picture"


def test_the_page_of_a_search_is_written_again(found, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["stillhouse", "report", "s"])
    (home / "s" / "search.html").unlink()
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().out) == (0, "s/search.html\n")
    assert (home / "s" / "search.html").exists()


def test_a_comparisons_directory_is_no_searchs(found, home):
    with pytest.raises(UserError, match="holds another search: ranges is"):
        sh.search("kd", ["temperature=1..4"], trials=1, overrides=FIELDS, out=home / "s")
    with pytest.raises(UserError, match="holds another search"):
        sh.compare("kd", out=home / "s", overrides=FIELDS)


def test_ranges_are_checked_before_anything_is_made():
    recipe = read_base("kd", [], seed=None)
    assert [one.key for one in read_ranges(recipe, [])] == ["weight_soft", "temperature"]
