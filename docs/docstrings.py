"""Docstrings as the pages show them.

Doctests become code blocks (Markdown would take ``>>>`` for quotations), and the description of a pydantic field becomes
its docstring.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^|(?<=\n\n))(>>> .*?)(?=\n\s*\n|\Z)", re.DOTALL)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of everything that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\1\n```", obj.docstring.value)
        elif isinstance(obj, griffe.Attribute) and isinstance(obj.value, griffe.ExprCall):
            for argument in obj.value.arguments:
                if isinstance(argument, griffe.ExprKeyword) and argument.name == "description":
                    text = ast.literal_eval(str(argument.value))
                    obj.docstring = griffe.Docstring(text[0].upper() + text[1:] + ".", parent=obj)
