"""Computation trees: the numbers are Weisfeiler-Lehman colours, the forms canonical, the root sees what the node sees."""

from collections import Counter

import networkx as nx
import numpy as np
import pytest
import torch

from stillhouse.data import Graph, padded
from stillhouse.models import GraphNetwork
from stillhouse.modules.computation_trees import TreeIndex, coverage

RANDOM = np.random.default_rng(0)


def random_graph(nodes=8, edges=11, labels=3, kinds=2):
    pairs = np.stack(np.triu_indices(nodes, 1))[:, RANDOM.choice(nodes * (nodes - 1) // 2, edges, replace=False)]
    return Graph(RANDOM.integers(labels, size=nodes).tolist(), pairs, RANDOM.integers(kinds, size=edges).tolist())


def moved(graph):
    """The same graph with its nodes and edges in another order."""
    place = RANDOM.permutation(len(graph.labels))
    labels = [0] * len(place)
    for old, new in enumerate(place):
        labels[new] = graph.labels[old]
    order = RANDOM.permutation(graph.edges.shape[1])
    kinds = None if graph.edge_labels is None else [graph.edge_labels[e] for e in order]
    return Graph(labels, place[graph.edges[:, order]], kinds), place


def walked(graph, root, depth):
    """The tree of a node, walked step by step: nested (label, sorted children)."""
    tensors = padded([graph])
    ends = list(zip(*tensors["edge_index"][0].tolist(), tensors["edge_labels"][0].tolist(), strict=True))

    def below(node, left):
        if left == 0:
            return (graph.labels[node],)
        children = sorted((kind, below(other, left - 1)) for here, other, kind in ends if here == node)
        return graph.labels[node], tuple(children)

    return below(root, depth)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_form_is_the_walked_tree_whatever_the_order(depth):
    for _ in range(5):
        graph = random_graph()
        index = TreeIndex(depth)
        [numbers] = index.number(**padded([graph]))
        forms = [index.form(number) for number in numbers]
        assert forms == [walked(graph, node, depth) for node in range(len(graph.labels))]
        other, place = moved(graph)
        [again] = index.number(**padded([other]))
        assert [again[place[node]] for node in range(len(place))] == numbers
        fresh = TreeIndex(depth)
        [own] = fresh.number(**padded([other]))
        assert [fresh.form(own[place[node]]) for node in range(len(place))] == forms


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_classes_are_the_colours_of_weisfeiler_and_lehman(depth):
    graphs = [random_graph(kinds=1) for _ in range(6)]
    index = TreeIndex(depth)
    numbers = index.number(**padded(graphs))
    union = nx.Graph()
    for which, graph in enumerate(graphs):
        union.add_nodes_from(((which, node), {"label": str(label)}) for node, label in enumerate(graph.labels))
        union.add_edges_from(((which, a), (which, b)) for a, b in graph.edges.T.tolist() if a != b)
    hashes = nx.weisfeiler_lehman_subgraph_hashes(union, node_attr="label", iterations=depth, digest_size=16)
    colours = {hashes[which, node][-1] for which, part in enumerate(numbers) for node in range(len(part))}
    assert len(colours) == len(index)


def test_a_single_edge_label_makes_another_tree():
    edges = np.array([[0, 1], [1, 2]])
    index = TreeIndex(2)
    first, second = index.number(**padded([Graph([0, 0, 0], edges, [0, 0]), Graph([0, 0, 0], edges, [0, 1])]))
    assert not set(first) & set(second)
    assert len(set(first)) == 2
    assert len(set(second)) == 3


@pytest.mark.parametrize("nodes", [3, 4, 9])
def test_a_path_has_two_kinds_of_trees_of_depth_one(nodes):
    path = Graph([0] * nodes, np.stack([np.arange(nodes - 1), np.arange(1, nodes)]))
    [numbers] = TreeIndex(1).number(**padded([path]))
    assert sorted(Counter(numbers).values()) == sorted([2, nodes - 2])


def forest(trees):
    """Trees as the tensors of one graph with child -> parent edges, its roots and degrees."""
    labels, source, target, kinds, roots, degrees = [], [], [], [], [], []
    for tree in trees:
        start = len(labels)
        for place, parent in enumerate(tree.parents):
            roots.append(parent < 0)
            if parent >= 0:
                source.append(start + place)
                target.append(start + parent)
                kinds.append(tree.edge_labels[place])
        labels += tree.labels
        degrees += tree.degrees
    tensors = {"node_labels": labels, "edge_index": [source, target], "edge_labels": kinds, "degrees": degrees}
    return {name: torch.tensor([value]) for name, value in tensors.items()}, torch.tensor(roots)


@pytest.mark.parametrize("readout", ["sum", "mean", "max"])
@pytest.mark.parametrize("convolution", ["gin", "sage", "gat", "gcn"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_root_of_a_tree_is_the_node_of_the_graph(depth, convolution, readout):
    torch.manual_seed(0)
    net = GraphNetwork(4, 3, convolution=convolution, layers=depth, width=5, readout=readout).double().eval()
    graph = random_graph()
    tensors = padded([graph])
    index = TreeIndex(depth, leaf_degrees=convolution == "gcn")
    [numbers] = index.number(**tensors)
    batch, roots = forest([index.grow(number) for number in numbers])
    _, of_nodes = net.nodes(**tensors)
    if convolution != "gcn":
        del batch["degrees"]
    _, of_trees = net.nodes(**batch)
    torch.testing.assert_close(of_trees[roots], of_nodes, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(net(**batch, roots=roots[None]), net(**tensors), rtol=1e-10, atol=1e-10)


def test_without_the_leaves_degrees_gcn_is_only_near():
    net = GraphNetwork(4, None, convolution="gcn", layers=1, width=5).double().eval()
    graph = Graph([0, 1, 1], np.array([[0, 1], [1, 2]]))
    index = TreeIndex(1)
    [numbers] = index.number(**padded([graph]))
    assert index.mean_degree(1) == 2, "the mean of 2 and 1, a half up"
    batch, roots = forest([index.grow(number) for number in numbers])
    del batch["edge_labels"]
    _, of_nodes = net.nodes(**padded([graph]))
    _, with_means = net.nodes(**batch)
    del batch["degrees"]
    _, without = net.nodes(**batch)
    near, far = (found[roots] - of_nodes for found in (with_means, without))
    assert 0 < near.abs().sum() < far.abs().sum()


def test_sizes_are_known_without_growing():
    index = TreeIndex(3)
    numbers = index.number(**padded([random_graph() for _ in range(3)]))
    for number in {number for part in numbers for number in part}:
        tree = index.grow(number)
        assert index.nodes(number) == len(tree.labels) == len(tree.parents) == len(tree.degrees)
        assert tree.parents[0] == -1
        assert all(parent < place for place, parent in enumerate(tree.parents))
    assert coverage(numbers, top=len(index)) == 1
