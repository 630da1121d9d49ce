"""Printed characters with captions: drawn from the fonts that come with matplotlib, without any file of one's own."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int, UInt8
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse.data.dataset import Carving, Data, ImageSpec
from stillhouse.data.sources import Memory
from stillhouse.data.splits import number_of
from stillhouse.data.text import ByteTokenize

FONTS: dict[str, str] = {
    "DejaVuSans": "a plain font",
    "DejaVuSans-Bold": "a bold font",
    "DejaVuSans-Oblique": "a slanted font",
    "DejaVuSerif": "a serif font",
    "DejaVuSerif-Bold": "a bold serif font",
    "DejaVuSerif-Italic": "an italic serif font",
    "DejaVuSansMono": "a typewriter font",
    "STIXGeneral": "a book font",
    "STIXGeneralItalic": "an italic book font",
    "cmr10": "a roman font",
    "cmss10": "a sans font",
    "cmtt10": "a terminal font",
}
"""Fonts by file name, and how a caption calls them."""

CAPTIONS = ("{c}", "a {c}", "a picture of a {c}", "a printed {c}", "the character {c} in {font}", "{c}, in {font}")
"""What a caption may be."""

LENGTH = 40
"""Bytes of a caption, padded."""

BIG = 64
"""Side of the drawing from which an image is scaled down."""


class Characters(Carving, ImageSpec):
    """Printed characters in twelve fonts, turned, moved and scaled a little, each with a caption in words.

    ``pixel_values`` (grey) and ``input_ids`` (the caption's bytes plus one, 0 is padding) with the character as the label:
    image-text pairs for contrastive training, and a plain classification set for networks that read images alone. A sample is
    the same on every machine with the same fonts and Pillow.
    """

    kind: ClassVar[str] = "characters"

    characters: str = Field("0123456789", min_length=2, max_length=94)
    """The classes, a character each."""
    per_class: int = Field(200, ge=10, le=100_000)
    """Samples of each class, before validation and test samples are set aside."""
    size: int = Field(16, ge=8, le=64)
    """Side of the images in pixels."""
    turn: float = Field(12.0, ge=0, le=180)
    """Largest turn in degrees, either way."""

    @classmethod
    def from_text(cls, text: str) -> Characters:
        return cls(characters=text) if text else cls()

    @field_validator("characters")
    @classmethod
    def _different(cls, value: str) -> str:
        if len(set(value)) < len(value):
            raise ValueError("a character is listed twice")
        if not all(33 <= ord(letter) <= 126 for letter in value):
            raise ValueError("characters are printable ASCII ones without the space")
        return value

    def load(self) -> Data:
        count = self.per_class * len(self.characters)
        labels = torch.arange(count) % len(self.characters)
        drawn = [self._sample(self.characters[number % len(self.characters)], number) for number in range(count)]
        images = torch.from_numpy(np.stack([image for image, _ in drawn]))[:, None]
        whole = self.sized(
            {"pixel_values": images, "labels": labels, "input_ids": caption_ids([text for _, text in drawn])}
        )
        content = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        sources = self.carved({"train": Memory(whole)}, labels)
        return self.assemble(
            sources,
            [content],
            class_names=list(self.characters),
            scale=self.scale_of(sources["train"]),
            tokenize=ByteTokenize(LENGTH),
        )

    def _sample(self, character: str, number: int) -> tuple[UInt8[np.ndarray[Any, Any], "size size"], str]:
        """Picture and caption of sample ``number``, from a generator of its own."""
        rng = np.random.Generator(np.random.PCG64(number_of("characters", character, number)))
        name = str(rng.choice(list(FONTS)))
        caption = str(rng.choice(CAPTIONS)).format(c=character, font=FONTS[name])
        points, angle = int(rng.uniform(0.9, 1.2) * BIG), float(rng.uniform(-self.turn, self.turn))
        shift = rng.uniform(-0.06, 0.06, 2) * BIG
        return drawing(character, name, points, angle, (shift[0], shift[1]), self.size), caption


def caption_ids(captions: list[str]) -> Int[Tensor, "captions bytes"]:
    """Captions as ids: bytes plus one, padded with 0 to :data:`LENGTH`."""
    return ByteTokenize(LENGTH)(captions)["input_ids"]


def drawing(
    character: str, font: str, points: int, angle: float, shift: tuple[float, float], size: int
) -> UInt8[np.ndarray[Any, Any], "size size"]:
    """A white character on black.

    Args:
        character: what is drawn, its box in the middle.
        font: name in :data:`FONTS`.
        points: size of the font on a canvas of :data:`BIG` pixels.
        angle: turn in degrees, counter-clockwise.
        shift: to the right and down, in pixels of the canvas.
        size: side of the result in pixels.
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (BIG, BIG))
    ImageDraw.Draw(canvas).text(
        (BIG / 2 + shift[0], BIG / 2 + shift[1]), character, fill=255, font=_font(font, points), anchor="mm"
    )
    turned = canvas.rotate(angle, resample=Image.Resampling.BILINEAR)
    return np.asarray(turned.resize((size, size), Image.Resampling.BOX), dtype=np.uint8)


@cache
def _font(name: str, points: int) -> Any:
    """A font of matplotlib's; Pillow comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", points)
