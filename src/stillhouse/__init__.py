"""stillhouse: distillation and disentanglement, one method after the other, with your model and your data.

>>> import stillhouse as sh
>>> [entry["name"] for entry in sh.methods()][-1]
'supervised'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stillhouse.bench import Comparison, Search, compare, evaluate_dataset, search
    from stillhouse.engine import Method, Result, Stage, Update
    from stillhouse.exporting import export
    from stillhouse.front import distil
    from stillhouse.recipe import Recipe, load_recipe
    from stillhouse.registry import entries as methods

# Importing the package must cost nothing: what is asked for is imported then.
_HOMES = {
    "compare": "stillhouse.bench",
    "Comparison": "stillhouse.bench",
    "search": "stillhouse.bench",
    "Search": "stillhouse.bench",
    "evaluate_dataset": "stillhouse.bench",
    "distil": "stillhouse.front",
    "export": "stillhouse.exporting",
    "load_recipe": "stillhouse.recipe",
    "Recipe": "stillhouse.recipe",
    "Method": "stillhouse.engine",
    "Result": "stillhouse.engine",
    "Stage": "stillhouse.engine",
    "Update": "stillhouse.engine",
    "methods": "stillhouse.registry",
}

__all__ = [
    "Comparison",
    "Method",
    "Recipe",
    "Result",
    "Search",
    "Stage",
    "Update",
    "compare",
    "distil",
    "evaluate_dataset",
    "export",
    "load_recipe",
    "methods",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stillhouse' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), "entries" if name == "methods" else name)


def __dir__() -> list[str]:
    return sorted(__all__)
