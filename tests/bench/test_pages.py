"""The pages of comparisons and searches: whatever was found is said, they fit a phone, and they load nothing."""

import json

import pytest

from stillhouse.report.comparison import build_comparison, tables
from stillhouse.report.search import build_search, trials_table

OVERFLOWING = """[...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre"))
  .map((e) => `${e.tagName} ${e.textContent.slice(0, 40)}`)"""


def arm(name, values, differences=None, **cost):
    finite = [value for value in values if value is not None]
    mean = sum(finite) / len(finite)
    return {
        "name": name,
        "method": name,
        "source": name,
        "digest": name,
        "recipe": {"method": name, "data": {"kind": "digits"}, "epochs": 3, "temperature": 2.0, "run": {}},
        "taken": {"epochs": "kd"},
        "set_aside": ["epochs"] if name != "kd" else [],
        "runs": [
            {
                "seed": seed,
                "directory": f"runs/{name}-{seed}",
                "failure": None if value is not None else "the 'ce' term of update 'loss' is NaN or infinite",
                "seconds": 1.5,
                "peak_memory": 5e8,
            }
            for seed, value in enumerate(values)
        ],
        "budget": {"steps": 30, "epochs": 3, "batch_size": None},
        "unequal": "30 steps where kd has 40" if name != "kd" else None,
        "metrics": {"test/mse": {"values": values, "mean": mean, "std": 0.01 if len(finite) > 1 else None}},
        "differences": {"test/mse": differences} if differences else {},
        "cost": {"seconds": 1.0, "peak_memory": None, "latency": 0.001, "parameters": 100.0} | cost,
        "front": ["seconds"] if name == "kd" else [],
    }


def difference(mean, interval, verdict):
    return {"mean": mean, "std": 0.01, "interval": interval, "pairs": 2, "verdict": verdict}


def comparison(*arms, **changes):
    return {
        "arms": list(arms),
        "baseline": "kd",
        "metric": "test/mse",
        "mode": "min",
        "seeds": list(range(len(arms[0]["runs"]))),
        "teachers": {"teacher": 0.2},
        "shared": {"data": {"kind": "digits"}, "epochs": 3, "patience": None},
        "findings": [f"{one['name']} <is> what it is." for one in arms if one["name"] != "kd"],
        "notes": ["something to know"],
        "command": ["stillhouse", "compare", "kd", "a b"],
        "date": "2026-01-02T03:04:05+00:00",
        "environment": {"torch": "2.13", "processor": "one"},
        "sources": ["abc", "def"],
        "version": "0.1.0",
        "directory": "runs/c",
    } | changes


LONG = "a-method-with-a-name-that-is-rather-longer-than-a-phone-is-wide"
FULL = comparison(
    arm("kd", [0.30, 0.31]),
    arm("better", [0.20, None], difference(-0.1, [-0.12, -0.08], "better"), seconds=4.0),
    arm(LONG, [0.40, 0.45], difference(0.12, [-0.2, 0.5], "within noise"), seconds=9.0, peak_memory=2e9),
)
TRIAL = {"values": {"temperature": 2.0, "divergence": "kl"}, "seconds": 1.0, "reason": None}
SEARCH = {
    "recipe": {"method": "kd"},
    "ranges": [
        {"key": "temperature", "low": 1.0, "high": 16.0, "log": True, "whole": False, "choices": []},
        {"key": "divergence", "low": 0.0, "high": 0.0, "log": False, "whole": False, "choices": ["kl", "js"]},
    ],
    "metric": "validation/nll",
    "mode": "min",
    "trials": [
        TRIAL | {"run": "trial-000", "state": "finished", "value": 0.5, "measured": [["student", 1, 0.5]]},
        TRIAL | {"run": "trial-001", "state": "finished", "value": 0.4, "measured": [["student", 1, 0.4]]},
        TRIAL | {"run": "trial-002", "state": "pruned", "value": None, "measured": [["student", 1, 0.9]]},
        TRIAL | {"run": "trial-003", "state": "failed", "value": None, "measured": []},
    ],
    "best": TRIAL | {"run": "trial-001", "state": "finished", "value": 0.4},
    "command": ["stillhouse", "search", "kd"],
    "environment": {"torch": "2.13"},
    "version": "0.1.0",
    "directory": "runs/s",
}


@pytest.fixture
def page(tmp_path):
    """Writes a page from what was found."""

    def write(found):
        name, build = ("search", build_search) if "trials" in found else ("comparison", build_comparison)
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        return build(tmp_path)

    return write


def test_smaller_may_be_better_and_failures_are_named(page):
    text = page(FULL).read_text()
    assert "smaller is better" in text
    assert "better &lt;is&gt; what it is." in text
    assert "1 failed" in text
    assert "its own epochs gave way to that of kd" in text
    assert "its budget differs: 30 steps where kd has 40" in text
    assert "2 versions of the source" in text
    assert "stillhouse compare kd &#39;a b&#39;" in text


def test_one_seed_and_no_teacher_have_a_page_too(page):
    told = difference(0.1, None, "within noise") | {"std": None}
    found = comparison(arm("kd", [0.3]), arm("b", [0.4], told), teachers={}, command=[], notes=[])
    text = page(found).read_text()
    assert "one seed" in text
    [(_, _, quality), _] = tables(found)
    assert quality[1][3:] == ["", "one seed"]


def test_costs_without_numbers_and_fronts_are_told_in_the_terminal():
    _, (title, columns, rows) = tables(FULL)
    assert title == "Cost (* on the Pareto front)"
    assert columns == ["arm", "training time", "peak memory", "CPU latency", "parameters"]
    assert rows[0] == ["kd", "1.0 s *", "-", "1 ms", "100"]


def test_a_search_says_what_became_of_every_trial(page):
    columns, rows = trials_table(SEARCH)
    assert columns == ["trial", "validation/nll", "temperature", "divergence", "time"]
    assert [row[:2] for row in rows] == [
        ["trial-001 *", "0.4"],
        ["trial-000", "0.5"],
        ["trial-002", "pruned"],
        ["trial-003", "failed"],
    ]
    text = page(SEARCH).read_text()
    assert "2 finished, 1 pruned, 1 failed" in text
    assert text.count('class="dropped"') == 2, "a trial without any number has no place in the pictures"


@pytest.mark.parametrize("found", [FULL, SEARCH], ids=["comparison", "search"])
def test_a_browser_shows_it_on_a_desk_and_on_a_phone_and_asks_for_nothing(page, found, chromium):
    address = page(found).as_uri()
    for width, dark in ((1280, False), (390, True)):
        tab = chromium.open(address, width=width, dark=dark)
        assert tab.requests == [address]
        assert tab.errors == []
        assert tab.see(OVERFLOWING) == []
        assert tab.see("document.documentElement.scrollWidth") <= width
        tab.close()
