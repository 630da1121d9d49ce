import csv
import gzip
import json

import pytest
import torch

from stillhouse.data import load_data
from stillhouse.errors import UserError

ROWS = [{"a": i / 7, "b": -2.0 * i + (i % 3), "label": ["no", "yes"][i % 2]} for i in range(40)]


def write_csv(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows=ROWS):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITE = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITE)
def test_one_file(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    WRITE[kind](path)
    data = load_data(f"{kind}:{path}")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 28, "validation": 4, "test": 8}
    assert data.facts.inputs == {"features": (2,)}
    assert data.facts.class_names == ("no", "yes")
    features = data.split("train").tensors["features"]
    torch.testing.assert_close(features.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(features.std(0, correction=0), torch.ones(2))
    plain = load_data({"kind": kind, "path": str(path), "standardize": False})
    held = torch.cat([split.tensors["features"] for split in plain.splits.values()])
    assert sorted(held[:, 1].tolist()) == sorted(row["b"] for row in ROWS)
    for split in plain.splits.values():
        assert torch.equal((split.tensors["features"][:, 0] * 7).round().long() % 2, split.labels)


def test_the_three_forms_agree(tmp_path):
    data = []
    for kind, write in WRITE.items():
        write(tmp_path / f"rows.{kind}")
        data.append(load_data(f"{kind}:{tmp_path / f'rows.{kind}'}"))
    for other in data[1:]:
        assert torch.equal(data[0].split("test").tensors["features"], other.split("test").tensors["features"])


def test_a_directory_with_a_file_per_split(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS[:20])
    write_csv(tmp_path / "val.csv", ROWS[20:30])
    with gzip.open(tmp_path / "test.csv.gz", "wt") as file:
        file.write("a,b,label\n1,2,yes\n")
    data = load_data(f"csv:{tmp_path}")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 20, "validation": 10, "test": 1}
    assert data.split("test").labels.tolist() == [1]


def test_content_and_fields_make_the_fingerprint(tmp_path):
    write_csv(tmp_path / "one.csv")
    write_csv(tmp_path / "two.csv")
    write_csv(tmp_path / "three.csv", [*ROWS[:-1], {**ROWS[-1], "a": 99}])
    one, two, three = (load_data(f"csv:{tmp_path / name}.csv").fingerprint for name in ("one", "two", "three"))
    assert one == two != three
    assert load_data({"kind": "csv", "path": str(tmp_path / "one.csv"), "test": 0.3}).fingerprint != one


def test_targets_and_chosen_columns(tmp_path):
    write_csv(tmp_path / "rows.csv")
    data = load_data({"kind": "csv", "path": str(tmp_path / "rows.csv"), "label_column": "a", "columns": ["b"]})
    assert data.facts.task == "regression"
    assert data.facts.num_classes is None
    assert data.split("train").labels.dtype == torch.float32
    unlabelled = load_data({"kind": "csv", "path": str(tmp_path / "rows.csv"), "label_column": None, "columns": ["b"]})
    assert unlabelled.facts.task == "unlabelled"
    assert "labels" not in unlabelled.split("train").batch([0])


def test_whole_numbers_are_classes_in_numeric_order(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"x": float(i), "label": [2, 10, 1][i % 3]} for i in range(30)])
    assert load_data(f"jsonl:{tmp_path / 'rows.jsonl'}").facts.class_names == ("1", "2", "10")
    write_csv(tmp_path / "rows.csv", [{"x": float(i), "label": [2, 10, 1][i % 3]} for i in range(30)])
    assert load_data(f"csv:{tmp_path / 'rows.csv'}").facts.class_names == ("1", "2", "10")


def test_quoted_text_with_line_breaks_as_bytes(tmp_path):
    rows = [{"text": f'line "{i}"\nnext, é', "label": i % 2} for i in range(20)]
    write_csv(tmp_path / "rows.csv", rows)
    fields = {"kind": "csv", "path": str(tmp_path / "rows.csv"), "text_column": "text"}
    with pytest.raises(UserError, match="needs a tokenizer"):
        load_data(fields)
    data = load_data({**fields, "tokenizer": "bytes", "max_length": 12})
    assert data.facts.inputs == {"input_ids": (12,), "attention_mask": (12,)}
    batch = data.split("train").batch([0])
    assert bytes((batch["input_ids"][0] - 1).tolist()).startswith(b'line "')
    longer = load_data({**fields, "tokenizer": "bytes", "max_length": 40}).split("train").batch([0])
    assert longer["attention_mask"].sum() == (longer["input_ids"] != 0).sum() < 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a,label\n", "holds no rows"),
        ("a,b\n1,2\n", "no column 'label'"),
        ("a,label\n1,x\n2\n", r"row 2 has 1 values for 2 columns"),
        ("a,label\n1,x\nred,y\n", r"column 'a' is not numeric \(row 2 holds 'red'\)"),
        ("a,label\n1,x\n,y\n", "column 'a' has no finite number in row 2"),
        ("a,label\n1,x\n2,\n", "row 2 has no 'label'"),
        ("label\nx\n", "no column besides the label"),
    ],
)
def test_bad_csv(content, message, tmp_path):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_data(f"csv:{tmp_path / 'rows.csv'}")
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "line 1 is not JSON"), ('{"a": 1}\n{"b": 1}', "line 2 is not an object with the keys"), ("[1]", "line 1")],
)
def test_bad_jsonl(content, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_data(f"jsonl:{tmp_path / 'rows.jsonl'}")


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="There is no file or directory"):
        load_data(f"csv:{tmp_path / 'none.csv'}")
    with pytest.raises(UserError, match=r"has no file train\.csv"):
        load_data(f"csv:{tmp_path}")
    with pytest.raises(UserError, match="csv:PATH"):
        load_data("csv")
    (tmp_path / "bad.parquet").write_bytes(b"nonsense")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_data(f"parquet:{tmp_path / 'bad.parquet'}")


def test_many_different_whole_numbers_are_asked_about(tmp_path):
    path = tmp_path / "prices.csv"
    path.write_text("a,label\n" + "".join(f"{row},{100 * row}\n" for row in range(150)))
    with pytest.raises(UserError, match="takes 150 different whole numbers in 150 rows; say task: regression"):
        load_data({"kind": "csv", "path": str(path)})
    asked = {"kind": "csv", "path": str(path), "validation": 0, "test": 0}
    assert load_data({**asked, "task": "regression"}).facts.task == "regression"
    assert load_data({**asked, "task": "classification"}).facts.num_classes == 150


def test_classes_in_floats_are_those_in_whole_numbers_and_in_their_order(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("a,label\n" + "".join(f"{row},{(2.0, 10.0, '2', '10')[row % 4]}\n" for row in range(80)))
    assert load_data(f"csv:{path}").facts.class_names == ("2", "10")


@pytest.mark.parametrize(
    ("delimiter", "sentence"),
    [
        ("", "delimiter: expected at least 1 characters, not ''"),
        (";;", "delimiter: expected at most 1 characters, not ';;'"),
    ],
)
def test_a_delimiter_is_one_character(tmp_path, delimiter, sentence):
    path = tmp_path / "a.csv"
    path.write_text("a,label\n1,x\n")
    with pytest.raises(UserError, match=sentence):
        load_data({"kind": "csv", "path": str(path), "delimiter": delimiter})
