"""Sets of transformations whose choice is a label: every sample gets one view per transformation, the first is itself.

Self-supervised label augmentation (SLA, arXiv 1910.05872) trains on (class, transformation) as one joint label. Unlike an
augmentation, nothing is drawn: view j is the same function of the sample each time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Annotated, Any, ClassVar, Self

import torch
from jaxtyping import Shaped
from pydantic import Field, field_serializer, field_validator
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.spec import IMPORT_PATH, Tagged

Transform = Callable[[Tensor], Tensor]


class Views(Tagged):
    """A list of transformations, as text (``rotation``, ``rotation*colors:cyclic``, ``pkg.mod:NAME``) or a mapping.

    A product applies every transformation of the first list, and to each result every one of the second: the view of
    (j, k) is number ``j * M_second + k``.
    """

    noun: ClassVar[str] = "list of transformations"

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Also accept a product of lists, written with ``*``, and a list of Python functions."""
        if isinstance(value, str) and "*" in value:
            return Product(parts=tuple(value.split("*")))  # type: ignore[return-value]
        return super().parse(value)

    @classmethod
    def from_object(cls, value: Any) -> Self:
        if isinstance(value, list | tuple) and value and all(map(callable, value)):
            return OwnViews(functions=tuple(value))  # type: ignore[return-value]
        raise ValueError("a list of transformations is text, a mapping with 'kind', or a list of functions of a tensor")

    @property
    def transforms(self) -> Sequence[Transform]:
        """The functions of a batch of inputs, identity first."""
        raise NotImplementedError(f"{type(self).__name__} lists no transformations.")

    @property
    def count(self) -> int:
        """Number M of views."""
        return len(self.transforms)

    def check(self, inputs: Shaped[Tensor, "batch *shape"]) -> None:
        """Refuse inputs that these transformations do not fit, and lists that do not begin with the identity.

        Raises:
            UserError: says which and why.
        """
        first = self.transforms[0](inputs)
        if first.shape != inputs.shape or not torch.equal(first, inputs):
            raise UserError(
                f"The first transformation of {self.described} changes its input; list the identity first, as view 0 is what "
                "is asked when only one view is."
            )
        for number, transform in enumerate(self.transforms):
            shape = tuple(transform(inputs).shape)
            if shape != tuple(inputs.shape):
                raise UserError(
                    f"Transformation {number} of {self.described} makes the shape {shape[1:]} of {tuple(inputs.shape[1:])}; "
                    "views keep the shape."
                )

    @property
    def described(self) -> str:
        """The list in words, for messages."""
        return repr(self.kind)

    def expand(self, inputs: Shaped[Tensor, "batch *shape"]) -> Shaped[Tensor, "rows *shape"]:
        """All views of each sample, one sample after the other: row ``b M + j`` is view j of sample b.

        >>> Views.parse("reverse").expand(torch.tensor([[1, 2], [3, 4]])).tolist()
        [[1, 2], [2, 1], [3, 4], [4, 3]]
        """
        return torch.stack([transform(inputs) for transform in self.transforms], 1).flatten(0, 1)


def _same(x: Tensor) -> Tensor:
    return x


class Rotations(Views):
    """Quarter turns of an image: 0, 90, 180 and 270 degrees, or as many as ``turns`` lists."""

    kind = "rotation"

    turns: tuple[Annotated[int, Field(ge=0, le=3)], ...] = Field((0, 1, 2, 3), min_length=1)
    """Quarter turns of each view, 0 first."""

    @property
    def transforms(self) -> Sequence[Transform]:
        return [_same if turn == 0 else _rotate(turn) for turn in self.turns]

    @property
    def described(self) -> str:
        return f"rotation by {', '.join(str(90 * turn) for turn in self.turns)} degrees"

    def check(self, inputs: Shaped[Tensor, "batch *shape"]) -> None:
        if inputs.dim() != 4:
            raise UserError(
                f"Rotations are of images (channels, height, width), not of inputs of shape {tuple(inputs.shape[1:])}; "
                "choose other transformations, such as 'reverse'."
            )
        height, width = inputs.shape[-2:]
        if height != width and any(turn % 2 for turn in self.turns):
            raise UserError(
                f"A quarter turn needs square images, not {height} x {width}; use 'rotation2' (0 and 180 degrees), or set "
                "image_size."
            )
        super().check(inputs)


class HalfTurn(Rotations):
    """An image and the same upside down."""

    kind = "rotation2"

    turns: tuple[Annotated[int, Field(ge=0, le=3)], ...] = Field((0, 2), min_length=1)
    """Quarter turns of each view, 0 first."""


def _rotate(turn: int) -> Transform:
    return lambda x: torch.rot90(x, turn, (-2, -1))


class Channels(Views):
    """Orders of the channels of an image or a series."""

    kind = "channels"

    orders: tuple[tuple[int, ...], ...] = Field(min_length=1)
    """For each view which channel stands where, 0, 1, 2, ... first."""
    dim: int = 1
    """The dimension of the channels, the batch counted."""

    @field_validator("orders")
    @classmethod
    def _permutations(cls, orders: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        for order in orders:
            if sorted(order) != list(range(len(orders[0]))):
                raise ValueError(f"{list(order)} is no order of {len(orders[0])} channels; write each number once")
        if len(set(orders)) < len(orders):
            raise ValueError("two views have the same order, so nobody could tell them apart")
        return orders

    @property
    def transforms(self) -> Sequence[Transform]:
        dim = self.dim
        return [_same if list(order) == sorted(order) else _permuted(order, dim) for order in self.orders]

    @property
    def described(self) -> str:
        return f"the channel orders {', '.join(''.join(map(str, order)) for order in self.orders)}"

    def check(self, inputs: Shaped[Tensor, "batch *shape"]) -> None:
        wanted = len(self.orders[0])
        found = inputs.shape[self.dim] if -inputs.dim() <= self.dim < inputs.dim() else 0
        if found != wanted:
            raise UserError(
                f"Orders of {wanted} channels need inputs with {wanted}, not {found} (inputs of shape "
                f"{tuple(inputs.shape[1:])}); choose other transformations."
            )
        super().check(inputs)


def _permuted(order: tuple[int, ...], dim: int) -> Transform:
    return lambda x: x.index_select(dim, torch.tensor(order, device=x.device))


class Colors(Channels):
    """Orders of red, green and blue: all six, or with ``colors:cyclic`` the three cyclic ones."""

    kind = "colors"

    orders: tuple[tuple[int, ...], ...] = Field(tuple(permutations(range(3))), min_length=1)
    """For each view which channel stands where, 0, 1, 2 first."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if text not in ("", "cyclic"):
            raise ValueError(f"'colors' takes nothing or 'cyclic' after its colon, not {text!r}")
        return cls(orders=((0, 1, 2), (1, 2, 0), (2, 0, 1))) if text else cls()


class Reverse(Views):
    """A series and the same backwards."""

    kind = "reverse"

    dim: int = -1
    """The dimension of time, the batch counted."""

    @property
    def transforms(self) -> Sequence[Transform]:
        dim = self.dim
        return [_same, lambda x: x.flip(dim)]


class Segments(Views):
    """A sequence cut into equal segments, in every cyclic order: as many views as ``segments``."""

    kind = "segments"

    segments: int = Field(2, ge=1)
    """Number of segments; positions that do not fill one stay at the end."""
    dim: int = 1
    """The dimension of the positions, the batch counted."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls() if not text else cls(segments=int(text))

    @property
    def transforms(self) -> Sequence[Transform]:
        return [_same, *(_rolled(shift, self.segments, self.dim) for shift in range(1, self.segments))]

    def check(self, inputs: Shaped[Tensor, "batch *shape"]) -> None:
        if inputs.shape[self.dim] < self.segments:
            raise UserError(f"{inputs.shape[self.dim]} positions are fewer than {self.segments} segments.")
        super().check(inputs)


def _rolled(shift: int, count: int, dim: int) -> Transform:
    def transform(x: Tensor) -> Tensor:
        size = x.shape[dim] // count
        whole, rest = torch.split(x, [size * count, x.shape[dim] - size * count], dim)
        return torch.cat([whole.roll(-shift * size, dim), rest], dim)

    return transform


class Product(Views):
    """Every transformation of each list after every one of the lists before it."""

    kind = "product"

    parts: tuple[Views, ...] = Field(min_length=1)
    """The lists, the slowest first."""

    @property
    def transforms(self) -> Sequence[Transform]:
        found: list[Transform] = [_same]
        for part in self.parts:
            found = [_after(first, second) for first in found for second in part.transforms]
        return found

    @property
    def described(self) -> str:
        return " times ".join(part.described for part in self.parts)

    def check(self, inputs: Shaped[Tensor, "batch *shape"]) -> None:
        for part in self.parts:
            part.check(inputs)
        super().check(inputs)


def _after(first: Transform, second: Transform) -> Transform:
    return lambda x: second(first(x))


class ImportedViews(Views):
    """Functions of one's own, each from a batch of inputs to as many of the same shape: a list by import path."""

    kind = "import"

    path: str = Field(pattern=IMPORT_PATH)
    """``package.module:NAME`` of a list of functions."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(path=text)

    @property
    def transforms(self) -> Sequence[Transform]:
        module, _, name = self.path.partition(":")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            raise UserError(f"{self.path!r} could not be imported: {error}.") from None
        if not isinstance(found, list | tuple) or not found or not all(map(callable, found)):
            raise UserError(f"{self.path!r} is no list of functions; name one that holds the identity first.")
        return list(found)

    @property
    def described(self) -> str:
        return repr(self.path)


class OwnViews(Views):
    """Functions of one's own, given in Python; such a recipe runs only with the functions passed again."""

    kind = "functions"

    functions: tuple[Any, ...] = Field(min_length=1)
    """The functions, identity first."""

    @field_validator("functions")
    @classmethod
    def _callable(cls, functions: tuple[Any, ...]) -> tuple[Any, ...]:
        if not all(map(callable, functions)):
            raise ValueError("the transformations were Python functions; pass them again")
        return functions

    @field_serializer("functions")
    def _names(self, functions: tuple[Any, ...]) -> list[str]:
        return [f"{one.__module__}.{getattr(one, '__qualname__', type(one).__qualname__)}" for one in functions]

    @property
    def transforms(self) -> Sequence[Transform]:
        return list(self.functions)

    @property
    def described(self) -> str:
        return "the functions that were given"
