import pytest
import torch

from stillhouse.data.pixels import PixelScale, at_size


@pytest.mark.parametrize("space", ["standard", "unit", "symmetric"])
def test_model_space_and_back(space):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(256, (50, 3, 4, 4), generator=generator, dtype=torch.uint8)
    stored[:, 1] //= 3
    scale = PixelScale.of(space, stored, 255)
    model = scale.to_model(stored)
    unit = stored.double() / 255
    channels = unit.transpose(0, 1).flatten(1)
    mean, std = channels.mean(1).view(1, 3, 1, 1), channels.std(1, correction=0).view(1, 3, 1, 1)
    expected = {"standard": (unit - mean) / std, "unit": unit, "symmetric": 2 * unit - 1}[space]
    torch.testing.assert_close(model.double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(scale.to_unit(model), unit.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scale.from_unit(unit.float()), model, atol=2e-6, rtol=1e-6)
    assert stored.dtype == torch.uint8


def test_unit_pixels_equal_the_usual_division_bit_for_bit():
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(PixelScale.of("unit", stored, 255).to_model(stored), stored.float() / 255)


def test_float_pixels_are_not_written_to():
    stored = torch.rand(4, 1, 3, 3)
    before = stored.clone()
    for space in ("standard", "unit", "symmetric"):
        PixelScale.of(space, stored, 1).to_model(stored)
    assert torch.equal(stored, before)


def test_given_floats_are_left_alone_and_still_give_pictures():
    stored = torch.randn(8, 3, 4, 4)
    scale = PixelScale.as_given(stored)
    assert scale.to_model(stored) is stored
    unit = scale.to_unit(stored)
    assert unit.min() == 0
    assert unit.max() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(scale.from_unit(unit), stored, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        PixelScale.as_given(torch.tensor([[[[0.2, 0.7]]]])).to_unit(stored.clamp(0, 1)), stored.clamp(0, 1)
    )


def test_pixels_outside_are_clipped_in_pictures():
    scale = PixelScale.of("symmetric", torch.zeros(1, 1, 1, 1, dtype=torch.uint8), 255)
    assert scale.to_unit(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 1]


def test_a_constant_channel_stays_finite():
    stored = torch.full((2, 1, 2, 2), 7, dtype=torch.uint8)
    assert PixelScale.of("standard", stored, 255).to_model(stored).abs().max() == 0


def test_sizes():
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    framed = at_size(images, 32, 255)
    assert torch.equal(framed[..., 2:30, 2:30], images)
    assert framed[..., :2, :].sum() == framed[..., 30:].sum() == 0
    assert at_size(images, 56, 255).shape == (3, 1, 56, 56)
    flat = torch.full((2, 3, 40, 60), 200, dtype=torch.uint8)
    assert torch.equal(at_size(flat, 16, 255), torch.full((2, 3, 16, 16), 200, dtype=torch.uint8))
