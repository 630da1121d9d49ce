"""The distilled set: layouts, targets, gradients, sizes, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.modules.distilled import DistilledSet


@pytest.fixture
def real():
    torch.manual_seed(0)
    return torch.randn(12, 3, 4, 5), torch.arange(12) % 3


def test_starts_from_samples_ordered_by_class(real):
    images, labels = real
    distilled = DistilledSet.from_samples(images, labels, torch.tensor([5, 0, 1, 3, 2, 4]), provenance={"method": "DM"})
    assert distilled.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(distilled.images, images[[0, 3, 1, 4, 5, 2]])
    assert distilled.provenance == {"method": "DM", "start": {"samples": [0, 3, 1, 4, 5, 2]}}
    assert (distilled.num_classes, distilled.images_per_class, len(distilled)) == (3, 2, 6)
    with torch.no_grad():
        DistilledSet(images, labels).images.zero_()
    assert images.abs().min() > 0, "the real images are copied"


def test_by_class_is_a_view_with_gradient(real):
    distilled = DistilledSet.from_samples(*real, torch.arange(6))
    assert distilled.by_class.shape == (3, 2, 3, 4, 5)
    distilled.by_class[1].sum().backward()
    assert distilled.images.grad.sum((1, 2, 3)).tolist() == [0, 0, 60, 60, 0, 0]
    with torch.no_grad():
        distilled.by_class[2].fill_(7)
    assert (distilled.images[4:] == 7).all()


def test_noise_follows_its_generator():
    one, two, three = (
        DistilledSet.from_noise(3, 2, (1, 4, 4), generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, three.images)
    assert one.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert one.provenance == {"start": "noise"}


def test_only_what_is_learned_is_a_parameter(real):
    images, labels = real
    indices = torch.tensor([2, 0, 1])
    logits = torch.randn(3, 3)
    hard = DistilledSet.from_samples(images, labels, indices)
    assert [name for name, _ in hard.named_parameters()] == ["images"]
    soft = DistilledSet.from_samples(
        images, labels, indices, soft_labels=logits, target="logits", learn_labels=True, lr=0.01
    )
    assert sorted(name for name, _ in soft.named_parameters()) == ["images", "labels", "lr"]
    assert torch.equal(soft.labels, logits[[1, 2, 0]]), "soft labels are sorted with their images"
    assert soft.class_of.tolist() == [0, 1, 2]
    fixed = DistilledSet.from_samples(images, labels, indices, soft_labels=logits, target="probabilities")
    assert [name for name, _ in fixed.named_parameters()] == ["images"]
    assert "labels" in fixed.state_dict()


def test_targets(real):
    images, _ = real
    values = torch.randn(12, 3, requires_grad=True)
    logits = DistilledSet(images, values, target="logits", learn_labels=True)
    torch.testing.assert_close(logits.targets(), values.softmax(-1))
    assert torch.equal(logits.targets(torch.tensor([4, 1])), logits.targets()[[4, 1]])
    batch = logits(torch.tensor([4, 1]))
    (batch["pixel_values"].sum() + batch["labels"][:, 0].sum()).backward()
    assert logits.images.grad.flatten(1).any(1).nonzero().flatten().tolist() == [1, 4]
    assert logits.labels.grad.any(1).nonzero().flatten().tolist() == [1, 4]
    features = DistilledSet(images, values, target="features")
    assert torch.equal(features()["labels"], values)
    assert features.class_of is None
    assert features.num_classes is None


def test_pixels_undo_standardisation_and_count_what_they_cut():
    unit = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    standard = (unit - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    distilled = DistilledSet(standard, torch.tensor([0, 1]), mean=mean, std=std)
    torch.testing.assert_close(distilled.pixels, unit)
    assert distilled.clipped == 0
    with torch.no_grad():
        distilled.images[0, 0, 0, :3] = 100
    assert distilled.clipped == pytest.approx(3 / 96)
    assert distilled.pixels.max() == 1
    assert not distilled.pixels.requires_grad


def test_bytes_are_those_of_the_stored_tensors(real):
    images, labels = real
    assert DistilledSet(images, labels).bytes == 12 * 60 * 4 + 12 * 8
    soft = DistilledSet(images, torch.zeros(12, 3), target="logits", classes=labels, lr=0.1)
    assert soft.bytes == 12 * 60 * 4 + 12 * 3 * 4 + 12 * 8 + 4


def test_unequal_classes_have_no_view_by_class(real):
    images, labels = real
    assert DistilledSet(images, labels).images_per_class is None, "not ordered"
    assert DistilledSet.from_samples(images, labels, torch.tensor([0, 1, 2, 3])).images_per_class is None
    missing = DistilledSet.from_samples(images, labels, torch.tensor([0, 1]), num_classes=3)
    with pytest.raises(UserError, match="same number of images of every class"):
        _ = missing.by_class


def test_bad_input_is_told_in_a_sentence(real):
    images, labels = real
    cases = [
        (lambda: DistilledSet(images[:0], labels[:0]), "at least one sample"),
        (lambda: DistilledSet((images * 255).byte(), labels), "a float tensor .* not uint8"),
        (lambda: DistilledSet(images, labels[:5]), "12 distilled images need as many labels, not 5"),
        (lambda: DistilledSet(images, labels.float()), "Hard labels are class numbers"),
        (lambda: DistilledSet(images, labels, learn_labels=True), "Hard labels cannot be learned"),
        (lambda: DistilledSet(images, labels, target="logits"), "'logits' are a float tensor"),
        (lambda: DistilledSet(images, labels, num_classes=2), r"in 0\.\.1, not 0\.\.2"),
        (lambda: DistilledSet(images, labels, lr=0), "step size of a distilled set must be positive, not 0"),
        (lambda: DistilledSet(images, labels, std=(1, 0, 1)), "std needs 3 numbers"),
        (lambda: DistilledSet(images, labels, mean=(0.5,)), "mean needs 3 numbers"),
        (lambda: DistilledSet(images, labels, provenance={"x": images}), "plain JSON values"),
        (lambda: DistilledSet.from_noise(3, 0, (1, 4, 4)), "at least one class and one image per class, not 3 and 0"),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message):
            make()
