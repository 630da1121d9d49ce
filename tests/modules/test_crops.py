"""Crops against torch's own resize and brute force; strips and stitching by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse.errors import UserError
from stillhouse.modules.crops import crop_resized, random_crops, random_strips, shuffle_strips, stitch


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(8, 8), (11, 5), (20, 24)])
def test_a_crop_is_torchs_antialiased_resize_of_the_part(size):
    images = torch.randn(40, 3, 12, 17, dtype=torch.float64, generator=seeded(0))
    boxes = random_crops(40, (12, 17), generator=seeded(1))
    mirrored = torch.arange(40) % 2 == 0
    found = crop_resized(images, boxes, size, mirrored)
    for image, (top, left, height, width), flip, one in zip(images, boxes.tolist(), mirrored, found, strict=True):
        part = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(part, size=size, mode="bilinear", antialias=True, align_corners=False)[0]
        torch.testing.assert_close(one, expected.flip(-1) if flip else expected, rtol=1e-12, atol=1e-12)


def test_the_whole_image_comes_back_bit_for_bit_and_gradients_reach_only_the_part():
    images = torch.randn(2, 1, 6, 6, generator=seeded(0), requires_grad=True)
    whole = crop_resized(images, torch.tensor([[0, 0, 6, 6]] * 2))
    assert torch.equal(whole, images)
    crop_resized(images, torch.tensor([[1, 2, 3, 2]] * 2)).sum().backward()
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[1:4, 2:4] = True
    assert bool((images.grad[:, 0, inside] > 0).all())
    assert bool((images.grad[:, 0, ~inside] == 0).all())


def test_crops_lie_inside_with_the_areas_and_proportions_asked():
    boxes = random_crops(20000, (40, 60), smallest=0.1, largest=0.5, ratio=4 / 3, generator=seeded(2))
    top, left, height, width = boxes.unbind(1)
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 40) & (left + width <= 60)).all())
    area = height * width / (40 * 60)
    assert 0.09 < area.min() < 0.12
    assert 0.48 < area.max() < 0.52
    assert area.mean() == pytest.approx(0.3, abs=0.01)
    proportions = (width / height).log() / math.log(4 / 3)
    assert bool((proportions.abs() < 1.25).all())
    assert proportions.mean() == pytest.approx(0, abs=0.02)
    assert (top / (40 - height).clamp_min(1)).mean() == pytest.approx(0.5, abs=0.01)


def test_what_never_fits_is_the_largest_centred_box():
    # An area above the image's never fits.
    boxes = random_crops(3, (10, 40), smallest=2.0, largest=3.0, ratio=2.0, generator=seeded(0))
    assert boxes.tolist() == [[0, 10, 10, 20]] * 3
    assert random_crops(1, (40, 10), smallest=2.0, largest=3.0, ratio=2.0).tolist() == [[10, 0, 20, 10]]
    assert random_crops(1, (8, 8), smallest=2.0, largest=3.0).tolist() == [[0, 0, 8, 8]]


@pytest.mark.parametrize(("sides", "strips"), [((6, 6), 2), ((7, 5), 2), ((8, 10), 3)])
def test_strips_are_laid_as_by_cutting_and_joining(sides, strips):
    images = torch.randn(6, 2, *sides, generator=seeded(0))
    orders = random_strips(6, strips, generator=seeded(1))
    found = shuffle_strips(images, orders)
    for image, (rows, columns), one in zip(images, orders.tolist(), found, strict=True):

        def cut(x, dim):
            size = x.shape[dim] // strips
            return torch.split(x, [size] * (strips - 1) + [x.shape[dim] - size * (strips - 1)], dim)

        down = torch.cat([cut(image, 1)[row] for row in rows], 1)
        assert torch.equal(one, torch.cat([cut(down, 2)[column] for column in columns], 2))


def test_one_strip_is_the_image_itself():
    images = torch.randn(2, 1, 4, 4)
    assert shuffle_strips(images, random_strips(2, 1)) is images


def test_stitching_takes_every_nth_part():
    parts = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2)
    images = stitch(parts, (4, 4), 2)
    assert images[0, 0, ::2, ::2].tolist() == [[0, 2], [4, 6]]
    assert images[1, 0, ::2, ::2].tolist() == [[1, 3], [5, 7]]
    whole = torch.randn(3, 1, 5, 5)
    assert torch.equal(stitch(whole, (5, 5), 1), whole)


def test_a_rest_of_the_side_goes_to_the_first_parts():
    images = stitch(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2), (5, 5), 2)
    assert images[0, 0, 2].tolist() == [0, 0, 0, 1, 1]
    assert images[0, 0, 3].tolist() == [2, 2, 2, 3, 3]


def test_parts_that_make_no_images_are_refused():
    with pytest.raises(UserError, match="5 parts do not make whole images of 2 x 2"):
        stitch(torch.zeros(5, 1, 2, 2), (4, 4), 2)
    with pytest.raises(UserError, match="no room for 3 parts"):
        stitch(torch.zeros(9, 1, 1, 1), (2, 2), 3)
