"""The ring: modes where they should be, of the width they should have, always the same."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.data import load_data


def test_modes_lie_on_the_circle_with_their_labels() -> None:
    data = load_data({"kind": "ring", "modes": 4, "radius": 2.0, "std": 0.1, "samples": 4000})
    assert data.facts.inputs == {"features": (2,)}
    assert data.facts.num_classes == 4
    train = data.split("train")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3200, "validation": 400, "test": 400}
    points = train.batch(range(len(train)))["features"]
    for mode, members in train.by_class().items():
        assert len(members) == 800
        angle = 2 * math.pi * mode / 4
        centre = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
        torch.testing.assert_close(points[members].mean(0), centre, rtol=0, atol=0.02)
        torch.testing.assert_close(points[members].std(0), torch.full((2,), 0.1), rtol=0.1, atol=0)


def test_it_is_the_same_every_time() -> None:
    one, two = load_data("ring"), load_data("ring")
    assert one.fingerprint == two.fingerprint
    assert torch.equal(one.split("test").batch([5])["features"], two.split("test").batch([5])["features"])
    assert load_data({"kind": "ring", "std": 0.1}).fingerprint != one.fingerprint


def test_bad_fields_are_refused() -> None:
    from stillhouse.errors import UserError

    with pytest.raises(UserError, match="modes: expected at least 1"):
        load_data({"kind": "ring", "modes": 0})
