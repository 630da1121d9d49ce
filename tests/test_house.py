"""The house keeps its order: every system is whole, the floors hold, the style holds, nothing is pickled."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.claims import RESULTS, judge
from stillhouse.claims.claim import find_claim
from stillhouse.recipe import build_recipe, load_recipe
from stillhouse.registry import INDEX, method_class, recipes

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stillhouse"
ENTRIES = json.loads(INDEX.read_text())
SYSTEMS = [entry["name"] for entry in ENTRIES if not entry["classic"]]
ALL = [entry["name"] for entry in ENTRIES]
FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_has_its_recipes_claim_test_and_page(name):
    assert {"small", "paper"} <= set(recipes(name))
    assert find_claim(name).name == name
    assert (ROOT / "tests" / "methods" / f"test_{name.replace('-', '_')}.py").exists()
    page = (ROOT / "docs" / "systems" / f"{name}.md").read_text()
    for heading in ("When to choose it", "Limits"):
        assert heading in page, f"docs/systems/{name}.md lacks the section {heading!r}"


@pytest.mark.parametrize("name", ALL)
def test_every_method_has_a_page_a_small_recipe_and_described_fields(name):
    assert "small" in recipes(name)
    assert (ROOT / "docs" / "systems" / f"{name}.md").exists()
    cls = method_class(name)
    bare = [field for field, info in cls.model_fields.items() if not info.description]
    assert not bare, f"{name}: fields without a description: {bare}"
    assert cls.summary
    assert cls.__doc__


@pytest.mark.parametrize("name", ALL)
def test_recipes_are_valid_and_resolve_to_themselves(name, tmp_path):
    for scale in recipes(name):
        recipe = load_recipe(f"{name}/{scale}")
        assert recipe.method.name == name
        recipe.write(tmp_path / f"{scale}.yaml")
        assert load_recipe(tmp_path / f"{scale}.yaml").dump() == recipe.dump()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_claim_states_arms_that_are_valid_recipes(name):
    claim = find_claim(name)
    for margin in claim.margins:
        assert {margin.better, margin.than} - {None} <= set(claim.arms)
    for arm in claim.arms:
        build_recipe(claim.values(arm))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recorded_result_belongs_to_the_claim_as_it_stands(name):
    path = RESULTS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"not recorded yet: stillhouse claims {name} --out src/stillhouse/claims/results")
    recorded = json.loads(path.read_text())
    claim = find_claim(name)
    assert (recorded["claim"], recorded["remark"]) == (claim.statement, claim.remark)
    assert recorded["seeds"] == list(claim.seeds)
    assert set(recorded["arms"]) == set(claim.arms)
    assert recorded["recipes"] == claim.digests(), "an arm has changed since it was run"
    assert recorded["margins"] == [judge(margin, recorded["arms"]) for margin in claim.margins]
    assert recorded["holds"] == all(margin["holds"] for margin in recorded["margins"])
    assert recorded["holds"] or claim.remark, "a failed claim says why"
    assert {"torch", "python"} <= set(recorded["environment"])


def test_the_floors_hold():
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_style_holds():
    ruff = str(Path(sys.executable).parent / "ruff")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, "."], capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_types_hold():
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_pickle_no_broad_except_no_leftovers(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "dill", "cloudpickle", "joblib"} & set(names)
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception"), f"line {node.lineno}: a broad except"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert path.stem not in ("utils", "helpers", "common", "misc")


def test_public_functions_say_what_they_do():
    bare = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            documented = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if documented and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(SOURCE)}:{node.name}")
    assert not bare, bare
