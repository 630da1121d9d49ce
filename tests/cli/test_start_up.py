"""Help and lists are light; the index is fresh; names resolve."""

import json
import subprocess
import sys

import pytest

from stillhouse.registry import INDEX, entries, method_class, read_methods, recipes

LOOK = """
import sys
sys.argv = ["stillhouse", *{arguments!r}]
from stillhouse.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = [name for name in ("torch", "pydantic", "numpy", "matplotlib") if name in sys.modules]
print("heavy:", heavy, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["run", "--help"]])
def test_help_and_list_import_neither_torch_nor_pydantic(arguments):
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(arguments=arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stderr
    assert done.stdout


def test_importing_the_package_costs_nothing():
    code = "import sys, stillhouse; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_index_is_fresh():
    assert json.loads(INDEX.read_text()) == read_methods(), "run: python -m stillhouse.registry"


def test_list_as_json_has_the_promised_keys():
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse", "list", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    listed = json.loads(done.stdout)
    assert {"name", "family", "title", "arxiv", "year"} <= set(listed[0])
    assert [entry["name"] for entry in listed][: len(entries())] == [entry["name"] for entry in entries()]


@pytest.mark.parametrize("name", [entry["name"] for entry in json.loads(INDEX.read_text())])
def test_every_name_resolves_and_has_a_small_recipe(name):
    assert method_class(name).name == name
    assert "small" in recipes(name)
