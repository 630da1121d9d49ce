import numpy as np
import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.dataset import read_spec
from stillhouse.errors import UserError

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pictures(count=30):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])})
    images = [Image.fromarray(np.full((6, 6, 3), 8 * i, dtype=np.uint8)) for i in range(count)]
    return datasets.Dataset.from_dict({"picture": images, "kind": [i % 3 for i in range(count)]}, features=features)


def test_images_saved_to_disk(tmp_path):
    pictures().save_to_disk(str(tmp_path / "set"))
    data = load_data({"kind": "hf", "path": str(tmp_path / "set"), "pixels": "unit"})
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 21, "validation": 3, "test": 6}
    assert data.facts.inputs == {"pixel_values": (3, 6, 6)}
    assert data.facts.class_names == ("a", "b", "c")
    batch = data.split("test").batch(range(6))
    assert torch.equal((batch["pixel_values"][:, 0, 0, 0] * 255 / 8).round().long() % 3, batch.labels)


def test_read_as_it_goes_gives_the_same(tmp_path):
    pictures().save_to_disk(str(tmp_path / "set"))
    fields = {"kind": "hf", "path": str(tmp_path / "set"), "image_size": 4}
    memory, disk = load_data(fields), load_data({**fields, "in_memory": False})
    assert disk.split("train").tensors is None
    assert memory.fingerprint == disk.fingerprint
    one, other = (data.split("train").batches(5).open(0) for data in (memory, disk))
    for _ in range(5):
        left, right = next(one), next(other)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_splits_by_their_names_and_by_choice(tmp_path):
    parts = datasets.DatasetDict({"train": pictures(30), "dev": pictures(9), "extra": pictures(6)})
    parts.save_to_disk(str(tmp_path / "set"))
    named = load_data({"kind": "hf", "path": str(tmp_path / "set"), "test": 0.0})
    assert {name: len(split) for name, split in named.splits.items()} == {"train": 30, "validation": 9}
    fields = {"kind": "hf", "path": str(tmp_path / "set"), "splits": {"test": "dev"}}
    chosen = load_data(fields)
    assert {name: len(split) for name, split in chosen.splits.items()} == {"train": 27, "validation": 3, "test": 9}
    with pytest.raises(UserError, match="has no split 'devel'; did you mean 'dev'"):
        load_data({**fields, "splits": {"test": "devel"}})


def test_hidden_labels_are_no_test_split(tmp_path):
    features = datasets.Features({"x": datasets.Value("float32"), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"x": [float(i) for i in range(40)], "label": [i % 2 for i in range(40)]}
    hidden = {"x": [0.0] * 4, "label": [-1] * 4}
    parts = {"train": rows, "test": hidden}
    held = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict(part, features=features) for name, part in parts.items()}
    )
    data = load_data(held)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 28, "validation": 4, "test": 8}


def test_a_directory_of_parquet_files(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"u": [float(i) for i in range(40)], "v": [[i, 2 * i] for i in range(40)], "label": ["x", "y"] * 20}
    )
    rows = rows.cast_column("v", datasets.Sequence(datasets.Value("int64"), length=2))
    rows.to_parquet(str(tmp_path / "set" / "train.parquet"))
    rows.select(range(10)).to_parquet(str(tmp_path / "set" / "test.parquet"))
    data = load_data(f"hf:{tmp_path / 'set'}")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "validation": 4, "test": 10}
    assert data.facts.inputs["features"] == (3,)
    assert data.facts.class_names == ("x", "y")
    assert data.split("test").batch([7])["features"][0].tolist() == [7, 7, 14]


def test_text(tmp_path):
    rows = {"sentence": [f"number {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    held = datasets.Dataset.from_dict(rows)
    fields = {"kind": "object", "object": held}
    with pytest.raises(UserError, match=r"set text_column \(there is 'sentence'\)"):
        load_data(fields)
    data = load_data({**fields, "text_column": "sentence", "tokenizer": "bytes", "max_length": 16})
    assert data.facts.inputs == {"input_ids": (16,), "attention_mask": (16,)}
    assert data.facts.task == "classification"
    without = load_data(
        {"kind": "object", "object": held.remove_columns("label"), "text_column": "sentence", "tokenizer": "bytes"}
    )
    assert without.facts.task == "language"


def test_a_tokenizer_of_the_library(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "number": 2, "one": 3}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(tmp_path / "tok")  # fmt: skip
    held = datasets.Dataset.from_dict({"s": ["number one", "one"] * 10})
    fields = {"kind": "object", "object": held, "text_column": "s", "tokenizer": str(tmp_path / "tok"), "max_length": 3}
    batch = load_data({**fields, "validation": 0, "test": 0}).split("train").batch([0, 1])
    assert batch["input_ids"].tolist() == [[2, 3, 1], [3, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    with pytest.raises(UserError, match="could not be loaded"):
        load_data({**fields, "tokenizer": str(tmp_path / "none")})


def test_objects_of_the_library_keep_selection_in_the_fingerprint():
    held = pictures()
    one, two, three = load_data(held), load_data(pictures()), load_data(held.select(range(29, -1, -1)))
    assert one.fingerprint == two.fingerprint != three.fingerprint


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="could not be read") as caught:
        load_data("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="hf:owner/name"):
        load_data("hf")
    with pytest.raises(UserError, match="no column 'labl'; did you mean 'label'"):
        load_data(
            {"kind": "object", "object": datasets.Dataset.from_dict({"x": [1.0], "label": [0]}), "label_column": "labl"}
        )


@pytest.mark.parametrize(
    ("spec", "counts", "shape", "classes"),
    [
        ({"path": "uoft-cs/cifar100", "validation": 0}, {"train": 50_000, "test": 10_000}, (3, 32, 32), 100),
        (
            {"path": "uoft-cs/cifar100", "label_column": "coarse_label", "train_size": 99},
            {"train": 99},
            (3, 32, 32),
            20,
        ),
        ({"path": "ylecun/mnist"}, {"train": 54_000, "validation": 6_000, "test": 10_000}, (1, 28, 28), 10),
        ({"path": "ylecun/mnist", "image_size": 32, "channels": 3, "long_tail": 10}, {"test": 10_000}, (3, 32, 32), 10),
        (
            {"path": "ILSVRC/imagenet-1k", "image_size": 64, "test": 0},
            {"train": 1_281_167, "validation": 50_000},
            (3, 64, 64),
            1000,
        ),
    ],
)
def test_the_form_of_well_known_sets_is_known_without_them(spec, counts, shape, classes):
    blank = read_spec({"kind": "hf", **spec}).foreseen()
    assert counts.items() <= {name: len(split) for name, split in blank.splits.items()}.items()
    assert blank.facts.inputs == {"pixel_values": shape}
    assert blank.facts.num_classes == classes
    batch = blank.split("train").batch(range(3))
    assert batch["pixel_values"].shape == (3, *shape)


@pytest.mark.parametrize(
    "spec",
    [
        {"path": "owner/name"},
        {"path": "ILSVRC/imagenet-1k"},
        {"path": "uoft-cs/cifar100", "label_column": "label"},
        {"path": "uoft-cs/cifar10", "splits": {"train": "test"}},
    ],
)
def test_other_forms_are_not(spec):
    assert read_spec({"kind": "hf", **spec}).foreseen() is None
