import pytest
import torch

from stillhouse.data import Augment, CropFlip, Kornia, NoAugment, Shift, load_data
from stillhouse.errors import UserError
from stillhouse.spec import Spec, read

PIPELINE = Kornia(
    operations=[
        {"RandomCrop": {"size": [16, 16], "padding": 2}},
        "RandomHorizontalFlip",
        {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1, "p": 0.8}},
        {"RandomErasing": {"p": 0.5}},
        {"RandomGaussianNoise": {"std": 0.05}},
    ]
)
ALL = [CropFlip(padding=2), Shift(by=2), PIPELINE]


@pytest.fixture
def images():
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("augment", ALL, ids=lambda augment: augment.kind)
def test_equal_seeds_give_equal_images_and_samples_differ(augment, images):
    images = images[:1].repeat(16, 1, 1, 1)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augment(images))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0][0], results[0][1])
    assert results[0].shape == images.shape


@pytest.mark.parametrize("augment", ALL, ids=lambda augment: augment.kind)
def test_processes_together_see_what_one_sees(augment, images):
    torch.manual_seed(0)
    whole = augment(images)
    halves = []
    for rank in range(2):
        torch.manual_seed(0)
        halves.append(augment(images[4 * rank : 4 * rank + 4], rank=rank, world=2))
    torch.testing.assert_close(torch.cat(halves), whole, atol=0, rtol=0)


@pytest.mark.parametrize("augment", ALL, ids=lambda augment: augment.kind)
def test_gradients_reach_the_pixels(augment, images):
    pixels = images.clone().requires_grad_()
    augment(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_none_is_the_identity(images):
    assert NoAugment()(images) is images
    assert torch.equal(CropFlip(padding=0, flip=False)(images), images)
    split = load_data("digits").split("train")
    plain, none = split.batches(8).open(0), split.batches(8, augment="none").open(0)
    assert torch.equal(next(plain)["pixel_values"], next(none)["pixel_values"])


def test_crops_are_windows_of_the_framed_image(images):
    torch.manual_seed(0)
    cropped = CropFlip(padding=2)(images)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, crop in zip(padded, cropped, strict=True):
        windows = [image[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert any(torch.equal(crop, w) or torch.equal(crop, w.flip(-1)) for w in windows)


def test_every_offset_and_both_mirrors_come_up():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 5, 5)
    image[..., 2, 1] = 1
    seen = {tuple(map(tuple, one.nonzero().tolist())) for one in CropFlip(padding=1)(image.repeat(500, 1, 1, 1))}
    assert len(seen) == 3 * 5  # three rows; columns 0 to 2, and 2 to 4 in the mirror
    shifted = {tuple(one[0].nonzero()[0].tolist()) for one in Shift(by=1)(image.repeat(300, 1, 1, 1))}
    assert shifted == {(y, x) for y in (1, 2, 3) for x in (0, 1, 2)}


def test_kornia_itself_gives_the_same(images):
    kornia = pytest.importorskip("kornia.augmentation")
    torch.manual_seed(3)
    ours = Kornia(operations=[{"RandomAffine": {"degrees": 20.0, "p": 0.7}}])(images)
    torch.manual_seed(3)
    assert torch.equal(ours, kornia.RandomAffine(degrees=20.0, p=0.7)(images))


def test_black_moves_in_and_pixels_are_in_the_models_space():
    data = load_data("digits")
    stream = data.split("train").batches(64, augment={"kind": "shift", "by": 3}).open(0)
    torch.manual_seed(0)
    pixels = next(stream)["pixel_values"]
    black = data.from_unit(torch.zeros(1, 1, 1, 1)).item()
    assert pixels.min().item() == pytest.approx(black)
    unit = data.to_unit(pixels)
    assert unit.min() == pytest.approx(0, abs=1e-6)
    assert unit.max() <= 1


class Holder(Spec):
    augment: Augment = NoAugment()


def test_written_forms():
    assert read(Holder, {"augment": "crop-flip"}).augment == CropFlip()
    assert read(Holder, {"augment": {"kind": "shift", "by": 2}}).augment == Shift(by=2)
    written = read(Holder, {"augment": {"kind": "kornia", "operations": ["RandomHorizontalFlip"]}})
    assert read(Holder, written.dump()) == written
    assert read(Holder, {"augment": "kornia:RandomHorizontalFlip"}).augment == written.augment


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("crop_flip", "did you mean 'crop-flip'"),
        ({"kind": "shift", "by": -1}, "expected at least 0"),
        ({"kind": "kornia", "operations": []}, "at least 1 item"),
    ],
)
def test_bad_fields(value, message):
    with pytest.raises(UserError, match=message):
        read(Holder, {"augment": value})


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ("RandomHorizontalFlop", "did you mean 'RandomHorizontalFlip'"),
        ("RandomMixUpV2", "no image augmentation"),
        ({"RandomAffine": {"degrees": 10.0, "wings": 2}}, "does not take"),
    ],
)
def test_bad_kornia_operations(operation, message, images):
    pytest.importorskip("kornia.augmentation")
    with pytest.raises(UserError, match=message):
        Kornia(operations=[operation])(images)


def test_augmenting_what_has_no_images():
    data = load_data((torch.zeros(20, 3), torch.arange(20) % 2))
    with pytest.raises(UserError, match="has no images, so augment must be 'none', not 'shift'"):
        data.split("train").batches(4, augment="shift")
    with pytest.raises(UserError, match="did you mean 'shift'"):
        load_data("digits").split("train").batches(4, augment="shifts")


def test_a_resized_crop_shows_a_part_of_the_image_enlarged():
    torch.manual_seed(0)
    # Each pixel says where it is, so the crop's ends can be read off.
    place = torch.linspace(0, 1, 32)
    images = torch.stack([place[:, None].expand(32, 32), place[None].expand(32, 32)])[None].repeat(500, 1, 1, 1)
    crop = Augment.parse({"kind": "resized-crop", "smallest": 0.25, "ratio": 2.0})
    seen = crop(images)
    assert seen.shape == images.shape
    high = (seen[:, 0, -1, 0] - seen[:, 0, 0, 0]) * 31 / 31
    wide = seen[:, 1, 0, -1] - seen[:, 1, 0, 0]
    assert 0.4 < float((wide < 0).float().mean()) < 0.6, "half are mirrored"
    assert (high > 0).all()
    area, ratio = high * wide.abs(), wide.abs() / high
    assert 0.2 < area.min() < 0.3
    assert area.max() <= 1.001
    assert 0.45 < ratio.min() < 0.7
    assert 1.5 < ratio.max() < 2.2
    # The whole image, unmirrored, is the image.
    whole = Augment.parse({"kind": "resized-crop", "smallest": 1.0, "ratio": 1.0, "flip": False})
    assert torch.allclose(whole(images), images, atol=1e-5)
    index = torch.arange(4)
    assert torch.equal(crop.fixed(images[:4], index, 1), crop.fixed(images[:4], index, 1))
