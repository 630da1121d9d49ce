"""QLAE: disentanglement by latent quantisation (arXiv 2305.18378)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.data import Batch
from stillhouse.engine import Losses, Modules, Paper, Run, Weight
from stillhouse.losses.latents import commitment, quantization
from stillhouse.methods.representations.autoencoding import Autoencoding


class QLAE(Autoencoding):
    """Round each latent to a learned scalar of its own codebook, and decay all weights strongly.

    ``L = BCE + w_q mean (sg(c) - z_q)^2 + w_c mean (c - sg(z_q))^2``: the quantisation term moves the codebooks only, the
    commitment term the encoder only, and the decoder's gradient passes the rounding straight to the encoder. Decoupled
    weight decay of 0.1 holds for everything but biases and codebooks. The ablations are fields of ``model``:
    ``latent`` (per_latent, shared, vector, none) and ``learned_values``.
    """

    name: ClassVar[str] = "qlae"
    family: ClassVar[str] = "representations"
    paper: ClassVar[Paper] = Paper(
        "Disentanglement via Latent Quantization", 2023, arxiv="2305.18378", venue="NeurIPS 2023"
    )
    summary: ClassVar[str] = "a short discrete code whose latents mean one source each, and InfoMEC to measure it"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of everything but biases and codebooks")
    clip_value: float | None = Field(1.0, gt=0, description="largest absolute gradient element of what is decayed")
    weight_quantization: Weight = Field(0.01, description="weight of the term that moves the codebooks")
    weight_commitment: Weight = Field(0.01, description="weight of the term that moves the encoder to its codebook")

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Reconstruction, quantisation, commitment."""
        code = self.code(m, batch)
        terms = dict(self.reconstruction(m, batch, code))
        if code.quantized is not None:
            continuous, quantized = code.continuous, code.quantized
            terms["quantization"] = lambda: quantization(continuous, quantized)
            terms["commitment"] = lambda: commitment(continuous, quantized)
        return terms
