"""The front door in Python: your model, your data, a method by name."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from stillhouse.data import ObjectData
from stillhouse.engine import Listener, Result, Run, RunDirectory, World
from stillhouse.engine.health import UNDER_TRAINED
from stillhouse.engine.rundir import refuse_foreign
from stillhouse.errors import UserError, nearest
from stillhouse.recipe import Recipe, build_recipe, load_recipe
from stillhouse.registry import method_class
from stillhouse.spec import IMPORT_PATH


def distil(
    method: str = "sinkd",
    *,
    data: Any = None,
    validation: Any = None,
    test: Any = None,
    seed: int = 0,
    out: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    cache: bool = True,
    listener: Listener | None = None,
    **fields: Any,
) -> Result:
    """Run a method with your own objects.

    Args:
        method: the method's name (see ``stillhouse list``).
        data: training data: a name, a spec, a map-style data set, a pair of tensors (inputs, labels), a dict of tensors,
            or a Hugging Face data set.
        validation: validation data in the same form; part of the training data is held out when it is not given.
        test: test data in the same form, for the final table.
        seed: the seed.
        out: run directory; with the same arguments, an interrupted run there is continued. A temporary one by default.
        settings: the recipe's ``run`` block: device, precision, log_every, ...
        cache: reuse trained teachers and outputs across runs.
        listener: told of progress.
        **fields: the method's fields, such as ``teacher``, ``student`` (modules, names or specs), ``epochs``.

    Returns:
        The result: its artefacts are attributes (``result.student``), its numbers are in ``result.metrics``.

    Raises:
        UserError: a name, a field or the data is wrong; one sentence says what and where.
    """
    cls = method_class(method)
    for name in fields:
        if name not in cls.model_fields:
            raise UserError(f"{method}: {name}: there is no such field; {nearest(name, cls.model_fields)}")
    values: dict[str, Any] = {"method": method, "seed": seed, "run": settings or {}, **fields}
    if (given := given_data(data, validation, test, models=fields)) is not None:
        values["data"] = given
    recipe = build_recipe(values, where=method)
    if out is not None:
        return _warned(run_recipe(recipe, Path(out), cache=cache, listener=listener))
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as directory:
        result = run_recipe(recipe, Path(directory), cache=cache, listener=listener)
        result.directory = None
        return _warned(result)


def _warned(result: Result) -> Result:
    """The result; what makes its numbers worthless is also a warning of Python's."""
    for note in result.notes:
        if note.startswith(UNDER_TRAINED):
            warnings.warn(note, stacklevel=3)
    return result


def given_data(data: Any, validation: Any = None, test: Any = None, *, models: Mapping[str, Any] | None = None) -> Any:
    """What a recipe's ``data`` is when it is given as objects, as :func:`distil` takes them; None when nothing is given.

    Args:
        data: training data, with or without other splits.
        validation: validation data.
        test: test data.
        models: fields that may hold models. Where one is the caller's own, data belongs to it.

    Raises:
        UserError: validation or test data without training data, or a model of the caller's own without any.
    """
    own = next((name for name, value in (models or {}).items() if _callers(value)), None)
    if data is None and own is not None:
        raise UserError(
            f"{own} is a model of yours and there is no data for it; pass data=, such as a pair of tensors, a data set, or a "
            "name ('digits')."
        )
    if validation is not None or test is not None:
        if data is None:
            raise UserError("validation and test data were given without training data; pass it as data=.")
        data = {"train": data} | {k: v for k, v in (("validation", validation), ("test", test)) if v is not None}
    # A mapping of tensors or splits is an object, unlike a mapping that writes a spec.
    return ObjectData.from_object(data) if isinstance(data, dict) and "kind" not in data else data


def _callers(value: Any) -> bool:
    """Whether a field's value is a model that comes with its weights or its code: a module, an estimator, a name of one."""
    if isinstance(value, list | tuple):
        return any(map(_callers, value))
    if isinstance(value, str):
        return value.startswith(("hf:", "file:")) or re.match(IMPORT_PATH, value) is not None
    return isinstance(value, torch.nn.Module) or hasattr(value, "predict_proba")


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    cache: bool = True,
    listener: Listener | None = None,
    world: World | None = None,
    about: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Run or continue a recipe in the directory ``out``; more ``options`` go to :class:`~stillhouse.engine.Run`.

    Args:
        recipe: the recipe.
        out: the run directory.
        cache: reuse trained teachers and outputs across runs.
        listener: told of progress.
        world: the processes.
        about: written as ``run.json`` when the run is new: the command, versions, ...
        options: see :class:`~stillhouse.engine.Run`.

    Raises:
        UserError: ``out`` holds a run of another recipe, or something else.
    """
    world = world or World.start(recipe.settings.device)
    if world.is_main:
        refuse_foreign(out)
    directory = RunDirectory(out, writes=world.is_main)
    directory.lock()
    threads = torch.get_num_threads()
    if recipe.settings.threads is not None:
        torch.set_num_threads(recipe.settings.threads)
    try:
        if world.is_main:
            _same_recipe(recipe, out / "recipe.yaml")
            recipe.write(out / "recipe.yaml")
            if about is not None and not (out / "run.json").exists():
                directory.write("run.json", about)
        run = Run(
            recipe.method,
            directory,
            seed=recipe.seed,
            settings=recipe.settings,
            world=world,
            cache=cache,
            listener=listener,
            **options,
        )
        return run.execute()
    finally:
        torch.set_num_threads(threads)
        directory.release()


def finished(recipe: Recipe, out: Path) -> dict[str, float | None] | None:
    """The final numbers of a recipe's run in ``out``, None for one that is not finite; None when it has not ended there.

    Raises:
        UserError: ``out`` holds a run of another recipe, or of this one carried out otherwise.
    """
    if not (out / "metrics.json").exists() or not (out / "recipe.yaml").exists():
        return None
    if not _reads_as(recipe, out / "recipe.yaml"):
        raise UserError(f"{out} holds a run of another recipe; remove it or choose another directory.")
    measured: dict[str, float | None] = json.loads((out / "metrics.json").read_text())
    return measured


def _reads_as(recipe: Recipe, path: Path) -> bool:
    """Whether a written recipe is this one; fields that are younger than the file have their defaults in it."""
    if _plain(YAML(typ="safe", pure=True).load(path.read_text())) == _plain(recipe.dump()):
        return True
    try:
        return _plain(load_recipe(path).dump()) == _plain(recipe.dump())
    except UserError:  # Such as that it names an object, which only the recipe at hand has.
        return False


def _plain(values: Any) -> str:
    return json.dumps(values, sort_keys=True)


def _same_recipe(recipe: Recipe, path: Path) -> None:
    """Refuse to continue a run with another recipe: its checkpoints would be taken for the new one's."""
    if not path.exists():
        return
    before, now = YAML(typ="safe", pure=True).load(path.read_text()), recipe.dump()
    if before.get("method") != now["method"]:
        raise UserError(
            f"{path.parent} holds a run of {before.get('method')!r}, not of {now['method']!r}; choose another directory."
        )
    with contextlib.suppress(UserError):  # Such as that it names an object, which only the recipe at hand has.
        # Fields that are younger than the file have their defaults in it.
        before = load_recipe(path).dump()
    differs = _difference({**before, "run": None}, {**now, "run": None})
    if differs is not None:
        key, was, is_ = differs
        raise UserError(f"{path.parent} holds a run whose {key!r} is {was}, not {is_}; choose another directory.")


def _difference(before: Any, now: Any, path: str = "") -> tuple[str, str, str] | None:
    """Where two plain values first differ, as a key path, and what stands there; None where they are equal."""
    if isinstance(before, dict) and isinstance(now, dict) and before.get("kind") == now.get("kind"):
        keys = sorted(before.keys() | now.keys())
        inner = (_difference(before.get(key), now.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return next((found for found in inner if found is not None), None)
    if json.dumps(before) == json.dumps(now):
        return None
    was, is_ = ("not set" if value is None else repr(value) for value in (before, now))
    return path, was, is_
