import pytest
import torch

from stillhouse.data import Batch
from stillhouse.errors import UserError


def test_parts_of_a_batch():
    batch = Batch(
        pixel_values=torch.zeros(3, 1, 2, 2), labels=torch.arange(3), index=torch.arange(3), weight=torch.ones(3)
    )
    assert list(batch.inputs) == ["pixel_values"]
    assert batch.size == 3
    assert batch.labels.tolist() == batch.index.tolist() == [0, 1, 2]


def test_names_set_aside_survive_replace_and_to():
    batch = Batch(features=torch.zeros(2, 3), sensitive=torch.zeros(2))
    batch.aside = frozenset({"sensitive"})
    for other in (batch.to("cpu"), batch.replace(features=torch.ones(2, 3))):
        assert isinstance(other, Batch)
        assert list(other.inputs) == ["features"]
    assert batch["features"].sum() == 0


def test_a_missing_part_is_named():
    with pytest.raises(UserError, match=r"no labels; it holds features\."):
        _ = Batch(features=torch.zeros(1, 1)).labels
