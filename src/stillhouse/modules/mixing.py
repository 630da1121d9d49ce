"""Mixing the samples of a batch, with soft labels: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899).

A :class:`Mixing` says how and draws a :class:`Mixture`, which blends inputs and labels by the same pairs and shares. The
draws come from torch's global generator.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field
from torch import Tensor
from torch.distributions import Beta

from stillhouse.errors import UserError
from stillhouse.spec import Tagged


@dataclass(frozen=True)
class Mixture:
    """Which samples make each new one, and in what shares.

    Attributes:
        first: place in the batch of each new sample's first part.
        second: of its second part.
        share: lambda, the share of the first part.
        pasted: pixels taken from the second part, where images are cut and not blended.
    """

    first: Int[Tensor, " batch"]
    second: Int[Tensor, " batch"]
    share: Float[Tensor, " batch"]
    pasted: Bool[Tensor, "batch height width"] | None = None

    @property
    def mixed(self) -> Bool[Tensor, " batch"]:
        """Which new samples have two parts."""
        return (self.share < 1) & (self.first != self.second)

    def inputs(self, values: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """The inputs of the new samples.

        Raises:
            UserError: the values are whole numbers, such as bytes of pixels or token ids.
        """
        if not values.is_floating_point():
            raise UserError(
                f"Samples are mixed as floating-point numbers, not as {str(values.dtype).removeprefix('torch.')}; scale pixels "
                "before they are mixed, and do not mix token ids."
            )
        one, other = values[self.first], values[self.second]
        if self.pasted is not None:
            return torch.where(self.pasted[:, None], other, one)
        return self._blend(one, other)

    def labels(self, labels: Shaped[Tensor, "batch *classes"], num_classes: int | None = None) -> Float[Tensor, "..."]:
        """The labels of the new samples: class numbers become distributions, other labels are blended as they are.

        Raises:
            UserError: class numbers without the number of classes.
        """
        if not labels.is_floating_point():
            if num_classes is None:
                raise UserError("Class numbers are mixed as distributions, for which the number of classes is needed.")
            labels = F.one_hot(labels.long(), num_classes).float()
        return self._blend(labels[self.first], labels[self.second])

    def _blend(self, one: Tensor, other: Tensor) -> Tensor:
        share = self.share.to(one.dtype).view(-1, *[1] * (one.dim() - 1))
        return share * one + (1 - share) * other


class Mixing(Tagged):
    """How the samples of a batch are mixed: ``mixup``, ``mixup:0.2`` (its alpha), ``cutmix``, or a mapping."""

    noun: ClassVar[str] = "mixing"

    @abstractmethod
    def draw(self, values: Float[Tensor, "batch *shape"], *, rank: int = 0, world: int = 1) -> Mixture:
        """Draw pairs and shares for a batch of inputs (this process's slice ``rank`` of ``world`` equal ones).

        Pairs are formed within the slice.

        Raises:
            UserError: the batch is too small, or its inputs are of a kind that this does not mix.
        """


class NoMixing(Mixing):
    """The samples as they are."""

    kind: ClassVar[str] = "none"

    def draw(self, values: Float[Tensor, "batch *shape"], *, rank: int = 0, world: int = 1) -> Mixture:
        every = torch.arange(len(values), device=values.device)
        return Mixture(every, every, torch.ones(len(values), device=values.device))


class Mixup(Mixing):
    """``lambda x_i + (1 - lambda) x_j`` for pairs of samples, with a lambda of its own for each new sample.

    The batch comes out in a random order; of its samples an exact ``fraction`` is mixed (0.1 of 64: 6), each with another
    one, and the others stay whole.
    """

    kind: ClassVar[str] = "mixup"

    alpha: float = Field(1.0, gt=0)
    """Both parameters of the beta distribution of lambda; 1 is uniform, smaller ones mix less evenly."""
    fraction: float = Field(1.0, ge=0, le=1)
    """Share of each batch that is mixed."""
    probability: float = Field(1.0, ge=0, le=1)
    """Chance that a batch is mixed at all."""
    shared: bool = False
    """One lambda for the whole batch, as in the first papers."""
    released_sampling: bool = False
    """Draw as MIX-KD's released code: whole samples with replacement (0.1 mixes about 41 %), pairs that may be of one sample."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        try:
            return cls(alpha=float(text)) if text else cls()
        except ValueError:
            raise ValueError(f"{text!r} is no alpha above 0; write it as in '{cls.kind}:0.2'") from None

    def draw(self, values: Float[Tensor, "batch *shape"], *, rank: int = 0, world: int = 1) -> Mixture:
        count, device = len(values), values.device
        if count < 2:
            raise UserError(
                f"A batch of {count} sample has no two to mix; use a batch_size of at least 2, or mix=none."
            )
        number = round(self.fraction * count)
        if self.fraction > 0 and number == 0 and not self.released_sampling:
            raise UserError(
                f"mix.fraction: {self.fraction:g} of a batch of {count} is not one sample; use larger batches, or at least "
                f"{1 / count:.2g}."
            )
        concentration = torch.full((), self.alpha, device=device)
        share = Beta(concentration, concentration, validate_args=False).sample((world * count,))[
            rank * count : (rank + 1) * count
        ]
        if self.shared:
            share = share[:1].expand(count)

        def shuffled() -> Tensor:
            return torch.rand(world, count, device=device).argsort(1)[rank]

        first = shuffled()
        if self.released_sampling:
            second = shuffled()
            kept = torch.randint(count, (world, int(count * (1 - self.fraction))), device=device)[rank]
            share = share.index_fill(0, kept, 1.0)
        else:
            # The neighbour in the random order: another sample for every one, each used once.
            second = first.roll(1)
            share = torch.where(shuffled() < number, share, 1.0)
        share = torch.where(torch.rand((), device=device) < self.probability, share, 1.0)
        return Mixture(first, second, share)


class CutMix(Mixup):
    """A box of one image pasted into another; lambda is the share of the pixels that stay.

    Pairs, fraction and lambda are drawn as for mixup. The box has sides ``sqrt(1 - lambda)`` of the image's, a uniform
    centre, and is cut off at the border, after which lambda is set to the share that really stays.
    """

    kind: ClassVar[str] = "cutmix"

    def draw(self, values: Float[Tensor, "batch *shape"], *, rank: int = 0, world: int = 1) -> Mixture:
        if values.dim() != 4:
            raise UserError(
                f"CutMix pastes boxes into images (channels, height, width), not into inputs of shape "
                f"{tuple(values.shape[1:])}; use mix=mixup."
            )
        mixture = super().draw(values, rank=rank, world=world)
        count, device, sides = len(values), values.device, values.shape[-2:]
        scale = (1 - mixture.share).sqrt()
        inside = []
        for side in sides:
            length = (side * scale).long()
            centre = torch.randint(side, (world * count,), device=device)[rank * count : (rank + 1) * count]
            if self.shared:
                centre = centre[:1].expand(count)
            low, high = (centre - length // 2).clamp(0, side), (centre + length // 2).clamp(0, side)
            place = torch.arange(side, device=device)
            inside.append((place >= low[:, None]) & (place < high[:, None]))
        pasted = inside[0][:, :, None] & inside[1][:, None, :]
        share = 1 - pasted.flatten(1).float().mean(1)
        return replace(mixture, share=share, pasted=pasted)
