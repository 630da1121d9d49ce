"""Models of one's own: by import path, from a file, or as a Python object."""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
from typing import Any, Self

import torch
from pydantic import Field, PrivateAttr, field_serializer, model_validator
from torch import nn

from stillhouse.errors import UnreachableError, UserError, nearest
from stillhouse.facts import Facts
from stillhouse.models import storage
from stillhouse.models.layers import classifier
from stillhouse.models.predictor import Predictor, PredictorSpec, predicts
from stillhouse.models.spec import ModelSpec, origin, remember, sentence
from stillhouse.models.weights import fingerprint
from stillhouse.spec import IMPORT_PATH


class ImportSpec(ModelSpec):
    """A class or function of one's own that makes the module; text form ``pkg.mod:Name``.

    It is called with ``arguments``, and with ``facts`` if it has a parameter of that name. A fitted estimator of
    scikit-learn's kind may stand there too, or be what it makes.
    """

    kind = "import"

    path: str = Field(pattern=IMPORT_PATH)
    """Where it is: 'package.module:Name'."""
    arguments: dict[str, Any] = {}
    """Keyword arguments."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(path=text)

    def build(self, facts: Facts) -> nn.Module:
        factory = self._factory()
        if predicts(factory):
            return Predictor(factory, facts)
        try:
            parameters = dict(inspect.signature(factory).parameters)
        except ValueError:  # a builtin without a signature
            parameters = {}
        arguments = dict(self.arguments)
        if "facts" in parameters:
            arguments.setdefault("facts", facts)
        for name, parameter in parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and not variadic and name not in arguments:
                raise UserError(f"{self.path!r} requires {name!r}; give it in 'arguments' of the model.")
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in arguments:
                if name not in parameters:
                    raise UserError(sentence(f"{self.path!r} takes no argument {name!r}; {nearest(name, parameters)}"))
        module = factory(**arguments)
        if predicts(module):
            return Predictor(module, facts)
        if not isinstance(module, nn.Module):
            raise UserError(f"{self.path!r} made a {type(module).__name__}, not a torch.nn.Module.")
        return module.train()

    def _factory(self) -> Any:
        module_name, _, qualified = self.path.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            absent = error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
            where = "it is not on the Python path" if absent else str(error)
            raise UnreachableError(f"The model {self.path!r} cannot be imported: {where}.") from error
        for name in qualified.split("."):
            if not hasattr(found, name):
                known = [key for key in vars(found) if not key.startswith("_")]
                raise UserError(sentence(f"{self.path!r}: {found.__name__!r} has no {name!r}; {nearest(name, known)}"))
            found = getattr(found, name)
        if isinstance(found, nn.Module):
            raise UserError(f"{self.path!r} is a module already made; name the class or function that makes it.")
        if not callable(found) and not predicts(found):
            raise UserError(f"{self.path!r} is a {type(found).__name__}; name a class or function that makes a module.")
        return found


class FileSpec(ModelSpec):
    """A model written by :func:`stillhouse.models.save`; text form ``file:path``.

    It is built with the facts stored beside it, whatever the data at hand; those of the data serve where none were.
    """

    kind = "file"

    path: str = Field(min_length=1)
    """The directory, or a '.safetensors' file with its '.json' of the same name beside it."""
    new_head: bool = False
    """Take it as a backbone: a fresh classifier for the data at hand, all else as stored."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            raise ValueError("'file' needs a path, as in 'file:runs/teacher/model'")
        return cls(path=text)

    def build(self, facts: Facts) -> nn.Module:
        stored = storage.load(self.path, facts)
        return self._with_new_head(stored, facts) if self.new_head else stored

    def _with_new_head(self, stored: nn.Module, facts: Facts) -> nn.Module:
        """The stored network built anew for these data, with the stored tensors everywhere but in the classifier."""
        built = origin(stored)
        if built is None:
            raise UserError(
                f"new_head: {self.path!r} is a model of a library; name it as 'hf:PATH', whose head is fitted."
            )
        fresh = built[0].build(facts)
        head = classifier(fresh, {name: torch.zeros(2, *shape) for name, shape in facts.inputs.items()})
        state = {name: value for name, value in stored.state_dict().items() if not name.startswith(f"{head}.")}
        shapes = {name: value.shape for name, value in fresh.state_dict().items()}
        wrong = next((name for name, value in state.items() if shapes.get(name) != value.shape), None)
        if wrong is not None:
            raise UserError(
                f"new_head: {wrong!r} has the shape {tuple(state[wrong].shape)} in {self.path!r} and "
                f"{tuple(shapes.get(wrong, ()))} for these data; they need inputs of the form it was trained on."
            )
        fresh.load_state_dict(state, strict=False)
        return fresh


class ObjectSpec(ModelSpec):
    """A module given in Python.

    Each :meth:`build` returns a copy, so that a second run, a resumed run or a run under another seed starts from the
    weights that were given; ``copy_on_build: false`` hands out the object itself (a large frozen teacher).
    """

    kind = "object"

    object: nn.Module
    """The module."""
    copy_on_build: bool = True
    """Whether each build returns a copy."""

    _fingerprint: str = PrivateAttr("")

    @classmethod
    def from_object(cls, value: Any) -> Self:
        if predicts(value):
            return PredictorSpec(object=value)  # type: ignore[return-value]
        if isinstance(value, type) and issubclass(value, nn.Module):
            raise ValueError(f"a model is a module, not the class {value.__name__}; call it, or write 'pkg.mod:Name'")
        if not isinstance(value, nn.Module):
            raise ValueError(
                f"a model is text, a mapping with 'kind', or a torch.nn.Module, not a {type(value).__name__}"
            )
        return cls(object=value)

    @model_validator(mode="before")
    @classmethod
    def _passed_again(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and isinstance(fields.get("object"), str):
            raise ValueError(
                f"the model is the Python object {fields['object']!r}, and a recipe with it runs only with the object "
                f"passed again"
            )
        return fields

    def model_post_init(self, context: Any) -> None:
        # Equal weights under another activation are another model.
        shape = hashlib.sha256(repr(self.object).encode()).hexdigest()[:16]
        self._fingerprint = f"{fingerprint(self.object)}-{shape}"

    @field_serializer("object")
    def _name(self, value: nn.Module) -> str:
        return f"{type(value).__module__}.{type(value).__qualname__}"

    def dump(self) -> dict[str, Any]:
        return {"kind": self.kind, "object": self._name(self.object), "fingerprint": self._fingerprint}

    def build(self, facts: Facts) -> nn.Module:
        if not self.copy_on_build:
            return self.object
        try:
            module = copy.deepcopy(self.object)
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"The module {self._name(self.object)!r} cannot be copied ({error}); give "
                f"{{'kind': 'object', 'object': module, 'copy_on_build': False}} or an import path."
            ) from error
        if (built := origin(self.object)) is not None:
            remember(module, *built)
        return module
