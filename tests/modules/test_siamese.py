"""Differentiable siamese augmentation against plain loops over images and pixels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from stillhouse.errors import UserError
from stillhouse.modules.siamese import DSA, OPERATIONS, apply


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bilinear(image, row, column):
    """The value of one image at a real-valued place, zero outside."""
    height, width = image.shape[-2:]
    value = torch.zeros(image.shape[0], dtype=image.dtype)
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < height and 0 <= c < width:
                value = value + image[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return value


def plain(image, operation, p, g):
    """One operation on one image [channels, height, width], pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    if operation == "color":
        out = image + p.brightness[g].item()
        gray = sum(out[c] for c in range(channels)) / channels
        out = torch.stack([(out[c] - gray) * p.saturation[g].item() + gray for c in range(channels)])
        mean = out.sum() / out.numel()
        return (out - mean) * p.contrast[g].item() + mean
    if operation == "flip":
        return image[:, :, list(range(width))[::-1]] if p.flip[g] else image
    if operation == "cutout":
        out = image.clone()
        tall, wide = p.cutout_size
        top, left = p.cutout[g, 0].item() - tall // 2, p.cutout[g, 1].item() - wide // 2
        out[:, max(top, 0) : max(top + tall, 0), max(left, 0) : max(left + wide, 0)] = 0
        return out
    middle = (height - 1) / 2, (width - 1) / 2
    for r in range(height):
        for c in range(width):
            if operation == "crop":
                row, column = r + p.shift[g, 0].item(), c + p.shift[g, 1].item()
                if 0 <= row < height and 0 <= column < width:
                    out[:, r, c] = image[:, row, column]
                continue
            down, right = r - middle[0], c - middle[1]
            if operation == "scale":
                row, column = down * p.scale[g, 1].item(), right * p.scale[g, 0].item()
            else:
                cos, sin = math.cos(p.angle[g]), math.sin(p.angle[g])
                row, column = sin * right + cos * down, cos * right - sin * down
            out[:, r, c] = bilinear(image, row + middle[0], column + middle[1])
    return out


@pytest.mark.parametrize("size", [(8, 8), (6, 11)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_its_plain_loop(operation, size):
    params = DSA(strategy=operation, crop=0.3, rotate=70, scale=1.6).draw(5, size, generator=seeded(0))
    images = torch.randn(15, 3, *size, dtype=torch.float64, generator=seeded(1))
    expected = torch.stack([plain(image, operation, params, i // 3) for i, image in enumerate(images)])
    torch.testing.assert_close(apply(images, params), expected, rtol=0, atol=1e-12)
    assert not torch.equal(expected, images)


@pytest.mark.parametrize("mode", ["one", "all"])
def test_strategies_are_their_plain_loop(mode):
    params = DSA(mode=mode).draw(18, (8, 8), generator=seeded(3))
    images = torch.randn(36, 3, 8, 8, dtype=torch.float64, generator=seeded(1))
    expected = []
    for i, image in enumerate(images):
        for operation in [OPERATIONS[params.choice[i // 2]]] if mode == "one" else OPERATIONS:
            image = plain(image, operation, params, i // 2)
        expected.append(image)
    torch.testing.assert_close(apply(images, params), torch.stack(expected), rtol=0, atol=1e-12)
    if mode == "one":
        assert len(set(params.choice.tolist())) == 6, "the seed must exercise every operation"


def test_real_and_synthetic_images_of_a_class_get_the_same():
    params = DSA().draw(12, (8, 8), generator=seeded(0))
    real = torch.randn(12, 4, 3, 8, 8, generator=seeded(1))
    synthetic = real[:, 2:3]
    assert torch.equal(apply(real, params)[:, 2:3], apply(synthetic, params))
    assert torch.equal(apply(real, params)[:, [3, 1, 0, 2]], apply(real[:, [3, 1, 0, 2]], params))
    mixed = torch.randperm(48, generator=seeded(2))
    by_index = apply(real.flatten(0, 1)[mixed], params, groups=mixed // 4)
    assert torch.equal(by_index, apply(real, params).flatten(0, 1)[mixed])


@pytest.mark.parametrize("mode", ["one", "all"])
def test_groups_of_classes_are_cut_out_exactly(mode):
    params = DSA(mode=mode).draw(9, (8, 8), generator=seeded(0))
    images = torch.randn(9, 5, 3, 8, 8, generator=seeded(1))
    parts = [apply(images[first : first + 2], params[first : first + 2]) for first in range(0, 9, 2)]
    assert torch.equal(torch.cat(parts), apply(images, params))
    chosen = torch.tensor([7, 2])
    assert torch.equal(apply(images[chosen], params[chosen]), apply(images, params)[chosen])
    assert len(params[chosen]) == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_differentiable_in_the_pixels(operation):
    params = DSA(strategy=operation).draw(2, (5, 4), generator=seeded(5))
    images = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply(x, params), images)


def test_images_left_alone_stay_bit_for_bit():
    params = DSA().draw(6, (6, 6), generator=seeded(0))
    still = replace(params, choice=torch.full((6,), OPERATIONS.index("flip")), flip=torch.arange(6) == 0)
    images = torch.randn(6, 3, 6, 6, generator=seeded(1))
    out = apply(images, still)
    assert torch.equal(out[1:], images[1:])
    assert torch.equal(out[0], images[0].flip(-1))


def test_a_quarter_turn_and_a_zoom_out():
    params = DSA(strategy="rotate").draw(1, (6, 6))
    image = torch.randn(1, 2, 6, 6, dtype=torch.float64, generator=seeded(1))
    turned = apply(image, replace(params, angle=torch.tensor([math.pi / 2], dtype=torch.float64)))
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2, 3)), rtol=0, atol=1e-12)
    params = DSA(strategy="scale").draw(1, (8, 8))
    shrunk = apply(torch.ones(1, 1, 8, 8), replace(params, scale=torch.tensor([[2.0, 1.0]])))
    assert shrunk[0, 0, 4].tolist() == [0, 0, 1, 1, 1, 1, 0, 0], "a factor of two on x shows twice the width"
    assert (shrunk[0, 0, :, 4] == 1).all(), "and leaves y"


def test_rotation_keeps_proportions_of_wide_images():
    params = DSA(strategy="rotate").draw(1, (9, 15))
    image = torch.zeros(1, 1, 9, 15)
    image[..., 4, 7 + 3] = 1
    turned = apply(image, replace(params, angle=torch.tensor([math.pi / 2])))
    assert turned.argmax() == 1 * 15 + 7, "a point 3 pixels to the right goes 3 pixels up"


def test_ranges_of_the_defaults():
    p = DSA().draw(20_000, (32, 28), generator=seeded(0))

    def within(values, low, high, slack):
        assert values.min() >= low
        assert values.max() <= high
        assert values.min() <= low + slack
        assert values.max() >= high - slack

    within(p.brightness, -0.5, 0.5, 0.01)
    within(p.saturation, 0, 2, 0.01)
    within(p.contrast, 0.5, 1.5, 0.01)
    within(p.scale, 1 / 1.2, 1.2, 0.01)
    within(p.angle, -math.radians(15), math.radians(15), 0.01)
    within(p.shift[:, 0], -4, 4, 0)
    within(p.shift[:, 1], -4, 4, 0)  # 28 / 8 = 3.5 is rounded up
    assert p.cutout_size == (16, 14)
    within(p.cutout[:, 0], 0, 32, 0)
    within(p.cutout[:, 1], 0, 28, 0)
    counts = torch.bincount(p.choice, minlength=6) / 20_000
    torch.testing.assert_close(counts, torch.full((6,), 1 / 6), rtol=0, atol=0.01)
    assert abs(p.flip.float().mean() - 0.5) < 0.02
    odd = DSA().draw(5_000, (31, 31), generator=seeded(0))
    assert odd.cutout_size == (16, 16)
    assert DSA(cutout=0.1).draw(5_000, (32, 32), generator=seeded(0)).cutout.max() == 31, (
        "an odd box stays centred inside"
    )


def test_draws_follow_their_generator_and_nothing_else():
    long, short = DSA().draw(40, (8, 8), generator=seeded(4)), DSA().draw(7, (8, 8), generator=seeded(4))
    assert torch.equal(long.angle[:7], short.angle)
    assert torch.equal(long.choice[:7], short.choice)
    narrow = DSA(strategy="rotate").draw(40, (8, 8), generator=seeded(4))
    assert torch.equal(narrow.angle, long.angle)
    torch.manual_seed(11)
    first = DSA().draw(3, (8, 8))
    torch.manual_seed(11)
    assert torch.equal(DSA().draw(3, (8, 8)).scale, first.scale)
    assert not torch.equal(DSA().draw(3, (8, 8)).scale, first.scale)


def test_training_batches_share_the_operation_not_its_parameters():
    images = torch.ones(64, 3, 8, 8)
    seen = set()
    for seed in range(40):
        params = DSA().draw(64, (8, 8), shared_choice=True, generator=seeded(seed))
        assert len(params.choice.unique()) == 1
        assert len(params.angle.unique()) == 64
        seen.add(int(params.choice[0]))
        assert torch.equal(DSA().augment(images, generator=seeded(seed)), apply(images, params))
    assert seen == set(range(6))


def test_none_changes_nothing_and_specs_read_from_text():
    images = torch.randn(4, 3, 8, 8)
    none = DSA.model_validate("none")
    assert none.operations == ()
    assert none.augment(images) is images
    assert apply(images, none.draw(2, (8, 8))) is images
    dsa = DSA.model_validate("color_crop_cutout_scale_rotate")
    assert "flip" not in dsa.operations
    assert DSA.model_validate(dsa.dump()) == dsa


def test_half_precision_is_kept_and_resampled_in_single():
    images = torch.randn(6, 3, 64, 64, generator=seeded(0)).bfloat16()
    for operation in OPERATIONS:
        params = DSA(strategy=operation).draw(6, (64, 64), generator=seeded(1))
        out = apply(images, params)
        assert out.dtype == torch.bfloat16
        if operation in ("scale", "rotate"):
            assert torch.equal(out, apply(images.float(), params).bfloat16())


def test_rotation_and_flip_equal_kornia():
    transform = pytest.importorskip("kornia").geometry.transform
    images = torch.randn(4, 3, 12, 9, dtype=torch.float64, generator=seeded(0))
    params = DSA(strategy="rotate").draw(4, (12, 9), generator=seeded(1))
    expected = transform.rotate(images, params.angle.rad2deg(), align_corners=False)
    torch.testing.assert_close(apply(images, params), expected, rtol=0, atol=1e-9)
    params = DSA(strategy="flip", flip=1).draw(4, (12, 9))
    assert torch.equal(apply(images, params), transform.hflip(images))


def test_bad_input_is_told_in_a_sentence():
    with pytest.raises(ValidationError, match="no operation 'rotation' in the strategy; did you mean 'rotate'"):
        DSA(strategy="color_rotation")
    with pytest.raises(ValidationError, match="names an operation twice"):
        DSA(strategy="crop_crop")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        DSA(scale=0.5)
    params = DSA().draw(3, (8, 8))
    with pytest.raises(UserError, match=r"drawn for images of 8x8, not 4x4\."):
        apply(torch.zeros(3, 1, 4, 4), params)
    with pytest.raises(UserError, match="4 images are not 3 groups of equal size"):
        apply(torch.zeros(4, 1, 8, 8), params)
