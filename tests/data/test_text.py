"""Words as ids: which words, in which order, learned from which texts."""

import csv
import hashlib
import json

import pytest
import torch

from stillhouse.data import load_data
from stillhouse.data.text import ByteTokenize, HubTokenize, Tokens, WordTokenize
from stillhouse.errors import UserError

LONG = ["the cat; the dog", "The CAT sat.", "a dog"]


def words(texts=LONG, max_length=6, vocabulary_size=100):
    return WordTokenize.fitted(texts, max_length, vocabulary_size)


def test_the_most_frequent_words_come_first_then_the_alphabet():
    assert words().vocabulary == ("the", "cat", "dog", ".", ";", "a", "sat")
    assert words(reversed(LONG)).vocabulary == words().vocabulary
    assert words().vocabulary_size == 9


def test_ids_padding_and_unknown_words():
    batch = words()(["The cat!", "", "a b c d e f g h"])
    assert batch["input_ids"].tolist() == [[2, 3, 1, 0, 0, 0], [0] * 6, [7, 1, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [0] * 6, [1] * 6]
    assert batch["input_ids"].dtype == torch.long


def test_one_expression_says_what_a_word_is():
    found = words(["What's é_2 (42%)?"], max_length=20)
    assert set(found.vocabulary) == {"what", "'", "s", "é_2", "(", "42", "%", ")", "?"}


@pytest.mark.parametrize(("size", "kept"), [(3, ("the",)), (5, ("the", "cat", "dog")), (9, None), (10, None)])
def test_the_cap_counts_padding_and_the_unknown_word(size, kept):
    found = words(vocabulary_size=size)
    assert found.vocabulary == (kept or words().vocabulary)
    assert found.vocabulary_size == min(size, 9)
    assert found(LONG)["input_ids"].max() == found.vocabulary_size - 1


def test_sums_follow_the_vocabulary_alone():
    assert words().sums == words(max_length=2, vocabulary_size=9).sums
    assert words().sums != words(vocabulary_size=8).sums
    assert words(["b a"]).sums != words(["b a b"]).sums


def test_texts_are_read_only_where_they_are_needed():
    def texts():
        yield pytest.fail("the texts were read")

    assert isinstance(Tokens(tokenizer="bytes").tokenize(texts()), ByteTokenize)
    assert isinstance(Tokens(tokenizer="owner/name").tokenize(texts()), HubTokenize)
    assert Tokens(tokenizer="words").tokenize(iter(LONG)).vocabulary == words().vocabulary


def rows():
    """Forty texts, each with a word of its own."""
    return [{"text": f"number n{i}", "label": i % 2} for i in range(40)]


def own_words(split):
    """The id of the word that each text of a split has for itself."""
    return split.tensors["input_ids"][:, 1]


def write(kind, path):
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows())
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    return {"kind": kind, "path": str(path), "text_column": "text", "tokenizer": "words", "max_length": 4}


def as_object():
    datasets = pytest.importorskip("datasets")
    held = datasets.Dataset.from_list(rows())
    return {"kind": "object", "object": held, "text_column": "text", "tokenizer": "words", "max_length": 4}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "object"])
def test_only_the_training_split_gives_words(kind, tmp_path):
    fields = as_object() if kind == "object" else write(kind, tmp_path / f"rows.{kind}")
    data = load_data(fields)
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 28, "validation": 4, "test": 8}
    # "number", and one word for each training text.
    assert data.facts.vocabulary_size == 2 + 1 + 28
    assert data.facts.inputs == {"input_ids": (4,), "attention_mask": (4,)}
    assert sorted(own_words(data.split("train")).tolist()) == list(range(3, 31))
    for name in ("validation", "test"):
        assert own_words(data.split(name)).tolist() == [1] * len(data.split(name))
        assert set(data.split(name).tensors["input_ids"][:, 0].tolist()) == {2}


def test_a_part_of_the_training_split_is_read_with_the_vocabulary_of_all(tmp_path):
    fields = write("csv", tmp_path / "rows.csv")
    whole, part = load_data(fields), load_data({**fields, "train_size": 6})
    assert part.facts.vocabulary_size == whole.facts.vocabulary_size
    assert torch.equal(part.split("test").tensors["input_ids"], whole.split("test").tensors["input_ids"])
    assert set(own_words(part.split("train")).tolist()) < set(own_words(whole.split("train")).tolist())


def test_fingerprints_follow_the_vocabulary(tmp_path):
    fields = write("csv", tmp_path / "rows.csv")
    prints = [load_data({**fields, "vocabulary_size": size}).fingerprint for size in (5, 6, 31, 1000)]
    assert len(set(prints)) == 3
    assert prints[2] == prints[3] == load_data(fields).fingerprint
    assert load_data({**fields, "tokenizer": "bytes"}).fingerprint not in prints


def test_bytes_say_how_many_ids_there_are(tmp_path):
    fields = {**write("csv", tmp_path / "rows.csv"), "tokenizer": "bytes"}
    assert load_data(fields).facts.vocabulary_size == 257
    assert load_data("digits").facts.vocabulary_size is None


def test_what_is_wrong_is_one_sentence(tmp_path):
    fields = write("csv", tmp_path / "rows.csv")
    with pytest.raises(UserError, match="'text' needs a tokenizer: a hub id, a directory, 'words' or 'bytes'"):
        load_data({**fields, "tokenizer": None})
    with pytest.raises(UserError, match="vocabulary_size: expected at least 3"):
        load_data({**fields, "vocabulary_size": 2})


def test_the_sum_is_of_the_words_in_order():
    assert words(["b a a"]).sums == (hashlib.sha256(b"a\nb").hexdigest(),)
