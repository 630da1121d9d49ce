"""A claim is judged seed by seed, says how sure it is, goes on where it stopped, and is recorded as strict JSON."""

import json
import math
import sys

import pytest
from scipy import stats

from stillhouse.claims import Claim, Margin, all_claims, find_claim, judge, last_result, run_claim
from stillhouse.cli import claiming, main
from stillhouse.engine import Interrupted, Signals, Silent
from stillhouse.errors import UserError

ARMS = {"ours": {"m": [0.9, 0.8, 0.85]}, "theirs": {"m": [0.7, 0.75, 0.6]}}


def supervised(**fields):
    """A comparison of widths that takes a second."""
    return Claim(
        name="kd",
        statement="A wider network is at least as good as a narrow one.",
        base={
            "method": "supervised",
            "data": "digits",
            "model": {"kind": "mlp", "widths": [32]},
            "epochs": 1,
            "run": {"log_every": 2, "device": "cpu", "checkpoint_every": 5},
        },
        arms={"wide": {}, "narrow": {"model": {"widths": [2]}}},
        margins=[Margin("wide", "narrow", "test/accuracy", by=0.0), Margin("wide", None, "test/accuracy", by=2.0)],
        seeds=(0, 1),
        **fields,
    )


def test_differences_are_taken_seed_by_seed():
    found = judge(Margin("ours", "theirs", "m", by=0.1), ARMS)
    differences = [0.2, 0.05, 0.25]
    assert found["measured"] == pytest.approx(sum(differences) / 3)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert found["std"] == pytest.approx(stats.tstd(differences))
    assert (found["holds"], found["clear"]) == (True, False)
    assert found["finding"].endswith("asked +0.1: holds, within noise")


@pytest.mark.parametrize(
    ("by", "holds", "clear"), [(-0.2, True, True), (0.1, True, False), (0.2, False, False), (0.6, False, True)]
)
def test_a_verdict_is_clear_when_the_interval_lies_on_one_side(by, holds, clear):
    found = judge(Margin("ours", "theirs", "m", by=by), ARMS)
    assert (found["holds"], found["clear"]) == (holds, clear)


def test_smaller_can_be_better_and_margins_relative():
    found = judge(Margin("theirs", "ours", "m", by=0.1, mode="min", ratio=True), ARMS)
    assert found["measured"] == pytest.approx((0.5 / 3) / 0.85)
    assert found["holds"]


def test_an_arm_can_be_held_against_a_number():
    found = judge(Margin("ours", None, "m", by=0.85), ARMS)
    assert found["measured"] == pytest.approx(0.85)
    assert found["finding"].startswith("ours in m: +0.85")


def test_one_seed_has_no_interval_and_is_never_clear():
    found = judge(Margin("ours", "theirs", "m", by=0.1), {arm: {"m": v["m"][:1]} for arm, v in ARMS.items()})
    assert (found["std"], found["interval"], found["holds"], found["clear"]) == (None, None, True, False)


def test_a_number_that_is_not_finite_fails_and_is_named():
    arms = {"ours": {"m": [0.9, None]}, "theirs": {"m": [0.1, 0.2]}}
    found = judge(Margin("ours", "theirs", "m", by=0.1), arms)
    assert (found["measured"], found["holds"]) == (None, False)
    assert "ours has a value that is not finite" in found["finding"]
    json.dumps(found, allow_nan=False)


def test_nothing_is_relative_to_nothing():
    found = judge(Margin("ours", "theirs", "m", by=0.1, ratio=True), {"ours": {"m": [1.0]}, "theirs": {"m": [0.0]}})
    assert (found["measured"], found["holds"]) == (None, False)


def test_arms_lie_over_the_base_key_by_key_but_another_kind_replaces():
    claim = Claim("x", "", {"model": {"kind": "mlp", "widths": [8]}, "epochs": 2}, {}, [])
    arms = {"a": {"model": {"widths": [4]}}, "b": {"model": {"kind": "vit"}}}
    claim = Claim("x", "", claim.base, arms, [])
    assert claim.values("a") == {"model": {"kind": "mlp", "widths": [4]}, "epochs": 2}
    assert claim.values("b") == {"model": {"kind": "vit"}, "epochs": 2}
    assert claim.base["model"] == {"kind": "mlp", "widths": [8]}


def test_an_outcome_has_every_number_and_the_margin_that_decides(tmp_path):
    outcome = run_claim(supervised(), home=tmp_path / "runs")
    assert set(outcome.arms) == {"wide", "narrow"}
    assert all(len(numbers["test/accuracy"]) == 2 for numbers in outcome.arms.values())
    assert [margin["holds"] for margin in outcome.margins] == [True, False]
    assert not outcome.holds
    assert (outcome.measured, outcome.margin) == (outcome.margins[1]["measured"], 2.0)
    assert outcome.seconds > 0
    assert {"torch", "python", "processor"} <= set(outcome.environment)
    assert len(outcome.sources) == 1
    assert set(outcome.recipes) == set(outcome.arms)
    stored = json.loads(outcome.save(tmp_path).read_text())
    assert {"name", "claim", "holds", "measured", "margin", "seeds", "seconds", "command", "date"} <= set(stored)
    assert (stored["name"], stored["seeds"], stored["command"]) == ("kd", [0, 1], "stillhouse claims kd")


def test_what_finished_is_not_repeated(tmp_path):
    first = run_claim(supervised(), seeds=1, home=tmp_path)
    ran = []
    second = run_claim(supervised(), home=tmp_path, listener=lambda arm, seed: ran.append((arm, seed)))
    assert ran == [("wide", 1), ("narrow", 1)]
    assert first.command == "stillhouse claims kd --seeds 1"
    for arm, numbers in first.arms.items():
        assert second.arms[arm]["test/accuracy"][:1] == numbers["test/accuracy"]


def test_a_record_tells_of_the_runs_and_not_of_the_judging(tmp_path):
    first = run_claim(supervised(), seeds=1, home=tmp_path)
    about = json.loads((tmp_path / "wide-0" / "run.json").read_text())
    about["environment"] |= {"torch": "0.0", "source": "elsewhere"}
    (tmp_path / "wide-0" / "run.json").write_text(json.dumps(about))
    again = run_claim(supervised(), seeds=1, home=tmp_path)
    assert again.date == first.date
    assert again.environment["torch"] == "0.0"
    assert "elsewhere" in again.sources
    assert len(again.sources) == 2


def test_a_changed_arm_has_another_digest():
    claim = supervised()
    changed = Claim(claim.name, "", {**claim.base, "epochs": 2}, claim.arms, claim.margins)
    assert set(claim.digests().values()).isdisjoint(changed.digests().values())


def test_an_interrupted_claim_goes_on_to_the_same_numbers(tmp_path):
    straight = run_claim(supervised(), home=tmp_path / "straight")
    signals = Signals()

    class Stopper(Silent):
        def step(self, step):
            signals.stop |= step == 7

    with pytest.raises(Interrupted):
        run_claim(
            supervised(),
            home=tmp_path / "stopped",
            listener=lambda arm, seed: Stopper() if (arm, seed) == ("narrow", 0) else None,
            signals=signals,
        )
    assert not (tmp_path / "stopped" / "narrow-0" / "metrics.json").exists()
    went_on = run_claim(supervised(), home=tmp_path / "stopped")
    assert went_on.arms == straight.arms


def test_a_home_with_runs_of_other_recipes_is_refused(tmp_path):
    run_claim(supervised(), seeds=1, home=tmp_path)
    claim = supervised()
    other = Claim(claim.name, claim.statement, {**claim.base, "epochs": 2}, claim.arms, claim.margins)
    with pytest.raises(UserError, match="holds a run of another recipe"):
        run_claim(other, seeds=1, home=tmp_path)


def test_a_metric_that_no_run_measures_is_named(tmp_path):
    with pytest.raises(UserError, match="arm wide: the run measures no 'test/beauty'"):
        run_claim(supervised(metrics=["test/beauty"]), seeds=1, home=tmp_path)


def test_more_seeds_than_the_claim_states_follow_its_own(tmp_path):
    outcome = run_claim(supervised(), seeds=3, home=tmp_path)
    assert outcome.seeds == [0, 1, 2]
    assert outcome.command == "stillhouse claims kd --seeds 3"


def test_every_system_states_a_claim_and_classics_none():
    assert {"sinkd", "datadam", "dmd2", "qlae"} <= {claim.name for claim in all_claims()}
    with pytest.raises(UserError, match="states no claim"):
        find_claim("kd")
    with pytest.raises(UserError, match="did you mean 'sinkd'"):
        find_claim("sinkdd")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Calls ``stillhouse claims`` in an empty directory, with two claims that take a second."""
    monkeypatch.chdir(tmp_path)
    easy = supervised()
    easy = Claim("qlae", easy.statement, easy.base, easy.arms, easy.margins[:1], seeds=easy.seeds)
    known = {"kd": supervised(), "qlae": easy}
    monkeypatch.setattr(claiming, "find_claim", known.__getitem__)
    monkeypatch.setattr(claiming, "all_claims", lambda: list(known.values()))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["stillhouse", "claims", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr()

    return call


def test_json_is_an_array_and_nothing_else(command, tmp_path):
    code, said = command("kd", "qlae", "--seeds", "1", "--json")
    found = json.loads(said.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert [(one["name"], one["holds"]) for one in found] == [("kd", False), ("qlae", True)]
    assert code == 1
    for one in found:
        assert json.loads((tmp_path / "claims" / "results" / f"{one['name']}.json").read_text()) == one
        assert math.isfinite(one["measured"])
    assert last_result("kd") == found[0]


def test_without_names_all_claims_are_run_and_shown(command, tmp_path):
    code, said = command("--seeds", "1", "--out", "kept")
    assert code == 1
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"kd.json", "qlae.json"}
    assert said.out.count("the claim") == 2
    assert "the claim holds" in said.out


def test_the_exit_code_is_0_when_all_hold(command):
    code, said = command("qlae")
    assert code == 0
    assert "95 % interval" in " ".join(said.out.split())
