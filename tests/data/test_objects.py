import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from stillhouse.data import DataSpec, load_data
from stillhouse.errors import UserError
from stillhouse.spec import Spec, read

X, Y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


class Holder(Spec):
    data: DataSpec


class Items(Dataset):
    """Whatever a function gives for each position."""

    def __init__(self, make, count=60):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, position):
        return self.make(position)


FORMS = {
    "pair": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "dict": {"features": X, "labels": Y},
    "xy": {"x": X, "y": Y},
    "tensors": TensorDataset(X, Y),
    "pairs": Items(lambda i: (X[i], int(Y[i]))),
    "dicts": Items(lambda i: {"features": X[i].numpy(), "label": Y[i]}),
    "subset": Subset(Items(lambda i: (X[i], Y[i])), list(range(60))),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same(form):
    data, expected = load_data(FORMS[form]), load_data((X, Y))
    assert data.facts == expected.facts
    assert data.facts.num_classes == 3
    for name in ("train", "validation", "test"):
        one, other = data.split(name).tensors, expected.split(name).tensors
        assert torch.equal(one["features"], other["features"])
        assert torch.equal(one["labels"], other["labels"])


def test_given_splits_are_kept():
    data = load_data({"train": (X, Y), "val": (X[:9], Y[:9]), "test": TensorDataset(X[:6], Y[:6])})
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 60, "validation": 9, "test": 6}
    with pytest.raises(UserError, match="no split 'trian'"):
        load_data({"trian": (X, Y)})
    with pytest.raises(UserError, match="no training split"):
        load_data({"test": (X, Y)})


def test_data_pass_through():
    data = load_data((X, Y))
    assert load_data(data) is data
    small = read(Holder, {"data": {"kind": "object", "object": data, "train_size": 6}}).data.load()
    assert len(small.split("train")) == 6
    assert small.fingerprint != data.fingerprint


def test_a_dumped_object_is_known_but_not_brought_back():
    spec = read(Holder, {"data": (X, Y)}).data
    dumped = spec.dump()
    assert dumped["kind"] == "object"
    assert dumped["object"] == "tuple"
    again = read(Holder, {"data": dumped}).data
    assert again.dump() == dumped
    with pytest.raises(UserError, match=f"fingerprint {dumped['fingerprint']}.*only with the object passed again"):
        again.load()
    assert read(Holder, {"data": (X.clone(), Y.clone())}).data == spec
    assert read(Holder, {"data": TensorDataset(X, Y)}).data.dump()["object"] == "torch.utils.data.dataset.TensorDataset"


def test_content_makes_the_fingerprint():
    changed = X.clone()
    changed[3, 2] += 1e-3
    prints = {load_data(form).fingerprint for form in ((X, Y), (changed, Y), (X, Y.flip(0)), (X,))}
    assert len(prints) == 4
    assert (
        load_data(Items(lambda i: (X[i], Y[i]))).fingerprint
        != load_data(Items(lambda i: (changed[i], Y[i]))).fingerprint
    )


def test_what_labels_mean():
    assert load_data((X,)).facts.task == "unlabelled"
    assert load_data((X, X[:, 0])).facts.task == "regression"
    soft = load_data((X, X.softmax(1)))
    assert (soft.facts.task, soft.facts.num_classes) == ("classification", 5)
    assert soft.split("train").by_class()[0].dtype == torch.long
    assert load_data({"input_ids": torch.ones(60, 7, dtype=torch.long)}).facts.task == "language"
    known = load_data({"kind": "object", "object": (X, Y), "num_classes": 7})
    assert known.facts.num_classes == 7
    assert len(known.split("train").by_class()[6]) == 0


def test_images():
    bytes_ = torch.randint(256, (40, 28, 28), dtype=torch.uint8)
    data = load_data((bytes_, torch.arange(40) % 2))
    assert data.facts.inputs == {"pixel_values": (1, 28, 28)}
    assert 0.99 < data.split("train").tensors["pixel_values"].max() <= 1
    floats = torch.randn(40, 3, 8, 8)
    given = load_data((floats, torch.arange(40) % 2))
    assert torch.isin(given.split("test").tensors["pixel_values"], floats).all()
    unit = given.to_unit(given.split("train").tensors["pixel_values"])
    # The least value is where [0, 1] begins, up to a rounding unit of float32 in value * std + mean.
    assert 0 <= unit.min() <= torch.finfo(torch.float32).eps
    standard = load_data(
        {"kind": "object", "object": (bytes_, torch.arange(40) % 2), "pixels": "standard", "image_size": 32}
    )
    assert standard.facts.inputs == {"pixel_values": (1, 32, 32)}
    assert standard.split("train").tensors["pixel_values"].mean().abs() < 1e-5


def test_items_that_are_pictures():
    image = pytest.importorskip("PIL.Image")
    data = load_data(Items(lambda i: (image.new("L", (6, 5), i), i % 2)))
    assert data.facts.inputs == {"pixel_values": (1, 5, 6)}
    array = load_data(Items(lambda i: (np.full((5, 6, 3), i, dtype=np.uint8), i % 2)))
    assert array.facts.inputs == {"pixel_values": (3, 5, 6)}


def test_random_items_are_not_frozen_in_memory():
    noisy = load_data(Items(lambda i: (X[i] + torch.randn(5), int(Y[i]))))
    assert noisy.split("train").tensors is None
    stream = noisy.split("train").batches(len(noisy.split("train")), shuffle=False).open(0)
    first, second = next(stream), next(stream)
    assert torch.equal(first.index, second.index)
    assert not torch.equal(first["features"], second["features"])
    assert noisy.fingerprint == load_data(Items(lambda i: (X[i] + torch.randn(5), int(Y[i])))).fingerprint


def test_loading_draws_nothing_from_the_global_generators():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data = load_data(
        {"kind": "object", "object": Items(lambda i: (X[i] + torch.randn(5), int(Y[i]))), "in_memory": True}
    )
    assert torch.equal(data.split("train").batch([0])["features"], data.split("train").tensors["features"][:1])
    assert torch.equal(torch.rand(3), expected)


def test_labels_of_a_slow_data_set_are_read_once():
    reads = []
    items = Items(lambda i: reads.append(i) or (X[i], int(Y[i])))
    split = load_data({"kind": "object", "object": items, "in_memory": False}).split("train")
    reads.clear()
    assert len(split.by_class()[0]) == len(split.take(30).by_class()[0]) + (len(split) - 30) // 3
    assert not reads


def test_known_targets_are_not_read_item_by_item():
    dataset = Items(lambda i: (X[i], int(Y[i])))
    dataset.targets, dataset.classes = Y.tolist(), ["a", "b", "c"]
    held = {
        "kind": "object",
        "object": Subset(dataset, list(range(30, 60))),
        "in_memory": False,
        "validation": 0,
        "test": 0,
    }
    assert torch.equal(load_data(held).split("train").labels, Y[30:])
    assert load_data(dataset).facts.class_names == ("a", "b", "c")


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (DataLoader(TensorDataset(X)), "pass the data set itself, not a DataLoader"),
        (Endless(), "pass a map-style Dataset"),
        (7, "not int"),
        (None, "not NoneType"),
        ((X, Y, Y), "not tuple"),
        ((X, Y[:5]), "equally many samples"),
        ((torch.zeros(0, 3), torch.zeros(0)), "no samples"),
        (Items(lambda i: (X[i], Y[i], Y[i])), "let the data set return dicts"),
        (Items(lambda i: ("text", 1)), "not str"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_objects(value, message):
    with pytest.raises(UserError, match=message):
        load_data(value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_sets.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch.utils.data import TensorDataset

            ready = TensorDataset(torch.arange(30.0)[:, None], torch.arange(30) % 2)


            def make(count=40):
                return torch.arange(float(count))[:, None], torch.arange(count) % 2


            number = 3
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_sets"
    sys.modules.pop("own_sets", None)


def test_import_paths(module):
    assert sum(map(len, load_data("own_sets:ready").splits.values())) == 30
    made = load_data({"kind": "import", "path": "own_sets:make", "arguments": {"count": 50}})
    assert sum(map(len, made.splits.values())) == 50
    assert made.fingerprint != load_data("own_sets:make").fingerprint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_sets:nothing", "has no 'nothing'"),
        ("no_such_module:x", "could not be imported"),
        ("own_sets:number", "not int"),
        ("own_sets:", "expected an import path such as"),
    ],
)
def test_bad_import_paths(path, message, module):
    with pytest.raises(UserError, match=message):
        load_data(path)


FLOATS = torch.tensor([0.0, 1.0, 2.0] * 20)


@pytest.mark.parametrize("form", ["pair", "dict", "dataset"])
def test_float_labels_that_may_be_classes_are_asked_about(form):
    x = torch.randn(60, 4)
    value = {
        "pair": (x, FLOATS),
        "dict": {"features": x, "labels": FLOATS},
        "dataset": torch.utils.data.TensorDataset(x, FLOATS),
    }[form]
    with pytest.raises(UserError, match=r"floats that are whole numbers \(0, 1, 2\): give classes as integers"):
        load_data(value)
    as_classes = load_data({"kind": "object", "object": value, "task": "classification"})
    assert (as_classes.facts.task, as_classes.facts.num_classes) == ("classification", 3)
    assert as_classes.split("train").batch([0]).labels.dtype == torch.long
    as_numbers = load_data({"kind": "object", "object": value, "task": "regression"})
    assert (as_numbers.facts.task, as_numbers.facts.num_classes) == ("regression", None)
    assert as_numbers.split("train").batch([0]).labels.dtype == torch.float32
    assert as_classes.fingerprint != as_numbers.fingerprint


def test_labels_that_say_what_they_are_need_no_question():
    x = torch.randn(60, 4)
    assert load_data((x, FLOATS.long())).facts.task == "classification"
    assert load_data((x, FLOATS + 0.5)).facts.task == "regression"
    assert load_data((x, torch.arange(60.0))).facts.task == "regression"
    assert load_data({"kind": "object", "object": (x, FLOATS.long()), "task": "regression"}).facts.task == "regression"
    with pytest.raises(UserError, match="numbers with fractions"):
        load_data({"kind": "object", "object": (x, FLOATS + 0.5), "task": "classification"})


def test_a_function_gets_the_arguments_it_takes():
    with pytest.raises(
        UserError, match="cannot be called with the 'arguments' of the data: missing a required argument"
    ):
        load_data({"kind": "import", "path": "os:unlink"})
