"""Graphs as data: both file forms of TUDataset, padding, ids of the training graphs only, and drawn sets."""

from collections import Counter

import numpy as np
import pytest
import torch

from stillhouse.data import Graph, load_data, padded, read_spec
from stillhouse.data.graphs import PADDING, sizes
from stillhouse.errors import UserError

# Ten graphs: a path of three nodes, or a triangle with a doubled edge and a loop. The last one has labels of its own.
PATH, TRIANGLE = [(1, 2), (2, 1), (2, 3), (3, 2)], [(1, 2), (2, 1), (2, 3), (3, 2), (3, 1), (1, 3), (1, 2), (2, 2)]


def collection(directory, name="TOY", *, node_labels=True, edge_labels=True, attributes=False):
    """Writes the set in the files of the collection."""
    directory.mkdir(parents=True, exist_ok=True)
    pairs, kinds, owner, labels, classes = [], [], [], [], []
    for graph in range(10):
        start, edges = 3 * graph, TRIANGLE if graph % 2 else PATH
        pairs += [f"{start + a}, {start + b}" for a, b in edges]
        kinds += ["7" if {a, b} == {1, 2} else "3" for a, b in edges]
        owner += [str(graph + 1)] * 3
        labels += ["4", "6", "6"]
        classes.append("1" if graph % 2 else "-1")
    written = {"A": pairs, "graph_indicator": owner, "graph_labels": classes}
    written |= {"node_labels": labels} if node_labels else {}
    written |= {"edge_labels": kinds} if edge_labels else {}
    written |= {"node_attributes": [f"{n}.5, {-n}" for n in range(30)]} if attributes else {}
    for part, lines in written.items():
        (directory / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
    return {"kind": "tudataset", "name": name, "path": str(directory.parent if directory.name == name else directory)}


def test_the_files_of_the_collection_are_read_wherever_they_are_unpacked(tmp_path):
    flat = load_data(collection(tmp_path / "flat"))
    nested = load_data(collection(tmp_path / "TOY"))
    assert flat.fingerprint == nested.fingerprint
    assert {name: len(split) for name, split in flat.splits.items()} == {"train": 8, "validation": 1, "test": 1}
    assert flat.facts.class_names == ("-1", "1")
    assert (flat.facts.vocabulary_size, flat.facts.edge_vocabulary_size) == (3, 3)
    train = flat.split("train")
    path = train.batch([int((train.labels == 0).nonzero()[0])])
    assert path["node_labels"].tolist() == [[0, 1, 1]]
    assert path["edge_index"][0, :, :4].tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert path["edge_labels"][0].tolist() == [1, 1, 0, 0, PADDING, PADDING]
    triangle = train.batch([int((train.labels == 1).nonzero()[0])])
    assert sizes(triangle)[1].tolist() == [6], "the doubled edge counts once, the loop not at all"


def test_labels_that_no_training_graph_has_share_the_last_id(tmp_path):
    spec = collection(tmp_path / "flat")
    lines = (tmp_path / "flat" / "TOY_node_labels.txt").read_text().split()
    found = []
    for graph in range(10):
        changed = list(lines)
        changed[3 * graph] = "99"
        (tmp_path / "flat" / "TOY_node_labels.txt").write_text("\n".join(changed))
        data = load_data(spec)
        seen = torch.cat([data.split(name).source.tensors["node_labels"] for name in ("validation", "test")])
        found.append((data.facts.vocabulary_size, bool((seen == data.facts.vocabulary_size - 1).any())))
    assert Counter(found) == {(4, False): 8, (3, True): 2}


def test_attributes_become_labels_by_bins_and_are_refused_without(tmp_path):
    spec = collection(tmp_path / "flat", node_labels=False, attributes=True)
    with pytest.raises(UserError, match=r"continuous node attributes and no node labels; say how many bins"):
        load_data(spec)
    data = load_data({**spec, "bins": 2})
    assert data.facts.vocabulary_size - 1 == 2, "both attributes rise and fall together"
    both = load_data({**collection(tmp_path / "both", attributes=True), "bins": 2})
    assert both.facts.vocabulary_size - 1 == 4


def test_degrees_are_labels_where_there_are_none(tmp_path):
    spec = collection(tmp_path / "flat", node_labels=False)
    with pytest.raises(UserError, match=r"no node labels; set degree_labels: true"):
        load_data(spec)
    train = load_data({**spec, "degree_labels": True}).split("train")
    path = train.batch([int((train.labels == 0).nonzero()[0])])
    assert path["node_labels"].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("A", "1, 4\n", "an edge between two graphs"),
        ("A", "1, 99\n", r"an edge to a node outside 1\.\.30"),
        ("A", "1, x\n", "is not as the collection has it"),
        ("graph_indicator", "1\n3\n", "gives graph 2 no nodes"),
        ("graph_indicator", "2\n1\n", "in ascending order"),
        ("node_labels", "1\n", "has 1 lines for 30 nodes"),
        ("edge_labels", "1\n", "has 1 lines for 60 edges"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path, part, text, message):
    spec = collection(tmp_path / "flat")
    if part == "graph_indicator":
        (tmp_path / "flat" / "TOY_A.txt").write_text("")
        (tmp_path / "flat" / "TOY_edge_labels.txt").unlink()
    (tmp_path / "flat" / f"TOY_{part}.txt").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_data(spec)
    assert "\n" not in str(error.value)


def test_the_one_file_form_gives_the_same_graphs(tmp_path):
    by_files = load_data(collection(tmp_path / "flat", edge_labels=False))
    lines = ["10"]
    for graph in range(10):
        lines += [f"3 {1 if graph % 2 else -1}"]
        lines += ["4 2 1 2", "6 2 0 2", "6 2 0 1"] if graph % 2 else ["4 1 1", "6 2 0 2", "6 1 1"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "TOY.txt").write_text("\n".join(lines))
    by_file = load_data({"kind": "tudataset", "name": "TOY", "path": str(tmp_path / "one")})
    for name, split in by_files.splits.items():
        for key, tensor in split.source.tensors.items():
            assert torch.equal(by_file.split(name).source.tensors[key], tensor), (name, key)
    (tmp_path / "one" / "TOY.txt").write_text("10\n3 1\n4 1 1\n")
    with pytest.raises(UserError, match="is not as the DGCNN repository has it"):
        load_data({"kind": "tudataset", "name": "TOY", "path": str(tmp_path / "one")})


def test_a_set_that_is_not_there_says_where_to_get_it(monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    with pytest.raises(UserError, match=r"get NCI1\.zip of https"):
        load_data("tudataset:NCI1")
    with pytest.raises(UserError, match="a set's name is letters"):
        load_data({"kind": "tudataset", "name": "../x"})


@pytest.mark.parametrize(("name", "graphs"), [("MUTAG", 188), ("PROTEINS", 1113), ("PTC_MR", 344)])
def test_the_real_sets_are_whole_and_as_foreseen(real_files, name, graphs):
    spec = {"kind": "tudataset", "name": name}
    data = load_data(spec)
    assert sum(len(split) for split in data.splits.values()) == graphs
    blank = read_spec(spec).foreseen()
    assert (blank.facts.inputs, blank.facts.num_classes) == (data.facts.inputs, data.facts.num_classes)
    assert {n: len(split) for n, split in blank.splits.items()} == {n: len(split) for n, split in data.splits.items()}


def test_what_cannot_be_a_graph_is_refused():
    none = np.empty((2, 0), dtype=np.int64)
    with pytest.raises(UserError, match="Graph 0 has no nodes"):
        padded([Graph([], none)])
    with pytest.raises(UserError, match="Graph 1 has 1 nodes, and an edge that ends at another one"):
        padded([Graph([0], none), Graph([0], np.array([[0], [1]]))])
    with pytest.raises(UserError, match="Either all graphs have edge labels or none has"):
        padded([Graph([0], none), Graph([0], none, [])])


def test_of_an_edge_given_twice_the_first_label_counts():
    tensors = padded([Graph([0, 0], np.array([[1, 0, 0], [0, 1, 0]]), [5, 6, 7])])
    assert tensors["edge_index"].tolist() == [[[0, 1], [1, 0]]]
    assert tensors["edge_labels"].tolist() == [[5, 5]]


@pytest.mark.parametrize("skewed", [False, True])
def test_drawn_graphs_are_the_same_each_time_and_of_the_said_form(skewed):
    spec = {"kind": "graph-motifs", "skewed": skewed}
    data = load_data(spec)
    again = load_data(spec)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 400, "validation": 100, "test": 400}
    tensors = data.split("train").source.tensors
    assert torch.equal(tensors["node_labels"], again.split("train").source.tensors["node_labels"])
    nodes, edges = sizes(tensors)
    assert int(tensors["node_labels"].max()) + 2 == data.facts.vocabulary_size
    if skewed:
        assert (nodes - 1 == edges // 2).all(), "they are trees"
        counts = [(tensors["node_labels"][tensors["labels"] == c] == 1).sum() for c in (0, 1)]
        twos = [(tensors["node_labels"][tensors["labels"] == c] == 2).sum() for c in (0, 1)]
        assert counts == twos, "labels alone tell nothing"
    else:
        assert int(nodes.min()) >= 11
        assert int(nodes.max()) <= 24
        extra = edges // 2 - (nodes - 1)
        assert extra[tensors["labels"] == 0].float().mean() > 2 * extra[tensors["labels"] == 1].float().mean()
