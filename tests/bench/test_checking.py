"""The walk before a comparison refuses no recipe that runs, with one teacher or several, and tells what will be measured."""

import pytest

from stillhouse.engine.rehearsal import rehearse
from stillhouse.methods.distillation import KnowledgeDistillation
from stillhouse.recipe import build_recipe, load_recipe
from stillhouse.registry import method_class, own_entries

NAMES = [entry["name"] for entry in own_entries()]
DISTILLING = [name for name in NAMES if issubclass(method_class(name), KnowledgeDistillation)]


@pytest.mark.parametrize("name", NAMES)
def test_every_small_recipe_passes(name, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    recipe = load_recipe(name, ["run.device=cpu"])
    found = rehearse(recipe.method, settings=recipe.settings, timed=False)
    assert found.steps


@pytest.mark.parametrize("name", DISTILLING)
def test_two_teachers_with_weights_pass(name, tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    recipe = load_recipe(name, ["run.device=cpu"])
    given = recipe.method.teacher
    one = (given[0] if isinstance(given, tuple) else given).dump()
    values = {field: getattr(recipe.method, field) for field in type(recipe.method).model_fields}
    values |= {"method": name, "teacher": [one, {**one, "seed": 1}], "teacher_weights": [1, 2]}
    found = rehearse(build_recipe(values).method, settings=recipe.settings, timed=False)
    assert found.metrics is not None, found.missing
    assert sum(step.kind == "run" and step.name.startswith("teacher") for step in found.steps) == 2
