import hashlib

import numpy as np
import pytest
import torch

from stillhouse.data import Scenes, Sprites, load_data
from stillhouse.errors import UserError

SMALL = {"kind": "sprites", "size": 16, "scales": 2, "orientations": 4, "positions": 3}


@pytest.mark.parametrize("value", [SMALL, "scenes"])
def test_every_combination_once(value):
    data = load_data(value)
    sizes = list(data.facts.factors.values())
    sources = torch.cat([split.tensors["sources"] for split in data.splits.values()])
    assert len(sources) == np.prod(sizes)
    assert len(sources.unique(dim=0)) == len(sources)
    assert (sources.max(0).values + 1).tolist() == sizes
    batch = data.split("train").batch([0, 1])
    assert list(batch.inputs) == ["pixel_values"]
    assert batch["sources"].dtype == torch.long
    assert "labels" not in batch
    assert data.facts.task == "unlabelled"
    assert data.facts.num_classes is None


def test_scenes_are_what_the_paper_check_asks_for():
    data = load_data({"kind": "scenes", "held_out": 0})
    assert list(data.splits) == ["train"]
    assert len(data.split("train")) == 576
    assert data.facts.inputs == {"pixel_values": (3, 32, 32)}
    pixels = data.split("train").tensors["pixel_values"]
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert len(pixels.flatten(1).unique(dim=0)) == 576


def test_shapes_stay_inside_and_have_their_area():
    spec = Sprites(size=64)
    grid = torch.cartesian_prod(*(torch.arange(n) for n in spec.factors().values()))
    images = spec.draw(grid[::7]).float() / 255
    border = torch.ones(64, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert images[..., border].max() == 0
    area = images.sum((1, 2, 3)) / 64**2
    shape, scale = grid[::7, 0], 0.5 + 0.25 * grid[::7, 1]
    radius = 0.2 * scale
    torch.testing.assert_close(area[shape == 0], 2 * radius[shape == 0] ** 2, rtol=0.03, atol=0)
    torch.testing.assert_close(area[shape == 1], torch.pi / 2 * radius[shape == 1] ** 2, rtol=0.03, atol=0)
    # A heart: a square of side 2h and two half discs of radius h.
    half = radius[shape == 2] / 2.3
    torch.testing.assert_close(area[shape == 2], (4 + torch.pi) * half**2, rtol=0.05, atol=0)


def test_factors_do_what_they_say():
    spec = Sprites(size=32, positions=8)
    place = torch.arange(32) + 0.5
    base = torch.tensor([1, 2, 0, 3, 3])
    for factor, axis in ((3, 3), (4, 2)):
        sources = base.repeat(8, 1)
        sources[:, factor] = torch.arange(8)
        images = spec.draw(sources).float()
        weights = images.sum((1, 5 - axis)) / images.sum((1, 2, 3))[:, None]
        centres = (weights * place).sum(1)
        torch.testing.assert_close(centres, 32 * torch.linspace(0.22, 0.78, 8), atol=0.05, rtol=0)
    quarter = spec.draw(torch.tensor([[2, 2, 0, 3, 3], [2, 2, 2, 3, 3]]))
    assert not torch.equal(quarter[0], quarter[1])


def test_drawn_batch_by_batch_is_the_same():
    memory, drawn = load_data(SMALL), load_data({**SMALL, "in_memory": False})
    assert drawn.split("train").tensors is None
    assert memory.fingerprint == drawn.fingerprint
    one, other = (data.split("train").batches(16).open(0) for data in (memory, drawn))
    for _ in range(12):
        left, right = next(one), next(other)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_hues_of_scenes():
    spec = Scenes()
    images = spec.draw(torch.tensor([[0, 1, 0, 0, 0], [2, 1, 0, 0, 0]])).float() / 255
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0.6, 0.3, 0.3]), atol=0.01, rtol=0)
    torch.testing.assert_close(images[1, :, 0, 0], torch.tensor([0.3, 0.6, 0.6]), atol=0.01, rtol=0)
    colours = images[:, :, 16, 8]
    torch.testing.assert_close(colours[0], colours[1])


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def write_dsprites(path, complete=True):
    """A file of the published form with few pixels: each image spells its place in the grid."""
    sizes = [1, 3, 6, 40, 32, 32]
    classes = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)
    if not complete:
        classes = classes[:-1]
    imgs = (np.arange(len(classes))[:, None] >> np.arange(20) & 1).astype(np.uint8).reshape(-1, 4, 5)
    metadata = np.empty((), dtype=object)
    metadata[()] = {"bomb": Bomb()}
    np.savez_compressed(path, metadata=metadata, imgs=imgs, latents_classes=classes)


@pytest.fixture(scope="module")
def dsprites(tmp_path_factory):
    path = tmp_path_factory.mktemp("dsprites") / "dsprites.npz"
    write_dsprites(path)
    return path


def test_dsprites_without_opening_its_pickle(dsprites):
    fields = {"kind": "dsprites", "path": str(dsprites), "scales": 2, "orientations": 5, "positions": 4}
    data = load_data(fields)
    assert data.facts.factors == {"shape": 3, "scale": 2, "orientation": 5, "x": 4, "y": 4}
    sources = torch.cat([split.tensors["sources"] for split in data.splits.values()])
    assert len(sources.unique(dim=0)) == len(sources) == 480
    batch = data.split("train").batch(range(20))
    bits = batch["pixel_values"].flatten(1).round().long()
    place = (bits << torch.arange(20)).sum(1)
    original = torch.stack(torch.unravel_index(place, (3, 6, 40, 32, 32)), dim=1)
    kept = [[0, 1, 2], [0, 5], [0, 8, 16, 23, 31], [0, 10, 21, 31], [0, 10, 21, 31]]
    for column, values in enumerate(kept):
        assert torch.equal(torch.tensor(values)[batch["sources"][:, column]], original[:, column])
    content = hashlib.sha256(dsprites.read_bytes()).hexdigest()
    assert load_data({**fields, "sha256": content}).fingerprint == data.fingerprint


def test_dsprites_that_are_not_what_they_should_be(dsprites, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has the SHA-256"):
        load_data({"kind": "dsprites", "path": str(dsprites), "sha256": "0" * 64})
    (tmp_path / "dsprites").mkdir()
    np.savez(tmp_path / "dsprites" / "other.npz", x=np.zeros(3))
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(UserError, match="is not the dSprites file"):
        load_data("dsprites")
    with pytest.raises(UserError, match="There is no file"):
        load_data("dsprites:/nowhere.npz")
    with pytest.raises(UserError, match="a url needs sha256"):
        load_data({"kind": "dsprites", "url": "https://example.org/d.npz"})
    with pytest.raises(UserError, match="must begin with https"):
        load_data({"kind": "dsprites", "url": "http://example.org/d.npz", "sha256": "0" * 64})


def test_an_incomplete_grid_is_refused(tmp_path):
    write_dsprites(tmp_path / "d.npz", complete=False)
    with pytest.raises(UserError, match="grid of factors is not complete"):
        load_data(f"dsprites:{tmp_path / 'd.npz'}")
