"""A set of graphs in its files: nothing is lost, names come back, and its bytes are those that are stored."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from stillhouse.data import Graph, padded
from stillhouse.data.graph_sets import GraphExport, GraphSet, load_graph_set
from stillhouse.errors import UserError


def whole(edge_labels=False):
    edges = np.array([[0, 0, 1], [1, 2, 2]])
    graphs = [
        Graph([0, 1, 2], edges, [0, 1, 2] if edge_labels else None),
        Graph([3], np.empty((2, 0), dtype=np.int64), [] if edge_labels else None),
        Graph([0, 300, 2], edges[:, :2], [2, 1] if edge_labels else None),
    ]
    return GraphSet(**padded(graphs), labels=torch.tensor([0, 1, 1]), weight=torch.tensor([0.5, 0.25, 0.25]))


def forest():
    return GraphSet(
        node_labels=torch.tensor([[0, 1, 1, 2, 0], [1, 0, -1, -1, -1]], dtype=torch.int32),
        edge_index=torch.tensor([[[1, 2, 4], [0, 0, 3]], [[1, -1, -1], [0, -1, -1]]], dtype=torch.int32),
        labels=torch.tensor([1, 0]),
        weight=torch.tensor([0.75, 0.25]),
        edge_labels=torch.tensor([[0, 1, 0], [1, -1, -1]], dtype=torch.int32),
        degrees=torch.tensor([[2, 3, 1, 1, 2], [1, 4, -1, -1, -1]], dtype=torch.int32),
    )


@pytest.mark.parametrize("graphs", [whole(), whole(True), forest()], ids=["whole", "labelled", "forest"])
def test_what_is_written_is_read_again(tmp_path, graphs):
    GraphExport(graphs, {"method": "test"}).save(tmp_path)
    again = load_graph_set(tmp_path / "graphs.safetensors")
    for name, value in vars(graphs).items():
        assert (getattr(again, name) is None) == (value is None), name
        if value is not None:
            assert torch.equal(getattr(again, name), value), name
    with safe_open(tmp_path / "graphs.safetensors", "pt") as file:
        stored = sum(t.numel() * t.element_size() for t in (file.get_tensor(key) for key in file.keys()))  # noqa: SIM118
    assert stored == graphs.bytes == int(graphs.bytes_each.sum())


def test_roots_are_where_no_edge_leads_from():
    assert forest().roots.tolist() == [[True, False, False, True, False], [True, False, False, False, False]]
    assert whole().roots is None
    assert (forest().nodes, forest().edges, whole().edges) == (7, 4, 10)


def test_a_part_keeps_its_order_of_weights():
    part = forest().select(torch.tensor([1]))
    assert part.weight.tolist() == [1.0]
    assert part.labels.tolist() == [0]


def test_lines_and_the_hugging_face_set_have_the_labels_own_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    export = GraphExport(
        forest(), {"method": "mirage", "data": "toy"}, ["inert", "active"], ["C", "N"], ["single", "double"]
    )
    export.save(tmp_path)
    first, second = map(json.loads, (tmp_path / "graphs.jsonl").read_text().splitlines())
    assert first["node_labels"] == ["C", "N", "N", "unseen", "C"]
    assert first["edge_labels"] == ["single", "double", "single"]
    assert first["roots"] == [True, False, False, True, False]
    assert second["edge_index"] == [[1], [0]]
    stored = datasets.load_from_disk(str(tmp_path / "dataset"))
    assert [row["node_labels"] for row in stored] == [first["node_labels"], second["node_labels"]]
    card = (tmp_path / "README.md").read_text()
    for word in ("graph-ml", "toy distilled by mirage", "child to parent", f"{forest().bytes} bytes"):
        assert word in card


def test_what_is_no_set_is_refused(tmp_path):
    (tmp_path / "x").write_text("no")
    with pytest.raises(UserError, match="cannot be read as a set of graphs"):
        load_graph_set(tmp_path / "x")
