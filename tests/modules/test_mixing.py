"""Mixing: exact counts, pairs and shares; images and labels are mixed by the same ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from stillhouse.errors import UserError
from stillhouse.modules.mixing import CutMix, Mixing, Mixup, NoMixing


def codes(count, side=4):
    """Images whose every pixel is the one-hot code of their place in the batch."""
    return torch.eye(count)[:, :, None, None].expand(-1, -1, side, side).clone()


@pytest.mark.parametrize(("fraction", "mixed"), [(0.1, 6), (0.5, 32), (1.0, 64), (0.0, 0)])
def test_an_exact_number_of_samples_is_mixed_each_with_another(fraction, mixed):
    for seed in range(20):
        torch.manual_seed(seed)
        mixture = Mixup(fraction=fraction).draw(torch.zeros(64, 1, 4, 4))
        assert int(mixture.mixed.sum()) == int((mixture.share < 1).sum()) == mixed
        assert (mixture.first != mixture.second).all()
        assert mixture.first.sort().values.tolist() == mixture.second.sort().values.tolist() == list(range(64))


@pytest.mark.parametrize(
    "mixing", [Mixup(), Mixup(fraction=0.25), CutMix(), Mixup(released_sampling=True, fraction=0.1)]
)
def test_images_and_labels_are_mixed_by_the_same_pairs_and_shares(mixing):
    torch.manual_seed(1)
    images, labels = codes(16, side=8), torch.arange(16)
    mixture = mixing.draw(images)
    soft = mixture.labels(labels, 16)
    # The mean colour of a new image is its label's distribution, to the last pixel of a pasted box.
    assert torch.allclose(mixture.inputs(images).mean((2, 3)), soft, atol=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(16))
    expected = mixture.share[:, None] * F.one_hot(labels[mixture.first], 16) + (1 - mixture.share)[:, None] * F.one_hot(
        labels[mixture.second], 16
    )
    assert torch.allclose(soft, expected)


def test_whole_samples_come_out_exactly_in_the_order_of_the_first_part():
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    mixture = Mixup(fraction=0.0).draw(x)
    assert torch.equal(mixture.inputs(x), x[mixture.first])
    assert torch.equal(mixture.labels(torch.arange(8), 8).argmax(1), mixture.first)
    untouched = NoMixing().draw(x)
    assert torch.equal(untouched.inputs(x), x)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta_distributed(alpha):
    torch.manual_seed(0)
    share = Mixup(alpha=alpha).draw(torch.zeros(20000, 1)).share
    variance = 1 / (4 * (2 * alpha + 1))
    assert share.mean() == pytest.approx(0.5, abs=5 * math.sqrt(variance / 20000))
    assert share.var() == pytest.approx(variance, rel=0.05)


def test_released_sampling_mixes_more_than_it_says():
    torch.manual_seed(0)
    mixture = Mixup(fraction=0.1, released_sampling=True).draw(torch.zeros(20000, 1))
    assert float((mixture.share < 1).float().mean()) == pytest.approx(math.exp(-0.9), abs=0.02)
    torch.manual_seed(0)
    alone = [
        int((m.first == m.second).sum())
        for m in (Mixup(released_sampling=True).draw(torch.zeros(50, 1)) for _ in range(400))
    ]
    assert sum(alone) / 400 == pytest.approx(1.0, abs=0.2)


def test_a_box_has_the_area_that_its_share_says():
    torch.manual_seed(0)
    images = codes(200, side=16)
    mixture = CutMix().draw(images)
    assert torch.allclose(mixture.share, 1 - mixture.pasted.float().mean((1, 2)))
    for box in mixture.pasted[:50]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None])
        assert int(rows.int().diff().abs().sum()) <= 2
    assert mixture.pasted.flatten(1).any(1).float().mean() > 0.9


def test_one_lambda_or_none_for_a_batch():
    torch.manual_seed(0)
    shares = Mixup(shared=True).draw(torch.zeros(16, 1)).share
    assert len(shares.unique()) == 1
    mixture = CutMix(shared=True).draw(torch.zeros(16, 1, 8, 8))
    assert len(mixture.pasted.flatten(1).unique(dim=0)) == 1
    mixed = [bool(Mixup(probability=0.5).draw(torch.zeros(4, 1)).mixed.any()) for _ in range(200)]
    assert 70 < sum(mixed) < 130


def test_processes_draw_shares_of_one_global_batch():
    def shares(rank, world, count):
        torch.manual_seed(3)
        return Mixup().draw(torch.zeros(count, 1), rank=rank, world=world)

    whole = shares(0, 1, 8)
    parts = [shares(rank, 2, 4) for rank in range(2)]
    assert torch.equal(torch.cat([part.share for part in parts]), whole.share)
    assert not torch.equal(parts[0].first, parts[1].first)


def test_vectors_of_labels_and_targets_are_blended_as_they_are():
    torch.manual_seed(0)
    mixture = Mixup().draw(torch.zeros(6, 2))
    several = torch.tensor([[1.0, 1, 0], [0, 1, 1]]).repeat(3, 1)
    assert torch.allclose(mixture.labels(several).sum(1), torch.full((6,), 2.0))
    targets = torch.arange(6.0)
    share = mixture.share
    assert torch.allclose(mixture.labels(targets), share * mixture.first + (1 - share) * mixture.second)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"kind": "mixup", "fraction": 1.5}, "fraction|less than|at most"),
        ({"kind": "mixup", "fraction": -0.1}, "fraction|at least"),
        ({"kind": "mixup", "alpha": 0}, "greater than|above|more than"),
        ("mixup:much", "no alpha above 0"),
        ("mixpu", "did you mean 'mixup'"),
    ],
)
def test_bad_fields_are_refused(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        Mixing.parse(value)


def test_what_cannot_be_mixed_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="A batch of 1 sample has no two to mix"):
        Mixup().draw(torch.zeros(1, 3))
    with pytest.raises(UserError, match=r"0\.1 of a batch of 4 is not one sample"):
        Mixup(fraction=0.1).draw(torch.zeros(4, 3))
    with pytest.raises(UserError, match="CutMix pastes boxes into images"):
        CutMix().draw(torch.zeros(4, 3))
    mixture = Mixup().draw(torch.zeros(4, 3))
    with pytest.raises(UserError, match="not as uint8; scale pixels"):
        mixture.inputs(torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="the number of classes is needed"):
        mixture.labels(torch.arange(4))


def test_text_forms():
    assert Mixing.parse("mixup:0.2") == Mixup(alpha=0.2)
    assert Mixing.parse("cutmix").kind == "cutmix"
    assert Mixing.parse("none") == NoMixing()
