"""The plain autoencoder: the line that codes with structure are compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.engine import Paper
from stillhouse.methods.representations.autoencoding import Autoencoding
from stillhouse.models import AutoencoderSpec, ModelSpec


class PlainAutoencoder(Autoencoding):
    """Reconstruct through a narrow continuous code; ``weight_decay`` gives the decayed variant."""

    name: ClassVar[str] = "autoencoder"
    family: ClassVar[str] = "representations"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Reducing the Dimensionality of Data with Neural Networks", 2006, venue="Science 313"
    )
    summary: ClassVar[str] = "a continuous code by reconstruction alone: the line to beat"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    model: ModelSpec = Field(AutoencoderSpec(latent="none"), description="the autoencoder")
