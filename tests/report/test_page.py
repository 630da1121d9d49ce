"""The page of a run: self-contained, well formed, safe, deterministic, and it says what is in the directory."""

import base64
import doctest
import hashlib
import html
import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from run_writer import logged, png
from stillhouse.errors import UserError
from stillhouse.report import build, environment
from stillhouse.report.charts import Axis, Line, chart

VOID = {"meta", "br", "img", "hr", "input", "link"}
NASTY = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"


class Balance(HTMLParser):
    """Checks that tags nest, and collects what a page loads and the identifiers in it."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.loads, self.ids, self.text, self.scripts = [], [], [], [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                self.loads.append((tag, name, value))
            assert not name.startswith("on"), f"an event handler in <{tag}>"
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def parsed(page):
    found = Balance()
    found.feed(page)
    found.close()
    assert found.open == []
    assert page.lower().startswith("<!doctype html>")
    assert len(found.ids) == len(set(found.ids))
    found.said = re.sub(r"\s+", " ", "".join(found.text))
    return found


@pytest.fixture
def finished(writer):
    writer.stage(steps=200, student="trained CNN [(6, 1, 3, 3), (6,)]", teacher="frozen CNN [(10, 2), ()]").rows(
        logged()
    )
    writer.json("cost.json", {"teacher": 75.0, "student": 2.5})
    numbers = {"test/student/accuracy": 0.98607242, "test/student-alone/accuracy": 0.98050139}
    writer.json("metrics.json", numbers | {"test/teacher/accuracy": 0.99164345, "parameters/student": 3628.0})
    table = {
        "title": "Comparison",
        "columns": ["model", "test accuracy", "parameters"],
        "rows": [["teacher", 0.99164345, 94186], ["student", 0.98607242, 3628]],
    }
    writer.json("result/tables.json", {"tables": [table], "notes": ["distillation helped by +0.56 points."]})
    writer.json("result/student/model.json", {"spec": {"kind": "cnn"}}).text(
        "result/student/model.safetensors", "x" * 1500
    )
    (writer.path / "result" / "confusion.png").write_bytes(png(40, 20))
    method = {
        "name": "sinkd",
        "title": "Sinkhorn Distance Minimization for Knowledge Distillation",
        "arxiv": "2402.17110",
        "year": 2024,
        "family": "language",
        "summary": "a smaller classifier",
        "verified": "official",
    }
    about = {"command": ["stillhouse", "run", "sinkd", "epochs=3"], "seed": 3, "started": "2026-01-02T03:04:05+00:00"}
    writer.json("run.json", about | {"environment": {"python": "3.11.7", "torch": "2.6.0"}, "method": method})
    return writer.path


def test_a_finished_run_is_told_whole(finished):
    path = build(finished)
    assert path == finished / "report.html"
    page = path.read_text(encoding="ascii")
    said = parsed(page).said
    for words in (
        "Sinkhorn Distance Minimization for Knowledge Distillation (2024), arxiv.org/abs/2402.17110",
        "its loss was checked against the official code",
        "94,186",
        "0.9861",
        "distillation helped by +0.56 points.",
        "takes over 50% of the teacher's lead",
        "1 min 18 s",
        "stillhouse run run/recipe.yaml --seed 3 --out run-again",
        "stillhouse run sinkd epochs=3",
        'model = stillhouse.models.load("run/result/student")',
        "weight_kd: 0.9",
        "2026-01-02 03:04:05 UTC",
        "2.6.0",
        "validation/accuracy",
        "learning rate of student",
        "1.5 kB",
    ):
        assert words in said, words
    assert "Not finished" not in said
    assert base64.b64encode(png(40, 20)).decode() in page


def test_the_page_loads_nothing(finished):
    page = build(finished).read_text()
    for tag, name, value in parsed(page).loads:
        assert value.startswith("#") or (tag == "img" and value.startswith("data:image/png;base64,")), (
            tag,
            name,
            value,
        )
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_the_policy_allows_the_script_of_the_page_and_no_other(finished):
    page = build(finished).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_the_same_run_gives_the_same_page(finished):
    first = build(finished).read_bytes()
    assert build(finished).read_bytes() == first
    code = "from pathlib import Path; from stillhouse.report import build; build(Path('run'))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert (finished / "report.html").read_bytes() == first


def test_the_page_is_written_whole_or_not_at_all(finished, monkeypatch):
    build(finished)
    before = (finished / "report.html").read_bytes()

    def full(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no"):
        build(finished)
    assert (finished / "report.html").read_bytes() == before
    assert not list(finished.glob(".report*"))


def test_an_unfinished_run_says_how_far_it_is(writer):
    writer.stage(steps=400).rows(logged())
    page = build(writer.path).read_text()
    said = parsed(page).said
    assert "Not finished: in stage student, step 200 of 400 as logged." in said
    assert 'aria-valuenow="50"' in page
    assert "stillhouse resume run" in said


@pytest.mark.parametrize(
    ("yields", "words"),
    [
        ([], "nothing was logged yet"),
        ([[{"kind": "run", "name": "teacher", "of": "x"}]], "in the run teacher"),
        ([[{"kind": "stage", "name": "student", "steps": 1200}]], "in stage student, step 0 of 1,200 as logged"),
        ([[{"kind": "stage built later", "name": "expert-0"}]], "in stage expert-0"),
    ],
)
def test_a_run_that_has_hardly_begun_has_a_page(writer, yields, words):
    writer.json("checkpoints/yields.json", yields)
    assert f"Not finished: {words}" in parsed(build(writer.path).read_text()).said


def test_a_run_between_stages_says_after_which(writer):
    writer.stage(steps=200).rows(logged())
    (writer.path / "checkpoints" / "student" / "end").mkdir(parents=True)
    assert "Not finished: after the stage student" in parsed(build(writer.path).read_text()).said


def test_a_log_that_was_cut_short_is_read_up_to_there(writer):
    writer.stage(steps=400).rows(logged())
    with (writer.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "student", "st')
    assert "1 line of metrics.jsonl could not be read and is left out." in parsed(build(writer.path).read_text()).said


def test_nasty_names_are_text(writer):
    rows = [
        {"stage": NASTY, "step": i, f"{NASTY}/{NASTY}": 1.0 / i, f"{NASTY}/b": 1.0, f"{NASTY}/lr/{NASTY}": 0.1 / i}
        for i in range(1, 15)
    ]
    rows += [{"stage": NASTY, "step": i, f"validation/{NASTY}": float(i)} for i in range(1, 15)]
    writer.rows(rows).text("recipe.yaml", f"# {NASTY}\nmethod: '{NASTY.replace(chr(39), '')}'\nkey: <b>x</b>\n")
    writer.json("cost.json", {NASTY: 1.0}).json("metrics.json", {f"test/{NASTY}": 1.0, NASTY: 0.5})
    table = {"title": NASTY, "columns": [NASTY, NASTY], "rows": [[NASTY, NASTY], [NASTY, 1.5]]}
    writer.json("result/tables.json", {"tables": [table], "notes": [NASTY]})
    writer.text("result/a<b>&'\"/config.json", json.dumps({"architectures": [NASTY]}))
    (writer.path / "result" / "<img src=x onerror=alert(1)>.png").write_bytes(png(4, 4))
    method = {"name": NASTY, "title": NASTY, "arxiv": NASTY, "year": NASTY, "summary": NASTY, "verified": NASTY}
    writer.json(
        "run.json",
        {"name": NASTY, "command": [NASTY], "started": NASTY, "environment": {NASTY: NASTY}, "method": method},
    )
    page = build(writer.path).read_text()
    found = parsed(page)
    assert found.scripts == 1
    assert "<b>x</b>" not in page
    assert found.said.count(NASTY) > 15


def test_letters_beyond_ascii_survive(writer):
    writer.text("recipe.yaml", "method: sinkd\nname: Größe 蒸留\n").json("run.json", {"name": "Größe 蒸留"})
    raw = build(writer.path).read_bytes()
    assert raw.isascii()
    assert parsed(raw.decode()).said.count("Größe 蒸留") >= 2


def test_without_a_run_json_the_index_tells_the_method(writer):
    said = parsed(build(writer.path).read_text()).said
    assert "Sinkhorn Distance Minimization for Knowledge Distillation (2024)" in said
    assert "The run did not write them down." in said
    assert "--seed 3" in said


def test_given_versions_are_shown(writer):
    assert "torch 9.9" in parsed(build(writer.path, version_info={"torch": "torch 9.9"}).read_text()).said


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"model.safetensors": "", "model.json": '{"spec": null}'}, "stillhouse.models.load_weights(model,"),
        ({"config.json": '{"architectures": ["BertForMaskedLM"]}'}, "model = BertForMaskedLM.from_pretrained("),
        ({"config.json": '{"_class_name": "UNet2DModel"}'}, "from diffusers import UNet2DModel"),
        ({"config.json": "{}", "model.json": "{}", "model.safetensors": ""}, "model = AutoModel.from_pretrained("),
        ({"unet/config.json": '{"_class_name": "DiTTransformer2DModel"}'}, 'from_pretrained("run/result/it/unet")'),
        ({"model_index.json": '{"_class_name": "DDPMPipeline"}'}, "pipeline = DDPMPipeline.from_pretrained("),
        ({"dataset/state.json": "{}", "dataset/dataset_info.json": "{}"}, 'load_from_disk("run/result/it/dataset")'),
        ({"distilled.safetensors": ""}, "load_tensors("),
        ({"codes.safetensors": ""}, 'load_file("run/result/it/codes.safetensors")'),
    ],
)
def test_an_artefact_comes_with_the_line_that_loads_it(writer, files, line):
    for name, text in files.items():
        writer.text(f"result/it/{name}", text)
    assert line in parsed(build(writer.path).read_text()).said


def test_many_files_are_counted_and_not_listed(writer):
    for i in range(40):
        writer.text(f"result/set/images/{i:03}.txt", "x")
    said = parsed(build(writer.path).read_text()).said
    assert "40 files" in said
    assert "and 28 more" in said


def test_stages_that_differ_in_a_number_share_a_figure(writer):
    rows = [
        {"stage": f"expert-{n}", "step": s, "loss/ce": n + 1 / s, "validation/accuracy": 0.1 * n}
        for n in range(6)
        for s in (1, 2, 3)
    ]
    writer.rows([{k: v for k, v in row.items() if not k.startswith("validation")} for row in rows])
    page = build(writer.path).read_text()
    assert "6 stages of up to 3 steps, a line each" in parsed(page).said
    assert page.count('class="line faint"') == 6


def test_a_nested_run_shows_its_curves_before_the_stage_that_used_it(writer):
    writer.rows(logged()).rows(
        [{"stage": "model", "step": s, "loss/ce": 1 / s} for s in (1, 2)], "subruns/teacher/metrics.jsonl"
    )
    said = parsed(build(writer.path).read_text()).said
    assert said.index("teacher / model") < said.index("student step 200")


def test_a_recipe_with_python_objects_says_so(writer):
    writer.text(
        "recipe.yaml",
        "method: kd\nteacher:\n  kind: pretrained\n  model: {kind: object, object: Net, fingerprint: ab}\n",
    )
    assert "names Python objects" in parsed(build(writer.path).read_text()).said
    writer.text("recipe.yaml", "method: kd\n")
    assert "names Python objects" not in parsed(build(writer.path).read_text()).said


def test_paths_with_spaces_are_quoted(writer, tmp_path):
    writer.path.rename(tmp_path / "my run")
    assert (
        "stillhouse run 'my run/recipe.yaml' --seed 3 --out 'my run-again'"
        in parsed(build(Path("my run")).read_text()).said
    )


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("recipe.yaml", None, "run holds no run: there is no recipe.yaml in it."),
        ("metrics.json", "{", "run/metrics.json is damaged: it is not JSON"),
        ("cost.json", "[]", "run/cost.json is damaged: it holds a list where a dict belongs."),
    ],
)
def test_what_is_wrong_is_one_sentence(writer, name, text, sentence):
    if text is None:
        (writer.path / name).unlink()
    else:
        writer.text(name, text)
    with pytest.raises(UserError) as error:
        build(writer.path)
    assert str(error.value).startswith(sentence)
    assert not (writer.path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("result/tables.json", {"tables": [{"title": "t", "columns": 3, "rows": [5]}]}),
        ("result/tables.json", {"tables": 7, "notes": [1]}),
        ("result/inputs.json", {"splits": [1], "inputs": 3, "pixels": {"black": "x"}}),
        ("run.json", {"method": 3, "environment": [1], "command": 5}),
        ("checkpoints/yields.json", [[{"kind": "stage", "name": ["x"], "modules": 3, "updates": 4}]]),
        ("metrics.json", {"test/a/accuracy": [1], "parameters/a": {"b": 1}}),
        ("export/export.json", [{"format": 3, "file": [1], "load": {}, "latency_ms": {"x": 1}}]),
    ],
)
def test_json_of_another_shape_gives_a_page_or_one_sentence(writer, name, value):
    writer.stage(steps=200).rows(logged()).json(name, value)
    try:
        parsed(build(writer.path).read_text())
    except UserError as error:
        assert str(error).startswith("run")  # noqa: PT017


def test_a_directory_that_is_not_there_holds_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        build(tmp_path / "nowhere")


def points(svg):
    return [
        [tuple(map(float, p.split(","))) for p in line.split()]
        for line in re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    ]


def test_a_chart_puts_points_where_they_belong():
    svg = chart([Line("ce", [(0, 0.0), (50, 1.0), (100, 0.5)])], label="x", steps=100)
    ((first, middle, last),) = points(svg)
    assert (first[0], middle[0], last[0]) == (48, 179, 310)
    assert first[1] > last[1] > middle[1]
    assert last[1] == pytest.approx((first[1] + middle[1]) / 2, abs=0.1)


def test_a_chart_leaves_gaps_where_values_are_not_finite():
    svg = chart([Line("ce", [(s, float("nan") if s == 20 else float(s)) for s in range(40)])], label="x", steps=40)
    assert [len(line) for line in points(svg)] == [20, 19]
    assert chart([Line("ce", [(1, float("inf"))])], label="x", steps=40) == ""


def test_a_long_line_is_thinned_to_its_means_within_its_band():
    values = [(s, float(s % 2)) for s in range(1, 2401)]
    svg = chart([Line("ce", values)], label="x", steps=2400)
    ((*line,),) = points(svg)
    assert len(line) == 240
    assert len({y for _, y in line}) == 1
    assert svg.count("<polygon") == 1
    embedded = json.loads(html.unescape(re.search(r'data-lines="([^"]*)"', svg)[1]))
    assert embedded[0]["y"] == [0.5] * 240


def test_a_log_axis_is_taken_only_for_positive_values_that_span_decades():
    for values, log in (([1.0, 1e-3], True), ([1.0, 0.5], False), ([1.0, 0.0], False), ([1.0, -1e-3], False)):
        ticks = re.findall(
            r'text-anchor="end">([^<]*)</text>',
            chart([Line("x", list(enumerate(values)))], label="x", steps=2, log=True),
        )
        assert ("0.01" in ticks) == log, (values, ticks)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3e-7, 2e-6), (0.95, 0.951), (1e5, 9e5), (-1.0, 1e9)])
def test_ticks_are_few_and_lie_within(low, high):
    ticks = Axis(low, high, 0, 1).ticks(4)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)


def test_a_constant_line_is_drawn():
    assert points(chart([Line("x", [(0, 0.1), (1, 0.1)])], label="x", steps=1))
    assert points(chart([Line("x", [(0, 0.0), (1, 0.0)])], label="x", steps=1))


def test_the_environment_names_versions_and_machine():
    found = environment()
    assert {"python", "platform", "stillhouse", "torch", "numpy", "processor", "cores", "threads"} <= set(found)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["charts", "formatting", "reading"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"stillhouse.report.{name}"))
    assert result.attempted
    assert not result.failed
