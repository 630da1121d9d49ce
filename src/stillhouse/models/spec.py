"""The family of model specs, and what its members read from the facts about the data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.memory import limited
from stillhouse.spec import Tagged

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "identity"]
Norm = Literal["instance", "batch", "group", "layer", "none"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


class ModelSpec(Tagged):
    """A model, as text (``resnet:20``, ``hf:owner/name``, ``pkg.mod:Name``), a mapping with ``kind``, or a module."""

    noun = "model"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "build" in cls.__dict__:
            cls.build = _remembering(cls.build)  # type: ignore[method-assign, assignment]

    def build(self, facts: Facts) -> nn.Module:
        """A module in training mode for data with these facts; random weights draw from torch's global generator.

        Raises:
            UserError: the data does not fit the model, or what the spec names cannot be had.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built.")


Builder = Callable[[ModelSpec, Callable[[], nn.Module]], nn.Module]
"""Builds a model from its spec, in place of the plain call of the function that it is given."""

_BUILDER: ContextVar[Builder | None] = ContextVar("builder", default=None)


@contextmanager
def built_by(builder: Builder) -> Iterator[None]:
    """Let ``builder`` build every model within the block, such as one that keeps large ones on the meta device."""
    token = _BUILDER.set(builder)
    try:
        yield
    finally:
        _BUILDER.reset(token)


def on_meta() -> bool:
    """Whether models are being built without memory, on torch's meta device: pretrained weights are then not read."""
    return torch.get_default_device().type == "meta"


_ORIGINS: WeakKeyDictionary[nn.Module, tuple[ModelSpec, Facts]] = WeakKeyDictionary()


def _remembering(build: Callable[[Any, Facts], nn.Module]) -> Callable[[Any, Facts], nn.Module]:
    @functools.wraps(build)
    def remembered(spec: ModelSpec, facts: Facts) -> nn.Module:
        builder, whole = _BUILDER.get(), functools.partial(_within_memory, build, spec, facts)
        module = whole() if builder is None else builder(spec, whole)
        if spec.kind not in ("file", "object"):
            remember(module, spec, facts)
        return module

    return remembered


def _within_memory(build: Callable[[Any, Facts], nn.Module], spec: ModelSpec, facts: Facts) -> nn.Module:
    """Build a network of sizes that somebody wrote; what comes with its weights or its code has its sizes from there."""
    foreign = spec.kind in ("file", "object", "import", "predictor") or getattr(spec, "name", None) is not None
    if foreign:
        return build(spec, facts)
    with limited(f"The model {spec.kind!r}", on_meta=on_meta()):
        return build(spec, facts)


def remember(module: nn.Module, spec: ModelSpec, facts: Facts) -> None:
    """Note what ``module`` was built from. Read back by :func:`origin`."""
    _ORIGINS[module] = spec, facts


def origin(module: nn.Module) -> tuple[ModelSpec, Facts] | None:
    """The spec and facts that a module was built from; None for a module from elsewhere.

    A module loaded from a file has the origin that is stored there, and not the file, so that it can be saved over it.
    """
    return _ORIGINS.get(module)


class NetworkSpec(ModelSpec):
    """Base of the networks that come with stillhouse: inputs and outputs are sized by the facts."""

    num_outputs: int | None = Field(default=None, ge=0)
    """Size of the output. None: the number of classes (1 for regression); 0: no classifier, the features come out."""

    def outputs(self, facts: Facts) -> int:
        """Size of the output layer for this data; 0 for none."""
        if self.num_outputs is not None:
            return self.num_outputs
        if facts.num_classes is not None:
            return facts.num_classes
        if facts.task == "regression":
            return 1
        raise UserError(
            f"The model {self.kind!r} cannot size its output, as the data has no classes; set 'num_outputs' "
            f"(0 gives the features)."
        )

    def image(self, facts: Facts) -> tuple[int, int, int]:
        """Shape (channels, height, width) of the images in this data."""
        shape = facts.inputs.get("pixel_values", facts.input_shape)
        if len(shape) != 3:
            raise UserError(
                f"The model {self.kind!r} takes images (channels, height, width), not inputs of shape {tuple(shape)}; "
                f"use 'mlp' for vectors."
            )
        channels, height, width = shape
        return channels, height, width


def activation(name: Activation) -> nn.Module:
    """A new activation module by its name."""
    return _ACTIVATIONS[name]()


def normalization(name: Norm, channels: int, height: int, width: int) -> nn.Module:
    """A new affine normalization of ``channels x height x width`` maps.

    ``instance`` is a group per channel (no running statistics), ``group`` four groups, and ``layer`` normalizes the
    whole map with one affine pair per element, as in the dataset-distillation literature.
    """
    match name:
        case "instance":
            return nn.GroupNorm(channels, channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(4, channels)
        case "layer":
            return nn.LayerNorm([channels, height, width])
        case "none":
            return nn.Identity()


def classifier(features: int, outputs: int) -> nn.Module:
    """The linear layer on top of the features, or nothing for ``outputs == 0``."""
    return nn.Linear(features, outputs) if outputs else nn.Identity()


def numbers(text: str, example: str) -> list[int]:
    """The whole numbers that ``text`` joins with hyphens; ``example`` is shown to whoever wrote something else."""
    parts = text.split("-")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is not whole numbers joined by '-'; write it as in {example!r}")
    return [int(part) for part in parts]


def number(text: str, example: str) -> int:
    """The one whole number, a depth, that ``text`` is."""
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a depth; write it as in {example!r}")
    return int(text)


def sentence(text: str) -> str:
    """``text`` with a full stop, unless it asks what was meant."""
    return text if text.endswith("?") else f"{text}."
