"""Two towers, one for images and one for texts, that meet in one space: CLIP's form, small and from transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from stillhouse.errors import UnreachableError, UserError
from stillhouse.facts import Facts
from stillhouse.models.calling import as_embedding, forward
from stillhouse.models.hub import transformers
from stillhouse.models.spec import ModelSpec, NetworkSpec

LARGEST_SCALE = 100.0
"""The largest scale of cosines, as in CLIP."""


class TwoTowers(nn.Module):
    """An image tower and a text tower whose outputs are normalised and compared by cosine.

    Attributes:
        image: the image tower, from pixels to (batch, width).
        text: the text tower, from byte ids to (batch, width).
        logit_scale: logarithm of the factor of the cosines.
        mean: mean of each channel that the image tower's pixels in [0, 1] lack; set by whoever trains it.
        std: what they are divided by.

    Args:
        image: the image tower.
        text: the text tower.
        channels: channels of the images.
        size: side of the square images.
    """

    mean: Tensor
    std: Tensor
    adaptable: ClassVar[tuple[str, ...]] = ("*",)
    """Paths, in the image tower, of the layers that low-rank changes may be of."""

    def __init__(self, image: nn.Module, text: ByteTower, *, channels: int, size: int) -> None:
        super().__init__()
        self.image, self.size, self.length = image, size, text.length
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The factor of the cosines."""
        return self.logit_scale.exp().clamp(max=LARGEST_SCALE)

    def encode_images(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        """Normalised embeddings of images in the tower's own pixels."""
        return F.normalize(as_embedding(forward(self.image, {"pixel_values": pixel_values})), dim=-1)

    def encode_ids(self, input_ids: Int[Tensor, "batch bytes"]) -> Float[Tensor, "batch width"]:
        """Normalised embeddings of texts as ids."""
        return F.normalize(self.text(input_ids), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch width"]:
        """Normalised embeddings of texts."""
        ids = torch.zeros(len(texts), self.length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            encoded = torch.tensor(list(text.encode()[: self.length]), dtype=torch.long) + 1
            row[: len(encoded)] = encoded
        return self.encode_ids(ids.to(self.logit_scale.device))

    def forward(
        self, pixel_values: Float[Tensor, "batch channels height width"], input_ids: Int[Tensor, "batch bytes"]
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
        """Embeddings of images and of their texts."""
        return self.encode_images(pixel_values), self.encode_ids(input_ids)


class ByteTower(nn.Module):
    """A text tower over bytes: embedding, two convolutions along the text, mean over its bytes, a linear layer.

    Args:
        width: width of the output.
        hidden: channels.
        length: bytes that it reads; longer texts are cut.
    """

    def __init__(self, width: int, hidden: int = 64, length: int = 40) -> None:
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(257, hidden, padding_idx=0)
        self.first = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.second = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.out = nn.Linear(hidden, width)

    def forward(self, input_ids: Int[Tensor, "batch bytes"]) -> Float[Tensor, "batch width"]:
        """One vector per text; padding has no part in it."""
        there = (input_ids != 0)[:, None].to(self.out.weight.dtype)
        x = self.embed(input_ids).transpose(1, 2) * there
        for layer in (self.first, self.second):
            x = x + F.relu(layer(x)) * there
        found: Tensor = self.out(x.sum(2) / there.sum(2).clamp_min(1))
        return found


class TwoTowersSpec(ModelSpec):
    """A small pair of towers with random weights: any network for images, bytes for texts."""

    kind = "two-towers"

    image: ModelSpec = Field(default="cnn", validate_default=True)
    """The image tower; its classifier is the projection into the common space."""
    width: int = Field(default=64, ge=2)
    """Width of the common space."""
    text_hidden: int = Field(default=64, ge=2)
    """Channels of the text tower."""
    text_length: int = Field(default=40, ge=1)
    """Bytes of a text that are read."""

    def build(self, facts: Facts) -> TwoTowers:
        shape = facts.inputs.get("pixel_values", ())
        if len(shape) != 3 or shape[1] != shape[2]:
            raise UserError(f"The model 'two-towers' reads square images, not inputs of shape {tuple(shape)}.")
        spec = self.image
        if isinstance(spec, NetworkSpec):
            spec = spec.model_copy(update={"num_outputs": self.width})
        image = spec.build(facts)
        text = ByteTower(self.width, self.text_hidden, self.text_length)
        return TwoTowers(image, text, channels=shape[0], size=shape[1])


class HubTowers(nn.Module):
    """A CLIP model of transformers with its tokenizer, in the form of :class:`TwoTowers`.

    Args:
        model: a ``CLIPModel`` (or one with the same methods).
        tokenizer: its tokenizer.
        mean: of the pixels that it takes.
        std: of the same.
        size: side of the images it takes.
    """

    mean: Tensor
    std: Tensor
    adaptable: ClassVar[tuple[str, ...]] = ("*vision_model*", "*visual_projection")
    """Paths, in the image tower, of the layers that low-rank changes may be of."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, mean: Sequence[float], std: Sequence[float], size: int
    ) -> None:
        super().__init__()
        self.image = VisionTower(model)
        self._tokenizer, self.size = tokenizer, size
        self.register_buffer("mean", torch.tensor(list(mean)))
        self.register_buffer("std", torch.tensor(list(std)))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The factor of the cosines."""
        return self.image.model.logit_scale.exp().clamp(max=LARGEST_SCALE)  # type: ignore[no-any-return, union-attr, operator]

    def encode_images(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        """Normalised embeddings of images in the model's own pixels."""
        return F.normalize(self.image(pixel_values), dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch width"]:
        """Normalised embeddings of texts."""
        encoded = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        device = self.mean.device
        inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
        found = self.image.model.get_text_features(**inputs)  # type: ignore[union-attr, operator]
        return F.normalize(as_embedding(found), dim=-1)


class VisionTower(nn.Module):
    """The image side of a CLIP model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        """Embeddings of images in the common space."""
        return as_embedding(self.model.get_image_features(pixel_values=pixel_values))  # type: ignore[operator]


def load_clip(name: str, revision: str | None = None) -> HubTowers:
    """A pretrained CLIP model by hub id or directory.

    Raises:
        UserError: transformers is not installed, or the model cannot be had.
    """
    library = transformers()
    try:
        model = library.AutoModel.from_pretrained(name, revision=revision)
        tokenizer = library.AutoTokenizer.from_pretrained(name, revision=revision)
        processor = library.AutoImageProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UnreachableError(f"The model 'clip:{name}' could not be loaded: {str(error).splitlines()[0]}.") from None
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise UserError(f"The model 'clip:{name}' is a {type(model).__name__}, which has no two towers.")
    return HubTowers(
        model,
        tokenizer,
        mean=processor.image_mean,
        std=processor.image_std,
        size=int(model.config.vision_config.image_size),
    )
