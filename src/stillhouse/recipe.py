"""Recipes: YAML in, a validated method out; and the sentences people read when something in it is wrong."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, create_model
from ruamel.yaml import YAML
from ruamel.yaml.error import ReusedAnchorWarning, YAMLError

from stillhouse.engine import Method, Settings
from stillhouse.engine.storage import write_text
from stillhouse.errors import UserError, nearest
from stillhouse.registry import entries, method_class, recipes
from stillhouse.spec import SHOWN, Spec, Tagged, read, spec_in

DEEPEST, MOST = 100, 100_000
"""Levels and values that a recipe may have: aliases of aliases multiply."""


@dataclass(frozen=True)
class Recipe:
    """A method with all its fields, the seed, and how the run is carried out.

    Attributes:
        method: the validated method.
        seed: the run's seed.
        settings: how it is carried out (the ``run`` block).
        source: the file or name it was read from.
    """

    method: Method
    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    source: str = ""

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain values; reading them back gives an equal recipe."""
        return {
            "method": self.method.name,
            "seed": self.seed,
            "run": self.settings.dump(),
            **self.method.dump(),
        }

    def write(self, path: Path) -> None:
        """Write the resolved recipe as YAML."""
        stream = io.StringIO()
        yaml = _yaml()
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        yaml.dump(self.dump(), stream)
        write_text(path, f"# Run again with: stillhouse run {path.name}\n" + stream.getvalue())


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, seed: int | None = None) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file; a method's name (its ``small`` recipe); or ``name/scale``.
        overrides: ``key.path=value``, each read by the type of its field.
        seed: in place of the recipe's seed.

    Raises:
        UserError: one sentence with the file and key path, and the nearest valid name.
    """
    path = find_recipe(source)
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: a recipe is UTF-8 text, which this file is not.") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from None
    if not isinstance(values, dict) or "method" not in values:
        raise UserError(f"{path}: a recipe is a mapping with the key 'method'; add 'method: NAME'.")
    recipe = build_recipe(values, overrides, where=str(path))
    return replace(recipe, seed=recipe.seed if seed is None else seed, source=str(source))


def find_recipe(source: str | Path) -> Path:
    """The file that ``source`` names.

    Raises:
        UserError: there is no such file, method or scale.
    """
    text = str(source)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        if not path.is_file():
            raise UserError(f"there is no recipe file {text!r}.")
        return path
    name, _, scale = text.partition("/")
    known = [entry["name"] for entry in entries()]
    if name not in known:
        raise UserError(f"there is no method {name!r}; {nearest(name, known)}")
    found = recipes(name)
    scale = scale or "small"
    if scale not in found:
        raise UserError(f"the method {name!r} has no recipe {scale!r}; {nearest(scale, found)}")
    return found[scale]


def build_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "", cls: type[Method] | None = None
) -> Recipe:
    """Validate plain values (and Python objects in place of specs) as a recipe.

    Args:
        values: the recipe.
        overrides: as in :func:`load_recipe`.
        where: what messages say of its origin.
        cls: the method, where it is none of the registry's.

    Raises:
        UserError: see :func:`load_recipe`.
    """
    raw = dict(values)
    for override in overrides:
        if override.partition("=")[0].strip() == "method":
            raise UserError(
                f"{override}: a recipe belongs to its method; name the other method, or a recipe of it, instead."
            )
    if cls is None:
        cls = method_class(str(raw.get("method")))
    raw.setdefault("method", cls.name)
    whole = _whole(cls)
    for override in overrides:
        _override(whole, raw, override)
    try:
        validated = read(whole, raw)
    except UserError as error:
        # A mistake in an override is not the file's.
        key = str(error).partition(":")[0].partition(".")[0]
        overridden = {override.partition("=")[0].partition(".")[0] for override in overrides}
        raise UserError(str(error) if key in overridden or not where else f"{where}: {error}") from None
    fields = {name: getattr(validated, name) for name in cls.model_fields}
    return Recipe(method=cls.model_construct(**fields), seed=validated.seed, settings=validated.run, source=where)


@functools.lru_cache(maxsize=64)
def _whole(cls: type[Method]) -> type[Spec]:
    """All that a recipe of a method may say."""
    whole: type[Spec] = create_model(  # type: ignore[call-overload]
        f"{cls.__name__}Recipe",
        __base__=cls,
        method=(str, cls.name),
        seed=(int, Field(0, ge=0)),
        run=(Settings, Settings()),
    )
    return whole


def field_at(recipe: Recipe, path: str) -> Any:
    """The annotation of the field that a key path of the method names.

    Raises:
        UserError: there is no such field.
    """
    here, _, last = _reach(type(recipe.method), recipe.method.dump(), path)
    return _field(here, last, path)[0]


def _override(model: type[Spec], raw: dict[str, Any], override: str) -> None:
    """Put ``key.path=value`` into the raw values."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r} is no override; write key=value, such as temperature=4.")
    here, raw, last = _reach(model, raw, path)
    if last == "kind" and isinstance(here, type) and issubclass(here, Tagged):
        raw.clear()
        raw["kind"] = text
        return
    annotation, _ = _field(here, last, path)
    try:
        raw[last] = _value(annotation, text)
    except Refused as error:
        raise UserError(f"{path}: {error}") from None


def _reach(model: type[Spec], raw: dict[str, Any], path: str) -> tuple[Any, dict[str, Any], str]:
    """The spec that the last key of a path is a field of, its values within ``raw`` (as mappings from here on), the key."""
    *heads, last = path.split(".")
    here: Any = model
    for done, head in enumerate(heads):
        key = ".".join(heads[: done + 1])
        annotation, default = _field(here, head, key)
        value = raw.get(head, default)
        family = spec_in(annotation)
        if family is None or isinstance(value, list | tuple):
            raise UserError(f"{path}: {key!r} has no fields of its own; override it as a whole with {key}=...")
        value = _as_mapping(family, value, last if done == len(heads) - 1 else "", key)
        raw[head] = value
        raw = value
        here = family.members.get(str(value.get("kind")), family) if issubclass(family, Tagged) else family
    return here, raw, last


def _as_mapping(family: type[Spec], value: Any, wanted: str, key: str) -> dict[str, Any]:
    if isinstance(value, Spec):
        return value.dump()
    if isinstance(value, dict):
        return dict(value)
    if issubclass(family, Tagged):
        try:
            return family.parse(value).dump()
        except ValueError as error:
            raise UserError(f"{key}: {error}.") from None
    return {}


def _field(model: type[Spec], name: str, path: str) -> tuple[Any, Any]:
    if name not in model.model_fields:
        raise UserError(f"{path}: there is no such field; {nearest(name, model.model_fields)}")
    info = model.model_fields[name]
    default = None if info.is_required() else info.get_default(call_default_factory=True)  # type: ignore[call-arg]
    return info.annotation, default


def _value(annotation: Any, text: str) -> Any:
    """Text stays text where the field takes text only; elsewhere it is read as YAML."""
    if annotation is str or (
        get_origin(annotation) is Literal and all(isinstance(a, str) for a in get_args(annotation))
    ):
        return text
    family = spec_in(annotation)
    if family is not None and issubclass(family, Tagged) and not text.startswith(("{", "[")):
        return None if text in ("null", "none") and family.members.get("none") is None else text
    try:
        return parse(text)
    except Refused:
        raise
    except ValueError:
        return text


class Refused(ValueError):
    """YAML that can be read, of what no recipe holds."""


def parse(text: str) -> Any:
    """The values that YAML text writes: lists, mappings, text, numbers, yes and no, nothing.

    Raises:
        Refused: it is nested too deeply, holds too much, or something that no field takes.
        ValueError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            values = _yaml().load(text)
        _counted(values, {}, 0)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        reason = (str(getattr(error, "problem", None) or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"this is not valid YAML{line}: {reason}") from None
    except RecursionError:
        raise Refused(f"this is nested more than {DEEPEST} levels deep") from None
    return values


def _counted(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values there are within one; aliases count as often as they stand.

    Raises:
        Refused: there are too many, or something that no field takes.
    """
    if depth > DEEPEST:
        raise Refused(f"this is nested more than {DEEPEST} levels deep")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise Refused(f"{SHOWN.repr(value)} holds half of a character")
    if value is None or isinstance(value, str | int | float):
        return 1
    if not isinstance(value, dict | list):
        raise Refused(
            f"a {type(value).__name__} stands where only text, numbers, lists and mappings may; put it in quotes"
        )
    if id(value) not in known:
        # Met again while it is being counted, it holds itself.
        known[id(value)] = MOST + 1
        items = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_counted(item, known, depth + 1) for item in items)
    if known[id(value)] > MOST:
        raise Refused(f"this holds more than {MOST:,} values, or a list or mapping that holds itself")
    return known[id(value)]


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)
