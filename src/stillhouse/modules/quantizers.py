"""Quantisers of latent codes: a scalar codebook per latent (QLAE), one scalar codebook for all, vectors (VQ-VAE).

All of them map encoder outputs to the nearest stored values with a straight-through gradient, and are trained by the
two losses :func:`stillhouse.losses.latents.quantization` (moves the values) and
:func:`stillhouse.losses.latents.commitment` (moves the encoder).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import UserError


class Quantized(NamedTuple):
    """What a quantiser returns.

    Attributes:
        z: the quantised code that a decoder takes. Its value is ``quantized``, its gradient goes to the encoder
            output unchanged and to the stored values not at all.
        quantized: the nearest stored values, whose gradient goes to the stored values.
        indices: which stored value each latent took.
    """

    z: Float[Tensor, "batch inputs"]
    quantized: Float[Tensor, "batch inputs"]
    indices: Int[Tensor, "batch latents"]


class CodebookUsage(NamedTuple):
    """How a set of codes uses a codebook; one row per latent.

    Attributes:
        counts: how often each latent takes each value.
        fraction: share of a latent's values that are taken at least once, in (0, 1].
        perplexity: exponential of the entropy of a latent's values: 1 where it never changes, its number of values
            where it takes all of them equally often.
    """

    counts: Int[Tensor, "latents values"]
    fraction: Float[Tensor, " latents"]
    perplexity: Float[Tensor, " latents"]


def straight_through(
    continuous: Float[Tensor, "*shape"], quantized: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The value of ``quantized`` with the gradient of ``continuous``: c + sg(q - c), without its rounding error.

    Written so that the value is ``quantized`` to the last bit: codes that share an index stay equal numbers, and
    whatever counts distinct values downstream counts the codebook's.

    >>> c = torch.tensor([0.3], requires_grad=True)
    >>> z = straight_through(c, torch.tensor([0.5]))
    >>> z.item(), torch.autograd.grad(3 * z.sum(), c)[0].item()
    (0.5, 3.0)
    """
    return quantized.detach() + (continuous - continuous.detach())


def codebook_usage(indices: Int[Tensor, "batch latents"], num_values: int | Sequence[int]) -> CodebookUsage:
    """Count how ``indices`` use their codebooks.

    Args:
        indices: which value each latent took, one row per sample.
        num_values: size of every codebook, or one size per latent.

    >>> usage = codebook_usage(torch.tensor([[0, 1], [1, 1]]), 2)
    >>> usage.counts.tolist(), usage.fraction.tolist(), usage.perplexity.tolist()
    ([[1, 1], [0, 2]], [1.0, 0.5], [2.0, 1.0])
    """
    num_latents = indices.shape[1]
    sizes = torch.as_tensor(num_values, device=indices.device).expand(num_latents)
    width = int(sizes.max())
    offsets = torch.arange(num_latents, device=indices.device) * width
    counts = torch.bincount((indices + offsets).flatten(), minlength=num_latents * width).view(num_latents, width)
    frequency = counts / counts.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(frequency, frequency).sum(dim=1)
    return CodebookUsage(counts, (counts > 0).sum(dim=1) / sizes, entropy.exp())


class LatentQuantizer(nn.Module):
    """Latent quantisation: each coordinate of the code is rounded to a codebook of scalars of its own.

    *Disentanglement via Latent Quantization* (arXiv 2305.18378). With n_z latents of n_v values there are
    n_v ** n_z codes but only n_z * n_v stored numbers: that a value must mean the same in every context is the
    inductive bias. Values start evenly spaced over [-0.5, 0.5]. They are to be trained without weight decay.

    Args:
        num_latents: number of latents, n_z (the paper: twice the number of sources).
        num_values: values per latent, n_v, or one number for each latent; each at least 2.
        learned: whether the values are parameters; otherwise they stay where they start.
        shared: one codebook of ``num_values`` for all latents (the paper's "global codebook" ablation).

    Raises:
        UserError: for a codebook of fewer than two values, or a list whose length is not ``num_latents``.
    """

    values: Tensor
    absent: Tensor
    sizes: Tensor

    def __init__(
        self, num_latents: int, num_values: int | Sequence[int] = 10, *, learned: bool = True, shared: bool = False
    ) -> None:
        super().__init__()
        if num_latents < 1:
            raise UserError(f"A quantiser's num_latents is {num_latents}; a code needs at least 1 latent.")
        if isinstance(num_values, int):
            sizes = [num_values] * (1 if shared else num_latents)
        elif shared:
            raise UserError("A shared codebook has one size, but num_values is a list; give a single number.")
        else:
            sizes = list(num_values)
        if not shared and len(sizes) != num_latents:
            raise UserError(
                f"The list num_values has {len(sizes)} sizes for {num_latents} latents; give one size each."
            )
        if min(sizes) < 2:
            raise UserError(f"A codebook's num_values is {min(sizes)}; a latent needs at least 2 values.")
        self.num_latents = num_latents
        self.num_inputs = num_latents
        self.shared = shared
        values = torch.zeros(len(sizes), max(sizes))
        for row, size in zip(values, sizes, strict=True):
            row[:size] = torch.linspace(-0.5, 0.5, size)
        if learned:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        # Shorter codebooks are filled up to the longest; the filling is never nearest.
        self.register_buffer("absent", torch.arange(max(sizes)) >= self.sizes[:, None], persistent=False)

    def forward(self, continuous: Float[Tensor, "batch latents"]) -> Quantized:
        """Round every latent to its nearest value; between two equally near the lower index wins.

        Args:
            continuous: encoder output, one number per latent.
        """
        if continuous.shape[-1] != self.num_latents:
            raise UserError(
                f"The quantiser has {self.num_latents} latents but the encoder gives {continuous.shape[-1]} numbers; "
                f"make the encoder's num_outputs {self.num_latents}."
            )
        distance = (continuous.detach().unsqueeze(-1) - self.values.detach()).abs()
        indices = distance.masked_fill(self.absent, torch.inf).argmin(dim=-1)
        quantized = self.lookup(indices)
        return Quantized(straight_through(continuous, quantized), quantized, indices)

    def lookup(self, indices: Int[Tensor, "batch latents"]) -> Float[Tensor, "batch latents"]:
        """The stored values at ``indices``, with gradient to them."""
        tables = self.values.expand(indices.shape[0], self.num_latents, -1)
        return tables.gather(-1, indices.unsqueeze(-1)).squeeze(-1)

    def sample(
        self, num_samples: int, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "samples latents"], Int[Tensor, "samples latents"]]:
        """Draw each latent uniformly from its values: the prior of the quantised InfoGAN.

        Returns:
            The codes, with gradient to the stored values (a generator's loss trains them), and their indices.
        """
        uniform = torch.rand(num_samples, self.num_latents, generator=generator, device=self.values.device)
        indices = (uniform * self.sizes).long()
        return self.lookup(indices), indices

    def traverse(self, indices: Int[Tensor, "batch latents"], latent: int) -> Float[Tensor, "values batch latents"]:
        """Codes equal to ``indices`` except for one latent, which takes each of its values in turn.

        Values are visited in ascending order, which training need not keep to.
        """
        codebook = 0 if self.shared else latent
        order = self.values[codebook, : int(self.sizes[codebook])].argsort()
        codes = indices.repeat(len(order), 1, 1)
        codes[:, :, latent] = order[:, None]
        return self.lookup(codes.flatten(0, 1)).view(len(order), *indices.shape)

    def usage(self, indices: Int[Tensor, "batch latents"]) -> CodebookUsage:
        """How a set of codes uses the codebooks."""
        return codebook_usage(indices, self.sizes.expand(self.num_latents).tolist())

    def extra_repr(self) -> str:
        learned = isinstance(self.values, nn.Parameter)
        sizes = sorted(set(self.sizes.tolist()))
        return f"num_latents={self.num_latents}, num_values={sizes}, learned={learned}, shared={self.shared}"


class VectorQuantizer(nn.Module):
    """Vector quantisation (VQ-VAE, arXiv 1711.00937): each latent is one of ``num_vectors`` stored vectors.

    The codebook is shared by all latents and trained by gradients, as in the QLAE paper's comparison. With
    ``num_vectors`` equal to a :class:`LatentQuantizer`'s ``num_values`` both carry the same number of bits.
    Vectors start uniform over a cube about zero whose size gives them an expected squared norm of 1.

    Args:
        num_latents: number of latents.
        num_vectors: codebook size, at least 2.
        vector_size: numbers per vector; the encoder gives ``num_latents * vector_size``.
    """

    def __init__(self, num_latents: int, num_vectors: int = 512, vector_size: int = 64) -> None:
        super().__init__()
        if num_vectors < 2:
            raise UserError(f"A quantiser's num_vectors is {num_vectors}; a codebook needs at least 2 vectors.")
        if num_latents < 1 or vector_size < 1:
            raise UserError(
                f"A quantiser's num_latents ({num_latents}) and vector_size ({vector_size}) must be at least 1."
            )
        self.num_latents = num_latents
        self.num_vectors = num_vectors
        self.vector_size = vector_size
        self.num_inputs = num_latents * vector_size
        limit = (3 / vector_size) ** 0.5
        self.vectors = nn.Parameter(torch.empty(num_vectors, vector_size).uniform_(-limit, limit))

    def forward(self, continuous: Float[Tensor, "batch inputs"]) -> Quantized:
        """Replace each latent's slice of the encoder output by the nearest vector in squared distance.

        Args:
            continuous: encoder output, the latents' vectors one after the other.
        """
        if continuous.shape[-1] != self.num_inputs:
            raise UserError(
                f"The quantiser has {self.num_latents} latents of {self.vector_size} numbers but the encoder gives "
                f"{continuous.shape[-1]}; make the encoder's num_outputs {self.num_inputs}."
            )
        latents = continuous.detach().view(-1, self.num_latents, self.vector_size)
        vectors = self.vectors.detach().float()
        if torch.compiler.is_compiling():
            # Other engines have no cdist; a compiler never holds the differences.
            distance = (latents.float().unsqueeze(-2) - vectors).square().sum(dim=-1)
        else:
            distance = torch.cdist(latents.float(), vectors, compute_mode="donot_use_mm_for_euclid_dist")
        indices = distance.argmin(dim=-1)
        quantized = self.lookup(indices)
        return Quantized(straight_through(continuous, quantized), quantized, indices)

    def lookup(self, indices: Int[Tensor, "batch latents"]) -> Float[Tensor, "batch inputs"]:
        """The stored vectors at ``indices``, one after the other, with gradient to them."""
        return nn.functional.embedding(indices, self.vectors).flatten(-2)

    def sample(
        self, num_samples: int, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "samples inputs"], Int[Tensor, "samples latents"]]:
        """Draw each latent uniformly from the codebook: the codes, with gradient to it, and their indices."""
        shape = (num_samples, self.num_latents)
        indices = torch.randint(self.num_vectors, shape, generator=generator, device=self.vectors.device)
        return self.lookup(indices), indices

    def usage(self, indices: Int[Tensor, "batch latents"]) -> CodebookUsage:
        """How a set of codes uses the codebook, for each latent."""
        return codebook_usage(indices, self.num_vectors)

    def extra_repr(self) -> str:
        return f"num_latents={self.num_latents}, num_vectors={self.num_vectors}, vector_size={self.vector_size}"
