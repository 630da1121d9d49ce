import gzip
import hashlib
import io
import itertools
import tarfile

import numpy as np
import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.classic import CIFAR10, CIFAR100, IDX, MNIST
from stillhouse.errors import UserError


def write_idx(place, train=40, test=20):
    generator = np.random.default_rng(0)
    for name, count in zip(IDX, (train, train, test, test), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        array = generator.integers(0, 256, shape) if len(shape) == 3 else np.arange(count) % 4
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
        with gzip.open(place / f"{name}.gz", "wb") as file:
            file.write(header + array.astype(np.uint8).tobytes())


def test_digits():
    data = load_data("digits")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1079, "validation": 359, "test": 359}
    assert data.facts.inputs == {"pixel_values": (1, 8, 8)}
    assert data.facts.num_classes == 10
    pixels = data.split("train").tensors["pixel_values"]
    assert pixels.mean().abs() < 1e-5
    assert pixels.std(correction=0) == pytest.approx(1, abs=1e-5)
    # All 17 grey levels come back exactly.
    assert torch.equal((data.to_unit(pixels) * 16).round().unique(), torch.arange(17.0))


def test_digits_splits_are_fixed_disjoint_and_complete():
    from sklearn.datasets import load_digits

    def rows(split):
        pixels = load_data({"kind": "digits", "pixels": "unit"}).split(split).tensors["pixel_values"]
        return [(16 * image).round().to(torch.uint8).numpy().tobytes() for image in pixels]

    torch.manual_seed(0)
    one = {name: rows(name) for name in ("train", "validation", "test")}
    torch.manual_seed(1)
    assert one == {name: rows(name) for name in one}
    every = [image.astype(np.uint8).tobytes() for image in load_digits().images]
    assert sorted(itertools.chain.from_iterable(one.values())) == sorted(every)
    assert hashlib.sha256(b"".join(one["test"])).hexdigest().startswith("82aac43514bdb8c9")
    counts = torch.bincount(load_data("digits").split("test").labels)
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_train_size_is_balanced_nested_and_keeps_the_pixel_space():
    data = load_data("digits")
    small, large = (load_data({"kind": "digits", "train_size": size}) for size in (30, 100))
    assert torch.bincount(small.split("train").labels).tolist() == [3] * 10
    assert small.scale == large.scale == data.scale
    assert torch.equal(large.split("train").tensors["pixel_values"][:30], small.split("train").tensors["pixel_values"])
    assert torch.equal(small.split("test").tensors["pixel_values"], data.split("test").tensors["pixel_values"])
    with pytest.raises(UserError, match="train_size 5000 is more than the 1079 training samples of 'digits'"):
        load_data({"kind": "digits", "train_size": 5000})


def test_fingerprints_follow_content_and_fields():
    values = [
        "digits",
        *({"kind": "digits", **fields} for fields in ({"train_size": 30}, {"pixels": "unit"}, {"image_size": 16})),
    ]
    prints = [load_data(value).fingerprint for value in values]
    assert len(set(prints)) == 4
    assert load_data({"kind": "digits", "pixels": "standard"}).fingerprint == prints[0]


def test_sizes_of_digits():
    assert load_data({"kind": "digits", "image_size": 16}).facts.input_shape == (1, 16, 16)
    with pytest.raises(UserError, match="expected at least 4"):
        load_data({"kind": "digits", "image_size": 2})


def test_files_in_both_layouts_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist")
    one = load_data({"kind": "mnist", "verify": False})
    assert {name: len(split) for name, split in one.splits.items()} == {"train": 36, "validation": 4, "test": 20}
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in IDX:
        (raw / name).write_bytes(gzip.decompress((tmp_path / "mnist" / f"{name}.gz").read_bytes()))
        (tmp_path / "mnist" / f"{name}.gz").unlink()
    other = load_data({"kind": "mnist", "verify": False})
    assert other.fingerprint == one.fingerprint
    assert load_data({"kind": "mnist", "verify": False, "path": str(raw)}).fingerprint == one.fingerprint
    seen = [one.split(n).tensors["pixel_values"].sum() for n in one.splits]
    assert seen == [other.split(n).tensors["pixel_values"].sum() for n in one.splits]


def test_unknown_and_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    write_idx(tmp_path / "mnist")
    with pytest.raises(UserError, match=r"train-images.* is not the known file of 'mnist'.*verify: false"):
        load_data("mnist")
    file = tmp_path / "mnist" / f"{IDX[0]}.gz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match="is damaged"):
        load_data({"kind": "mnist", "verify": False})
    file.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(UserError, match="is not an idx file"):
        load_data({"kind": "mnist", "verify": False})


@pytest.mark.parametrize("kind", ["mnist", "fashion-mnist", "cifar10", "cifar100", "dsprites"])
def test_a_missing_set_is_one_sentence_that_says_where_to_get_it(kind, tmp_path, monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    with pytest.raises(UserError, match=rf"'{kind}' was not found because STILLHOUSE_DATA is not set: get .*https://"):
        load_data(kind)
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=rf"'{kind}' was not found (under|in) {tmp_path}"):
        load_data(kind)


def test_pickles_are_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    array = np.empty(1, dtype=object)
    array[0] = Bomb()
    np.savez(tmp_path / "cifar10_subset.npz", x_train=array, y_train=array, x_test=array, y_test=array)
    with pytest.raises(UserError, match=r"is not a readable \.npz file of plain arrays"):
        load_data({"kind": "cifar10", "path": str(tmp_path), "verify": False})


def cifar_records(count, label_bytes, seed):
    records = np.random.default_rng(seed).integers(0, 256, (count, label_bytes + 3072)).astype(np.uint8)
    records[:, 0] = np.arange(count) % 2
    records[:, label_bytes - 1] = np.arange(count) % 10
    return records


def test_the_binary_version_of_cifar10(tmp_path):
    files = {f"data_batch_{number}.bin": cifar_records(20, 1, number) for number in range(1, 6)}
    files["test_batch.bin"] = cifar_records(20, 1, 6)
    for name, records in files.items():
        (tmp_path / name).write_bytes(records.tobytes())
    data = load_data({"kind": "cifar10", "path": str(tmp_path), "verify": False, "pixels": "unit"})
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 90, "validation": 10, "test": 20}
    expected = torch.from_numpy(files["test_batch.bin"][:, 1:].reshape(-1, 3, 32, 32)).float() / 255
    assert torch.equal(data.split("test").tensors["pixel_values"], expected)
    with pytest.raises(UserError, match=r"data_batch_1\.bin is not the known file"):
        load_data({"kind": "cifar10", "path": str(tmp_path)})


def test_the_archive_of_cifar100(tmp_path):
    with tarfile.open(tmp_path / CIFAR100.archive, "w:gz") as tar:
        for name, count in (("train.bin", 100), ("test.bin", 20)):
            content = cifar_records(count, 2, 0).tobytes()
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    fields = {"kind": "cifar100", "path": str(tmp_path), "verify": False}
    fine, coarse = load_data(fields), load_data({**fields, "labels": "coarse"})
    assert fine.split("test").labels.tolist() == [place % 10 for place in range(20)]
    assert coarse.split("test").labels.tolist() == [place % 2 for place in range(20)]
    assert (fine.facts.num_classes, coarse.facts.num_classes) == (100, 20)
    assert fine.fingerprint != coarse.fingerprint


def test_every_file_has_a_known_sum():
    for spec in (MNIST, CIFAR10, CIFAR100):
        assert all(len(known) in (32, 64) for sums in spec.sums.values() for known in sums)


@pytest.mark.usefixtures("real_files")
@pytest.mark.parametrize(
    ("kind", "shape", "sizes"),
    [
        ("mnist", (1, 28, 28), (54_000, 6_000, 10_000)),
        ("fashion-mnist", (1, 28, 28), (54_000, 6_000, 10_000)),
        ("cifar10", (3, 32, 32), None),
        ("cifar100", (3, 32, 32), None),
    ],
)
def test_real_files_pass_their_sums(kind, shape, sizes):
    data = load_data(kind)
    assert data.facts.input_shape == shape
    assert sizes is None or tuple(map(len, data.splits.values())) == sizes
    assert len(data.facts.class_names) == data.facts.num_classes == len(data.split("train").by_class())
