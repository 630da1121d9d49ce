"""The distilled set: images that are learned, with what a network is trained on them for and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import UserError

Target = Literal["hard", "logits", "probabilities", "features"]


class DistilledSet(nn.Module):
    """Learned images and their targets; a stage trains ``images``, and ``labels`` and ``lr`` where these are learned.

    Images live in the space that networks see (usually standardised); :attr:`pixels` are the same in [0, 1].
    Images of one class are kept next to each other when their classes are given in order.

    Args:
        images: where the images start; copied.
        labels: class numbers (hard), or one row per image: logits, probabilities or features, as ``target`` says.
        target: what ``labels`` are. Logits stay a distribution under any optimiser, because networks train on their
            softmax; probabilities and features are used as they are.
        classes: class of each image, where the labels do not say it (soft labels); ``None`` for unlabelled sets.
        num_classes: number of classes; taken from the classes by default.
        learn_labels: make the labels a parameter (not for hard ones).
        lr: step size for training networks on the set; given, it is a parameter.
        mean: mean of each channel that was subtracted from pixels in [0, 1].
        std: standard deviation of each channel by which they were then divided.
        provenance: what made the set (method, seed, protocol, ...): plain JSON values, written into its card.

    Raises:
        UserError: shapes or kinds that do not fit together.

    >>> real = torch.rand(6, 1, 4, 4)
    >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> distilled = DistilledSet.from_samples(real, labels, torch.tensor([3, 1, 2]))
    >>> distilled.labels.tolist(), distilled.by_class.shape, distilled.bytes
    ([0, 1, 2], torch.Size([3, 1, 1, 4, 4]), 216)
    """

    labels: Tensor
    classes: Tensor | None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        images: Float[Tensor, "samples channels height width"],
        labels: Int[Tensor, " samples"] | Float[Tensor, "samples values"],
        *,
        target: Target = "hard",
        classes: Int[Tensor, " samples"] | None = None,
        num_classes: int | None = None,
        learn_labels: bool = False,
        lr: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
            raise UserError(
                "Distilled images are a float tensor [samples, channels, height, width] with at least one sample, "
                f"not {str(images.dtype).removeprefix('torch.')} {list(images.shape)}."
            )
        if len(labels) != len(images):
            raise UserError(f"{len(images)} distilled images need as many labels, not {len(labels)}.")
        if target == "hard":
            if labels.is_floating_point() or labels.ndim != 1:
                raise UserError("Hard labels are class numbers (a long tensor [samples]); set target for soft ones.")
            if learn_labels:
                raise UserError("Hard labels cannot be learned; give logits with target 'logits'.")
            classes = labels
        elif not labels.is_floating_point() or labels.ndim != 2:
            raise UserError(
                f"Labels of target {target!r} are a float tensor [samples, values], not {list(labels.shape)}."
            )
        self.target: Target = target
        self.images = nn.Parameter(images.detach().clone())
        if learn_labels:
            self.labels = nn.Parameter(labels.detach().clone())
        else:
            self.register_buffer("labels", labels.detach().clone())
        self.register_buffer("classes", None if classes is None or target == "hard" else classes.detach().clone())
        self.lr = None if lr is None else nn.Parameter(torch.tensor(float(lr)))
        if lr is not None and not lr > 0:
            raise UserError(f"The step size of a distilled set must be positive, not {lr}.")
        channels = images.shape[1]
        for name, values, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            given = [default] * channels if values is None else [float(value) for value in values]
            if len(given) != channels or (name == "std" and min(given) <= 0):
                raise UserError(f"{name} needs {channels} numbers, one per channel (std positive), not {given}.")
            self.register_buffer(name, torch.tensor(given))
        self.num_classes, self.images_per_class = _layout(classes, num_classes)
        self.provenance: dict[str, Any] = dict(provenance or {})
        try:
            json.dumps(self.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"The provenance of a distilled set is plain JSON values: {error}.") from None

    @classmethod
    def from_samples(
        cls,
        images: Float[Tensor, "all channels height width"],
        labels: Int[Tensor, " all"],
        indices: Int[Tensor, " samples"],
        *,
        soft_labels: Float[Tensor, "samples values"] | None = None,
        **keywords: Any,
    ) -> Self:
        """Start from real samples (see :mod:`stillhouse.modules.coresets`), ordered by class, hard labels by default.

        Args:
            images: the real images.
            labels: class of each.
            indices: positions of the chosen ones.
            soft_labels: labels in place of the hard ones, a row for each of ``indices``; say with ``target`` what
                they are.
            keywords: further arguments of the class.
        """
        order = labels[indices].sort(stable=True).indices
        indices = indices[order]
        start = {"samples": indices.tolist()}
        keywords["provenance"] = {**(keywords.get("provenance") or {}), "start": start}
        if soft_labels is None:
            return cls(images[indices], labels[indices], **keywords)
        return cls(images[indices], soft_labels[order], classes=labels[indices], **keywords)

    @classmethod
    def from_noise(
        cls,
        num_classes: int,
        images_per_class: int,
        shape: tuple[int, int, int],
        *,
        generator: torch.Generator | None = None,
        **keywords: Any,
    ) -> Self:
        """Start from standard normal noise, with hard labels.

        Args:
            num_classes: number of classes.
            images_per_class: images of each.
            shape: channels, height and width of an image.
            generator: source of the noise; torch's global one by default.
            keywords: further arguments of the class.
        """
        if images_per_class < 1 or num_classes < 1:
            raise UserError(
                "A distilled set needs at least one class and one image per class, "
                f"not {num_classes} and {images_per_class}."
            )
        images = torch.randn(num_classes * images_per_class, *shape, generator=generator)
        labels = torch.arange(num_classes).repeat_interleave(images_per_class)
        keywords["provenance"] = {**(keywords.get("provenance") or {}), "start": "noise"}
        return cls(images, labels, num_classes=num_classes, **keywords)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def class_of(self) -> Int[Tensor, " samples"] | None:
        """Class of each image; ``None`` for unlabelled sets."""
        return self.labels if self.target == "hard" else self.classes

    @property
    def by_class(self) -> Float[Tensor, "classes per_class channels height width"]:
        """The images as a view [classes, images per class, ...]; gradients reach ``images``.

        Raises:
            UserError: the classes are not all present, equally often and in order.
        """
        if self.images_per_class is None:
            raise UserError("by_class needs the same number of images of every class, ordered by class.")
        return self.images.view(-1, self.images_per_class, *self.images.shape[1:])

    def targets(self, index: Int[Tensor, " part"] | None = None) -> Tensor:
        """What networks are trained for: class numbers, distributions (softmax of logits), or features."""
        labels = self.labels if index is None else self.labels[index]
        return labels.float().softmax(-1).to(labels.dtype) if self.target == "logits" else labels

    def forward(self, index: Int[Tensor, " part"] | None = None) -> dict[str, Tensor]:
        """A training batch of the set: ``pixel_values`` and ``labels`` (:meth:`targets`), with gradient to both."""
        return {"pixel_values": self.images if index is None else self.images[index], "labels": self.targets(index)}

    @property
    def pixels(self) -> Float[Tensor, "samples channels height width"]:
        """The images as real pixel values, cut to [0, 1]; without gradient."""
        return self._unstandardised().clamp(0, 1)

    @torch.no_grad()
    def cut(self) -> None:
        """Cut the images, in place, to values whose :attr:`pixels` are in [0, 1]."""
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        self.images.copy_(torch.maximum(torch.minimum(self.images, (1 - mean) / std), -mean / std))

    @property
    def clipped(self) -> float:
        """Fraction of the values outside [0, 1] by more than rounding, which :attr:`pixels` cuts."""
        raw = self._unstandardised()
        return ((raw < -1e-6) | (raw > 1 + 1e-6)).float().mean().item()

    @property
    def bytes(self) -> int:
        """Bytes of images, labels and step size as they are stored without loss."""
        parts = [self.images, self.labels] + ([self.classes] if self.classes is not None else [])
        parts += [self.lr] if self.lr is not None else []
        return sum(part.numel() * part.element_size() for part in parts)

    def extra_repr(self) -> str:
        per_class = "unequal" if self.images_per_class is None else self.images_per_class
        return f"{list(self.images.shape)}, classes={self.num_classes}, per_class={per_class}, target={self.target}"

    def _unstandardised(self) -> Tensor:
        return self.images.detach() * self.std[:, None, None] + self.mean[:, None, None]


def _layout(classes: Tensor | None, num_classes: int | None) -> tuple[int | None, int | None]:
    """Number of classes, and images per class if the images are in equal runs of ascending classes."""
    if classes is None:
        return num_classes, None
    low, high = int(classes.min()), int(classes.max())
    count = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= count:
        raise UserError(f"Classes of distilled images must be in 0..{count - 1}, not {low}..{high}.")
    per_class, rest = divmod(len(classes), count)
    runs = torch.arange(count, device=classes.device).repeat_interleave(per_class)
    return count, per_class if rest == 0 and torch.equal(classes, runs) else None
