"""Fixed orders and fixed splits: functions of a name and the sample's place, never of a run's seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.errors import UserError

RULE = "splitmix64, largest remainders"
"""How samples are ordered and divided here; part of every fingerprint, to be renamed with every change of the rule."""


def number_of(*parts: object) -> int:
    """A 63-bit number that depends on all parts; equal on every machine and version.

    >>> number_of(0, 1) == number_of(0, 1) != number_of(1, 0)
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def hashes(count: int, salt: str) -> np.ndarray:
    """One 64-bit hash (splitmix64) for each of the numbers 0 .. count-1; another salt gives independent ones."""
    with np.errstate(over="ignore"):
        z = (np.arange(count, dtype=np.uint64) + np.uint64(number_of(salt))) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def balanced_order(labels: Int[Tensor, " samples"] | None, count: int, salt: str) -> Int[Tensor, " samples"]:
    """A fixed order of all samples in which every prefix holds the classes as equally as their sizes allow.

    Without labels it is a fixed shuffle.
    """
    keys = hashes(count, salt)
    order = np.argsort(keys, kind="stable")
    if labels is None:
        return torch.from_numpy(order)
    classes = labels.numpy()[order]
    by_class = np.argsort(classes, kind="stable")
    sizes = np.bincount(classes, minlength=1)
    starts = np.cumsum(sizes) - sizes
    place = np.empty(count, dtype=np.int64)
    place[by_class] = np.arange(count) - starts[classes[by_class]]
    return torch.from_numpy(order[np.argsort(place, kind="stable")])


def long_tailed(
    labels: Int[Tensor, " samples"], num_classes: int, ratio: float, most: int | None = None
) -> Int[Tensor, " part"]:
    """Ascending positions of a part whose class c of C has ``floor(most * ratio ** (-c / (C - 1)))`` samples.

    Which samples stay is fixed; a larger ``ratio`` takes a part of what a smaller one does.

    Args:
        labels: class of each sample.
        num_classes: number of classes; class 0 is the largest and the last one the smallest.
        ratio: how many times larger, at least 1.
        most: samples of class 0; all of them by default.

    Raises:
        UserError: a class would be empty, or has fewer samples than that.

    >>> counts = long_tailed(torch.arange(3).repeat(100), 3, ratio=100).remainder(3).bincount()
    >>> counts.tolist()
    [100, 10, 1]
    """
    if num_classes < 2:
        raise UserError("A long tail needs at least 2 classes.")
    there = torch.bincount(labels, minlength=num_classes).tolist()
    head = there[0] if most is None else most
    # A hair above, so that a power that is a whole number but for rounding is not cut down.
    wanted = [int(head * ratio ** (-place / (num_classes - 1)) + 1e-9) for place in range(num_classes)]
    for place, (count, size) in enumerate(zip(wanted, there, strict=True)):
        if count < 1 or count > size:
            why = "would have no sample" if count < 1 else f"has {size} samples and is to have {count}"
            raise UserError(
                f"long_tail: with {head} samples of class 0 and a ratio of {ratio:g}, class {place} {why}; choose another ratio "
                "or 'most'."
            )
    order = torch.from_numpy(np.argsort(hashes(len(labels), "long tail"), kind="stable"))
    shuffled = labels[order]
    kept = [order[shuffled == place][:count] for place, count in enumerate(wanted)]
    return torch.cat(kept).sort().values


def carve(
    labels: Int[Tensor, " samples"] | None, count: int, fractions: Mapping[str, float], salt: str
) -> dict[str, Int[Tensor, " part"]]:
    """Divide samples into named parts of given fractions, class by class where there are labels.

    Args:
        labels: class of each sample; ``None`` divides without regard to classes.
        count: number of samples.
        fractions: share of each part; they sum to one. Each part has its exact
            share of the whole, rounded; a class with few samples stays in the first part.
        salt: name that fixes the division.

    Returns:
        Ascending positions of each part.

    Raises:
        UserError: if a part with a positive fraction would be empty.
    """
    order = np.argsort(hashes(count, salt), kind="stable")
    classes = np.zeros(count, dtype=np.int64) if labels is None else labels.numpy()[order]
    groups = [order[classes == label] for label in np.unique(classes)]
    left = np.array([len(group) for group in groups])
    whole, names = left.copy(), list(fractions)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in fractions}
    for name in reversed(names[1:]):
        sizes = apportioned(fractions[name] * whole, round(fractions[name] * count), left - 1)
        parts[name] = [group[rest - size : rest] for group, rest, size in zip(groups, left, sizes, strict=True)]
        left = left - sizes
    parts[names[0]] = [group[:rest] for group, rest in zip(groups, left, strict=True)]
    carved = {name: torch.from_numpy(np.sort(np.concatenate(pieces))) for name, pieces in parts.items()}
    for name, positions in carved.items():
        if fractions[name] > 0 and len(positions) == 0:
            raise UserError(
                f"{count} samples are too few to set {fractions[name]:.0%} of each class aside as {name!r}."
            )
    return {name: positions for name, positions in carved.items() if len(positions)}


def apportioned(quotas: np.ndarray, total: int, most: np.ndarray) -> np.ndarray:
    """Whole numbers near the quotas that sum to ``total``, by largest remainders; none above ``most``."""
    sizes: np.ndarray = np.minimum(np.floor(quotas + 1e-9).astype(np.int64), most)
    for place in np.argsort(sizes - quotas, kind="stable"):
        if sizes.sum() < total and sizes[place] < most[place]:
            sizes[place] += 1
    return sizes
