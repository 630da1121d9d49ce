"""Copies of images are found again when they were mirrored, cropped, darkened or blurred, and others are left alone."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from stillhouse.modules import duplicates
from stillhouse.modules.duplicates import (
    BITS,
    Gallery,
    hamming,
    matching_keypoints,
    perceptual_hash,
    pixel_embedding,
)


def textures(count, size=48, seed=0):
    """Images with detail at several scales, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.zeros(count, 3, size, size)
    for scale in (3, 6, 12, 24):
        noise = torch.rand(count, 3, scale, scale, generator=generator)
        whole += F.interpolate(noise, size=(size, size), mode="bicubic") / scale**0.5
    low, high = whole.amin((1, 2, 3), keepdim=True), whole.amax((1, 2, 3), keepdim=True)
    return (whole - low) / (high - low)


def cropped(images, edge=2):
    inner = images[..., edge:-edge, edge:-edge]
    return F.interpolate(inner, size=images.shape[-2:], mode="bilinear", antialias=True)


def gallery(images, hash_distance=10, cosine=0.9):
    found = Gallery(hash_distance, cosine)
    embed = pixel_embedding
    for part, (start, chosen) in enumerate(((0, images[:30]), (0, images[30:]))):
        index = torch.arange(start, start + len(chosen))
        found.add(chosen, embed(chosen), embed(chosen.flip(-1)), index, part)
    return found


def test_a_hash_is_a_bit_string_that_survives_small_changes():
    images = textures(40)
    hashes = perceptual_hash(images)
    assert hashes.shape == (40, BITS)
    assert hashes.dtype == torch.bool
    assert torch.equal(perceptual_hash(0.5 * images), hashes), "brightness only scales frequencies"
    resized = F.interpolate(images, 32, mode="bilinear", antialias=True)
    assert (hashes != perceptual_hash(resized)).sum(1).float().mean() < 3
    apart = hamming(hashes, hashes)[~torch.eye(40, dtype=torch.bool)]
    assert apart.float().mean() > 24


def test_hamming_counts_differing_bits():
    torch.manual_seed(0)
    first, second = torch.rand(5, 64) > 0.5, torch.rand(7, 64) > 0.5
    assert torch.equal(hamming(first, second), (first[:, None] != second[None]).sum(-1))


def test_planted_copies_are_found_and_the_others_are_not():
    images, foreign = textures(60), textures(200, seed=1)
    known = gallery(images)
    copies = {
        "as it is": images[10:20],
        "mirrored": images[10:20].flip(-1),
        "cropped": cropped(images[10:20]),
        "mirrored and cropped": cropped(images[10:20]).flip(-1),
        "darker": 0.7 * images[10:20],
        "noisy": (images[10:20] + 0.02 * torch.randn(10, 3, 48, 48)).clamp(0, 1),
    }
    for how, planted in copies.items():
        pairs, cosines = known.near(planted, pixel_embedding(planted))
        assert pairs[:, 0].tolist() == list(range(10)), how
        assert pairs[:, 1].tolist() == [0] * 10
        assert pairs[:, 2].tolist() == list(range(10, 20)), how
        assert pairs[:, 3].tolist() == [int("mirrored" in how)] * 10
        assert (pairs[:, 4] <= 10).all()
        assert (cosines >= 0.9).all()
    pairs, _ = known.near(images[40:42], pixel_embedding(images[40:42]))
    assert pairs[:, 1:3].tolist() == [[1, 10], [1, 11]], "the part and the place within it"
    pairs, cosines = known.near(foreign, pixel_embedding(foreign))
    assert pairs.shape == (0, 5)
    assert cosines.shape == (0,)


def test_both_the_hash_and_the_embedding_must_agree():
    images = textures(10)
    known = gallery(images)
    assert len(known.near(images, -pixel_embedding(images))[0]) == 0
    assert len(known.near(images.flip(-2), pixel_embedding(images))[0]) == 0
    assert len(known.near(images, pixel_embedding(images))[0]) == 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_keypoints_tell_a_copy_from_another_image():
    pytest.importorskip("kornia")
    images = textures(2, size=96)
    same = matching_keypoints(images[:1], cropped(images[:1], 4).flip(-1))
    other = matching_keypoints(images[:1], images[1:])
    assert same >= 10 > 2 * other


def test_the_examples_run():
    assert doctest.testmod(duplicates, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
