import gzip
import json

import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.intents import CLINC150
from stillhouse.errors import UserError

INTENTS = ("weather", "alarm", "joke")


def utterances(split, count):
    return [[f"{intent} please, {split}{i}", intent] for intent in INTENTS for i in range(count)]


def whole(**parts):
    found = {"oos_train": [["beyond", "oos"]], "oos_val": [["beyond", "oos"]], "oos_test": [["beyond", "oos"]]}
    found |= {"train": utterances("a", 6), "val": utterances("b", 2), "test": utterances("c", 3)}
    return json.dumps(found | parts)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The directory of a small set in the official form."""
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "data_full.json").write_text(whole())
    return tmp_path / "clinc150"


SMALL = {"kind": "clinc150", "verify": False}


def test_official_splits_without_what_is_out_of_scope(place):
    data = load_data(SMALL)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 18, "validation": 6, "test": 9}
    assert data.facts.class_names == ("alarm", "joke", "weather")
    assert data.facts.num_classes == 3
    assert data.facts.task == "classification"
    assert data.facts.inputs == {"input_ids": (32,), "attention_mask": (32,)}
    assert data.split("test").labels.tolist() == [2] * 3 + [0] * 3 + [1] * 3
    # Ids: "," and "please" in every text, then a0 .. a5 three times each and the intents six times each.
    assert data.facts.vocabulary_size == 2 + 2 + 3 + 6
    batch = data.split("train").batch([0])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    assert batch["input_ids"][0, :6].tolist() == [6, 3, 2, 7, 0, 0]
    assert batch["attention_mask"].sum() == 4
    assert data.split("test").batch([0])["input_ids"][0, :4].tolist() == [6, 3, 2, 1]


def test_gzipped_or_elsewhere_it_is_the_same(place, tmp_path):
    one = load_data(SMALL)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "data_full.json.gz").write_bytes(gzip.compress((place / "data_full.json").read_bytes()))
    (place / "data_full.json").unlink()
    other = load_data({**SMALL, "path": str(tmp_path / "else")})
    assert other.fingerprint == one.fingerprint
    for name, split in one.splits.items():
        assert torch.equal(split.tensors["input_ids"], other.split(name).tensors["input_ids"])


def test_few_training_samples_are_balanced_and_keep_the_ids(place):
    data, few = load_data(SMALL), load_data({**SMALL, "train_size": 6})
    assert torch.bincount(few.split("train").labels).tolist() == [2, 2, 2]
    assert few.facts == data.facts
    assert torch.equal(few.split("test").tensors["input_ids"], data.split("test").tensors["input_ids"])
    with pytest.raises(UserError, match="train_size 19 is more than the 18 training samples of 'clinc150'"):
        load_data({**SMALL, "train_size": 19})


def test_fingerprints_follow_content_vocabulary_and_fields(place):
    fields = [{}, {"train_size": 6}, {"max_length": 8}, {"tokenizer": "bytes"}, {"vocabulary_size": 9}]
    prints = [load_data({**SMALL, **some}).fingerprint for some in fields]
    (place / "data_full.json").write_text(whole(test=utterances("d", 3)))
    assert len({*prints, load_data(SMALL).fingerprint}) == 6


def test_unknown_damaged_and_foreign_files_are_refused(place):
    with pytest.raises(UserError, match=r"data_full\.json is not the known file of 'clinc150'.*verify: false"):
        load_data("clinc150")
    for content in (
        "{",
        "[]",
        json.dumps({"train": []}),
        whole(test=[]),
        whole(test=[["text"]]),
        whole(val=[["text", 3]]),
    ):
        (place / "data_full.json").write_text(content)
        with pytest.raises(UserError, match="does not hold pairs of text and intent; get it again"):
            load_data(SMALL)
    (place / "data_full.json").rename(place / "data_full.json.gz")
    with pytest.raises(UserError, match="is damaged"):
        load_data(SMALL)


def test_a_missing_set_is_one_sentence_that_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    with pytest.raises(UserError) as caught:
        load_data("clinc150")
    assert str(caught.value) == (
        "The data set 'clinc150' was not found because STILLHOUSE_DATA is not set: get data/data_full.json of "
        "https://github.com/clinc/oos-eval, put it in a directory 'clinc150' and let STILLHOUSE_DATA name the directory "
        "above."
    )
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"was not found under {tmp_path}"):
        load_data("clinc150")


def test_it_is_registered_once_and_reads_its_own_dump(place):
    data = load_data({**SMALL, "max_length": 5})
    assert load_data({**CLINC150(verify=False, max_length=5).dump()}).fingerprint == data.fingerprint


@pytest.mark.usefixtures("real_files")
def test_the_real_file_passes_its_sum():
    data = load_data("clinc150")
    assert tuple(map(len, data.splits.values())) == (15_000, 3_000, 4_500)
    assert data.facts.num_classes == len(data.facts.class_names) == 150
    assert torch.bincount(data.split("train").labels).tolist() == [100] * 150
    assert data.facts.vocabulary_size == 5076
    # The longest request of all, so that nothing is cut.
    assert max(split.tensors["attention_mask"].sum(1).max() for split in data.splits.values()) == 30
