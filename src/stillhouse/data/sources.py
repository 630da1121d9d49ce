"""Where a split's samples are: in memory, or read batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.data.generators import GeneratorsAside
from stillhouse.data.splits import number_of
from stillhouse.errors import UserError

Seeds = Callable[[int], int]
InMemory = Literal["auto"] | bool

MEMORY_LIMIT = 2 * 2**30
"""Bytes up to which ``in_memory: auto`` reads a split into memory once."""


class Source(ABC):
    """Samples by position, in stored form (bytes for pixels)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        """The samples at ``index``; ``seeds`` gives a seed per sample to a source that draws at random."""

    @property
    def labels(self) -> Tensor | None:
        """Labels of all samples, where they are known without reading everything else."""
        return None

    def select(self, index: Int[Tensor, " part"]) -> Source:
        """The source that holds only the samples at ``index``, in that order."""
        return Selected(self, index)


class Memory(Source):
    """Tensors with the samples in their first dimension."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(f"The tensors of a split must hold equally many samples, not {sizes}.")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        return {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}

    @property
    def labels(self) -> Tensor | None:
        return self.tensors.get("labels")

    def select(self, index: Int[Tensor, " part"]) -> Memory:
        return Memory(self.fetch(index))


class Selected(Source):
    """Some samples of another source."""

    def __init__(self, source: Source, index: Int[Tensor, " part"]) -> None:
        self.source, self.index = source, index

    def __len__(self) -> int:
        return len(self.index)

    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        return self.source.fetch(self.index[index], seeds)

    @property
    def labels(self) -> Tensor | None:
        labels = self.source.labels
        return None if labels is None else labels[self.index]


class Relabelled(Source):
    """A source with its labels in another type: whole numbers for classes, floats for a quantity."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        batch = self.source.fetch(index, seeds)
        return {**batch, "labels": batch["labels"].to(self.dtype)}

    @property
    def labels(self) -> Tensor | None:
        labels = self.source.labels
        return None if labels is None else labels.to(self.dtype)


class Rows(Source):
    """A source that reads one sample at a time.

    Attributes:
        foreign: :meth:`row` runs code of the user's, which may draw from the global CPU generators. They are seeded
            before each sample and put back after the batch, so that a sample depends on its seed alone (on its
            position, where no seeds are given).
        random: it was seen to draw, so one reading of all samples is not all there is.
    """

    foreign = False
    random = False

    @abstractmethod
    def row(self, position: int) -> dict[str, Tensor]:
        """One sample, without a batch dimension."""

    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        if not self.foreign:
            return stack([self.row(position) for position in index.tolist()])
        rows, seeds = [], seeds or _fixed
        with GeneratorsAside() as generators:
            for position in index.tolist():
                generators.seed(seeds(position))
                rows.append(self.row(position))
        return stack(rows)


def _fixed(sample: int) -> int:
    return number_of("fixed", sample)


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples as one batch.

    Raises:
        UserError: if the samples differ in shape.
    """
    if len(rows) == 1:
        return {name: value[None] for name, value in rows[0].items()}
    return {name: torch.cat(alike(name, [row[name][None] for row in rows])) for name in rows[0]}


def alike(name: str, batches: list[Tensor]) -> list[Tensor]:
    """The batches themselves, if their samples have one shape; else a UserError that says what to set."""
    shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        hint = "; set image_size" if name == "pixel_values" else ""
        raise UserError(f"Samples differ in the shape of {name}: {shapes[0]} and {shapes[1]}{hint}.")
    return batches


def in_chunks(source: Source, size: int = 256) -> Iterator[dict[str, Tensor]]:
    """All samples in order, ``size`` at a time."""
    for index in torch.split(torch.arange(len(source)), size):
        yield source.fetch(index)


def settle(source: Source, in_memory: InMemory) -> Source:
    """Read a source into memory where asked, or where ``auto`` finds that it is small and draws nothing at random."""
    if isinstance(source, Memory) or in_memory is False or not len(source):
        return source
    if in_memory == "auto":
        sample = source.fetch(torch.zeros(1, dtype=torch.long))
        size = len(source) * sum(tensor.numel() * tensor.element_size() for tensor in sample.values())
        if size > MEMORY_LIMIT or (isinstance(source, Rows) and source.random):
            return source
    chunks = list(in_chunks(source))
    return Memory({name: torch.cat(alike(name, [chunk[name] for chunk in chunks])) for name in chunks[0]})
