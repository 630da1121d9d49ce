"""Views: what is drawn is all that the pixels depend on."""

import pytest
import torch

from stillhouse.modules.crops import crop_resized, shuffle_strips
from stillhouse.modules.soft_views import ViewPlan, Views, seen

WHOLE = {"smallest": 1.0, "ratio": 1.0, "flip": False}


def drawn(count=12, size=(8, 10), seed=0, **fields):
    torch.manual_seed(seed)
    return ViewPlan(**fields).draw(count, size)


@pytest.fixture
def images():
    return torch.randn(12, 3, 8, 10, generator=torch.Generator().manual_seed(5))


def test_every_image_is_the_first_part_of_one_view():
    assert drawn().sources[:, 0].sort().values.tolist() == list(range(12))


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix", {"kind": "cutmix", "shared": True}])
def test_pixels_are_those_of_the_parts_put_together_by_hand(images, mix):
    views = drawn(mix=mix, strips=2)
    found = seen(images, views)
    for row in range(len(views)):
        one, other = (
            crop_resized(
                shuffle_strips(images[source][None], views.strips[row, part][None]),
                views.crops[row, part][None],
                mirrored=views.mirrored[row, part][None],
            )[0]
            for part, source in enumerate(views.sources[row].tolist())
        )
        share = views.share[row]
        expected = share * one + (1 - share) * other
        top, left, height, width = views.pasted[row].tolist()
        expected[:, top : top + height, left : left + width] = other[:, top : top + height, left : left + width]
        torch.testing.assert_close(found[row], expected)


def test_a_part_of_the_views_and_their_small_types_give_the_same_pixels(images):
    views = drawn(mix="cutmix")
    whole = seen(images, views)
    assert torch.equal(seen(images, views[3:7]), whole[3:7])
    assert torch.equal(seen(images, Views(**views.small())), whole)
    assert torch.equal(seen(images, Views.joined([views[:5], views[5:]])), whole)


def test_nothing_drawn_leaves_images_as_they_are(images):
    square = images[..., :8]
    assert torch.equal(seen(square, drawn(size=(8, 8), **WHOLE, mix="none")), square)


def test_one_box_for_a_batch_where_it_is_shared():
    shared = drawn(mix={"kind": "cutmix", "shared": True})
    assert len({tuple(box) for box in shared.pasted.tolist()}) == 1
    assert len({tuple(box) for box in drawn(mix="cutmix").pasted.tolist()}) > 1


def test_a_single_image_is_mixed_with_nothing():
    views = drawn(count=1)
    assert views.sources.tolist() == [[0, 0]]
    assert views.pasted.sum() == 0


def test_gradients_reach_the_images(images):
    images = images.double().requires_grad_()
    views = drawn(mix="mixup")
    seen(images, views).sum().backward()
    assert images.grad.abs().sum() > 0
