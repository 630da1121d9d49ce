"""Recipes: YAML in, a validated method out; and the sentences people read when something in it is wrong."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import Field, create_model
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stillhouse.engine import Method, Settings
from stillhouse.engine.storage import write_text
from stillhouse.errors import UserError, nearest
from stillhouse.registry import entries, method_class, recipes
from stillhouse.spec import Spec, Tagged, read


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
        values = _yaml().load(path.read_text())
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise UserError(f"{path}: this is not valid YAML{line}: {getattr(error, 'problem', None) or error}.") from None
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


def build_recipe(values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "") -> Recipe:
    """Validate plain values (and Python objects in place of specs) as a recipe.

    Raises:
        UserError: see :func:`load_recipe`.
    """
    raw = dict(values)
    for override in overrides:
        if override.partition("=")[0].strip() == "method":
            raise UserError(
                f"{override}: a recipe belongs to its method; name the other method, or a recipe of it, instead."
            )
    cls = method_class(str(raw.get("method")))
    whole: Any = create_model(  # type: ignore[call-overload]
        f"{cls.__name__}Recipe",
        __base__=cls,
        method=(str, cls.name),
        seed=(int, Field(0, ge=0)),
        run=(Settings, Settings()),
    )
    for override in overrides:
        _override(cast("type[Spec]", whole), raw, override)
    try:
        validated = read(whole, raw)
    except UserError as error:
        # A mistake in an override is not the file's.
        key = str(error).partition(":")[0].partition(".")[0]
        overridden = {override.partition("=")[0].partition(".")[0] for override in overrides}
        raise UserError(str(error) if key in overridden or not where else f"{where}: {error}") from None
    fields = {name: getattr(validated, name) for name in cls.model_fields}
    return Recipe(method=cls.model_construct(**fields), seed=validated.seed, settings=validated.run, source=where)


def _override(model: type[Spec], raw: dict[str, Any], override: str) -> None:
    """Put ``key.path=value`` into the raw values."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r} is no override; write key=value, such as temperature=4.")
    *heads, last = path.split(".")
    here: Any = model
    for done, head in enumerate(heads):
        key = ".".join(heads[: done + 1])
        annotation, default = _field(here, head, key)
        value = raw.get(head, default)
        family = _spec_in(annotation)
        if family is None or isinstance(value, list | tuple):
            raise UserError(f"{path}: {key!r} has no fields of its own; override it as a whole with {key}=...")
        value = _as_mapping(family, value, last if done == len(heads) - 1 else "", key)
        raw[head] = value
        raw = value
        here = family.members.get(str(value.get("kind")), family) if issubclass(family, Tagged) else family
    if last == "kind" and isinstance(here, type) and issubclass(here, Tagged):
        raw.clear()
        raw["kind"] = text
        return
    annotation, _ = _field(here, last, path)
    raw[last] = _value(annotation, text)


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


def _spec_in(annotation: Any) -> type[Spec] | None:
    """The spec class within an annotation such as ``Spec | None`` or ``Spec | tuple[Spec, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    return next((found for part in get_args(annotation) if (found := _spec_in(part)) is not None), None)


def _value(annotation: Any, text: str) -> Any:
    """Text stays text where the field takes text only; elsewhere it is read as YAML."""
    if annotation is str or (
        get_origin(annotation) is Literal and all(isinstance(a, str) for a in get_args(annotation))
    ):
        return text
    family = _spec_in(annotation)
    if family is not None and issubclass(family, Tagged) and not text.startswith(("{", "[")):
        return None if text in ("null", "none") and family.members.get("none") is None else text
    try:
        return _yaml().load(text)
    except YAMLError:
        return text


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)
