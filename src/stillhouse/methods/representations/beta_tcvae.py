"""beta-TCVAE (arXiv 1802.04942), and with it the VAE and the beta-VAE."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from stillhouse.data import Batch
from stillhouse.engine import Losses, Modules, Paper, Run, Weight
from stillhouse.losses.latents import kl_decomposition
from stillhouse.methods.representations.autoencoding import Autoencoding, inputs
from stillhouse.models import AutoencoderSpec, Code, ModelSpec


class BetaTCVAE(Autoencoding):
    """A Gaussian code whose total correlation is penalised more than the rest of its KL divergence.

    The KL to the standard normal splits into mutual information, total correlation and dimension-wise KL (equation 2);
    all weights 1 give the VAE, all weights beta the beta-VAE. Terms are per pixel value, as the reconstruction is.
    """

    name: ClassVar[str] = "beta-tcvae"
    family: ClassVar[str] = "representations"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Isolating Sources of Disentanglement in Variational Autoencoders", 2018, arxiv="1802.04942"
    )
    summary: ClassVar[str] = "a Gaussian code with a penalty on the dependence of its latents"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    model: ModelSpec = Field(AutoencoderSpec(latent="gaussian"), description="the autoencoder")
    sampling: Literal["weighted", "stratified", "batch"] = Field(
        "weighted", description="estimator of the aggregate posterior"
    )
    weight_mutual_information: Weight = Field(1.0, description="weight of the index-code mutual information (alpha)")
    weight_total_correlation: Weight = Field(6.0, description="weight of the total correlation (beta)")
    weight_dimension_wise_kl: Weight = Field(1.0, description="weight of the dimension-wise KL (gamma)")

    def code(self, m: Modules, batch: Batch) -> Code:
        """A draw from the posterior."""
        found: Code = m.model.encode(inputs(batch), sample=True)
        return found

    def couples(self) -> bool:
        """The aggregate posterior is estimated on the batch."""
        return True

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Reconstruction and the three parts of the KL divergence, of the batch of all processes."""
        code = self.code(m, batch)
        assert code.std is not None
        parts = kl_decomposition(
            run.gather(code.z),
            run.gather(code.continuous),
            run.gather(code.std),
            dataset_size=len(run.data.split("train")),
            sampling=self.sampling,
        )
        pixels = inputs(batch)[0].numel()
        return {
            **self.reconstruction(m, batch, code),
            "mutual_information": parts.mutual_information / pixels,
            "total_correlation": parts.total_correlation / pixels,
            "dimension_wise_kl": parts.dimension_wise_kl / pixels,
        }
