"""The pages say what is so: their Python runs, their links lead somewhere, the files and tests they name exist."""

import importlib.util
import itertools
import json
import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from stillhouse.cli import app
from stillhouse.recipe import build_recipe, load_recipe, parse
from stillhouse.registry import entries, filled, own_entries

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
FENCE = re.compile(r"^( *)(`{3,})[ {.]*(\w*)[^\n]*\n(.*?)^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "([^":]+)(?::(\d+):(\d+))?"$', re.MULTILINE)
WITH_PYTHON = [page for page in PAGES if any(block[2] == "python" for block in FENCE.findall(page.read_text()))]


def name_of(page):
    return str(page.relative_to(ROOT))


def snippet(match):
    """The lines of a file that a page includes."""
    path, first, last = match.groups()
    lines = (ROOT / path).read_text().splitlines()
    return "\n".join(lines[int(first) - 1 : int(last)] if first else lines)


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in words}


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, as one program: a later one may use what an earlier one defined."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    blocks = [code for _, _, language, code in FENCE.findall(page.read_text()) if language == "python"]
    program = tmp_path / "page.py"
    program.write_text("\n\n".join(SNIPPET.sub(snippet, block) for block in blocks))
    runpy.run_path(str(program), run_name="page")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(found), f"{name_of(page)} links to {target}, a heading that does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_and_tests_that_a_page_names_exist(page):
    for path, test in re.findall(r"`((?:src|tests|benchmarks|examples|docs)/[\w./-]+)(?:::(\w+))?`", prose(page)):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}, which does not exist"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{name_of(page)} names {test}, which {path} lacks"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_snippets_exist(page):
    for match in SNIPPET.finditer(page.read_text()):
        assert snippet(match).strip(), f"{name_of(page)} includes nothing by {match.group()}"


def test_a_recorded_claim_is_shown_whole_also_when_it_failed(hooks):
    result = {
        "claim": "A beats B.",
        "holds": False,
        "seconds": 61.0,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "stillhouse claims x",
        "seeds": [0, 1],
        "arms": {"a": {"test/accuracy": [0.5, 0.52]}, "b": {"test/accuracy": [0.6, 0.6]}},
        "margins": [{"finding": "a over b in test/accuracy: -0.09, asked +0.01: fails"}],
        "environment": {"torch": "2"},
        "remark": "Small.",
    }
    text = hooks.claim("x", result)
    assert text.startswith('!!! failure "The claim fails"')
    assert "| `a` | 0.510 ± 0.014 |" in text
    assert "| `b` | 0.6 ± 0 |" in text
    for part in (
        "A beats B.",
        "asked +0.01: fails",
        "Small.",
        "stillhouse claims x",
        "2 seeds",
        "torch 2",
        "1 minutes",
    ):
        assert part in text
    assert "stillhouse claims y" in hooks.claim("y", None)


def test_markers_are_filled_and_nothing_else(hooks):
    page = "before `<!-- claim -->`\n\n<!-- fields -->\n\n<!-- another -->\n"
    filled = hooks.filled(page, "kd")
    assert filled.startswith("before `<!-- claim -->`\n\n| field |")
    assert filled.endswith("<!-- another -->\n")
    assert "| `divergence` | kl \\| reverse_kl \\| js \\| tv | `kl` |" in filled


def test_a_page_shows_its_rows_of_the_tables_of_all_methods(hooks, tmp_path):
    head = "| method | accuracy | gain | verdict |\n|---|---|---|---|\n"
    table = head + "| `kd` | 80 | +2 | better |\n| `supervised` | 78 |  |  |\n"
    (tmp_path / "knowledge.md").write_text(
        f"# All\n\nWords.\n\n## one\n\n{table}| `at` | 79 | +1 | better |\n\n## two\n\n- none\n"
    )
    text = hooks.measured("kd", tmp_path)
    assert text == f"one:\n\n{table}".removesuffix("\n")
    assert hooks.measured("fitnet", tmp_path) == "Not measured in the tables yet."


def test_the_list_of_systems_has_every_method_and_its_verdict(hooks):
    text = hooks.systems()
    for entry in json.loads((ROOT / "src/stillhouse/index.json").read_text()):
        [row] = [
            line for line in text.splitlines() if line.startswith((f"| [`{entry['name']}`]", f"| `{entry['name']}` "))
        ]
        assert entry["summary"] in row
        if not entry["classic"]:
            result = hooks.recorded(entry["name"])
            assert row.endswith(f"| {'not recorded' if result is None else hooks.verdict(result)} |")


def test_the_navigation_takes_up_every_page_of_a_folder(hooks):
    nav = hooks.expanded(["index.md", {"Systems": "systems/*"}])
    assert nav[0] == "index.md"
    pages = nav[1]["Systems"]
    assert pages[0] == "systems/index.md"
    assert sorted(pages) == sorted(f"systems/{path.name}" for path in (DOCS / "systems").glob("*.md"))


def test_a_reference_has_every_module_of_its_room(hooks):
    rooms = re.findall(
        r"^<!-- modules (\S+) -->$", "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md")), re.M
    )
    assert {f"stillhouse.{room}" for room in ("losses", "metrics", "modules", "models", "data", "engine")} <= set(rooms)
    assert "::: stillhouse.losses.transport\n" in hooks.modules("stillhouse.losses")
    assert "__init__" not in hooks.modules("stillhouse.losses")


def test_the_readme_has_every_system_and_classic():
    readme = (ROOT / "README.md").read_text()
    for entry in own_entries():
        row = f"| [`{entry['name']}`](docs/systems/{entry['name']}.md) | {entry['summary']} |"
        assert row in readme, "README.md lacks a method's row; `python -m stillhouse.registry` writes it"
    assert filled(readme, own_entries()) == readme, "README.md has stale rows: python -m stillhouse.registry"


def test_the_readme_has_every_command_and_guide_page():
    readme = (ROOT / "README.md").read_text()
    shown = {line[0] for line in commands(ROOT / "README.md")}
    missing = {command.name or command.callback.__name__ for command in app.registered_commands} - shown
    assert not missing, f"README.md shows no line `$ stillhouse ...` for {missing}"
    for page in sorted((DOCS / "guide").glob("*.md")):
        assert f"](docs/guide/{page.name}) |" in readme, f"the table of the guide in README.md lacks {page.name}"


def test_every_guide_page_is_in_the_navigation_and_on_the_first_page():
    navigation, first = (ROOT / "mkdocs.yml").read_text(), (DOCS / "index.md").read_text()
    for page in sorted((DOCS / "guide").glob("*.md")):
        assert f"](guide/{page.name})" in first, f"docs/index.md links nowhere to guide/{page.name}"
        assert f"- guide/{page.name}\n" in navigation, f"mkdocs.yml lacks guide/{page.name}"


def test_the_first_page_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    first = (DOCS / "index.md").read_text()
    for extra in extras.keys() - {"test", "docs", "bench"}:
        assert f"`{extra}`" in first or f"[{extra}]" in first, f"docs/index.md does not name the extra {extra}"


def commands(page):
    """The lines of a page's console blocks that call stillhouse, as words; a comment ends a line."""
    blocks = [code for _, _, language, code in FENCE.findall(page.read_text()) if language == "console"]
    lines = [line[2:] for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("stillhouse") + 1 :] for line in words if "stillhouse" in line]


WITH_RUNS = [page for page in PAGES if any(line[:1] == ["run"] for line in commands(page))]


@pytest.mark.parametrize("page", WITH_RUNS, ids=name_of)
def test_the_runs_that_a_page_shows_are_valid_recipes(page):
    known = {entry["name"] for entry in entries()}
    for line in commands(page):
        if line[:1] != ["run"] or line[1].partition("/")[0] not in known:
            continue
        options = {"--out", "--seed"}
        words = [
            word for before, word in itertools.pairwise(line) if before not in options and not word.startswith("--")
        ]
        load_recipe(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_shell_scripts_of_a_page_are_shell(page, tmp_path):
    for number, (_, _, language, code) in enumerate(FENCE.findall(page.read_text())):
        if language == "bash":
            script = tmp_path / f"{number}.sh"
            script.write_text(code)
            subprocess.run(["bash", "-n", script], check=True)


def test_pages_followed_one_after_another_do_not_meet_in_a_directory():
    """Each directory that a page's Python writes is its own, and none that a command takes by default."""
    owner = {f"runs/{entry['name']}": "stillhouse run" for entry in entries()}
    for page in WITH_PYTHON:
        code = "\n".join(code for _, _, language, code in FENCE.findall(page.read_text()) if language == "python")
        for directory in set(
            re.findall(r"""out=["'](runs/[^"']+)|"out": "(runs/[^"]+)|Path\("(runs/[^"]+)"\)""", code)
        ):
            name = next(filter(None, directory))
            assert owner.setdefault(name, name_of(page)) == name_of(page), (
                f"{name_of(page)} and {owner[name]} share {name}"
            )


def recipes_of(page):
    """The whole recipes that a page shows."""
    blocks = [parse(code) for _, _, language, code in FENCE.findall(page.read_text()) if language == "yaml"]
    return [block for block in blocks if isinstance(block, dict) and "method" in block]


@pytest.mark.parametrize("page", [page for page in PAGES if recipes_of(page)], ids=name_of)
def test_the_recipes_that_a_page_shows_are_valid_and_say_how_to_train(page):
    for values in recipes_of(page):
        build_recipe(values, where=name_of(page))
        if "student" in values and page.parent.name == "guide":
            assert {"optimizer", "epochs"} <= values.keys(), (
                f"{name_of(page)} leaves a paper's pace to a network of one's own"
            )
