"""The page over runs: what it finds, what it answers, and all that it refuses."""

import doctest
import importlib
import json
import os
import re
import socket
import sys
import threading
import time

import pytest
from filelock import FileLock

from asgi import ask
from run_writer import write_run
from stillhouse.errors import UserError
from stillhouse.ui import Library, application, serve
from stillhouse.ui.side_by_side import charts, differences, labels, numbers


def ids(answer):
    return re.findall(r'<tr data-text="[^"]*"><td><input type="checkbox" name="run" value="([^"]*)"', answer.html)


@pytest.fixture
def app(runs):
    return application(runs)


def test_the_list_tells_every_run_with_its_state_and_numbers(runs):
    found = {run.id: run for run in Library(runs).summaries()}
    assert set(found) == {"kd/0", "kd/1", "other", "stopped", "broken"}
    first = found["kd/0"]
    assert (first.method, first.data, first.seed, first.state) == ("kd", "digits", 0, "finished")
    assert first.numbers == (("test/accuracy", 0.9),)
    assert (first.started, first.seconds) == ("2026-01-01 00:00:00", 1.5)
    assert found["other"].data == "folder:cats"
    assert (found["stopped"].state, found["stopped"].detail) == ("stopped", "student, step 200 of 200")
    assert found["stopped"].numbers[0][0] == "validation/accuracy"
    assert (found["broken"].state, found["broken"].detail) == ("broken", "metrics.json is damaged: it is not JSON.")


def test_the_list_filters_by_text_method_and_state(app):
    assert ids(ask(app, "/")) == ["stopped", "kd/1", "broken", "other", "kd/0"]
    assert ids(ask(app, "/", query="q=cats")) == ["other"]
    assert set(ids(ask(app, "/", query="q=KD+digits"))) == {"kd/0", "kd/1", "stopped", "broken"}
    assert ids(ask(app, "/", query="method=dkd")) == ["other"]
    assert ids(ask(app, "/", query="state=broken")) == ["broken"]
    assert "None of the 5 runs is like this." in ask(app, "/", query="q=nothing").text
    # What a query says that is not known is left out.
    assert len(ids(ask(app, "/", query="state=x&sort=y&order=z"))) == 5


def test_the_list_sorts_by_any_column_and_what_lacks_it_comes_last(app):
    assert ids(ask(app, "/", query="sort=started&order=up")) == ["kd/0", "other", "broken", "kd/1", "stopped"]
    by_number = ids(ask(app, "/", query="sort=number&order=up"))
    assert by_number[-1] == "broken"
    assert [name for name in by_number if name != "stopped"] == ["other", "kd/1", "kd/0", "broken"]
    by_number = ids(ask(app, "/", query="sort=number&order=down"))
    assert [name for name in by_number if name != "stopped"] == ["kd/0", "kd/1", "other", "broken"]
    assert ids(ask(app, "/", query="sort=name&order=up")) == ["broken", "kd/0", "kd/1", "other", "stopped"]


def test_a_run_that_is_locked_is_running_and_so_is_one_that_was_just_logged(runs):
    library = Library(runs)

    def state():
        return {run.id: run.state for run in library.summaries()}["stopped"]

    assert state() == "stopped"
    if os.path.exists("/proc/locks"):
        with FileLock(runs / "stopped" / ".lock"):
            assert state() == "running"
        assert state() == "stopped"
    os.utime(runs / "stopped" / "metrics.jsonl")
    assert state() == "running"


def test_a_running_run_keeps_its_page_fresh_and_a_finished_one_does_not(runs, app):
    assert 'data-live="yes"' not in ask(app, "/").html
    os.utime(runs / "stopped" / "metrics.jsonl")
    assert 'data-live="yes"' in ask(app, "/").html
    assert 'data-live="yes"' in ask(app, "/compare", query="run=stopped").html
    assert 'data-live="yes"' not in ask(app, "/compare", query="run=kd/0").html


def test_what_did_not_change_is_not_read_again(runs, monkeypatch):
    library = Library(runs)
    before = library.summaries()
    read = []
    kept = importlib.import_module("stillhouse.ui.library")._read_summary
    monkeypatch.setattr(
        "stillhouse.ui.library._read_summary", lambda name, place: read.append(name) or kept(name, place)
    )
    assert library.summaries() == before
    # What is not finished may go on at any time.
    assert read == ["stopped"]
    (runs / "kd" / "0" / "metrics.json").write_text(json.dumps({"test/accuracy": 0.5}))
    assert {run.id: run.numbers for run in library.summaries()}["kd/0"] == (("test/accuracy", 0.5),)
    assert "kd/0" in read
    assert library.run("kd/1") is library.run("kd/1")


def test_a_report_is_shown_as_the_run_is_now(runs, app):
    answer = ask(app, "/run/kd/1")
    assert answer.status == 200
    assert "All runs" in answer.text
    assert "temperature: 5.0" in answer.text
    # Nothing was written for it.
    assert not list(runs.rglob("report.html"))
    (runs / "kd" / "1" / "recipe.yaml").write_text("method: kd\ntemperature: 7.0\n")
    assert "temperature: 7.0" in ask(app, "/run/kd/1").text


def test_a_run_that_is_a_directory_itself_is_served(tmp_path):
    write_run(tmp_path, "one")
    app = application(tmp_path / "one")
    assert ids(ask(app, "/")) == ["one"]
    assert ask(app, "/run/one").status == 200


def test_runs_within_a_run_belong_to_it(runs):
    write_run(runs / "kd" / "0" / "subruns", "teacher")
    assert "kd/0/subruns/teacher" not in {run.id for run in Library(runs).summaries()}


def test_two_runs_are_compared_curve_by_curve(runs, app):
    answer = ask(app, "/compare", query="run=kd/0&run=kd/1")
    assert answer.status == 200
    (shared,) = re.findall(r'<svg[^>]*aria-label="validation/accuracy over steps[^>]*>(.*?)</svg>', answer.html)
    assert shared.count("<polyline") == 2
    assert 'class="line c0"' in shared
    assert 'class="line c1"' in shared
    assert answer.html.count('<img src="data:image/png;base64,') == 2
    assert "temperature 4.0 5.0" in answer.text
    assert re.search(r'right best">0\.9000', answer.html)


def test_the_tables_of_a_comparison_are_exact(runs):
    library = Library(runs)
    read = {name: library.run(name) for name in ("kd/0", "kd/1", "other")}
    first = numbers(read)[0]
    assert (first.name, first.cells) == ("test/accuracy", [("0.9000", True), ("0.8000", False), ("0.7000", False)])
    differ, partly = differences(read)
    assert {row.name: [text for text, _ in row.cells] for row in differ} == {
        "method": ["kd", "kd", "dkd"],
        "seed": ["0", "1", "0"],
        "data.kind": ["digits", "digits", "folder"],
        "temperature": ["4.0", "5.0", "4.0"],
    }
    assert {row.name: [text for text, _ in row.cells] for row in partly} == {"data.path": ["-", "-", "cats"]}
    assert [panel.title for panel in charts(read)] == ["validation/accuracy", "loss/ce", "loss/kd"]
    assert labels(["a/0", "b/0"]) == {"a/0": "a/0", "b/0": "b/0"}


@pytest.mark.parametrize(
    ("query", "status", "sentence"),
    [
        ("", 400, "Choose the runs to compare in the list."),
        ("&".join(f"run=x{i}" for i in range(9)), 400, "Choose at most 8 runs, not 9."),
        ("run=nothing", 404, "There is no run nothing."),
        ("run=broken", 422, "metrics.json is damaged: it is not JSON"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_one_sentence(app, query, status, sentence):
    answer = ask(app, "/compare", query=query)
    assert answer.status == status
    assert sentence in answer.text


def test_a_broken_run_is_shown_as_such_and_its_report_says_why(app):
    assert "metrics.json is damaged" in ask(app, "/").text
    answer = ask(app, "/run/broken")
    assert (answer.status, "metrics.json is damaged" in answer.text) == (422, True)


@pytest.mark.parametrize(
    "files",
    [
        {"recipe.yaml": "", "run.json": "{}"},
        {"recipe.yaml": ": : :\n\t-", "run.json": "[]"},
        {"recipe.yaml": "method: kd\ndata: [1, 2", "metrics.jsonl": '{"stage": "a", "st'},
        {"recipe.yaml": "method: kd\n", "metrics.jsonl": "\x00\x01\n[]\n3\n", "checkpoints/yields.json": "{]"},
        {
            "recipe.yaml": "method: kd\nseed: many\n",
            "metrics.json": '{"test/accuracy": null, "x": "y"}',
            "cost.json": "{}",
        },
        {"recipe.yaml": "method: {a: b}\n", "run.json": '{"started": 5, "seed": "x", "method": 3}'},
        {
            "recipe.yaml": "method: kd\n",
            "run.json": "{}",
            "checkpoints/yields.json": '[[{"name": "a", "steps": "x"}], 3]',
        },
    ],
)
def test_whatever_lies_in_a_run_is_answered(tmp_path, files):
    for name, text in files.items():
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / name).write_text(text)
    app = application(tmp_path)
    assert ask(app, "/").status == 200
    assert ids(ask(app, "/")) == ["r"]
    assert ask(app, "/run/r").status in (200, 422)
    assert ask(app, "/compare", query="run=r").status in (200, 422)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8350", "127.0.0.1.evil.example", "", "192.168.0.1"])
def test_a_request_for_another_host_is_sent_away(app, host):
    answer = ask(app, "/", host=host)
    assert answer.status == 400
    assert "kd/0" not in answer.html


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8350", "localhost:1234"])
def test_a_request_for_this_machine_is_answered(app, host):
    assert ask(app, "/", host=host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/", "/compare", "/run/kd/0"])
def test_nothing_can_be_written(app, method, path):
    assert ask(app, path, method=method).status == 405


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "kd/../../secret",
        "/etc",
        "..",
        ".",
        "",
        "kd",
        "kd/0/..",
        "kd/0/result",
        "kd\\0",
        "%2e%2e/secret",
        "kd/0\0",
    ],
)
def test_only_runs_that_were_found_are_opened(runs, app, name):
    write_run(runs.parent, "secret")
    answer = ask(app, f"/run/{name}")
    assert answer.status == 404
    assert "temperature" not in answer.html
    assert ask(app, "/compare", query=f"run={name}").status in (400, 404)


def test_links_out_of_the_directory_are_not_followed(runs, tmp_path):
    write_run(tmp_path, "secret", method="hidden", accuracy=0.123)
    (runs / "link").symlink_to(tmp_path / "secret")
    inside = write_run(runs, "inside").path
    (inside / "result" / "stolen.png").symlink_to(tmp_path / "secret" / "result" / "digits.png")
    recipe = write_run(runs, "recipe").path / "recipe.yaml"
    recipe.unlink()
    recipe.symlink_to(tmp_path / "secret" / "recipe.yaml")
    folder = write_run(runs, "folder").path
    (folder / "samples").symlink_to(tmp_path)
    app = application(runs)
    answer = ask(app, "/")
    assert "link" not in ids(answer)
    assert "hidden" not in answer.text
    assert {run.id: run.state for run in Library(runs).summaries()}["recipe"] == "broken"
    for name in ("inside", "recipe", "folder"):
        for told in (ask(app, f"/run/{name}"), ask(app, "/compare", query=f"run={name}")):
            assert told.status == 422
            assert "leads out of" in told.text
            assert "hidden" not in told.text
    # A link that stays within is followed.
    (runs / "kd" / "0" / "result" / "again.png").symlink_to(runs / "kd" / "1" / "result" / "digits.png")
    assert ask(app, "/run/kd/0").status == 200


def test_a_run_that_became_a_link_is_not_opened(runs, tmp_path):
    app = application(runs)
    assert ask(app, "/run/other").status == 200
    write_run(tmp_path, "secret", method="hidden")
    (runs / "other").rename(tmp_path / "aside")
    (runs / "other").symlink_to(tmp_path / "secret")
    answer = ask(app, "/run/other")
    assert answer.status in (404, 422)
    assert "hidden" not in answer.text


@pytest.mark.parametrize("path", ["/", "/compare", "/run/kd/0", "/nowhere"])
def test_a_browser_may_do_nothing_with_an_answer_but_show_it(app, path):
    headers = ask(app, path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.replace("style-src 'unsafe-inline'", "")
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers


def test_names_of_runs_and_queries_are_text(tmp_path):
    nasty = "<img src=x onerror=alert(1)>&\"'{{ 7 * 7 }}"
    write_run(tmp_path, nasty, method="'<b>x</b>'")
    app = application(tmp_path)
    for answer in (ask(app, "/", query="q=%3Cb%3E"), ask(app, "/"), ask(app, f"/run/{nasty}"), ask(app, "/run/<b>")):
        assert "<b>x" not in answer.html
        assert "<img src=x" not in answer.html
    assert nasty in ask(app, "/").text
    assert ask(app, f"/run/{nasty}").status == 200


def test_hundreds_of_runs_are_listed_quickly(tmp_path):
    first = write_run(tmp_path, "run-000").path
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    for i in range(1, 300):
        for name, content in files.items():
            (tmp_path / f"run-{i:03}" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"run-{i:03}" / name).write_bytes(content)
    app = application(tmp_path)
    assert len(ids(ask(app, "/"))) == 300
    taken = []
    for _ in range(3):
        started = time.process_time()
        ask(app, "/")
        taken.append(time.process_time() - started)
    assert min(taken) < 1.0


def test_many_may_ask_at_once(runs, app):
    found = []
    threads = [threading.Thread(target=lambda: found.append(ask(app, "/run/kd/0").status)) for _ in range(6)]
    threads += [threading.Thread(target=lambda: found.append(ask(app, "/").status)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 12


def test_a_directory_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is no directory; give one that holds runs"):
        application(tmp_path / "nowhere")
    assert "no run below this directory yet" in ask(application(tmp_path), "/").text


@pytest.mark.parametrize("module", ["uvicorn", "starlette.applications"])
def test_a_missing_extra_is_one_sentence(runs, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        application(runs)
    assert str(error.value) == (
        "The page over runs needs starlette and uvicorn; install them with: pip install 'stillhouse[ui]'."
    )


def test_a_taken_port_is_one_sentence(runs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^Port {port} cannot be used \(.*\); choose another with --port\.$"):
            serve(runs, port)


@pytest.mark.parametrize("name", ["library", "side_by_side"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"stillhouse.ui.{name}"))
    assert result.attempted
    assert not result.failed
