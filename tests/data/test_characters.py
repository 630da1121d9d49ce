"""Printed characters: the same each time, told apart by their pictures, with captions that name them."""

import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.characters import FONTS, caption_ids, drawing
from stillhouse.errors import UserError

SMALL = {"kind": "characters", "characters": "01x", "per_class": 20, "size": 12}


def text_of(ids):
    return bytes(int(i) - 1 for i in ids if i).decode()


def test_samples_are_the_same_each_time_and_captions_name_them():
    data, again = load_data(SMALL), load_data(SMALL)
    assert data.fingerprint == again.fingerprint
    assert data.facts.inputs == {"pixel_values": (1, 12, 12), "input_ids": (40,)}
    assert data.facts.class_names == ("0", "1", "x")
    assert sum(len(split) for split in data.splits.values()) == 60
    batch = data.split("train").batch(range(30))
    for ids, label in zip(batch["input_ids"], batch.labels, strict=True):
        caption = text_of(ids)
        assert "01x"[label] in caption.replace("character", "").replace("font", "").split(",")[0]
    assert len({text_of(ids) for ids in batch["input_ids"]}) > 10
    assert all(len(members) > 5 for members in data.split("train").by_class().values())


def test_a_sample_does_not_depend_on_how_many_there_are():
    # The order over classes is fixed by the list of characters alone.
    few, many = (load_data({**SMALL, "per_class": count, "validation": 0, "test": 0}) for count in (10, 20))
    one, other = (data.split("train").source.tensors["pixel_values"][:30] for data in (few, many))
    assert torch.equal(one, other)


def test_every_font_draws_and_they_differ():
    drawn = {font: drawing("8", font, 60, 0.0, (0, 0), 16) for font in FONTS}
    assert all(picture.max() > 100 for picture in drawn.values())
    assert len({picture.tobytes() for picture in drawn.values()}) == len(FONTS)
    turned = drawing("8", "cmr10", 60, 90.0, (0, 0), 16)
    assert turned.sum() > 0
    assert (turned != drawn["cmr10"]).any()


def test_captions_are_padded_bytes():
    ids = caption_ids(["a 3", "é" * 40])
    assert ids.shape == (2, 40)
    assert ids[0, :3].tolist() == [98, 33, 52]
    assert ids[0, 3:].sum() == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"characters": "00"}, "listed twice"),
        ({"characters": "0 "}, "printable ASCII"),
        ({"characters": "0"}, "at least 2"),
    ],
)
def test_lists_of_characters_are_checked(fields, words):
    with pytest.raises(UserError, match=words):
        load_data({"kind": "characters", **fields})


def test_text_names_the_characters():
    assert load_data({"kind": "characters", "characters": "ab", "per_class": 10}).name == "characters"
    data = load_data("characters:ab")
    assert data.facts.class_names == ("a", "b")
