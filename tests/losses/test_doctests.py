"""Every public loss shows itself in a runnable example."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

from stillhouse import losses

MODULES = [f"{losses.__name__}.{module.name}" for module in pkgutil.iter_modules(losses.__path__)]


def missing_examples(module: ModuleType) -> list[str]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return [
        name
        for name, function in functions
        if not name.startswith("_")
        and inspect.unwrap(function).__module__ == module.__name__
        and ">>>" not in (function.__doc__ or "")
    ]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_has_an_example(name: str) -> None:
    assert missing_examples(importlib.import_module(name)) == []


def test_a_missing_example_is_found() -> None:
    module = ModuleType("sample")
    exec("def shown():\n    '''>>> 1 + 1\n    2'''\ndef bare(): 'No example.'\ndef _private(): ...", module.__dict__)
    assert missing_examples(module) == ["bare"]


def test_modules_were_found() -> None:
    assert {"stillhouse.losses.divergences", "stillhouse.losses.transport"} <= set(MODULES)
