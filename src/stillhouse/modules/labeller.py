"""A light labeller: a frozen image encoder with low-rank changes, and a head that starts as the names of the classes.

What HeLlO (arXiv 2408.08201) keeps in place of a soft label for every view of every image: the numbers that were trained,
and what the rest is made from again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import UserError
from stillhouse.modules.lora import LowRank, add_lora

PREFIX = "base_model.model."
"""What peft puts before the path of an adapted layer."""


class Labeller(nn.Module):
    """``f(x) = s W E(x) / |E(x)|`` with ``W = W_0 + B A``, and low-rank changes in the layers of E.

    One factor of each pair starts at 0, so that f starts as zero-shot classification by W_0 exactly. Only factors are
    trained; everything stays in eval mode as long as its user keeps it there.

    Args:
        encoder: from pixels to (batch, width); changed in place.
        base: W_0, (classes, width): normalised embeddings of the class names, or zeros where the head is stored whole.
        scale: s, factor of the cosines.
        encoder_rank: rank of the changes in the encoder; 0 leaves it as it is.
        head_rank: rank of the head's change; None trains all of it.
        layers: paths of the adapted layers, as :func:`~stillhouse.modules.lora.add_lora` reads them.
        gain: factor of each channel, from the data's pixels to the encoder's own; None changes nothing.
        shift: added after the factor.
        size: side of the square images that the encoder takes; None leaves the size.

    Raises:
        UserError: a rank is larger than a side of its matrix.
    """

    base: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        base: Float[Tensor, "classes width"],
        *,
        scale: float = 100.0,
        encoder_rank: int = 8,
        head_rank: int | None = 64,
        layers: Sequence[str] = ("*",),
        gain: Sequence[float] | None = None,
        shift: Sequence[float] | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.scale, self.size = encoder.requires_grad_(False), scale, size
        self.register_buffer("base", base.detach().clone())
        self.register_buffer("gain", None if gain is None else torch.tensor(list(gain)).view(-1, 1, 1))
        self.register_buffer("shift", None if shift is None else torch.tensor(list(shift)).view(-1, 1, 1))
        self.adapted = add_lora(encoder, layers, encoder_rank, float(encoder_rank)) if encoder_rank else []
        for path, pair in self.pairs().items():
            limit = min(pair.A.shape[1], pair.B.shape[0])
            if encoder_rank > limit:
                raise UserError(
                    f"encoder_rank is {encoder_rank}, but the layer {path!r} has a side of {limit}; use less."
                )
        classes, width = base.shape
        if head_rank is not None and head_rank > min(classes, width):
            raise UserError(
                f"head_rank is {head_rank}, but the head is {classes} classes by {width} values; use at most "
                f"{min(classes, width)}."
            )
        if head_rank is None:
            self.A, self.B = None, nn.Parameter(torch.zeros(classes, width))
        else:
            self.A = nn.Parameter(torch.empty(head_rank, width))
            self.B = nn.Parameter(torch.zeros(classes, head_rank))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def head(self) -> Float[Tensor, "classes width"]:
        """W."""
        return self.base + (self.B if self.A is None else self.B @ self.A)

    def embed(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        """Normalised embeddings of images in the data's pixels."""
        gain, shift = self._buffers["gain"], self._buffers["shift"]
        if gain is not None and shift is not None:
            # A grey image is read by an encoder of colours as the same in each channel.
            pixel_values = pixel_values * gain + shift
        if self.size is not None and pixel_values.shape[-2:] != (self.size, self.size):
            pixel_values = F.interpolate(pixel_values, (self.size, self.size), mode="bilinear", antialias=True)
        return F.normalize(self.encoder(pixel_values), dim=-1)

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """The label of each image: logits."""
        return self.scale * self.embed(pixel_values) @ self.head.T

    def pairs(self) -> dict[str, LowRank]:
        """The low-rank changes of the encoder by the path of their layer."""
        found: dict[str, LowRank] = {}
        for path in self.adapted:
            layer = self.encoder.get_submodule(path)
            if parametrize.is_parametrized(layer, "weight"):
                change = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
                assert isinstance(change, LowRank)
                found[path] = change
        return found

    @torch.no_grad()
    def round(self, dtype: torch.dtype) -> None:
        """Round what is trained to the numbers of another type, in place, so that storing in it loses nothing."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(dtype).to(parameter.dtype))

    def factors(self) -> dict[str, Tensor]:
        """What is stored, under peft's names and in its shapes: ``lora_A`` a layer of ``rank`` outputs, ``lora_B`` a 1x1 one."""
        found: dict[str, Tensor] = {}
        for path, pair in self.pairs().items():
            weight = self.encoder.get_submodule(path).weight
            one, other = pair.A.detach(), pair.B.detach()
            if weight.dim() > 2:  # type: ignore[operator]
                one = one.view(len(one), *weight.shape[1:])  # type: ignore[index]
                other = other.view(*other.shape, *[1] * (weight.dim() - 2))  # type: ignore[operator]
            found[f"{PREFIX}{path}.lora_A.weight"], found[f"{PREFIX}{path}.lora_B.weight"] = one, other
        if self.A is None:
            found["head.weight"] = self.B.detach()
        else:
            found["head.lora_A.weight"], found["head.lora_B.weight"] = self.A.detach(), self.B.detach()
        return found

    @torch.no_grad()
    def load_factors(self, stored: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`factors` gave.

        Raises:
            UserError: names or sizes are of another labeller.
        """
        own = self.factors()
        if own.keys() != stored.keys() or any(own[name].shape != stored[name].shape for name in own):
            raise UserError("The stored factors belong to a labeller of another encoder, other ranks or other classes.")
        for name, value in own.items():
            # Views of the parameters: what is written here is in them.
            value.copy_(stored[name].to(value.dtype))


def factor_numbers(
    layers: Sequence[Sequence[int]], encoder_rank: int, classes: int, width: int, head_rank: int | None
) -> int:
    """Numbers that a labeller stores: ``sum_layers r1 (out + in kh kw) + r2 (C + d)``; a whole head has ``C d``.

    Args:
        layers: shapes of the adapted layers' weights.
        encoder_rank: r1.
        classes: C.
        width: d.
        head_rank: r2; None for a whole head.

    >>> factor_numbers([(16, 1, 3, 3)], 4, 10, 32, 8)
    436
    """
    encoder = sum(encoder_rank * (shape[0] + math.prod(shape[1:])) for shape in layers)
    return encoder + (classes * width if head_rank is None else head_rank * (classes + width))


def view_label_bytes(epochs: int, images: int, classes: int, size: int = 2) -> int:
    """Bytes of a soft label for every view of every image: ``K N C`` numbers of ``size`` bytes.

    >>> round(view_label_bytes(300, 1000, 1000) / 2**20), round(view_label_bytes(300, 200_000, 1000) / 2**30)
    (572, 112)
    """
    return epochs * images * classes * size
