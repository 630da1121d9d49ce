"""Specs: the small, frozen, validated descriptions that a recipe is made of.

A :class:`Spec` is a set of fields. A :class:`Tagged` family is a choice between several specs, written as text
(``digits``, ``hf:owner/name``, ``pkg.mod:Name``) or as a mapping ``{kind: ..., fields}``.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from stillhouse.errors import UserError, nearest

IMPORT_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
"""What names a Python object: ``pkg.mod:Name``."""


class Spec(BaseModel):
    """Frozen fields; unknown keys, NaN and infinity are refused, defaults are validated."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    version: ClassVar[int] = 1
    """Raised by hand when equal fields begin to mean something else; part of every digest."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name in cls.model_fields:
            inherited = next((base.__dict__[name] for base in cls.__mro__ if name in base.__dict__), None)
            if callable(inherited) or isinstance(inherited, classmethod | staticmethod | property):
                raise TypeError(f"{cls.__name__}: the field {name!r} shadows a method of the same name.")

    def dump(self) -> dict[str, Any]:
        """The fields as JSON-ready values; reading them back gives an equal spec."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """A short hash of the canonical form, equal for equal specs (used in cache keys and records)."""
        canonical = json.dumps([self.dump(), sorted(self._versions())], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def _versions(self) -> set[tuple[str, int]]:
        versions = {(type(self).__name__, self.version)}
        for name in type(self).model_fields:
            value = getattr(self, name)
            for spec in value if isinstance(value, list | tuple) else (value,):
                if isinstance(spec, Spec):
                    versions |= spec._versions()
        return versions


class Tagged(Spec):
    """Base of a family of specs told apart by ``kind``.

    A direct subclass is the family's root: use it as a field's type. Its concrete members set the class variable
    ``kind`` and are found by it. A member may read itself from text by overriding :meth:`from_text`; ``kind:rest``
    goes to the member ``kind``, a bare ``name`` to the member of that name, and other text with a colon to the member
    ``import`` (a Python import path). Python objects go to the member ``object`` when the family has one.
    """

    kind: ClassVar[str] = ""
    members: ClassVar[dict[str, type[Tagged]]]
    noun: ClassVar[str] = "spec"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Tagged in cls.__bases__:
            cls.members = {}
        elif "kind" in cls.__dict__:
            cls.members[cls.kind] = cls

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read this member from the text after ``kind:`` (empty when only the kind was written)."""
        if text:
            raise ValueError(f"{cls.kind!r} takes no text after its name; write a mapping with 'kind: {cls.kind}'")
        return cls()

    @classmethod
    def from_object(cls, value: Any) -> Self:
        """Wrap a Python object given in place of a spec."""
        raise ValueError(f"a {cls.noun} is text or a mapping with 'kind', not {type(value).__name__}")

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Read any accepted form into a member of this family."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            head, colon, rest = value.partition(":")
            if head in cls.members:
                return cls.members[head].from_text(rest)  # type: ignore[return-value]
            # What is no import path and nearly a name is that name, mistyped.
            mistyped = not re.fullmatch(IMPORT_PATH, value) and get_close_matches(head, cls.members, cutoff=0.75)
            if colon and "import" in cls.members and not mistyped:
                return cls.members["import"].from_text(value)  # type: ignore[return-value]
            raise ValueError(f"there is no {cls.noun} {value!r}; {nearest(head, cls.members)}")
        if isinstance(value, dict):
            fields = dict(value)
            kind = fields.pop("kind", None)
            if kind is None:
                raise ValueError(f"a {cls.noun} written as a mapping needs 'kind', one of {sorted(cls.members)}")
            if not isinstance(kind, str) or kind not in cls.members:
                raise ValueError(f"there is no {cls.noun} kind {kind!r}; {nearest(str(kind), cls.members)}")
            try:
                return cls.members[kind].model_validate(fields)  # type: ignore[return-value]
            except ValidationError as error:
                path, reason = first_problem(error, cls.members[kind])
                raise PydanticCustomError("spec", "{reason}", {"reason": reason, "path": path}) from None
        if "object" in cls.members:
            return cls.members["object"].from_object(value)  # type: ignore[return-value]
        return cls.from_object(value)

    def dump(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.model_dump(mode="json")}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if "members" in cls.__dict__:
            return core_schema.no_info_plain_validator_function(
                cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(lambda spec: spec.dump())
            )
        return handler(source)


WORDS = {
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "multiple_of": "expected a multiple of {multiple_of}",
    "finite_number": "expected a finite number",
    "literal_error": "expected {expected}",
    "string_too_short": "expected at least {min_length} characters",
    "string_too_long": "expected at most {max_length} characters",
    "string_pattern_mismatch": "expected text that matches {pattern}",
    "too_short": "expected at least {min_length} items",
    "too_long": "expected at most {max_length} items",
    "is_instance_of": "expected a {class}",
    "recursion_loop": "expected no list or mapping that holds itself",
    "invalid_key": "expected text as a key",
}
"""What pydantic found, by its name for it."""

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "dict": "a mapping"}
"""What was expected where pydantic names a type, by the first word of its name for it."""

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 60
SHOWN.maxlevel, SHOWN.maxlist, SHOWN.maxtuple, SHOWN.maxdict = 3, 4, 4, 4


def first_problem(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """The first problem of a validation error as (dotted key path, reason in words)."""
    problem = error.errors()[0]
    kind, context = problem["type"], problem.get("ctx", {})
    path, annotation, owner = _place(problem["loc"], model, kind)
    if kind == "spec":
        reason = context["reason"]
        path += [part for part in context["path"].split(".") if part]
    elif kind == "extra_forbidden":
        reason = "there is no such field" + (f"; {nearest(path[-1], owner.model_fields)}" if owner else "")
    elif kind in ("value_error", "assertion_error"):
        reason = str(context["error"])
    elif kind == "missing":
        reason = "this field is required" if isinstance(problem["loc"][-1], str) else "this item is missing"
    else:
        reason = f"{_expected(kind, context, annotation)}, not {SHOWN.repr(problem['input'])}"
    return ".".join(map(_readable, path)), reason


def spec_in(annotation: Any) -> type[Spec] | None:
    """The spec class within an annotation such as ``Spec | None`` or ``Spec | tuple[Spec, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    return next((found for part in get_args(annotation) if (found := spec_in(part)) is not None), None)


def _place(
    location: tuple[int | str, ...], model: type[BaseModel], kind: str
) -> tuple[list[str], Any, type[BaseModel] | None]:
    """The keys of an error's location, the annotation of what stands there, and the spec whose field the last one is.

    What else stands in a location says which member of a union failed, and is no key that anybody wrote.
    """
    path: list[str] = []
    here: Any = model
    owner: type[BaseModel] | None = None
    for number, part in enumerate(location):
        spec: type[BaseModel] | None = model if here is model else spec_in(here)
        if spec is not None and issubclass(spec, Tagged):
            # Of a family, the member that has such a field was tried.
            spec = next((member for member in (spec, *spec.members.values()) if part in member.model_fields), spec)
        if isinstance(part, int):
            path.append(str(part))
            here = _items(here)
        elif spec is not None and part in spec.model_fields:
            path.append(part)
            here, owner = spec.model_fields[part].annotation, spec
        elif kind == "extra_forbidden" and number == len(location) - 1:
            path.append(part)
            here, owner = Any, spec
        elif _origin(here) is dict and "[" not in part:
            path.append(part)
            here = Any
    return path, here, owner


def _expected(kind: str, context: dict[str, Any], annotation: Any) -> str:
    """What pydantic would have accepted, in words."""
    if context.get("pattern") == IMPORT_PATH:
        return "expected an import path such as 'package.module:Name'"
    if kind in WORDS:
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in context.items()}
        return WORDS[kind].format(**whole)
    head = kind.partition("_")[0]
    if head in KINDS:
        return f"expected {KINDS[head]}"
    if head in ("tuple", "list", "set", "frozen", "iterable"):
        item = _plural(_items(annotation))
        return "expected a list" + (f" of {item}" if item else "")
    spec = spec_in(annotation)
    if head == "model" and spec is not None:
        names = ", ".join(map(repr, list(spec.model_fields)[:3]))
        return f"expected a mapping with fields such as {names}" if names else "expected a mapping"
    return "expected something else"


def _origin(annotation: Any) -> Any:
    """What an annotation is of, such as ``tuple``; of a union, what its first part that is of something is of."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _origin(part)) is not None), None)
    return origin


def _items(annotation: Any) -> Any:
    """The annotation of the items of a list."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _items(part)) is not None), None)
    return get_args(annotation)[0] if origin in (tuple, list) and get_args(annotation) else None


def _plural(annotation: Any) -> str:
    """Several values of a type, in words; empty where there is no word."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _plural(part))), "")
    if isinstance(annotation, type) and issubclass(annotation, Tagged):
        return f"{annotation.noun}s"
    words = {
        int: "whole numbers",
        float: "numbers",
        str: "texts",
        bool: "true and false",
        tuple: "lists",
        list: "lists",
    }
    return words.get(get_origin(annotation) or annotation, "")


def _readable(key: str) -> str:
    return key if key.isprintable() and len(key) <= 60 else SHOWN.repr(key)


def read(model: type[BaseModel], values: Any, *, where: str = "") -> Any:
    """Validate ``values`` as ``model``.

    Raises:
        UserError: one sentence naming the place (``where``), the key path and what would be right.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        path, reason = first_problem(error, model)
        place = f"{where}: " if where else ""
        key = f"{path}: " if path else ""
        raise UserError(f"{place}{key}{reason}") from None
