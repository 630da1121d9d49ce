"""Networks on graphs: equal to dense formulas, blind to padding and to the order of nodes and edges."""

import numpy as np
import pytest
import torch

from stillhouse.data import Graph, load_data, padded
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import GraphNetwork, ModelSpec, forward

CONVOLUTIONS = ["gcn", "sage", "gin", "gat"]


def network(convolution, edge_labels=None, **fields):
    torch.manual_seed(1)
    net = GraphNetwork(4, edge_labels, convolution=convolution, width=6, **fields).double().eval()
    for name, value in net.named_parameters():
        if value.ndim < 2:
            torch.nn.init.normal_(value, std=0.3)
        assert name
    return net


def example(edge_labels=False):
    edges = np.array([[0, 0, 1, 2, 3], [1, 2, 2, 3, 4]])
    graph = Graph([0, 1, 2, 1, 0], edges, [0, 1, 0, 1, 0] if edge_labels else None)
    other = Graph([2, 2, 0], np.array([[0, 1], [1, 2]]), [1, 1] if edge_labels else None)
    return [graph, other]


@pytest.mark.parametrize("readout", ["sum", "mean", "max"])
@pytest.mark.parametrize("edge_labels", [None, 3])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_padding_and_company_and_order_change_nothing(convolution, edge_labels, readout):
    net = network(convolution, edge_labels, readout=readout)
    graph, other = example(edge_labels is not None)
    both, alone = forward(net, padded([graph, other])), forward(net, padded([other]))
    torch.testing.assert_close(both[1:], alone, rtol=1e-12, atol=1e-12)
    order = np.array([3, 0, 4, 1, 2])
    place = np.argsort(order)
    shuffled = np.random.default_rng(0).permutation(graph.edges.shape[1])
    moved = Graph(
        [graph.labels[old] for old in order],
        place[graph.edges[:, shuffled]],
        None if graph.edge_labels is None else [graph.edge_labels[e] for e in shuffled],
    )
    torch.testing.assert_close(forward(net, padded([moved])), both[:1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_a_layer_is_its_formula_on_the_dense_adjacency(convolution):
    net = network(convolution, layers=1)
    graph = example()[0]
    h = net.node_embedding(torch.tensor(graph.labels))
    adjacency = torch.zeros(5, 5, dtype=torch.double)
    adjacency[graph.edges[0], graph.edges[1]] = adjacency[graph.edges[1], graph.edges[0]] = 1
    degrees, layer = adjacency.sum(1), net.layers[0]
    match convolution:
        case "gcn":
            scale = torch.diag((degrees + 1).rsqrt())
            expected = scale @ (adjacency + torch.eye(5)) @ scale @ layer.linear(h)
        case "sage":
            expected = layer.own(h) + layer.others(adjacency @ h / degrees[:, None])
        case "gin":
            expected = layer.mlp((1 + layer.eps) * h + adjacency @ h)
        case "gat":
            own = layer.linear(h)
            scores = torch.nn.functional.leaky_relu(layer.of_target(own) + layer.of_source(own).T, 0.2)
            scores = scores.masked_fill((adjacency + torch.eye(5)) == 0, -torch.inf)
            expected = scores.softmax(1) @ own + layer.bias
    _, found = net.nodes(**padded([graph]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_messages_go_along_edges_only(convolution):
    net = network(convolution)
    labels = torch.tensor([[0, 1, 2]])
    one_way = {"node_labels": labels, "edge_index": torch.tensor([[[0, 1], [1, 2]]])}
    _, h = net.nodes(**one_way)
    _, changed = net.nodes(torch.tensor([[0, 1, 1]]), one_way["edge_index"])
    torch.testing.assert_close(changed[:2], h[:2])
    assert not torch.allclose(changed[2], h[2])
    _, changed = net.nodes(torch.tensor([[1, 1, 2]]), one_way["edge_index"])
    assert not torch.allclose(changed[2], h[2]), "two rounds carry the first node's label two edges far"


def test_only_roots_are_read_out_and_unseen_labels_are_zero():
    net = network("gin", readout="mean")
    tensors = padded(example())
    roots = torch.zeros_like(tensors["node_labels"], dtype=torch.bool)
    roots[:, 0] = True
    graph, h = net.nodes(**tensors)
    expected = net.classifier(torch.stack([h[graph == 0][0], h[graph == 1][0]]))
    torch.testing.assert_close(net(**tensors, roots=roots), expected)
    assert not net.node_embedding(torch.tensor(3)).any()
    assert net.node_embedding(torch.tensor(2)).any()


def test_every_parameter_is_reached():
    for convolution in CONVOLUTIONS:
        net = network(convolution, 3, norm="layer")
        forward(net, padded(example(True))).square().sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_the_spec_sizes_itself_by_the_data_and_says_what_is_missing():
    data = load_data("graph-motifs")
    net = ModelSpec.parse("gnn:gat").build(data.facts)
    assert net(**data.split("test").batch([0, 1]).inputs).shape == (2, 2)
    assert net.node_embedding.num_embeddings == 5
    with pytest.raises(UserError, match="takes graphs"):
        ModelSpec.parse("gnn").build(Facts({"features": (3,)}, 2))
    with pytest.raises(UserError, match="does not say; set 'node_labels'"):
        ModelSpec.parse("gnn").build(Facts({"node_labels": (3,), "edge_index": (2, 4)}, 2))
    batched = ModelSpec.parse({"kind": "gnn", "norm": "batch", "node_labels": 9}).build(data.facts)
    assert batched.node_embedding.num_embeddings == 9
    assert batched(**data.split("test").batch([0, 1]).inputs).isfinite().all()
