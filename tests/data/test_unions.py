"""Data sets joined: every sample in the form of the first, no label anywhere, from memory and from disk alike."""

import pytest
import torch

from stillhouse.data import fitted, load_data, union
from stillhouse.errors import UserError


def images(count, channels=3, size=8, dtype=torch.uint8, **fields):
    torch.manual_seed(count)
    x = torch.randint(256, (count, channels, size, size)).to(dtype)
    if dtype != torch.uint8:
        x = x / 255
    return load_data({"kind": "object", "object": (x, torch.arange(count) % 3), "validation": 0, "test": 0, **fields})


def test_samples_follow_one_another_without_labels():
    one, other = images(5), images(7)
    whole = union([one.split("train"), other.split("train")])
    assert len(whole) == 12
    batch = whole.batch([0, 4, 5, 11])
    assert set(batch) == {"pixel_values", "index"}
    assert whole.facts.task == "unlabelled"
    assert whole.facts.num_classes is None
    mine, theirs = one.split("train").batch([0, 4]), other.split("train").batch([0, 6])
    assert torch.equal(batch["pixel_values"], torch.cat([mine["pixel_values"], theirs["pixel_values"]]))
    assert batch.index.tolist() == [0, 4, 5, 11]
    with pytest.raises(UserError, match="has no labels"):
        _ = whole.labels


def test_pixels_take_the_space_of_the_first():
    """Bytes, floats and 17 grey levels: the same picture is the same numbers, whatever it was stored as."""
    digits = load_data("digits").split("train")
    levels = digits.source.tensors["pixel_values"]
    for scaled, tolerance in ((levels.float() / 16, 1e-6), ((levels.float() * 255 / 16).round().to(torch.uint8), 0.02)):
        pool = load_data({"kind": "object", "object": (scaled,), "validation": 0, "test": 0})
        joined = union([digits, pool.split("train")])
        count = len(digits)
        index = torch.arange(20)
        ours, theirs = joined.batch(index)["pixel_values"], joined.batch(index + count)["pixel_values"]
        assert torch.equal(ours, digits.batch(index)["pixel_values"])
        torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)


def test_standardised_images_keep_the_firsts_mean_and_deviation():
    first = images(40, pixels="standard")
    second = images(30, pixels="symmetric")
    joined = union([first.split("train"), second.split("train")])
    expected = first.scale.from_unit(second.to_unit(second.split("train").batch([3])["pixel_values"]))
    torch.testing.assert_close(joined.batch([43])["pixel_values"], expected)


def test_size_and_colours_are_the_firsts():
    colour, grey = images(4, 3, 8), images(4, 1, 12)
    joined = union([colour.split("train"), grey.split("train")])
    assert joined.batch([0, 5])["pixel_values"].shape == (2, 3, 8, 8)
    seen = joined.batch([5])["pixel_values"][0]
    assert torch.equal(seen[0], seen[1])
    joined = union([grey.split("train"), colour.split("train")])
    assert joined.batch([0, 5])["pixel_values"].shape == (2, 1, 12, 12)
    plain = union([images(4, 1, 8).split("train"), colour.split("train")])
    stored = colour.split("train").source.tensors["pixel_values"][0].float()
    luminance = (0.299 * stored[0] + 0.587 * stored[1] + 0.114 * stored[2]).round() / 255
    torch.testing.assert_close(plain.batch([4])["pixel_values"][0, 0], luminance)


def test_memory_and_streams_agree():
    one, other = images(50), images(30, 1)
    streamed = [images(50, in_memory=False), images(30, 1, in_memory=False)]
    index = torch.tensor([79, 0, 50, 49, 3])
    held = union([one.split("train"), other.split("train")])
    assert held.tensors is not None
    lazily = [data.split("train") for data in streamed]
    from stillhouse.data.dataset import Split
    from stillhouse.data.sources import Selected

    lazily = [Split(s.name, s.facts, Selected(s.source, torch.arange(len(s))), scale=s.scale) for s in lazily]
    read = union(lazily)
    assert read.tensors is None
    assert torch.equal(held.batch(index)["pixel_values"], read.batch(index)["pixel_values"])
    first, second = (split.batches(8, augment="crop-flip").open(3) for split in (held, read))
    for _ in range(12):
        torch.manual_seed(1)
        a = next(first)
        torch.manual_seed(1)
        b = next(second)
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert torch.equal(a.index, b.index)


def test_vectors_join_where_their_shapes_agree():
    one = load_data((torch.randn(10, 3), torch.arange(10) % 2))
    other = load_data((torch.randn(10, 3),))
    joined = union([one.split("train"), other.split("train")])
    assert len(joined) == len(one.split("train")) + len(other.split("train"))
    with pytest.raises(UserError, match=r"'features' is \[4\] in one and \[3\] in the other"):
        union([one.split("train"), load_data((torch.randn(10, 4),)).split("train")])
    with pytest.raises(UserError, match="need the same inputs"):
        union([one.split("train"), images(5).split("train")])


def test_what_cannot_be_brought_to_one_form():
    with pytest.raises(UserError, match="2 channels cannot be united with images with 3"):
        union([images(4).split("train"), images(4, 2).split("train")])
    wide = load_data({"kind": "object", "object": (torch.rand(4, 3, 6, 8),), "validation": 0, "test": 0})
    with pytest.raises(UserError, match="only where these are square; set image_size"):
        union([wide.split("train"), images(4).split("train")])


def test_a_fitted_split_keeps_what_travels_beside_the_inputs():
    from stillhouse.data.dataset import Split

    like = images(5).split("train")
    tensors = {"pixel_values": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "unreadable": torch.tensor([True, False])}
    part = Split("train", like.facts, tensors, scale=like.scale, aside=frozenset({"unreadable"}))
    assert fitted(part, like, asides=True).batch([0])["unreadable"].item()
    assert "unreadable" not in fitted(part, like).batch([0])
    assert "unreadable" not in union([like, part]).batch([0])
