"""Mirage: what is mined is what is frequent, forests are the mined trees, budgets and orders hold, bad input is named."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from stillhouse.data import Graph, load_data, padded
from stillhouse.data.graph_sets import load_graph_set
from stillhouse.data.graphs import PADDING
from stillhouse.errors import UserError
from stillhouse.front import run_recipe
from stillhouse.methods.datasets.mirage import Mirage, _drawn, forests, whole_set
from stillhouse.models import GraphNetwork
from stillhouse.recipe import build_recipe, load_recipe
from stillhouse.spec import read

TINY = {
    "method": "mirage",
    "run": {"threads": 1, "device": "cpu"},
    "data": {"kind": "graph-motifs", "samples": 180},
    "network": {"kind": "gnn", "width": 4},
    "eval_networks": 1,
    "eval_steps": 2,
    "eval_batch_size": 8,
    "compare": [],
    "max_trees": 2,
}


def train(**fields):
    return load_data({"kind": "graph-motifs", "samples": 180, **fields}).split("train")


def mined(method, split):
    """What a method mines of a split: transactions and the sets of each class."""
    whole = whole_set(split)
    classes = [members.tolist() for members in split.by_class().values()]
    mining = method.transactions(whole, classes)
    room = [method.budget * float(whole.bytes_each[members].sum()) for members in classes]
    return mining, *method.itemsets(mining, room)


def ran(tmp_path, **fields):
    return run_recipe(build_recipe({**TINY, **fields}), tmp_path / "run", cache=False)


def forms(mining, itemsets):
    return {tuple(sorted(mining.index.form(number) for number in trees)): count for trees, count in itemsets.items()}


def test_every_set_is_in_as_many_graphs_as_it_says_and_none_is_frequent_everywhere():
    mining, found, thresholds = mined(Mirage(thresholds=(12, 9), max_trees=3), train())
    assert thresholds == [12, 9]
    for rows, itemsets, threshold in zip(mining.transactions, found, thresholds, strict=True):
        for trees, count in itemsets.items():
            assert sum(set(trees) <= row for row in rows) == count >= threshold
    assert not set(found[0]) & set(found[1])
    _, all_of_them, _ = mined(Mirage(thresholds=(12, 9), max_trees=3, discriminative=False), train())
    shared = set(all_of_them[0]) & set(all_of_them[1])
    assert shared
    assert [len(part) + len(shared) for part in found] == [len(part) for part in all_of_them]


def test_a_lower_threshold_only_adds():
    fields = {"max_trees": 2, "discriminative": False}
    _, few, _ = mined(Mirage(thresholds=(20, 20), **fields), train())
    _, many, _ = mined(Mirage(thresholds=(10, 10), **fields), train())
    assert all(set(a) < set(b) for a, b in zip(few, many, strict=True))


def test_the_order_of_the_training_graphs_changes_nothing():
    split = train()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    method = Mirage(thresholds=(9, 9), max_trees=2)
    sets = []
    for part in (split, split.subset(order)):
        mining, found, _ = mined(method, part)
        rows = [(trees, count, label) for label, kept in enumerate(found) for trees, count in kept.items()]
        sets.append(forests(mining.index, rows, [0.5, 0.5], edge_labels=False))
    for name, value in vars(sets[0]).items():
        assert value is None or torch.equal(value, getattr(sets[1], name)), name


def test_a_forest_is_the_disjoint_union_of_its_trees_with_edges_to_the_parents():
    mining, found, _ = mined(Mirage(thresholds=(9, 9), max_trees=2), train())
    rows = [(trees, count, label) for label, kept in enumerate(found) for trees, count in kept.items()]
    graphs = forests(mining.index, rows, [0.25, 0.75], edge_labels=False)
    for label, share in enumerate((0.25, 0.75)):
        weights = graphs.weight[graphs.labels == label]
        counts = torch.tensor([float(count) for _, count, own in rows if own == label])
        torch.testing.assert_close(weights, share * counts / counts.sum())
    for place, (trees, _, _) in enumerate(rows):
        ends = graphs.edge_index[place][:, graphs.edge_index[place, 0] != PADDING]
        labels = graphs.node_labels[place].tolist()

        def below(node, ends=ends, labels=labels):
            children = [int(child) for child in ends[0][ends[1] == node]]
            return (labels[node], tuple(sorted((0, below(c)) for c in children))) if children else (labels[node],)

        roots = graphs.roots[place].nonzero().flatten().tolist()
        assert sorted(below(root) for root in roots) == sorted(mining.index.form(number) for number in trees)
        outgoing = Counter(ends[0].tolist())
        assert set(outgoing.values()) == {1}, "every node but the roots has one parent"


@pytest.mark.parametrize("convolution", ["gin", "sage", "gat"])
def test_a_forest_of_all_trees_of_a_graph_gives_the_graphs_output(convolution):
    torch.manual_seed(0)
    split = train().subset(torch.tensor([3]))
    net = GraphNetwork(5, None, convolution=convolution, width=6).double().eval()
    whole = whole_set(split)
    mining = Mirage().transactions(whole, [[0]])
    numbers = mining.index.number(whole.node_labels, whole.edge_index)[0]
    graphs = forests(mining.index, [(tuple(numbers), 1, 0)], [1.0], edge_labels=False)
    torch.testing.assert_close(net(**graphs.graphs()), net(**whole.graphs()), rtol=1e-10, atol=1e-10)


def test_the_search_fills_the_budget_and_does_not_pass_it(tmp_path):
    split = load_data({"kind": "graph-motifs", "skewed": True}).split("train")
    whole = whole_set(split)
    sizes = []
    for budget in (0.005, 0.01, 0.02):
        mining, found, thresholds = mined(Mirage(budget=budget), split)
        rows = [(trees, count, label) for label, kept in enumerate(found) for trees, count in kept.items()]
        sizes.append(forests(mining.index, rows, [0.5, 0.5], edge_labels=False).bytes)
        assert sizes[-1] <= budget * whole.bytes
        assert min(thresholds) >= 1
    assert sizes[0] < sizes[1] < sizes[2]
    assert mining.covered > 0.6
    assert len(mining.index) <= 100


def test_baselines_have_at_least_the_sets_bytes_or_fit_them(tmp_path):
    result = ran(tmp_path, thresholds=[12, 12], compare=["random-graphs", "random-trees", "trees", "all"])
    size = {
        name: result.metrics[f"size/{name}/bytes"] for name in ("itemsets", "random-graphs", "trees", "random-trees")
    }
    assert size["random-graphs"] >= size["itemsets"]
    assert max(size["trees"], size["random-trees"]) <= size["itemsets"] + 100
    assert result.metrics["size/all/share"] == 1
    assert result.metrics["size/share"] == pytest.approx(size["itemsets"] / result.metrics["size/all/bytes"])
    assert len(result.tables[0].rows) == 5


def test_the_artefact_is_the_set_with_names_and_thresholds(tmp_path):
    result = ran(tmp_path, thresholds=[12, 12])
    home = tmp_path / "run" / "result" / "set"
    again = load_graph_set(home / "graphs.safetensors")
    assert torch.equal(again.edge_index, result.artefacts["set"].graphs.edge_index)
    rows = [json.loads(line) for line in (home / "graphs.jsonl").read_text().splitlines()]
    assert {name for row in rows for name in row["node_labels"]} <= {"0", "1", "2", "3"}
    assert sum(row["weight"] for row in rows) == pytest.approx(1)
    assert "thresholds" in (home / "README.md").read_text()


@pytest.mark.parametrize("weighting", ["frequency", "loss", "none"])
def test_draws_follow_the_weights_or_the_loss_does(weighting):
    method = Mirage(weighting=weighting, eval_batch_size=20_000)
    mining, found, _ = mined(Mirage(thresholds=(9, 9), max_trees=2), train())
    rows = [(trees, count, label) for label, kept in enumerate(found) for trees, count in kept.items()]
    graphs = forests(mining.index, rows, [0.1, 0.9], edge_labels=False)

    class World:
        rank, size, device = 0, 1, torch.device("cpu")

    run = type("Run", (), {"world": World})
    batch = method.drawn({"node_labels": torch.arange(len(graphs))[:, None]}, graphs, {}, {}, run)
    counts = torch.bincount(batch["node_labels"].flatten(), weights=batch["weight"], minlength=len(graphs)) / 20_000
    expected = torch.full_like(graphs.weight, 1 / len(graphs)) if weighting == "none" else graphs.weight
    torch.testing.assert_close(counts.float(), expected, rtol=0.3, atol=2e-3)


def test_ablations_change_what_networks_are_fed_and_not_the_set():
    mining, found, _ = mined(Mirage(thresholds=(9, 9), max_trees=2), train())
    rows = [(trees, count, label) for label, kept in enumerate(found) for trees, count in kept.items()]
    graphs = forests(mining.index, rows, [0.5, 0.5], edge_labels=False)
    fed = Mirage().inputs(graphs)
    assert torch.equal(fed["roots"], graphs.roots)
    both = Mirage(direction="both").inputs(graphs)
    assert both["edge_index"].shape[2] == 2 * fed["edge_index"].shape[2]
    assert torch.equal(both["roots"], graphs.roots), "roots stay what they are"
    assert "roots" not in Mirage(read_out="all").inputs(graphs)


def test_a_depth_that_is_not_the_networks_is_told_and_single_nodes_are_left_out(tmp_path):
    none = np.empty((2, 0), dtype=np.int64)
    edge = np.array([[0], [1]])
    graphs = [Graph([place % 2], none) if place % 5 == 0 else Graph([place % 2, 1], edge) for place in range(60)]
    data = {**padded(graphs), "labels": torch.arange(60) % 2}
    fields = {**TINY, "data": {"train": data, "test": data}, "depth": 1, "thresholds": [5, 5]}
    result = run_recipe(build_recipe(fields), tmp_path / "run", cache=False)
    assert any("2 trees are single nodes" in note for note in result.notes)
    assert any("1 deep and the network has 2 layers" in note for note in result.notes)
    result = ran(tmp_path / "large", thresholds=[12, 12], max_tree_nodes=9)
    assert any("more than 9 nodes" in note for note in result.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thresholds": [5000, 5]}, r"no set of trees is in 5000 of the 40 training graphs of class 'triangle'"),
        ({"thresholds": [5]}, "has 1 numbers, and 'graph-motifs' has 2 classes"),
        ({"thresholds": [0, 3]}, "at least 1"),
        ({"depth": 0}, "depth"),
        (
            {"thresholds": [1, 1], "max_itemsets": 50},
            "More than 50 sets occur together at least 1 times; raise the threshold",
        ),
        ({"data": "digits"}, "needs graphs"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as error:
        ran(tmp_path, **fields)
    assert "\n" not in str(error.value)


def test_random_graphs_fill_the_room_in_their_own_numbers():
    """Graphs of 300 nodes make the numbers of all wide; those of a few small ones are narrow again."""
    path = np.array([range(299), range(1, 300)])
    graphs = [*[Graph([0] * 300, path)] * 20, *[Graph([0, 1, 0], np.array([[0, 1], [1, 2]]))] * 200]
    split = load_data({"train": {**padded(graphs), "labels": torch.arange(220) % 2}}).split("train")
    whole = whole_set(split)
    small = ((whole.node_labels != PADDING).sum(1) == 3).nonzero().flatten()
    assert 50 < len(small) < len(whole)
    chosen = _drawn(whole, small, 500.0)
    assert whole.select(chosen).bytes >= 500 > whole.select(chosen[:-1]).bytes
    assert len(set(chosen.tolist())) == len(chosen)


def test_the_search_that_ends_empty_says_what_to_do(tmp_path):
    edge = np.array([[0], [1]])
    data = {**padded([Graph([0, 0], edge)] * 40), "labels": torch.arange(40) % 2}
    with pytest.raises(
        UserError, match=r"ended at .* without a set of trees for every class that is not frequent in all"
    ):
        ran(tmp_path, data={"train": data, "test": data}, depth=2)


def test_objects_need_whole_numbers_for_labels(tmp_path):
    tensors = padded([Graph([0, 1], np.array([[0], [1]]))] * 20)
    data = {**tensors, "node_labels": tensors["node_labels"].float() + 0.5, "labels": torch.arange(20) % 2}
    with pytest.raises(UserError, match="cut continuous features into bins"):
        ran(tmp_path, data={"train": data, "test": data})


def test_the_paper_recipe_is_the_released_script():
    method = load_recipe("mirage/paper").method
    assert method.thresholds == (440, 570)
    assert [method.network.convolution, *(spec.convolution for spec in method.eval_architectures)] == [
        "gat",
        "gcn",
        "gin",
    ]
    assert (method.network.width, method.network.dropout, method.eval_batch_size) == (128, 0.5, 500)
    assert read(Mirage, method.dump()) == method
