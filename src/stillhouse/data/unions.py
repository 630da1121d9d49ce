"""Unions of data sets: samples of several sets in the form of one of them, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.data.dataset import Split
from stillhouse.data.pixels import at_size
from stillhouse.data.sources import Memory, Seeds, Source, in_chunks
from stillhouse.errors import UserError


class Fitted(Source):
    """The inputs of a split in the form of another's: channels, size and pixel levels; labels stay behind.

    Args:
        split: where the samples come from.
        like: the split whose form they take.
        levels: pixels as bytes of 256 levels, where both hold such; else as floats.
        asides: also names that travel with a batch and are no inputs.
    """

    def __init__(self, split: Split, like: Split, *, levels: bool, asides: bool = False) -> None:
        self.split, self.like, self.levels, self.asides = split, like, levels, asides
        theirs, ours = split.facts.inputs, like.facts.inputs
        if set(theirs) != set(ours):
            raise UserError(
                f"Data sets that are united need the same inputs, but {sorted(theirs)} are not {sorted(ours)}; "
                "choose another pool."
            )
        for name in ours:
            if name != "pixel_values" and theirs[name] != ours[name]:
                raise UserError(
                    f"Data sets that are united need inputs of one shape, but {name!r} is {list(theirs[name])} in one and "
                    f"{list(ours[name])} in the other."
                )

    def __len__(self) -> int:
        return len(self.split)

    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        stored = self.split.source.fetch(index, seeds)
        kept = {name: stored[name] for name in self.like.facts.inputs}
        if "pixel_values" in kept:
            kept["pixel_values"] = self._pixels(kept["pixel_values"])
        if self.asides:
            kept |= {name: stored[name] for name in self.split.aside if name in stored}
        return kept

    def _pixels(self, pixels: Tensor) -> Tensor:
        own, scale = self.split.scale, self.like.scale
        assert own is not None
        assert scale is not None
        channels, height, width = self.like.facts.inputs["pixel_values"]
        if self.levels:
            return _sized(_coloured(pixels, channels), height, width, 255)
        unit = _sized(_coloured(own.stored_to_unit(pixels), channels), height, width, 1)
        return unit * scale.span + scale.low


def fitted(split: Split, like: Split, *, asides: bool = False) -> Split:
    """A split in the form of another (see :class:`Fitted`), as its own samples would be."""
    source: Source = Fitted(split, like, levels=_bytes(split) and _bytes(like), asides=asides)
    if isinstance(split.source, Memory):
        source = _in_memory(source)
    return _split(source, like, split.aside if asides else frozenset())


def union(parts: Sequence[Split]) -> Split:
    """The samples of several splits, one after the other, without labels and in the form of the first.

    It is in memory where all parts are; ``index`` counts through all of them.

    Raises:
        UserError: their inputs cannot be brought to one form.
    """
    like = parts[0]
    levels = all(map(_bytes, parts))
    sources: list[Source] = [Fitted(part, like, levels=levels) for part in parts]
    whole: Source = Joined(sources)
    if all(isinstance(part.source, Memory) for part in parts):
        whole = _in_memory(whole)
    return _split(whole, like, frozenset())


class Joined(Source):
    """Sources one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.starts = torch.tensor([0, *(len(source) for source in sources)]).cumsum(0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def fetch(self, index: Int[Tensor, " batch"], seeds: Seeds | None = None) -> dict[str, Tensor]:
        owner = torch.bucketize(index, self.starts[1:], right=True)
        places = [(owner == part).nonzero().flatten() for part in range(len(self.sources))]
        found = [
            (place, source.fetch(index[place] - start, None if seeds is None else _moved(seeds, int(start))))
            for place, source, start in zip(places, self.sources, self.starts, strict=False)
            if len(place)
        ]
        order = torch.argsort(torch.cat([place for place, _ in found]))
        return {name: torch.cat([part[name] for _, part in found])[order] for name in found[0][1]}


def _in_memory(source: Source) -> Memory:
    chunks = list(in_chunks(source, 4096))
    return Memory({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})


def _moved(seeds: Seeds, start: int) -> Seeds:
    return lambda sample: seeds(sample + start)


def _bytes(split: Split) -> bool:
    """Whether pixels are stored as bytes of 256 levels, black to white."""
    scale = split.scale
    return scale is None or (not scale.given and (scale.low, scale.span) == (0, 255))


def _split(source: Source, like: Split, aside: frozenset[str]) -> Split:
    facts = replace(like.facts, num_classes=None, task="unlabelled", class_names=(), factors={})
    return Split("train", facts, source, scale=like.scale, aside=aside)


def _coloured(pixels: Tensor, channels: int) -> Tensor:
    """Pixels with 1 or 3 channels as asked: grey by ITU-R 601, colour by three equal channels."""
    if pixels.shape[1] == channels:
        return pixels
    if (pixels.shape[1], channels) == (1, 3):
        return pixels.expand(-1, 3, -1, -1).contiguous()
    if (pixels.shape[1], channels) == (3, 1):
        weights = torch.tensor([0.299, 0.587, 0.114])
        mixed = torch.einsum("nchw,c->nhw", pixels.float(), weights)[:, None]
        return mixed.round().to(torch.uint8) if pixels.dtype == torch.uint8 else mixed
    raise UserError(
        f"Images with {pixels.shape[1]} channels cannot be united with images with {channels}; give both as grey or colour."
    )


def _sized(pixels: Tensor, height: int, width: int, levels: float) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    if height != width:
        raise UserError(
            f"Images of {pixels.shape[-2]} x {pixels.shape[-1]} are united with images of {height} x {width} only where "
            "these are square; set image_size."
        )
    return at_size(pixels, height, levels)
