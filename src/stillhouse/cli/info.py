"""``stillhouse info``: everything about one method, from its class."""

from __future__ import annotations

import json
from typing import Any, get_args

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
    bounds = []
    for item in info.metadata:
        for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if (bound := getattr(item, key, None)) is not None:
                bounds.append(f"{sign} {bound:g}")
    default = "required" if info.is_required() else _default(info.get_default(call_default_factory=True))  # type: ignore[call-arg]
    return {
        "field": name,
        "type": _type(info.annotation) + (f" {', '.join(bounds)}" if bounds else ""),
        "default": default,
        "description": info.description or "",
    }


def _default(value: Any) -> str:
    if isinstance(value, Spec):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        kind = getattr(value, "kind", "") or ""
        return " ".join([kind, *(f"{k}={v}" for k, v in changed.items())]).strip() or type(value).__name__
    return str(value)


def _type(annotation: Any) -> str:
    arguments = get_args(annotation)
    if not arguments:
        return str(getattr(annotation, "noun", "") or getattr(annotation, "__name__", annotation))
    if all(isinstance(argument, str) for argument in arguments):
        return " | ".join(arguments)
    parts = [_type(argument) for argument in arguments if argument is not Ellipsis and argument is not type(None)]
    return " | ".join(dict.fromkeys(part for part in parts if part))


def _arxiv(cls: type[Method]) -> str:
    return f"arXiv {cls.paper.arxiv}" if cls.paper.arxiv else cls.paper.url
