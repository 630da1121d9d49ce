"""Message-passing networks for graph classification: GCN, GraphSAGE, GIN and GAT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models.spec import NetworkSpec, classifier

Convolution = Literal["gcn", "sage", "gin", "gat"]
Readout = Literal["sum", "mean", "max"]

Nodes = Float[Tensor, "nodes width"]
Edges = Int[Tensor, "2 edges"]


def aggregated(messages: Float[Tensor, "edges width"], target: Int[Tensor, " edges"], nodes: int) -> Nodes:
    """Sum of the messages that arrive at each node."""
    total: Tensor = messages.new_zeros(nodes, *messages.shape[1:]).index_add(0, target, messages)
    return total


class GCNLayer(nn.Module):
    """``h_v = sum_u W h_u / sqrt((d_u + 1)(d_v + 1))`` over the neighbours and the node itself (arXiv 1609.02907, Eq. 2).

    Edge embeddings, where there are any, are added to ``W h_u`` of the neighbours.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Nodes, edges: Edges, edge: Tensor | None, degrees: Float[Tensor, " nodes"]) -> Nodes:
        source, target = edges
        scale = (degrees + 1).rsqrt()
        own: Tensor = self.linear(h)
        messages = own[source] if edge is None else own[source] + edge
        found: Tensor = aggregated(messages * (scale[source] * scale[target])[:, None], target, len(h))
        return found + own * scale.square()[:, None]


class SAGELayer(nn.Module):
    """``h_v = W h_v + V mean_u h_u`` (arXiv 1706.02216, with the mean); edge embeddings are added to ``h_u``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, h: Nodes, edges: Edges, edge: Tensor | None, degrees: Float[Tensor, " nodes"]) -> Nodes:
        source, target = edges
        messages = h[source] if edge is None else h[source] + edge
        arriving = aggregated(h.new_ones(len(target)), target, len(h)).clamp_min(1)
        found: Tensor = self.own(h) + self.others(aggregated(messages, target, len(h)) / arriving[:, None])
        return found


class GINLayer(nn.Module):
    """``h_v = MLP((1 + eps) h_v + sum_u h_u)`` (arXiv 1810.00826, Eq. 4.1); with edge embeddings ``ReLU(h_u + e_uv)`` in
    place of ``h_u`` (arXiv 1905.12265)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, h: Nodes, edges: Edges, edge: Tensor | None, degrees: Float[Tensor, " nodes"]) -> Nodes:
        source, target = edges
        messages = h[source] if edge is None else (h[source] + edge).relu()
        found: Tensor = self.mlp((1 + self.eps) * h + aggregated(messages, target, len(h)))
        return found


class GATLayer(nn.Module):
    """Attention over the nodes that an edge leads from and the node itself (arXiv 1710.10903, Eq. 1-4), one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.of_source, self.of_target, self.of_edge = (nn.Linear(width, 1, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Nodes, edges: Edges, edge: Tensor | None, degrees: Float[Tensor, " nodes"]) -> Nodes:
        source, target = edges
        own: Tensor = self.linear(h)
        values, sent, seen = own[source], self.of_source(own)[:, 0], self.of_target(own)[:, 0]
        scores = sent[source] + seen[target]
        if edge is not None:
            values, scores = values + edge, scores + self.of_edge(edge)[:, 0]
        scores, itself = (nn.functional.leaky_relu(x, 0.2) for x in (scores, sent + seen))
        highest = itself.detach().scatter_reduce(0, target, scores.detach(), "amax")
        parts, part = (scores - highest[target]).exp(), (itself - highest).exp()
        total = part + aggregated(parts, target, len(h))
        found: Tensor = aggregated(values * (parts / total[target])[:, None], target, len(h))
        return found + own * (part / total)[:, None] + self.bias


_LAYERS: dict[Convolution, Callable[[int], nn.Module]] = {
    "gcn": GCNLayer,
    "sage": SAGELayer,
    "gin": GINLayer,
    "gat": GATLayer,
}


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}


class GraphNetwork(nn.Module):
    """Node labels are embedded, messages passed along directed edges, nodes read out and classified.

    Args:
        node_labels: number of node labels. The last one stands for labels never seen in training; its embedding is 0.
        edge_labels: number of edge labels, likewise; None for edges without labels.
        convolution: how messages are passed.
        layers: rounds of message passing.
        width: values of a node.
        outputs: size of the output; 0 returns what is read out.
        readout: how a graph's nodes become one vector.
        norm: normalisation of the nodes after each round.
        dropout: probability of dropping a value after each round and before the classifier.
    """

    def __init__(
        self,
        node_labels: int,
        edge_labels: int | None,
        *,
        convolution: Convolution = "gin",
        layers: int = 2,
        width: int = 128,
        outputs: int = 2,
        readout: Readout = "sum",
        norm: Literal["none", "batch", "layer"] = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.readout: Readout = readout
        self.node_embedding = nn.Embedding(node_labels, width, padding_idx=node_labels - 1)
        self.edge_embedding = None if edge_labels is None else nn.Embedding(edge_labels, width, edge_labels - 1)
        self.layers = nn.ModuleList(_LAYERS[convolution](width) for _ in range(layers))
        self.norms = nn.ModuleList(_NORMS[norm](width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.classifier = classifier(width, outputs)

    def forward(
        self,
        node_labels: Int[Tensor, "graphs nodes"],
        edge_index: Int[Tensor, "graphs 2 edges"],
        edge_labels: Int[Tensor, "graphs edges"] | None = None,
        roots: Bool[Tensor, "graphs nodes"] | None = None,
        degrees: Float[Tensor, "graphs nodes"] | Int[Tensor, "graphs nodes"] | None = None,
    ) -> Float[Tensor, "graphs outputs"]:
        """Logits of padded graphs.

        Args:
            node_labels: ids, padded with -1 after the nodes.
            edge_index: positions of the nodes that edges lead from and to, padded with -1.
            edge_labels: ids.
            roots: nodes to read out; all by default.
            degrees: degrees that GCN normalises with, where nodes have neighbours that are not there; by default the number
                of edges that arrive.
        """
        graph, h = self.nodes(node_labels, edge_index, edge_labels, degrees)
        count = len(node_labels)
        if roots is not None:
            chosen = roots[node_labels >= 0]
            graph, h = graph[chosen], h[chosen]
        if self.readout == "max":
            index = graph[:, None].expand_as(h)
            read = h.new_zeros(count, h.shape[1]).scatter_reduce(0, index, h, "amax", include_self=False)
        else:
            read = aggregated(h, graph, count)
            if self.readout == "mean":
                read = read / aggregated(h.new_ones(len(h)), graph, count).clamp_min(1)[:, None]
        outputs: Tensor = self.classifier(self.dropout(read))
        return outputs

    def nodes(
        self,
        node_labels: Int[Tensor, "graphs nodes"],
        edge_index: Int[Tensor, "graphs 2 edges"],
        edge_labels: Int[Tensor, "graphs edges"] | None = None,
        degrees: Float[Tensor, "graphs nodes"] | Int[Tensor, "graphs nodes"] | None = None,
    ) -> tuple[Int[Tensor, " total"], Float[Tensor, "total width"]]:
        """The graph and the vector of each node after the last round, without the padding."""
        present, there = node_labels >= 0, edge_index[:, 0] >= 0
        starts = present.sum(1).cumsum(0) - present.sum(1)
        graph = present.nonzero()[:, 0]
        shifted = edge_index.long() + starts[:, None, None]
        edges = torch.stack([shifted[:, 0][there], shifted[:, 1][there]])
        h: Tensor = self.node_embedding(node_labels[present].long())
        edge = None
        if self.edge_embedding is not None and edge_labels is not None:
            edge = self.edge_embedding(edge_labels[there].long())
        arriving = aggregated(h.new_ones(edges.shape[1]), edges[1], len(h))
        known = arriving if degrees is None else degrees[present].to(h.dtype)
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            h = norm(layer(h, edges, edge, known))
            h = self.dropout(h if number == len(self.layers) else h.relu())
        return graph, h


class GNNSpec(NetworkSpec):
    """A message-passing network on graphs; text form ``gnn:gat`` gives the convolution."""

    kind = "gnn"

    convolution: Convolution = "gin"
    """How messages are passed: gcn, sage (mean), gin or gat."""
    layers: int = Field(2, ge=1, le=100)
    """Rounds of message passing."""
    width: int = Field(128, ge=1)
    """Values of a node."""
    readout: Readout = "sum"
    """How a graph's nodes become one vector."""
    norm: Literal["none", "batch", "layer"] = "none"
    """Normalisation of the nodes after each round."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping a value after each round and before the classifier."""
    node_labels: int | None = Field(None, ge=1)
    """Number of node labels, that of unseen ones included, where the data does not say it."""
    edge_labels: int | None = Field(None, ge=1)
    """Number of edge labels, likewise."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls.model_validate({"convolution": text} if text else {})

    def build(self, facts: Facts) -> GraphNetwork:
        if not {"node_labels", "edge_index"} <= set(facts.inputs):
            raise UserError(
                f"The model 'gnn' takes graphs (node_labels and edge_index), not {', '.join(facts.inputs)}."
            )
        nodes = self.node_labels or facts.vocabulary_size
        if nodes is None:
            raise UserError(
                "The model 'gnn' needs the number of node labels, which this data does not say; set 'node_labels'."
            )
        edges = (self.edge_labels or facts.edge_vocabulary_size) if "edge_labels" in facts.inputs else None
        return GraphNetwork(
            nodes,
            edges,
            convolution=self.convolution,
            layers=self.layers,
            width=self.width,
            outputs=self.outputs(facts),
            readout=self.readout,
            norm=self.norm,
            dropout=self.dropout,
        )
