"""Specs: the small, frozen, validated descriptions that a recipe is made of.

A :class:`Spec` is a set of fields. A :class:`Tagged` family is a choice between several specs, written as text
(``digits``, ``hf:owner/name``, ``pkg.mod:Name``) or as a mapping ``{kind: ..., fields}``.
"""

from __future__ import annotations

import hashlib
import json
import re
from difflib import get_close_matches
from typing import Any, ClassVar, Self

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


def first_problem(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """The first problem of a validation error as (dotted key path, reason in words)."""
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"] if not _names_a_type(str(part))]
    context = problem.get("ctx", {})
    kind = problem["type"]
    if kind == "spec":
        reason = context["reason"]
        path += [part for part in context["path"].split(".") if part]
    elif kind == "extra_forbidden":
        owner: Any = model
        for part in path[:-1]:
            field = owner.model_fields.get(part) if hasattr(owner, "model_fields") else None
            owner = field.annotation if field is not None else None
        valid = owner.model_fields if hasattr(owner, "model_fields") else {}
        reason = "there is no such field" + (f"; {nearest(path[-1], valid)}" if valid else "")
    elif kind == "value_error":
        reason = str(context["error"])
    elif kind == "missing":
        reason = "this field is required"
    else:
        message = problem["msg"]
        reason = message[0].lower() + message[1:] + f", not {problem['input']!r}"
    return ".".join(path), reason


def _names_a_type(part: str) -> bool:
    """Whether a part of an error's path says which member of a union failed, which is no key that anybody wrote."""
    return "[" in part or part[:1].isupper() or part in ("float", "int", "str", "bool", "none")


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
        end = "" if reason.endswith("?") else "."
        raise UserError(f"{place}{key}{reason.rstrip('.')}{end}") from None
