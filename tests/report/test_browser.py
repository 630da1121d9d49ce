"""The page in a real browser: it renders, fits a phone, loads nothing, says nothing wrong, and can be read by everybody."""

import io
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.image import imread

from run_writer import logged
from stillhouse.report import build

# Whatever is written on the page, with the contrast to what is behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """(() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script, style, .unseen, .skip, [hidden]")) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parse(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio / (large ? 3 : 4.5), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found;
})()"""

OVERFLOWING = """[...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre"))
  .map((e) => `${e.tagName} ${e.textContent.slice(0, 40)}`)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run in which everything is there, and much of it is long."""
    from run_writer import RunWriter

    home = tmp_path_factory.mktemp("browser") / "a-run-with-a-name-that-is-rather-longer-than-a-phone-is-wide"
    home.mkdir()
    write = RunWriter(home)
    write.stage(steps=200, student="trained CNN [(6, 1, 3, 3), (6,)]", teacher="frozen CNN [(10, 2), ()]")
    rows = logged()
    for row in rows:
        if "loss/kd" in row:
            row |= {"loss/ce/gradient_share": 0.2, "loss/kd/gradient_share": 0.8}
        else:
            row |= {"validation/accuracy/line/student-alone": 0.8, "validation/accuracy/line/teacher": 0.95}
    rows.append({"stage": "student", "step": 200, "about": "terms", "warning": "ce gives 0.01 % of the gradient."})
    write.rows(rows)
    long = "a_measurement_with_a_name_that_goes_on_and_on/" * 3
    numbers = {
        f"test/{model}/accuracy": value for model, value in (("teacher", 0.99), ("student", 0.98), ("start", 0.9))
    }
    numbers |= {"test/student/accuracy_std": 0.004, "parameters/student": 3628.0, "parameters/teacher": 94186.0}
    write.json("metrics.json", numbers | {"test/accuracy": 0.98, long: 0.5})
    columns = ["model", "accuracy", "std", *(f"measure {i}" for i in range(12)), "CPU latency (ms, one sample)"]
    table = {"title": "Wide", "columns": columns, "rows": [["student", 0.98, 0.004, *range(12), 0.1]]}
    write.json("result/tables.json", {"tables": [table], "notes": ["x" * 200]})
    write.json("result/inputs.json", {"splits": {"train": 1078}, "inputs": {"pixel_values": [1, 8, 8]}})
    write.json("cost.json", {"student": 2.5}).json("memory.json", {"student": 3e8})
    write.picture("result/student.png", 329, 263, 90).picture("result/wide.png", 1400, 60, 200)
    write.picture("result/tall.png", 20, 900, 128)
    for step in (0, 50, 100, 150, 200, 250, 300):
        write.picture(f"samples/student/{step:09d}-digits.png", 100, 10, min(step, 255))
    write.json("result/student/model.json", {"spec": {"kind": "cnn"}}).text("result/student/model.safetensors", "x")
    load = "import onnxruntime\nsession = onnxruntime.InferenceSession('export/student.onnx')"
    write.json("export/export.json", [{"format": "onnx", "file": "student.onnx", "load": load}])
    write.json("run.json", {"command": ["stillhouse", "run", "sinkd", "y" * 150], "environment": {"python": "3.11.7"}})
    return "file://" + str(build(home))


@pytest.fixture(
    scope="module",
    params=[(1280, False), (390, False), (1280, True), (390, True)],
    ids=lambda p: f"{p[0]}-{p[1] and 'dark'}",
)
def tab(request, chromium, page):
    width, dark = request.param
    tab = chromium.open(page, width=width, height=844, dark=dark)
    yield tab
    tab.close()


def test_the_page_renders(tab):
    pixels = imread(io.BytesIO(tab.picture(whole=False)))
    colors = (255 * pixels[:, :, :3]).astype(int) @ (65536, 256, 1)
    assert len(np.unique(colors)) > 50
    dark = tab.see("matchMedia('(prefers-color-scheme: dark)').matches")
    # The ground, where nothing is.
    assert (pixels[2, 2, :3].mean() < 0.2) == dark
    assert pixels[:, :, :3].std() > 0.02


def test_it_loads_nothing_and_nothing_goes_wrong(tab, page):
    assert tab.requests == [page]
    assert tab.errors == []
    assert tab.see("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0


def test_it_fits_the_window(tab):
    width = tab.see("document.documentElement.clientWidth")
    assert width in (390, 1280)
    assert tab.see(OVERFLOWING) == []
    assert tab.see("document.documentElement.scrollWidth") == width
    # The wide table is there, and moves within its own box.
    assert tab.see("[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)")


def test_no_button_lies_on_what_it_copies(tab):
    apart = tab.see("""[...document.querySelectorAll(".code")].map((e) => {
      const [text, button] = ["pre", ".copy"].map((name) => e.querySelector(name).getBoundingClientRect());
      return button.width > 0 && (button.left >= text.right || button.top >= text.bottom);
    })""")
    assert len(apart) >= 2
    assert all(apart)


def test_every_picture_is_decoded_and_described(tab):
    shown = tab.see(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.alt, i.getBoundingClientRect().height])"
    )
    assert len(shown) == 3 + 5
    for complete, width, alt, height in shown:
        assert complete
        assert width > 0
        assert alt
        assert 0 < height <= 420
    assert len({alt for _, _, alt, _ in shown}) == 8
    charts = tab.see("[...document.querySelectorAll('svg:not([aria-hidden])')].map(s => s.getAttribute('aria-label'))")
    assert len(charts) >= 4
    assert all(charts)


def test_everything_can_be_read(tab):
    found = tab.see(CONTRASTS)
    assert len(found) > 150
    assert [text for ratio, text in found if ratio < 1] == []


def test_headings_are_in_order_and_sections_can_be_jumped_to(tab):
    levels = tab.see("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert tab.see("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))")
    nodes = tab.accessible()
    unnamed = [
        n for n in nodes if n.get("role", {}).get("value") in ("image", "region", "button", "link", "navigation")
    ]
    assert [n["role"]["value"] for n in unnamed if not n.get("name", {}).get("value")] == []


def test_a_chart_tells_the_values_under_the_pointer(chromium, page):
    tab = chromium.open(page, width=1280)
    x, y = tab.see(
        "(() => { const s = document.querySelector('svg[data-lines]'); s.scrollIntoView({block: 'center', behavior: 'instant'});"
        " const b = s.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    tab.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = tab.until("document.querySelector('svg[data-lines]').parentElement.querySelector('.readout').textContent")
    assert said.startswith("step ")
    assert "ce " in said
    assert "kd " in said
    tab.close()


def test_it_is_whole_without_scripts_and_on_paper(chromium, page):
    with_script = chromium.open(page, width=390, height=844)
    without = chromium.open(page, width=390, height=844, script=False)
    box = "document.documentElement.scrollHeight"
    without.command("Emulation.setScriptExecutionDisabled", value=False)
    assert without.see(box) == with_script.see(box)
    assert without.see("[...document.querySelectorAll('.copy')].every(b => b.hidden)")
    assert not with_script.see("[...document.querySelectorAll('.copy')].some(b => b.hidden)")
    assert with_script.printed().startswith(b"%PDF")
    without.close()
    with_script.close()
