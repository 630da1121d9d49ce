"""A network that was made for other pixels, another size or another order of classes, fitted to the data at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.models.calling import logits, unwrapped


class Adapted(nn.Module):
    """Reads the data's pixels with a network that has its own: each gets the same picture in its own form.

    Args:
        model: the network.
        gain: factor of each of the network's channels, from the data's pixels to its own; None changes nothing.
        shift: added after the factor.
        size: side of the square pictures it takes; None leaves the size.
        classes: for each class of the data the network's output that stands for it; None takes all as they are.

    Raises:
        UserError: an output is named twice.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gain: Sequence[float] | None = None,
        shift: Sequence[float] | None = None,
        size: int | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.size = model, size
        if classes is not None and len(set(classes)) < len(classes):
            raise UserError(f"classes: one output stands for two classes in {list(classes)}.")
        self.largest = max(classes, default=0) if classes is not None else 0
        self.register_buffer("gain", None if gain is None else torch.tensor(gain).view(-1, 1, 1))
        self.register_buffer("shift", None if shift is None else torch.tensor(shift).view(-1, 1, 1))
        self.register_buffer("classes", None if classes is None else torch.tensor(classes))

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        """The network's logits, in the data's order of classes."""
        gain, shift, classes = (self._buffers[name] for name in ("gain", "shift", "classes"))
        if gain is not None and shift is not None:
            pixel_values = pixel_values * gain + shift
        if self.size is not None and pixel_values.shape[-2:] != (self.size, self.size):
            pixel_values = F.interpolate(pixel_values, (self.size, self.size), mode="bilinear", antialias=True)
        out = logits(self.model, {"pixel_values": pixel_values})
        if classes is None:
            return out
        if self.largest >= out.shape[-1]:
            raise UserError(f"classes: there is no output {self.largest} among {out.shape[-1]}.")
        return out[:, classes]


def named_order(module: nn.Module, class_names: Sequence[str]) -> tuple[int, ...] | None:
    """Which output of a network stands for each class of the data, by the names in its configuration.

    None where it does not name its classes, or names others than the data.
    """
    config = getattr(unwrapped(module), "config", None)
    names: Any = getattr(config, "id2label", None)
    if not isinstance(names, dict) or not class_names:
        return None
    place = {_plain(name): int(output) for output, name in names.items()}
    wanted = [_plain(name) for name in class_names]
    if len(place) < len(names) or not set(wanted) <= set(place):
        return None
    return tuple(place[name] for name in wanted)


def smallest_image(module: nn.Module) -> int | None:
    """The side of the pictures that a network's configuration asks for; None where it says nothing."""
    size = getattr(getattr(unwrapped(module), "config", None), "image_size", None)
    if isinstance(size, list | tuple):
        size = max(size)
    return int(size) if isinstance(size, int) else None


def _plain(name: str) -> str:
    return " ".join(str(name).lower().replace("_", " ").split())
