"""Numbers with their errors, the line-up, the headline, cost beside quality, curves with what they are held against."""

import doctest
import importlib
import re

import pytest

from run_writer import logged
from stillhouse.report import build
from stillhouse.report.charts import Dot, Line, chart, scatter
from stillhouse.report.curves import curves
from stillhouse.report.pictures import Album, samples_of
from stillhouse.report.reading import read_run
from stillhouse.report.results import cells, costing, errors_of, headline, lineup, ours

METRICS = {"test/teacher/accuracy": 0.9, "test/student/accuracy": 0.85, "test/student-alone/accuracy": 0.8}


def test_an_error_stands_behind_its_number():
    table = {"title": "t", "columns": ["images", "mean", "std", "n"], "rows": [["start", 0.46657, 0.05431, 10]]}
    found = cells(table, {"start"})
    assert found.columns == ["images", "mean ± std", "n"]
    assert found.rows == [("start", True, [("0.467 ± 0.054", "0.46657 ± 0.05431"), ("10", 10)])]
    assert found.numeric == [False, True, True]


@pytest.mark.parametrize("columns", [["model", "std", "mean"], ["mean", "std", "x"], ["a", "recall", "precision"]])
def test_a_column_that_is_no_error_of_the_one_before_it_stays(columns):
    table = {"columns": columns, "rows": [["a", 0.5, 0.25]]}
    assert cells(table, set()).columns == columns


def test_rows_of_uneven_length_and_empty_tables_are_tables():
    assert cells({"columns": ["a"], "rows": [[1, 2], []]}, set()).columns == ["a", ""]
    assert cells({"rows": []}, set()).rows == []


def test_the_error_of_a_measurement_is_found_beside_it():
    table = {
        "a": {"accuracy": 0.5, "std": 0.1},
        "b": {"accuracy": 0.4, "accuracy_std": 0.2, "nll": 1.0},
        "c": {"nll": 1.0},
    }
    assert errors_of(table, "accuracy") == {"a": 0.1, "b": 0.2}
    # Beside two numbers a bare error belongs to nobody in particular.
    assert errors_of({"a": {"accuracy": 0.5, "nll": 0.4, "std": 0.1}}, "accuracy") == {}


def test_the_line_is_long_enough_for_the_errors():
    found = lineup({"test/a/accuracy": 0.5, "test/a/std": 0.1, "test/b/accuracy": 0.9, "test/b/std": 0.1})
    assert [(row.name, row.low, row.at, row.high) for row in found.rows] == [
        ("b", 66.7, 83.3, 100.0),
        ("a", 0.0, 16.7, 33.3),
    ]
    assert found.errors
    assert lineup(METRICS).sentence == (
        "The student takes over 50% of the teacher's lead over the same student trained alone, in this one run."
    )
    assert not lineup(METRICS).errors
    assert lineup({"test/a/accuracy": 0.5}) is None


def test_what_the_run_is_about_is_the_student_or_has_the_runs_own_number():
    assert ours(METRICS) == "student"
    assert ours({"test/start/accuracy": 0.4, "test/distilled/accuracy": 0.5, "test/accuracy": 0.5}) == "distilled"
    assert ours({"psnr": 20.0}) is None


def test_the_headline_says_quality_size_speed_time_and_memory(writer):
    writer.json("metrics.json", METRICS | {"parameters/teacher": 900.0, "parameters/student": 90.0, "nfe/student": 1.0})
    table = {"columns": ["model", "latency (ms)"], "rows": [["teacher", 4.0], ["student", 1.0]]}
    writer.json("result/tables.json", {"tables": [table]}).json("cost.json", {"a": 30.0, "b": 45.0})
    writer.json("memory.json", {"a": 2e8, "b": 3e8})
    found = [(figure.value, figure.name, figure.remark) for figure in headline(read_run(writer.path))]
    assert found == [
        ("0.85", "test accuracy of student", "teacher 0.9, student-alone 0.8"),
        ("10×", "smaller", "90 of 900 parameters"),
        ("4.0×", "faster", "1 of 4 ms a sample"),
        ("1 min 15 s", "training and measuring", ""),
        ("300.0 MB", "peak memory", ""),
    ]


def test_without_models_that_were_tested_the_first_measurements_are_the_headline(writer):
    writer.json("metrics.json", {"psnr": 21.9, "active_latents": 10.0, "mig": 0.5, "parameters": 346570.0})
    assert [(f.value, f.name) for f in headline(read_run(writer.path))] == [("21.9", "psnr"), ("0.5", "mig")]


def test_cost_stands_beside_quality(writer):
    modules = {"generator": "trained Net [(3, 2)]", "teacher": "frozen Net [(9, 2)]"}
    yields = [[{"kind": "run", "name": "teacher", "of": "x a seed 0"}]]
    yields += [[{"kind": "stage", "name": "student", "steps": 9, "modules": modules}]]
    writer.json("checkpoints/yields.json", yields).json("metrics.json", METRICS)
    writer.json("cost.json", {"teacher": 5.0, "student": 2.0}).json("memory.json", {"student": 2e6})
    metric, rows = costing(read_run(writer.path))
    assert metric == "accuracy"
    found = {row.name: row for row in rows}
    assert set(found) == {"teacher", "student"}
    assert (found["teacher"].quality, found["teacher"].parameters, found["teacher"].seconds) == (0.9, 18, 5.0)
    assert (found["student"].seconds, found["student"].memory, found["student"].ours) == (2.0, 2e6, True)


def test_a_measurement_is_drawn_with_what_it_is_held_against(writer):
    rows = logged()
    for row in rows:
        if "validation/accuracy" in row:
            row["validation/accuracy/line/teacher"] = 0.95
            row["validation/student-alone/accuracy"] = 0.7
    writer.stage(steps=200).rows(rows).json(
        "metrics.json", {"validation/other/accuracy": 0.6, "validation/accuracy": 0.8}
    )
    writer.rows(
        [{"stage": "model", "step": s, "validation/accuracy": 0.5} for s in (50, 100, 400)],
        "subruns/plain-alone/metrics.jsonl",
    )
    stage = next(stage for stage in curves(read_run(writer.path)) if stage.title == "student")
    (panel,) = [panel for panel in stage.panels if panel.title == "validation/accuracy"]
    assert len(re.findall('class="line reference"', panel.svg)) == 4
    names = re.findall(r'text-anchor="end">([a-z-]+)</text>', panel.svg)
    assert names == ["teacher", "student-alone", "other", "plain-alone"]
    assert "teacher 0.95; student-alone 0.7; plain-alone 0.5; other 0.6" in panel.ends
    assert "validation/student-alone/accuracy" not in {panel.title for panel in stage.panels}


def test_shares_of_the_gradient_are_shown_where_they_were_sampled(writer):
    rows = logged()
    for i, row in enumerate(rows):
        if "loss/kd" in row:
            row |= {"loss/ce/gradient_share": 0.2 + 0.001 * i, "loss/kd/gradient_share": 0.8 - 0.001 * i}
    writer.stage(steps=200).rows(rows)
    (loss,) = curves(read_run(writer.path))[0].losses
    assert [(row.name, row.gradient) for row in loss.rows] == [("ce", "23.8%"), ("kd", "76.2%")]
    assert "share of the gradient" in loss.shares.title
    assert "gradient_share" not in build(writer.path).read_text()
    writer.rows(logged())
    (loss,) = curves(read_run(writer.path))[0].losses
    assert (loss.shares, loss.rows[0].gradient) == (None, "")


def test_what_was_said_during_training_is_on_the_page(writer):
    row = {"stage": "student", "step": 100, "about": "terms", "warning": "ce gives <0.1 % of the gradient."}
    writer.stage(steps=200).rows([*logged(), row])
    page = build(writer.path).read_text()
    assert "student, step 100: ce gives &lt;0.1 % of the gradient." in page


def test_names_of_references_do_not_lie_on_each_other():
    lines = [Line(name, [(0, 0.5), (9, 0.5 + i * 1e-3)], reference=True) for i, name in enumerate("abcd")]
    svg = chart([*lines, Line("x", [(0, 0.0), (9, 1.0)])], label="x", steps=9)
    places = [float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="end">[abcd]</text>', svg)]
    assert len(places) == 4
    assert all(abs(one - other) >= 11 for i, one in enumerate(places) for other in places[:i])


def test_a_scatter_puts_points_names_and_errors_where_they_belong():
    dots = [Dot("teacher", 1000.0, 0.9), Dot("student", 10.0, 0.8, error=0.05, ours=True), Dot("x", float("nan"), 1.0)]
    svg = scatter(dots, label="l", across="parameters", up="accuracy")
    assert svg.count("<circle") == 2
    (ours_x,) = re.findall(r'<circle class="point ours" cx="([\d.]+)"', svg)
    (other_x,) = re.findall(r'<circle class="point other" cx="([\d.]+)"', svg)
    assert float(ours_x) < float(other_x)
    assert svg.count("whisker") == 1
    assert scatter([], label="l", across="a", up="b") == ""
    assert "&lt;b&gt;" in scatter([Dot("<b>", 1.0, 1.0)], label="l", across="a", up="b")


def test_of_the_pictures_of_training_the_first_the_last_and_some_between_are_shown(writer):
    for step in range(0, 110, 10):
        writer.picture(f"samples/student/{step:09d}-digits.png").picture(f"samples/a/b/{step:09d}-x-y.png")
    writer.text("samples/student/notes.txt", "x").picture("samples/student/odd.png")
    assert set(samples_of(writer.path / "samples")) == {("student", "digits"), ("a/b", "x-y")}
    strips = Album().of_training(writer.path / "samples")
    assert [(strip.stage, strip.name, strip.count) for strip in strips] == [
        ("a/b", "x-y", 11),
        ("student", "digits", 11),
    ]
    assert [step for step, _ in strips[1].frames] == [0, 30, 50, 80, 100]
    page = build(writer.path).read_text()
    assert page.count('alt="digits at step') == 5
    assert "5 of 11 pictures" in page


def test_a_page_has_room_for_so_many_pictures_and_no_more(writer, monkeypatch):
    for i in range(30):
        writer.picture(f"result/{i:02}.png")
    assert "6 more are in the run directory." in build(writer.path).read_text()
    size = (writer.path / "result" / "00.png").stat().st_size
    monkeypatch.setattr("stillhouse.report.pictures.PAGE_BYTES", 3 * size)
    page = build(writer.path).read_text()
    assert page.count("<img") == 3
    assert page.count("Too large for this page") == 21


def test_exports_come_with_the_line_that_loads_them(writer):
    latency = {"PyTorch": {"one_thread": 0.2}, "ONNX Runtime": {"one_thread": 0.05, "default_threads": 0.1}}
    told = {"artefact": "student", "largest_difference": 1.43e-6, "latency_ms": latency, "notes": ["no dropout."]}
    onnx = {"format": "onnx", "file": "elsewhere/run/export/student.onnx", "load": "import onnxruntime", **told}
    writer.json("export/export.json", [onnx, {"format": "gone", "file": "x", "notes": 3, "latency_ms": []}, 3])
    writer.text("export/student.onnx", "x" * 2000)
    page = build(writer.path).read_text()
    assert "import onnxruntime" in page
    assert (
        "elsewhere/run/export/student.onnx, 2.0 kB; of student; outputs differ from PyTorch&#39;s by at most 1.4e-06; "
        "0.2 ms a sample in PyTorch on one thread; 0.05 ms a sample in ONNX Runtime on one thread; no dropout."
    ) in page
    assert "x, which is gone" in page


@pytest.mark.parametrize("name", ["account", "pictures", "results"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"stillhouse.report.{name}"))
    assert result.attempted
    assert not result.failed
