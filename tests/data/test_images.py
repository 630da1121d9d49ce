import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.images import as_bytes
from stillhouse.errors import UserError

Image = pytest.importorskip("PIL.Image")


def fill(place, classes=("cat", "dog"), count=10, size=(8, 8)):
    for label, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (20 * number, 100 * label, 7)).save(place / name / f"{number:02}.png")


def test_one_directory_is_divided_in_a_fixed_way(tmp_path):
    fill(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = load_data({"kind": "folder", "path": str(tmp_path), "pixels": "unit"})
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 14, "validation": 2, "test": 4}
    assert data.facts.class_names == ("cat", "dog")
    seen = set()
    for split in data.splits.values():
        pixels = (split.tensors["pixel_values"] * 255).round().long()
        assert torch.equal(pixels[:, 1, 0, 0] // 100, split.labels)
        colours = {tuple(pixel) for pixel in pixels[:, :, 3, 3].tolist()}
        assert not colours & seen
        seen |= colours
    assert len(seen) == 20


def test_directories_per_split(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", count=3)
    fill(tmp_path / "test", count=2)
    data = load_data(f"folder:{tmp_path}")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 20, "validation": 6, "test": 4}
    (tmp_path / "test" / "cow").mkdir()
    with pytest.raises(UserError, match=r"class 'cow' in .* is not among the training classes"):
        load_data(f"folder:{tmp_path}")


def test_from_memory_and_from_disk_agree(tmp_path):
    fill(tmp_path, size=(12, 9))
    fields = {"kind": "folder", "path": str(tmp_path), "image_size": 8, "channels": 1}
    memory, disk = load_data(fields), load_data({**fields, "in_memory": False})
    assert disk.split("train").tensors is None
    assert memory.fingerprint == disk.fingerprint
    assert memory.facts == disk.facts
    assert memory.scale == disk.scale
    one, other = (data.split("train").batches(5).open(0) for data in (memory, disk))
    for _ in range(4):
        left, right = next(one), next(other)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_images_of_different_sizes(tmp_path):
    fill(tmp_path)
    Image.new("RGB", (9, 8)).save(tmp_path / "cat" / "wide.png")
    with pytest.raises(UserError, match=r"differ in the shape of pixel_values.*set image_size"):
        load_data(f"folder:{tmp_path}")
    assert load_data({"kind": "folder", "path": str(tmp_path), "image_size": 8}).facts.input_shape == (3, 8, 8)


def test_content_makes_the_fingerprint(tmp_path):
    fill(tmp_path / "one")
    fill(tmp_path / "two")
    one, two = (load_data(f"folder:{tmp_path / name}").fingerprint for name in ("one", "two"))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "two" / "cat" / "00.png")
    assert one == two != load_data(f"folder:{tmp_path / 'two'}").fingerprint


def test_bad_directories(tmp_path):
    with pytest.raises(UserError, match="There is no directory"):
        load_data(f"folder:{tmp_path / 'none'}")
    with pytest.raises(UserError, match="no sub-directories"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        load_data(f"folder:{tmp_path}")
    for number in range(10):
        (tmp_path / "cat" / f"{number}.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a readable image"):
        load_data(f"folder:{tmp_path}")


def test_modes_of_images():
    assert as_bytes(Image.new("L", (3, 2), 9)).tolist() == [[[9] * 3] * 2]
    assert as_bytes(Image.new("RGBA", (3, 2))).shape == (3, 2, 3)
    assert as_bytes(Image.new("P", (3, 2)), channels=1).shape == (1, 2, 3)


def test_images_without_labels_however_they_lie(tmp_path):
    fill(tmp_path / "flat" / "a", classes=("",), count=10)
    flat = load_data(f"folder:{tmp_path / 'flat' / 'a'}")
    assert flat.facts.task == "unlabelled"
    assert flat.facts.num_classes is None
    assert {name: len(split) for name, split in flat.splits.items()} == {"train": 7, "validation": 1, "test": 2}
    assert set(flat.split("train").batch([0])) == {"pixel_values", "index"}
    with pytest.raises(UserError, match="has no labels"):
        _ = flat.split("train").labels

    fill(tmp_path / "deep" / "one" / "two", count=5)
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "top.png")
    deep = load_data({"kind": "folder", "path": str(tmp_path / "deep"), "labels": False, "validation": 0, "test": 0})
    assert len(deep.split("train")) == 11
    assert load_data(f"folder:{tmp_path / 'deep'}").facts.class_names == ("one",), (
        "sub-directories are classes by default"
    )
    with pytest.raises(UserError, match="it needs one per class, or images without labels"):
        load_data({"kind": "folder", "path": str(tmp_path / "flat" / "a"), "labels": True})


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_that_cannot_be_read_are_told_and_not_an_input(tmp_path, in_memory):
    fill(tmp_path, count=3)
    whole = (tmp_path / "cat" / "00.png").read_bytes()
    (tmp_path / "dog" / "01.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "dog" / "02.png").write_bytes(b"nonsense")
    fields = {"kind": "folder", "path": str(tmp_path), "labels": False, "validation": 0, "test": 0, "pixels": "unit"}
    with pytest.raises(UserError, match="is not a readable image"):
        load_data({**fields, "in_memory": True})
    with pytest.raises(UserError, match="skip_unreadable needs image_size"):
        load_data({**fields, "skip_unreadable": True})
    data = load_data({**fields, "skip_unreadable": True, "image_size": 8, "in_memory": in_memory})
    batch = data.split("train").batch(range(6))
    assert batch["unreadable"].tolist() == [False, False, False, False, True, True]
    assert not batch["pixel_values"][4:].any()
    assert batch["pixel_values"][3].any()
    assert list(batch.inputs) == ["pixel_values"]
    assert list(data.facts.inputs) == ["pixel_values"]
