"""RandAugment: each operation against PIL's, and draws that do not depend on the number of processes."""

import math

import pytest
import torch

from stillhouse.data import Augment, load_data
from stillhouse.data.randaugment import OPERATIONS, RandAugment

Image = pytest.importorskip("PIL.Image")


def pictures(count=6, height=18, width=24):
    torch.manual_seed(0)
    noise = torch.rand(count, 3, height, width)
    ramp = torch.linspace(0, 1, width)
    return ((0.3 + 0.5 * (noise * ramp)) * 255).round() / 255


def as_pil(x):
    return Image.fromarray((x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def from_pil(image):
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def geometric(image, matrix, fill=127):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=(fill,) * 3
    )


def reference(name, image, level):
    from PIL import ImageEnhance, ImageOps

    a = abs(level)
    width, height = image.size
    cx, cy = width / 2, height / 2
    match name:
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
        case "posterize":
            return ImageOps.posterize(image, 4 - int(4 * a))
        case "solarize":
            return ImageOps.solarize(image, 256 - int(256 * a))
        case "solarize-add":
            return image.point([min(255, i + int(110 * a)) if i < 128 else i for i in range(256)] * 3)
        case "rotate":
            angle = level * math.pi / 6
            c, s = math.cos(angle), math.sin(angle)
            return geometric(image, (c, -s, cx - c * cx + s * cy, s, c, cy - s * cx - c * cy))
        case "shear-x":
            return geometric(image, (1, 0.3 * level, -0.3 * level * cy, 0, 1, 0))
        case "shear-y":
            return geometric(image, (1, 0, 0, 0.3 * level, 1, -0.3 * level * cx))
        case "translate-x":
            return geometric(image, (1, 0, 0.45 * level * width, 0, 1, 0))
        case "translate-y":
            return geometric(image, (1, 0, 0, 0, 1, 0.45 * level * height))
    kinds = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    return getattr(ImageEnhance, kinds[name])(image).enhance(max(0.1, 1 + 0.9 * level))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0.7, -0.7, 0.2])
def test_an_operation_is_pils(name, level):
    x = pictures()
    found = OPERATIONS[name](x, torch.full((len(x),), level), 127 / 255)
    expected = torch.stack([from_pil(reference(name, as_pil(image), level)) for image in x])
    moving = name.split("-")[0] in ("rotate", "shear", "translate")
    error = (found - expected).abs()
    if moving:
        error = error[..., 2:-2, 2:-2]  # PIL has no values between the border and what lies outside
        outside = (expected == 127 / 255).all(1, keepdim=True).expand_as(expected)[..., 2:-2, 2:-2]
        assert (error[~outside] <= 2 / 255).float().mean() > 0.95
    else:
        # PIL rounds the image that it blends with, and cuts off what it blends to.
        levels = 2 if name in ("color", "contrast", "sharpness") else 1
        assert error.max() <= (levels + 0.01) / 255


def test_level_0_of_what_has_a_strength_changes_nothing():
    x = pictures()
    for name in (
        "rotate",
        "shear-x",
        "shear-y",
        "translate-x",
        "translate-y",
        "color",
        "contrast",
        "brightness",
        "sharpness",
    ):
        torch.testing.assert_close(OPERATIONS[name](x, torch.zeros(len(x)), 0.5), x, rtol=0, atol=1e-6)


def test_two_processes_see_what_one_does():
    x, augment = pictures(8), Augment.parse("rand-augment:9")
    assert augment.magnitude == 9
    torch.manual_seed(3)
    whole = augment(x)
    halves = []
    for rank in range(2):
        torch.manual_seed(3)
        halves.append(augment(x[4 * rank : 4 * rank + 4], rank=rank, world=2))
    torch.testing.assert_close(torch.cat(halves), whole)
    assert whole.shape == x.shape
    assert whole.min() >= -1e-6
    assert whole.max() <= 1 + 1e-6
    assert not torch.equal(whole, x)
    torch.manual_seed(3)
    assert torch.equal(RandAugment(probability=0)(x), x)
    cropped = Augment.parse({"kind": "rand-augment", "first": "shift", "probability": 0})
    torch.manual_seed(5)
    found = cropped(x)
    torch.manual_seed(5)
    assert torch.equal(found, Augment.parse("shift")(x))


def test_it_augments_batches():
    stream = load_data("digits").split("train").batches(16, augment="rand-augment").open(0)
    plain = load_data("digits").split("train").batches(16).open(0)
    torch.manual_seed(0)
    one, other = next(stream), next(plain)
    assert torch.equal(one.index, other.index)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
