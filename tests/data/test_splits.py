import numpy as np
import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.splits import balanced_order, carve, hashes, long_tailed, number_of
from stillhouse.errors import UserError


def splitmix64(number):
    """The finaliser of SplitMix64 (Steele et al. 2014) in whole numbers."""
    mask = 2**64 - 1
    z = number * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def test_hashes_never_change():
    # Splits of published results hang on these numbers: a change here is a change of every split.
    assert number_of("order", 0, 1) == 6930563423497544697
    start = number_of("digits")
    assert hashes(50, "digits").tolist() == [splitmix64(start + place) for place in range(50)]
    assert len(np.unique(hashes(100_000, "x"))) == 100_000


def test_every_prefix_of_a_balanced_order_is_balanced():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    order = balanced_order(labels, len(labels), "s")
    assert sorted(order.tolist()) == list(range(83))
    for size in (3, 6, 9):
        assert torch.bincount(labels[order[:size]], minlength=3).tolist() == [size // 3] * 3
    assert torch.bincount(labels[order[:63]]).tolist() == [30, 30, 3]
    # Larger takes hold the smaller ones, and another salt gives another order.
    assert not torch.equal(order, balanced_order(labels, len(labels), "t"))


@pytest.mark.parametrize("labels", [None, torch.arange(100) % 5])
def test_carved_parts_divide_the_whole(labels):
    parts = carve(labels, 100, {"train": 0.6, "validation": 0.2, "test": 0.2}, "salt")
    assert [len(part) for part in parts.values()] == [60, 20, 20]
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(100))
    if labels is not None:
        assert torch.bincount(labels[parts["test"]]).tolist() == [4] * 5


def test_shares_are_exact_and_small_classes_stay_in_the_first_part():
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate((5923, 6742, 57, 7, 1))])
    parts = carve(labels, len(labels), {"train": 0.9, "validation": 0.1}, "salt")
    assert len(parts["validation"]) == round(0.1 * len(labels))
    counts = torch.bincount(labels[parts["validation"]], minlength=5)
    assert ((counts - 0.1 * torch.bincount(labels)).abs() <= 1).all()
    assert counts[4] == 0


def test_too_few_samples_to_divide():
    with pytest.raises(UserError, match="4 samples are too few"):
        carve(torch.arange(4), 4, {"train": 0.9, "test": 0.1}, "s")


def test_class_sizes_fall_exponentially():
    labels = torch.arange(10).repeat(1000)
    chosen = long_tailed(labels, 10, ratio=100)
    assert labels[chosen].bincount().tolist() == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
    assert (chosen.diff() > 0).all()
    assert set(long_tailed(labels, 10, ratio=200).tolist()) < set(chosen.tolist())
    assert labels[long_tailed(labels, 10, ratio=1, most=5)].bincount().tolist() == [5] * 10
    with pytest.raises(UserError, match="class 8 would have no sample"):
        long_tailed(labels, 10, ratio=5000)
    with pytest.raises(UserError, match="class 1 has 3 samples and is to have 50"):
        long_tailed(torch.tensor([0] * 100 + [1] * 3), 2, ratio=2)


def test_any_data_set_can_have_a_long_tail():
    plain, tailed = load_data("digits"), load_data({"kind": "digits", "long_tail": {"ratio": 10, "most": 100}})
    counts = tailed.split("train").labels.bincount().tolist()
    assert (counts[0], counts[9]) == (100, 10)
    assert counts == sorted(counts, reverse=True)
    assert len(tailed.split("test")) == len(plain.split("test"))
    assert tailed.scale == plain.scale
    assert tailed.fingerprint != plain.fingerprint
    x, y = torch.randn(400, 3), torch.arange(4).repeat(100)
    own = load_data({"kind": "object", "object": {"train": (x, y), "test": (x, y)}, "long_tail": 5})
    # All but what is set aside for validation.
    assert own.split("train").labels.bincount().tolist()[::3] == [90, 18]
    with pytest.raises(UserError, match="train_size and long_tail both choose"):
        load_data({"kind": "digits", "train_size": 5, "long_tail": 2})
    with pytest.raises(UserError, match="long_tail"):
        load_data({"kind": "digits", "long_tail": 0.5})
    with pytest.raises(UserError, match="no class labels"):
        load_data({"kind": "object", "object": (x, x[:, 0]), "long_tail": 2})
