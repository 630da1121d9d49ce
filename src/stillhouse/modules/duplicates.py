"""Near-duplicates between two sets of images: perceptual hashes, embeddings, and local keypoints for the last word."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import UserError

SIDE, LOW = 32, 8
BITS = LOW * LOW
"""Bits of a perceptual hash."""


def grey(images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n height width"]:
    """Luminance (ITU-R 601) of colour images, the mean of other numbers of channels."""
    if images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype)
        return torch.einsum("nchw,c->nhw", images, weights)
    return images.mean(1)


def perceptual_hash(images: Float[Tensor, "n channels height width"]) -> Bool[Tensor, "n 64"]:
    """64 bits that survive resizing, compression and small changes of brightness.

    The 8 x 8 lowest frequencies (DCT-II) of the image at 32 x 32 grey levels, each above or below their median ("pHash").

    >>> _ = torch.manual_seed(0)
    >>> image = F.interpolate(torch.rand(1, 3, 6, 6), 64, mode="bilinear")
    >>> smaller = F.interpolate(image, 48, mode="bilinear", antialias=True)
    >>> int((perceptual_hash(image) != perceptual_hash(0.9 * smaller)).sum()) <= 2
    True
    """
    small = F.interpolate(
        grey(images.float())[:, None], size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
    )[:, 0]
    place = torch.arange(SIDE, device=images.device) + 0.5
    basis = torch.cos(math.pi / SIDE * torch.arange(LOW, device=images.device)[:, None] * place)
    low = (basis @ small @ basis.T).flatten(1)
    return low > low.median(1, keepdim=True).values


def hamming(first: Bool[Tensor, "n bits"], second: Bool[Tensor, "m bits"]) -> Int[Tensor, "n m"]:
    """How many bits differ, for every pair."""
    signs = [hashes.float() * 2 - 1 for hashes in (first, second)]
    distance: Tensor = ((first.shape[1] - signs[0] @ signs[1].T) / 2).round().long()
    return distance


INNER = 0.92
"""Side of the inner part by which a cropped copy is known."""


class Gallery:
    """Images that must not come back: those of an evaluation set, as they are and mirrored, whole and without their edge.

    Args:
        hash_distance: most differing bits (of 64) of a near-duplicate's hash.
        cosine: least cosine of a near-duplicate's embedding.
    """

    def __init__(self, hash_distance: int, cosine: float) -> None:
        self.hash_distance, self.cosine = hash_distance, cosine
        self._hashes: list[Tensor] = []
        self._embeddings: list[Tensor] = []
        self._places: list[Tensor] = []
        self._whole: tuple[Tensor, Tensor, Tensor] | None = None

    def add(
        self,
        images: Float[Tensor, "n channels height width"],
        embeddings: Float[Tensor, "n width"],
        mirrored: Float[Tensor, "n width"],
        index: Int[Tensor, " n"],
        part: int = 0,
    ) -> None:
        """Remember images.

        Args:
            images: pictures in [0, 1].
            embeddings: what they are compared by.
            mirrored: the same of their mirror images.
            index: their positions in their set.
            part: number of their set.
        """
        height, width = images.shape[-2:]
        top, left = round(height * (1 - INNER) / 2), round(width * (1 - INNER) / 2)
        for pictures, vectors, flipped in ((images, embeddings, 0), (images.flip(-1), mirrored, 1)):
            for seen in (pictures, pictures[..., top : height - top, left : width - left]):
                self._hashes.append(perceptual_hash(seen))
                self._embeddings.append(F.normalize(vectors.float(), dim=1))
                self._places.append(
                    torch.stack([torch.full_like(index, part), index, torch.full_like(index, flipped)], 1)
                )
        self._whole = None

    def near(
        self, images: Float[Tensor, "n channels height width"], embeddings: Float[Tensor, "n width"]
    ) -> tuple[Int[Tensor, "pairs 5"], Float[Tensor, " pairs"]]:
        """The nearest remembered image of each image that is a near-duplicate of one.

        Both must hold: a hash within :attr:`hash_distance`, and an embedding of at least :attr:`cosine`.

        Returns:
            Position in ``images``; part, index and whether mirrored of the remembered one; differing bits. And the cosine.
        """
        if self._whole is None:
            self._whole = torch.cat(self._hashes), torch.cat(self._embeddings), torch.cat(self._places)
        hashes, vectors, places = self._whole
        distance = hamming(perceptual_hash(images), hashes)
        row, column = (distance <= self.hash_distance).nonzero(as_tuple=True)
        ours = F.normalize(embeddings.float(), dim=1)
        cosine = (
            torch.cat([(ours[r] * vectors[c]).sum(1) for r, c in _in_parts(row, column)]) if len(row) else ours[:0, 0]
        )
        close = cosine >= self.cosine
        row, column, cosine = row[close], column[close], cosine[close]
        # The most alike of each image comes first and is kept.
        order = torch.argsort(cosine, descending=True, stable=True)
        order = order[torch.argsort(row[order], stable=True)]
        row, column, cosine = row[order], column[order], cosine[order]
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        row, column, cosine = row[first], column[first], cosine[first]
        return torch.cat([row[:, None], places[column], distance[row, column][:, None]], 1), cosine


def _in_parts(row: Tensor, column: Tensor, size: int = 2**18) -> Sequence[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(row, size), torch.split(column, size), strict=True))


def pixel_embedding(images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n 256"]:
    """An image as 16 x 16 grey levels less their mean, for data that no network at hand knows."""
    small = F.interpolate(
        grey(images.float())[:, None], size=(16, 16), mode="bilinear", antialias=True, align_corners=False
    )
    flat = small.flatten(1)
    return flat - flat.mean(1, keepdim=True)


def matching_keypoints(
    first: Float[Tensor, "1 channels height width"], second: Float[Tensor, "1 channels height width"]
) -> int:
    """How many SIFT keypoints of two images match one another, the second as it is or mirrored (whichever has more).

    Mutual nearest neighbours that pass the ratio test at 0.8. Keypoints need detail: images below 64 pixels are enlarged.

    Raises:
        UserError: kornia is missing.
    """
    try:
        import kornia.feature as local
    except ImportError:
        raise UserError("SIFT keypoints need kornia: pip install 'stillhouse[knowledge]'.") from None
    sift = local.SIFTFeature(num_features=256, upright=False)

    def described(image: Tensor) -> Tensor:
        pixels = grey(image.float())[:, None]
        if min(pixels.shape[-2:]) < 64:
            pixels = F.interpolate(pixels, scale_factor=math.ceil(64 / min(pixels.shape[-2:])), mode="bicubic")
        found: Tensor = sift(pixels)[2][0]
        return found

    ours = described(first)
    counts = [0]
    for image in (second, second.flip(-1)):
        theirs = described(image)
        if min(len(ours), len(theirs)) >= 2:
            _, pairs = local.match_smnn(ours, theirs, 0.8)
            counts.append(len(pairs))
    return max(counts)
