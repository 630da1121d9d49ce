"""Labelled graphs: sets in the formats of TUDataset, and small ones that are drawn here.

A batch holds graphs as tensors of one size, shorter ones padded with -1: ``node_labels`` (graphs, nodes) and ``edge_index``
(graphs, 2, edges), which lists each edge in both directions, and ``edge_labels`` (graphs, edges) where edges have labels. A
graph's nodes come before its padding. Ids are those of the training graphs; the last one stands for labels that these lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse.data.blank import Blank
from stillhouse.data.dataset import Carving, Data, DataSpec
from stillhouse.data.files import Files, LocalFiles
from stillhouse.data.splits import carve, number_of
from stillhouse.data.tables import as_classes
from stillhouse.errors import UnreachableError, UserError

PADDING = -1
"""What fills a graph's tensors up to the size of the largest one."""

Label = tuple[float, ...]


@dataclass(frozen=True)
class Graph:
    """One undirected graph.

    Attributes:
        labels: a label for each node.
        edges: (2, edges), each edge once or twice, in any direction; loops are dropped and doubled edges merged.
        edge_labels: a label for each of ``edges``; of an edge given twice the first one counts. None where there are none.
    """

    labels: Sequence[int]
    edges: Int[np.ndarray[Any, Any], "2 edges"]
    edge_labels: Sequence[int] | None = None


def padded(graphs: Sequence[Graph]) -> dict[str, Tensor]:
    """Graphs as the tensors of a batch, see above; int32.

    Raises:
        UserError: a graph has no nodes, an edge ends outside its graph, or only some graphs have edge labels.

    >>> graphs = [Graph([0, 1], np.array([[0], [1]])), Graph([2], np.empty((2, 0), dtype=np.int64))]
    >>> tensors = padded(graphs)
    >>> tensors["node_labels"].tolist(), tensors["edge_index"].tolist()
    ([[0, 1], [2, -1]], [[[0, 1], [1, 0]], [[-1, -1], [-1, -1]]])
    """
    if len({graph.edge_labels is None for graph in graphs}) > 1:
        raise UserError("Either all graphs have edge labels or none has.")
    for place, graph in enumerate(graphs):
        if not len(graph.labels):
            raise UserError(f"Graph {place} has no nodes; leave it out.")
        if graph.edges.size and not 0 <= graph.edges.min() <= graph.edges.max() < len(graph.labels):
            raise UserError(f"Graph {place} has {len(graph.labels)} nodes, and an edge that ends at another one.")
    both = [_both_ways(graph) for graph in graphs]
    nodes, edges = max(len(graph.labels) for graph in graphs), max(1, *(found.shape[1] for found, _ in both))
    node_labels = np.full((len(graphs), nodes), PADDING, dtype=np.int32)
    edge_index = np.full((len(graphs), 2, edges), PADDING, dtype=np.int32)
    edge_labels = np.full((len(graphs), edges), PADDING, dtype=np.int32)
    for place, (graph, (found, labels)) in enumerate(zip(graphs, both, strict=True)):
        node_labels[place, : len(graph.labels)] = graph.labels
        edge_index[place, :, : found.shape[1]] = found
        if labels is not None:
            edge_labels[place, : len(labels)] = labels
    tensors = {"node_labels": torch.from_numpy(node_labels), "edge_index": torch.from_numpy(edge_index)}
    if graphs[0].edge_labels is not None:
        tensors["edge_labels"] = torch.from_numpy(edge_labels)
    return tensors


def _both_ways(graph: Graph) -> tuple[np.ndarray, np.ndarray | None]:
    """Every edge in both directions and once, without loops, in order; and the labels of these."""
    source, target = np.asarray(graph.edges, dtype=np.int64).reshape(2, -1)
    keys = np.concatenate([source, target]) * len(graph.labels) + np.concatenate([target, source])
    loops = np.concatenate([source, target]) == np.concatenate([target, source])
    # The first of equal keys is that of the edge as it was given first, in either direction.
    order = np.arange(len(keys)).reshape(2, -1).T.ravel()
    kept, first = np.unique(keys[order][~loops[order]], return_index=True)
    edges = np.stack([kept // len(graph.labels), kept % len(graph.labels)])
    if graph.edge_labels is None:
        return edges, None
    given = np.tile(np.asarray(graph.edge_labels), 2)
    return edges, given[order][~loops[order]][first]


@dataclass(frozen=True)
class _Known:
    """What is known of a set without reading it: graphs, nodes and directed edges of the largest, node labels, classes."""

    graphs: int
    nodes: int
    edges: int
    labels: int
    classes: int


KNOWN = {
    "ENZYMES": _Known(600, 126, 298, 3, 6),
    "IMDB-BINARY": _Known(1000, 136, 2498, 1, 2),
    "IMDB-MULTI": _Known(1500, 89, 2934, 1, 3),
    "MUTAG": _Known(188, 28, 66, 7, 2),
    "NCI1": _Known(4110, 111, 238, 37, 2),
    "PROTEINS": _Known(1113, 620, 2098, 3, 2),
    "PTC_MR": _Known(344, 109, 216, 19, 2),
}


class TUDataset(Carving, LocalFiles):
    """A set of labelled graphs, read from local files; ``tudataset:MUTAG`` in text.

    Two forms are read: the files of the TUDataset collection (``NAME_A.txt``, ``NAME_graph_indicator.txt``,
    ``NAME_graph_labels.txt``, and node labels, edge labels and node attributes where they are), which sets of one's own can
    be written in as well, and the one-file form of the DGCNN repository (``NAME.txt``), which has no edge labels. Edges are
    taken as undirected, doubled ones are merged and loops dropped. The sets have no official split; shares of the classes
    are set aside in a fixed way.
    """

    kind: ClassVar[str] = "tudataset"
    folders: ClassVar[tuple[str, ...]] = ("tudataset", "TUDataset")
    origin: ClassVar[str] = "NAME.zip of https://chrsmrrs.github.io/datasets"
    sums: ClassVar[dict[str, tuple[str, ...]]] = {
        "ENZYMES.txt": ("04e048844018a0f9c87afdc0d69031c4b625bb97d40320b9dbd76acc663f41a6",),
        "IMDBBINARY.txt": ("1068c698677c07c04f3ad56fc4a175cb2161523c840abfdaf50e101ecc30504f",),
        "IMDBMULTI.txt": ("f4cc1b32112303bf1b16a8351df8b8073978fdead823775fbe79e60cf94e7009",),
        "MUTAG.txt": ("5897dae243f6c773aab54ec99e86551c3b1e8601acef254714073042c632d30e",),
        "NCI1.txt": ("415d2e0861484c2baef1e40ee3ca62dd13c06d6b99549fb25774f43533e9321d",),
        "PROTEINS.txt": ("ed0730f9bf9da68aa6a8c80f2f2b6ecea5d05791ca254c709f3efab3b45d937b",),
        "PTC.txt": ("711729eaf2a5308752aa7c11062dd99f645f978afc400909a5927051b314ec55",),
    }

    name: str = "MUTAG"
    """Name of the set, as its files have it."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share of the graphs set aside for testing."""
    bins: int | None = Field(None, ge=2, le=1000)
    """Cut each continuous node attribute into so many equally filled bins over the training graphs; a node's bins become
    part of its label. Without it attributes are left aside."""
    degree_labels: bool = False
    """Make a node's degree part of its label (for sets whose nodes have none, such as IMDB-BINARY)."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(name=text) if text else cls()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not name or not all(letter.isalnum() or letter in "_-" for letter in name):
            raise ValueError(f"a set's name is letters, digits, '-' and '_', not {name!r}")
        return name

    @property
    def title(self) -> str:
        return f"{self.kind}:{self.name}"

    def foreseen(self) -> Data | None:
        known = KNOWN.get(self.name)
        if known is None or self.bins is not None or self.degree_labels:
            return None
        form = {"node_labels": ((known.nodes,), torch.int32), "edge_index": ((2, known.edges), torch.int32)}
        shares = {"test": self.test, "validation": self.validation}
        counts = {name: round(share * known.graphs) for name, share in shares.items()}
        counts = {"train": known.graphs - sum(counts.values()), **{n: count for n, count in counts.items() if count}}
        sources = {name: Blank(count, form, known.classes) for name, count in counts.items()}
        return self.assemble(
            sources, ["blank"], num_classes=known.classes, vocabulary=[str(n) for n in range(known.labels)]
        )

    def load(self) -> Data:
        files = Files(self)
        found = _collection(files, self.name) or _one_file(files, self.name)
        if found is None:
            raise UnreachableError(files.missing().replace("NAME", self.name))
        labels, class_names = as_classes({"all": found.classes})
        rows = self.training_rows(len(found.graphs), (), labels["all"])
        node_ids, nodes = numbered(self._node_labels(found, rows), rows)
        edge_ids, edges = None, None
        if found.edge_labels is not None:
            edge_ids, edges = numbered(found.edge_labels, rows)
        graphs = [
            Graph(own, graph.edges, None if edge_ids is None else edge_ids[place])
            for place, (own, graph) in enumerate(zip(node_ids, found.graphs, strict=True))
        ]
        source = {**padded(graphs), "labels": labels["all"]}
        shares = {name: share for name, share in (("validation", self.validation), ("test", self.test)) if share > 0}
        parts = carve(labels["all"], len(graphs), {"train": 1 - sum(shares.values()), **shares}, "carve")
        return self.assemble(
            {name: {key: tensor[index] for key, tensor in source.items()} for name, index in parts.items()},
            files.read_sums,
            class_names=class_names,
            vocabulary=nodes,
            edge_vocabulary=edges,
        )

    def _node_labels(self, found: _Found, rows: Tensor) -> list[list[Label]]:
        """What tells nodes apart: given labels, bins of attributes, degrees."""
        labels: list[list[Label]] = [[() for _ in range(graph.nodes)] for graph in found.graphs]
        told = False
        if found.node_labels is not None:
            told = True
            labels = [list(part) for part in found.node_labels]
        if found.attributes is not None and self.bins is not None:
            told = True
            training = np.concatenate([found.attributes[row] for row in rows.tolist()])
            edges = np.quantile(training, np.linspace(0, 1, self.bins + 1)[1:-1], axis=0)
            for part, values in zip(labels, found.attributes, strict=True):
                bins = [np.searchsorted(edges[:, column], values[:, column]) for column in range(values.shape[1])]
                part[:] = [(*label, *more) for label, more in zip(part, np.stack(bins, 1).tolist(), strict=True)]
        if self.degree_labels:
            told = True
            for part, graph in zip(labels, found.graphs, strict=True):
                degrees = np.bincount(_both_ways(Graph(part, graph.edges))[0][0], minlength=graph.nodes).tolist()  # type: ignore[arg-type]
                part[:] = [(*label, degree) for label, degree in zip(part, degrees, strict=True)]
        if not told:
            why = "continuous node attributes and no node labels; say how many bins they are cut into (bins: 4)"
            lacking = "no node labels; set degree_labels: true to take the degrees for labels"
            raise UserError(f"data: {self.title} has {why if found.attributes is not None else lacking}.")
        return labels


def numbered(labels: Sequence[Sequence[Label]], rows: Int[Tensor, " rows"]) -> tuple[list[list[int]], list[str]]:
    """Labels as ids from 0 in ascending order of the labels that the graphs ``rows`` have; all others get one id more.

    Returns:
        The ids, and the names of the labels by their ids; unseen ones have none.
    """
    seen = sorted({label for row in rows.tolist() for label in labels[row]})
    ids = {label: place for place, label in enumerate(seen)}
    names = [",".join(f"{number:g}" for number in label) for label in seen]
    return [[ids.get(label, len(seen)) for label in part] for part in labels], names


@dataclass(frozen=True)
class _Edges:
    nodes: int
    edges: np.ndarray


@dataclass(frozen=True)
class _Found:
    """What files hold, graph by graph."""

    graphs: list[_Edges]
    classes: list[str]
    node_labels: list[list[Label]] | None
    edge_labels: list[list[Label]] | None
    attributes: list[np.ndarray] | None


def _collection(files: Files, name: str) -> _Found | None:
    """A set in the files of the collection; None where they are not."""
    for folder in ("", f"{name}/", f"{name}/raw/"):
        if files.find(f"{folder}{name}_A.txt") is not None:
            break
    else:
        return None

    def read(part: str, convert: Callable[[str], Any]) -> list[Any] | None:
        content = files.read(f"{folder}{name}_{part}.txt")
        if content is None:
            return None
        lines = content.decode("utf-8", errors="replace").split("\n")
        try:
            return [convert(line) for line in lines if line.strip()]
        except ValueError as error:
            raise UserError(
                f"{files.find(f'{folder}{name}_{part}.txt')} is not as the collection has it: {error}."
            ) from None

    indicator, classes = read("graph_indicator", int), read("graph_labels", lambda line: str(int(line)))
    pairs = read("A", lambda line: [int(number) - 1 for number in line.split(",")])
    if indicator is None or classes is None or pairs is None:
        part = "graph_indicator" if indicator is None else "graph_labels"
        raise UserError(f"The set {name!r} has no file {name}_{part}.txt beside {name}_A.txt.")
    owner = np.asarray(indicator) - 1
    ends = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    if len(owner) == 0 or (np.diff(owner) < 0).any() or owner.max() >= len(classes) or owner.min() < 0:
        raise UserError(
            f"{name}_graph_indicator.txt must name the {len(classes)} graphs from 1 on, in ascending order."
        )
    if ends.size and not 0 <= ends.min() <= ends.max() < len(owner):
        raise UserError(f"{name}_A.txt has an edge to a node outside 1..{len(owner)}.")
    if (owner[ends[0]] != owner[ends[1]]).any():
        raise UserError(f"{name}_A.txt has an edge between two graphs.")
    starts = np.searchsorted(owner, np.arange(len(classes) + 1))
    order = np.argsort(owner[ends[0]], kind="stable")
    cuts = np.searchsorted(owner[ends[0]][order], np.arange(len(classes) + 1))
    if (np.diff(starts) == 0).any():
        raise UserError(f"{name}_graph_indicator.txt gives graph {int(np.argmin(np.diff(starts))) + 1} no nodes.")

    def by_node(values: list[Any] | None, part: str) -> list[Any] | None:
        if values is not None and len(values) != len(owner):
            raise UserError(f"{name}_{part}.txt has {len(values)} lines for {len(owner)} nodes.")
        return None if values is None else [values[low:high] for low, high in pairwise(starts)]

    def label(line: str) -> Label:
        return tuple(int(number) for number in line.split(","))

    edge_values = read("edge_labels", label)
    if edge_values is not None and len(edge_values) != ends.shape[1]:
        raise UserError(f"{name}_edge_labels.txt has {len(edge_values)} lines for {ends.shape[1]} edges.")
    attributes = by_node(read("node_attributes", lambda line: [float(n) for n in line.split(",")]), "node_attributes")
    return _Found(
        [
            _Edges(int(starts[g + 1] - starts[g]), ends[:, order[cuts[g] : cuts[g + 1]]] - starts[g])
            for g in range(len(classes))
        ],
        classes,
        by_node(read("node_labels", label), "node_labels"),
        None
        if edge_values is None
        else [[edge_values[e] for e in order[cuts[g] : cuts[g + 1]]] for g in range(len(classes))],
        None if attributes is None else [np.asarray(part, dtype=np.float64) for part in attributes],
    )


def _one_file(files: Files, name: str) -> _Found | None:
    """A set in the one file of the DGCNN repository; None where it is not."""
    for stem in dict.fromkeys([name, name.replace("-", ""), name.removesuffix("_MR")]):
        content = files.read(f"{stem}.txt")
        if content is not None:
            break
    else:
        return None
    lines = iter(content.decode("utf-8", errors="replace").split("\n"))
    graphs, classes, attributes = [], [], []
    labels: list[list[Label]] = []
    try:
        for _ in range(int(next(lines))):
            nodes, target = next(lines).split()
            rows = [next(lines).split() for _ in range(int(nodes))]
            degrees = [int(row[1]) for row in rows]
            ends = [[place, int(other)] for place, row in enumerate(rows) for other in row[2 : 2 + degrees[place]]]
            graphs.append(_Edges(len(rows), np.asarray(ends, dtype=np.int64).reshape(-1, 2).T))
            classes.append(str(int(target)))
            labels.append([(int(row[0]),) for row in rows])
            attributes.append([[float(n) for n in row[2 + d :]] for row, d in zip(rows, degrees, strict=True)])
    except (ValueError, IndexError, StopIteration, RuntimeError):
        raise UserError(f"{files.find(f'{stem}.txt')} is not as the DGCNN repository has it; get it again.") from None
    values = [np.asarray(part, dtype=np.float64) for part in attributes] if attributes[0][0] else None
    return _Found(graphs, classes, labels, None, values)


class GraphMotifs(DataSpec):
    """Random graphs whose two classes differ by the motifs that hang on them, each of the right kind with a probability.

    By default random trees of 8 to 15 nodes with labels 0 to 3 (0.4, 0.3, 0.2, 0.1) and one to three motifs: triangles of
    labels 2-2-3 in class 0, paths 2-3-2 in class 1. Few computation trees come twice. With ``skewed`` paths of 12 to 20 nodes
    of label 0 with motifs five nodes apart or more: a branch 1-2 in class 0 and 2-1 in class 1, so that labels alone tell
    nothing, and a few dozen computation trees are all there are. Four ninths are for training, four for testing.
    """

    kind: ClassVar[str] = "graph-motifs"

    samples: int = Field(900, ge=90, le=10**6)
    """Number of graphs in all splits together."""
    right: float = Field(0.8, ge=0.5, le=1)
    """Probability that a motif is that of the graph's class."""
    skewed: bool = False
    """Few labels and degrees, so that a few computation trees cover most nodes."""

    def load(self) -> Data:
        random = np.random.default_rng(number_of(self.kind, self.skewed))
        labels = torch.arange(self.samples) % 2
        draw = _chain if self.skewed else _bush
        graphs = [draw(random, [int(label) ^ int(random.random() >= self.right) for _ in range(count)])
                  for label, count in zip(labels.tolist(), random.integers(1, 4, self.samples), strict=True)]  # fmt: skip
        source = {**padded(graphs), "labels": labels}
        parts = carve(labels, self.samples, {"train": 4 / 9, "validation": 1 / 9, "test": 4 / 9}, self.kind)
        return self.assemble(
            {name: {key: tensor[index] for key, tensor in source.items()} for name, index in parts.items()},
            [],
            class_names=["branch 1-2", "branch 2-1"] if self.skewed else ["triangle", "path"],
            vocabulary=["0", "1", "2"] if self.skewed else ["0", "1", "2", "3"],
        )


def _bush(random: np.random.Generator, motifs: Sequence[int]) -> Graph:
    """A random tree with triangles (0) and paths (1) on it."""
    size = int(random.integers(8, 16))
    labels = random.choice(4, size, p=[0.4, 0.3, 0.2, 0.1]).tolist()
    edges = [(int(random.integers(node)), node) for node in range(1, size)]
    for motif in motifs:
        first = len(labels)
        labels += [2, 3, 2] if motif else [2, 2, 3]
        edges += [(first, first + 1), (first + 1, first + 2), (int(random.integers(size)), first)]
        edges += [] if motif else [(first, first + 2)]
    return Graph(labels, np.asarray(edges).T)


def _chain(random: np.random.Generator, motifs: Sequence[int]) -> Graph:
    """A path with branches on it, far enough from each other and from its ends that no two are seen at once."""
    size = int(random.integers(12, 21))
    places = [3 + 5 * place for place in range(len(motifs)) if 3 + 5 * place <= size - 4] or [3]
    shift = int(random.integers(size - 3 - places[-1]))
    labels, edges = [0] * size, [(node - 1, node) for node in range(1, size)]
    for place, motif in zip(places, motifs, strict=False):
        first = len(labels)
        labels += [2, 1] if motif else [1, 2]
        edges += [(place + shift, first), (first, first + 1)]
    return Graph(labels, np.asarray(edges).T)


def sizes(tensors: Mapping[str, Tensor]) -> tuple[Int[Tensor, " graphs"], Int[Tensor, " graphs"]]:
    """Nodes and directed edges of each graph of a batch."""
    return (tensors["node_labels"] != PADDING).sum(1), (tensors["edge_index"][:, 0] != PADDING).sum(1)
