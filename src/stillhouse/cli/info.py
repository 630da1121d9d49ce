"""``stillhouse info``: everything about one method, from its class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape

from stillhouse.claims import last_result
from stillhouse.cli.tables import result_table
from stillhouse.engine import Method
from stillhouse.registry import method_class, recipes
from stillhouse.spec import Spec


def show(name: str, *, as_json: bool = False) -> None:
    """Print what is known of a method."""
    cls = method_class(name)
    fields = [describe(field_name, info) for field_name, info in cls.model_fields.items()]
    claim = last_result(name)
    if as_json:
        paper = {"title": cls.paper.title, "arxiv": cls.paper.arxiv, "year": cls.paper.year, "venue": cls.paper.venue}
        known: dict[str, Any] = {
            "name": name,
            "family": cls.family,
            "summary": cls.summary,
            "paper": paper,
            "verified": cls.verified,
            "fields": fields,
            "recipes": list(recipes(name)),
            "claim": claim,
        }
        print(json.dumps(known, indent=1))
        return
    console = Console()
    paper_line = ", ".join(str(p) for p in (cls.paper.title, cls.paper.venue or cls.paper.year, _arxiv(cls)) if p)
    console.print(f"[bold]{name}[/bold]  {escape(cls.summary)}")
    console.print(escape(paper_line), style="dim")
    console.print(escape((cls.__doc__ or "").strip().split("\n\n")[0]))
    console.print(f"verified: {cls.verified}", highlight=False)
    console.print("recipes:  " + ", ".join(f"{name}/{scale}" for scale in recipes(name)), highlight=False)
    columns = ["field", "type", "default", "description"]
    result_table("Fields", columns, [[f[column] for column in columns] for f in fields], console)
    if claim is None:
        console.print("claim: none recorded.")
        return
    console.print(f"claim: {escape(claim['claim'])}", highlight=False)
    console.print(f"  last result: [bold]{'holds' if claim['holds'] else 'fails'}[/bold]", highlight=False)
    for margin in claim["margins"]:
        console.print(f"  {escape(margin['finding'])}", highlight=False)
    console.print(f"  with: {escape(claim['command'])} (seeds {claim['seeds']})", highlight=False)


def describe(name: str, info: FieldInfo) -> dict[str, str]:
    """A field as text: its name, type with bounds, default, and description."""
    bounds = _bounds(info.metadata)
    default = "required" if info.is_required() else told(info.get_default(call_default_factory=True))  # type: ignore[call-arg]
    return {
        "field": name,
        "type": _type(info.annotation) + (f" {bounds}" if bounds else ""),
        "default": default,
        "description": info.description or "",
    }


def _bounds(metadata: Iterable[Any]) -> str:
    bounds = []
    for item in metadata:
        # Bounds within an annotation stand in a field of their own.
        for part in (item, *getattr(item, "metadata", ())):
            for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
                if (bound := getattr(part, key, None)) is not None:
                    bounds.append(f"{sign} {bound:g}")
    return ", ".join(dict.fromkeys(bounds))


def told(value: Any) -> str:
    """A value in plain words, with what a part of a recipe is made of: its kind or name, then what it says.

    >>> told(None), told(True), told((0.1, 2)), told(())
    ('not set', 'yes', '0.1, 2', 'none')
    """
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case tuple() | list():
            return ", ".join(map(told, value)) or "none"
        case Spec():
            fields = {name: getattr(value, name) for name in type(value).model_fields}
            changed = value.model_dump(exclude_defaults=True)
            head = str(getattr(value, "kind", "") or fields.pop("name", ""))
            if head:
                # Of an optimiser also what nobody leaves to a default in mind.
                fields = {name: field for name, field in fields.items() if name in (*changed, "lr", "schedule")}
            # What is not set, or set to nothing, says nothing.
            parts = [f"{name} {told(field)}" for name, field in fields.items() if field not in (None, False, 0, "", ())]
            return ", ".join(filter(None, [head, *parts])) or "as described"
        case Mapping():
            parts = [f"{name} {told(field)}" for name, field in value.items() if name != "kind"]
            return ", ".join(filter(None, [str(value.get("kind", "")), *parts]))
        case float():
            return f"{value:g}"
        case _:
            return str(value)


WORDS = {
    float: "number",
    int: "whole number",
    str: "text",
    bool: "yes or no",
    Any: "name or mapping",
    Path: "path",
    type(None): "",
}
"""What types are called where people read them."""


def _type(annotation: Any) -> str:
    if annotation in WORDS:
        return WORDS[annotation]
    arguments = get_args(annotation)
    if not arguments:
        return str(getattr(annotation, "noun", "") or str(getattr(annotation, "__name__", annotation)).lower())
    if get_origin(annotation) is Annotated:
        bounds = _bounds(arguments[1:])
        return _type(arguments[0]) + (f" {bounds}" if bounds else "")
    if all(isinstance(argument, str) for argument in arguments):
        return " | ".join(arguments)
    if get_origin(annotation) is Literal:
        return " | ".join(
            "no" if argument is False else "yes" if argument is True else str(argument) for argument in arguments
        )
    parts = [_type(argument) for argument in arguments if argument is not Ellipsis]
    words = list(dict.fromkeys(part for part in parts if part))
    if get_origin(annotation) in (tuple, list):
        return f"several: {' | '.join(words)}" if Ellipsis in arguments else ", ".join(part for part in parts if part)
    return " | ".join(words)


def _arxiv(cls: type[Method]) -> str:
    return f"arXiv {cls.paper.arxiv}" if cls.paper.arxiv else cls.paper.url
