"""The contract of the command line: exit codes, one sentence, the run directory, resume, Ctrl-C, the lock."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from stillhouse.cli import main
from stillhouse.cli.info import describe
from stillhouse.registry import method_class, own_entries

TINY = ["teacher.epochs=1", "epochs=1", "run.checkpoint_every=5", "run.log_every=2", "run.device=cpu"]
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def stillhouse(*arguments, cwd, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "stillhouse", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
        **kwargs,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("cli")
    done = stillhouse("run", "sinkd", *TINY, "--out", "a", "--seed", 3, cwd=home)
    assert done.returncode == 0, done.stderr
    return home, done


def test_run_leaves_everything_promised(finished):
    home, done = finished
    out = home / "a"
    for name in ("recipe.yaml", "metrics.json", "metrics.jsonl", "report.html", "run.json"):
        assert (out / name).stat().st_size > 0, name
    for name in ("checkpoints", "result"):
        assert (out / name).is_dir(), name
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert {"test/teacher/accuracy", "test/student/accuracy", "test/student-alone/accuracy"} <= set(metrics)
    assert metrics["parameters/teacher"] >= 10 * metrics["parameters/student"]
    assert str(out / "report.html") in done.stdout.replace("\n", "") or "a/report.html" in done.stdout
    for word in ("teacher", "student-alone", "parameters", "latency"):
        assert word in done.stdout


def test_the_resolved_recipe_gives_the_same_result(finished):
    home, _ = finished
    done = stillhouse("run", home / "a" / "recipe.yaml", "--out", "b", cwd=home)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.json", "metrics.jsonl", "result/student/model.safetensors", "recipe.yaml"):
        assert (home / "a" / name).read_bytes() == (home / "b" / name).read_bytes(), name


def test_without_the_cache_the_result_is_the_same(finished):
    home, _ = finished
    done = stillhouse("run", home / "a" / "recipe.yaml", "--out", "c", "--no-cache", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "c" / "subruns" / "teacher" / "checkpoints" / "model" / "end").is_dir()
    assert (home / "a" / "metrics.json").read_bytes() == (home / "c" / "metrics.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "sinkdd"], "did you mean 'sinkd'?"),
        (["run", "sinkd", "temprature=3"], "temprature: there is no such field; did you mean 'temperature'?"),
        (["run", "sinkd", "epsilon=0"], "epsilon: expected more than 0, not 0"),
        (["run", "sinkd", "num_iterations=0"], "num_iterations: expected at least 1, not 0"),
        (["run", "nowhere.yaml"], "there is no recipe file 'nowhere.yaml'"),
        (["run", "sinkd", "--sed", "3"], "--sed"),
        (["resume", "nowhere"], "nowhere holds no run"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["info", "sinkdd"], "did you mean 'sinkd'?"),
        (["list", "--family", "langage"], "did you mean 'language'?"),
        (["run", "sinkd", "--out", "a"], "already holds a run; continue it with 'stillhouse resume a'"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_code_2(finished, arguments, sentence, monkeypatch, capsys):
    home, _ = finished
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["stillhouse", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert sentence in stderr


def test_a_user_error_prints_no_traceback(finished):
    home, _ = finished
    done = stillhouse("run", "sinkd", "temprature=3", cwd=home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_debug_shows_the_traceback(finished):
    home, _ = finished
    assert "Traceback" in stillhouse("run", "sinkd", "epsilon=0", "--debug", cwd=home).stderr


def test_ctrl_c_writes_a_checkpoint_and_resume_continues(finished):
    home, _ = finished
    program = subprocess.Popen(
        [sys.executable, "-m", "stillhouse", "run", "sinkd", *TINY, "epochs=60", "--out", "d", "--seed", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((home / "d").glob("checkpoints/student/step-*")):
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130, err
    assert "stillhouse resume d" in out
    assert not (home / "d" / "metrics.json").exists()
    unfinished = stillhouse("report", "d", cwd=home)
    assert unfinished.returncode == 0
    assert "Not finished" in (home / "d" / "report.html").read_text()
    resumed = stillhouse("resume", "d", cwd=home)
    assert resumed.returncode == 0, resumed.stderr
    straight = stillhouse("run", "sinkd", *TINY, "epochs=60", "--out", "e", "--seed", 3, cwd=home)
    assert straight.returncode == 0
    for name in ("metrics.jsonl", "metrics.json", "result/student/model.safetensors"):
        assert (home / "d" / name).read_bytes() == (home / "e" / name).read_bytes(), name


def test_a_nan_stops_with_exit_code_1_and_names_the_term(finished):
    home, _ = finished
    broken = ["optimizer.lr=1e30", "epochs=5", "compare_alone=false"]
    done = stillhouse("run", "kd", *TINY, *broken, "--out", "nan", cwd=home)
    assert done.returncode == 1
    assert done.stderr.startswith("error: stage 'student', step ")
    assert "is NaN or infinite" in done.stderr
    assert any(term in done.stderr for term in ("'ce'", "'soft'", "'gradient'"))


def test_one_writer_per_directory(finished):
    from filelock import FileLock

    home, _ = finished
    with FileLock(home / "a" / ".lock"):
        done = stillhouse("resume", "a", cwd=home)
    assert done.returncode == 2
    assert "another process is writing this run" in done.stderr


def test_info_tells_fields_recipes_and_verification(finished):
    home, _ = finished
    known = json.loads(stillhouse("info", "sinkd", "--json", cwd=home).stdout)
    fields = {field["field"]: field for field in known["fields"]}
    assert fields["temperature_sinkhorn"]["default"] == "2"
    assert fields["optimizer"]["default"].startswith("adamw, lr ")
    assert fields["patience"]["default"] == "not set"
    assert "> 0" in fields["temperature_sinkhorn"]["type"]
    assert all(field["description"] for field in known["fields"]), [
        f["field"] for f in known["fields"] if not f["description"]
    ]
    assert known["recipes"][0] == "small"
    assert known["verified"] == "official"
    text = stillhouse("info", "sinkd", cwd=home, env={**os.environ, "COLUMNS": "160"}).stdout
    assert "temperature_sinkhorn" in text
    assert "claim" in text


@pytest.mark.parametrize("entry", own_entries(), ids=lambda entry: entry["name"])
def test_info_tells_fields_in_plain_words(entry):
    for name, field in method_class(entry["name"]).model_fields.items():
        said = describe(name, field)
        words = said["type"] + " " + said["default"]
        leak = re.search(
            r"None|True|False|object at|annotation|Validator|Field|class |\{'|\['|\('|\b[A-Z][a-z]+[A-Z]\w+", words
        )
        assert leak is None, f"{name}: {words}"
        assert said["default"]


def test_dry_run_builds_and_trains_nothing(finished):
    home, _ = finished
    done = stillhouse("run", "sinkd", "--dry-run", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "94,186 parameters" in done.stdout
    assert not (home / "runs").exists()


def test_what_is_wrong_from_the_start_leaves_no_directory(tmp_path):
    done = stillhouse("run", "sinkd", *TINY, "student=nowhere.nets:Net", "--out", "z", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("command", ["info", "run", "resume", "report"])
def test_a_missing_argument_is_named(command, tmp_path):
    done = stillhouse(command, cwd=tmp_path)
    assert done.returncode == 2
    assert "Missing argument" in done.stderr
    assert done.stderr.startswith("error: ")


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("dear reader")
    (tmp_path / "file").write_text("x")
    for place, sentence in (
        ("thesis", "thesis holds other files, such as 'chapter.tex'; choose"),
        ("file", "file is a file;"),
    ):
        done = stillhouse("run", "sinkd", *TINY, "--out", place, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert sentence in done.stderr
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_the_version_is_told(tmp_path):
    assert stillhouse("--version", cwd=tmp_path).stdout.startswith("stillhouse ")


def test_two_processes_on_a_machine_without_an_accelerator(tmp_path):
    tiny = [argument for argument in TINY if argument != "run.device=cpu"]
    done = subprocess.run(
        [sys.executable, *LAUNCHER, "-m", "stillhouse", "run", "sinkd", *tiny, "--out", "two"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("report:") == 1
