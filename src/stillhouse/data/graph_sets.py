"""A small set of graphs to train on in place of a large one: real graphs, or forests of computation trees (Mirage).

It writes itself as safetensors (small integers, each graph without padding), as JSON lines with the labels' own names, as a
Hugging Face data set where that library is installed, and with a card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from ruamel.yaml import YAML
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.data.graphs import PADDING, sizes
from stillhouse.errors import UserError

TENSORS, LINES, HUGGING_FACE, CARD = "graphs.safetensors", "graphs.jsonl", "dataset", "README.md"


@dataclass(frozen=True, eq=False)
class GraphSet:
    """Graphs with their classes and weights.

    Attributes:
        node_labels: ids, padded with -1 (see :mod:`stillhouse.data.graphs`).
        edge_index: where edges lead from and to, padded with -1.
        labels: class of each graph.
        weight: how often each graph is to be drawn, or how much it counts; the sum is 1.
        edge_labels: ids; None where edges have none.
        degrees: of a forest, the number of neighbours that each node had in its graph; None for whole graphs. Edges of a
            forest lead from child to parent only, and its roots alone are read out.

    >>> tensors = {"node_labels": torch.tensor([[5, 6, -1]]), "edge_index": torch.tensor([[[1, -1], [0, -1]]])}
    >>> forest = GraphSet(**tensors, labels=torch.tensor([1]), weight=torch.ones(1), degrees=torch.tensor([[1, 3, -1]]))
    >>> forest.roots.tolist(), forest.bytes, forest.nodes, forest.edges
    ([[True, False, False]], 15, 2, 1)
    """

    node_labels: Int[Tensor, "graphs nodes"]
    edge_index: Int[Tensor, "graphs 2 edges"]
    labels: Int[Tensor, " graphs"]
    weight: Float[Tensor, " graphs"]
    edge_labels: Int[Tensor, "graphs edges"] | None = None
    degrees: Int[Tensor, "graphs nodes"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nodes(self) -> int:
        """Nodes of all graphs."""
        return int(sizes(self.graphs())[0].sum())

    @property
    def edges(self) -> int:
        """Directed edges of all graphs."""
        return int(sizes(self.graphs())[1].sum())

    @property
    def roots(self) -> Bool[Tensor, "graphs nodes"] | None:
        """The nodes of a forest that no edge leads from; None for whole graphs."""
        if self.degrees is None:
            return None
        inner = torch.zeros(len(self), self.node_labels.shape[1] + 1, dtype=torch.bool)
        inner.scatter_(1, self.edge_index[:, 0].long() + 1, True)
        return (self.node_labels != PADDING) & ~inner[:, 1:]

    def graphs(self) -> dict[str, Tensor]:
        """The inputs of a network, without classes: what a data set of graphs has, and ``degrees`` and ``roots`` of a forest."""
        found = {"node_labels": self.node_labels, "edge_index": self.edge_index}
        if self.edge_labels is not None:
            found["edge_labels"] = self.edge_labels
        if self.degrees is not None:
            found |= {"degrees": self.degrees, "roots": self.roots}  # type: ignore[dict-item]
        return found

    def select(self, index: Int[Tensor, " part"]) -> GraphSet:
        """The graphs at some positions; their weights are made to sum to 1."""
        part = {name: None if value is None else value[index] for name, value in vars(self).items()}
        part["weight"] = self.weight[index] / self.weight[index].sum()
        return GraphSet(**part)  # type: ignore[arg-type]

    def packed(self) -> dict[str, Tensor]:
        """All of it without padding, in the smallest whole numbers: what is stored and what :attr:`bytes` counts.

        Each edge of a whole graph is there once; its other direction is put back by :func:`load_graph_set`.
        """
        present, there = self.node_labels != PADDING, self.edge_index[:, 0] != PADDING
        if self.degrees is None:
            there &= self.edge_index[:, 0] < self.edge_index[:, 1]
        found = {
            "nodes_per_graph": present.sum(1),
            "edges_per_graph": there.sum(1),
            "node_labels": self.node_labels[present],
            "edge_index": self.edge_index.transpose(0, 1)[:, there],
            "labels": self.labels,
        }
        if self.edge_labels is not None:
            found["edge_labels"] = self.edge_labels[there]
        if self.degrees is not None:
            found["degrees"] = self.degrees[present]
        small = {name: _smallest(value) for name, value in found.items()}
        return {**small, "weight": self.weight.float().contiguous()}

    @property
    def bytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(value.numel() * value.element_size() for value in self.packed().values())

    @property
    def bytes_each(self) -> Int[Tensor, " graphs"]:
        """Bytes of each graph among these; they sum to :attr:`bytes`."""
        packed = self.packed()
        width = {name: value.element_size() for name, value in packed.items()}
        nodes, edges = packed["nodes_per_graph"].long(), packed["edges_per_graph"].long()
        per_graph = sum(width[name] for name in ("nodes_per_graph", "edges_per_graph", "labels", "weight"))
        per_node, per_edge = (
            width["node_labels"] + width.get("degrees", 0),
            2 * width["edge_index"] + width.get("edge_labels", 0),
        )
        return per_graph + per_node * nodes + per_edge * edges


def _smallest(values: Tensor) -> Tensor:
    """Whole numbers in the smallest type that holds them."""
    high = int(values.max()) if values.numel() else 0
    dtype = torch.uint8 if high < 2**8 else torch.int16 if high < 2**15 else torch.int32
    return values.to(dtype).contiguous()


def load_graph_set(path: Path) -> GraphSet:
    """Read the ``graphs.safetensors`` of a set: equal to what was written.

    Raises:
        UserError: the file is missing or was written by something else.
    """
    try:
        with safe_open(path, "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a set of graphs: {str(error).rstrip('.')}.") from None
    if "nodes_per_graph" not in stored or "stillhouse" not in metadata:
        raise UserError(f"{path} is no set of graphs of this house.")
    nodes, edges = stored["nodes_per_graph"].long(), stored["edges_per_graph"].long()
    ends, kinds = stored["edge_index"].int(), stored.get("edge_labels")
    owner = torch.arange(len(nodes)).repeat_interleave(edges)
    if "degrees" not in stored:
        # Both directions, in the order that graphs have everywhere: by node.
        owner, ends = owner.repeat(2), torch.cat([ends, ends.flip(0)], 1)
        order = torch.argsort((owner * int(nodes.max()) + ends[0]) * int(nodes.max()) + ends[1])
        owner, ends, edges = owner[order], ends[:, order], 2 * edges
        kinds = None if kinds is None else kinds.repeat(2)[order]
    return GraphSet(
        node_labels=_apart(stored["node_labels"], nodes),
        edge_index=torch.stack([_apart(end, edges) for end in ends], 1),
        labels=stored["labels"].long(),
        weight=stored["weight"],
        edge_labels=None if kinds is None else _apart(kinds, edges),
        degrees=_apart(stored["degrees"], nodes) if "degrees" in stored else None,
    )


def _apart(values: Tensor, counts: Tensor) -> Tensor:
    """Values of graph after graph as rows, padded."""
    width = max(1, int(counts.max()))
    found = torch.full((len(counts), width), PADDING, dtype=torch.int32)
    found[torch.arange(width) < counts[:, None]] = values.int()
    return found


@dataclass(frozen=True)
class GraphExport:
    """A set of graphs as an artefact of a result, with what its card says.

    Attributes:
        graphs: the set.
        facts: what made it and of what, plain values.
        class_names: names of the classes; their numbers by default.
        node_names: what the ids of node labels stand for; the ids themselves by default.
        edge_names: likewise for edge labels.
    """

    graphs: GraphSet
    facts: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    node_names: Sequence[str] = ()
    edge_names: Sequence[str] = ()

    def save(self, directory: Path) -> None:
        """Write every format into ``directory``."""
        names = {"classes": self.class_names, "node_labels": self.node_names, "edge_labels": self.edge_names}
        told = {**self.facts, **{name: list(values) for name, values in names.items()}}
        save_file(self.graphs.packed(), directory / TENSORS, metadata={"stillhouse": json.dumps(told)})
        rows = self.rows()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / LINES).write_text(lines, encoding="utf-8")
        if find_spec("datasets") is not None:
            _save_huggingface(directory / HUGGING_FACE, rows)
        (directory / CARD).write_text(self._card(), encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """Each graph as plain values, labels by their names: what the JSON lines and the Hugging Face data set hold."""
        found = []
        graphs = self.graphs.graphs()
        for place in range(len(self.graphs)):
            nodes = int((graphs["node_labels"][place] != PADDING).sum())
            edges = int((graphs["edge_index"][place, 0] != PADDING).sum())
            row: dict[str, Any] = {
                "y": int(self.graphs.labels[place]),
                "weight": float(self.graphs.weight[place]),
                "num_nodes": nodes,
                "node_labels": _named(graphs["node_labels"][place, :nodes], self.node_names),
                "edge_index": graphs["edge_index"][place, :, :edges].tolist(),
            }
            if self.graphs.edge_labels is not None:
                row["edge_labels"] = _named(graphs["edge_labels"][place, :edges], self.edge_names)
            if self.graphs.degrees is not None:
                row["degrees"] = self.graphs.degrees[place, :nodes].tolist()
                row["roots"] = graphs["roots"][place, :nodes].tolist()
            found.append(row)
        return found

    def _card(self) -> str:
        graphs = self.graphs
        front: dict[str, Any] = {
            "pretty_name": f"{self.facts.get('data', 'graphs')} distilled by {self.facts.get('method', 'hand')}",
            "task_categories": ["graph-ml"],
            "tags": ["dataset-distillation", "stillhouse"],
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": LINES}]}],
            "distilled": {
                **self.facts,
                "graphs": len(graphs),
                "nodes": graphs.nodes,
                "directed_edges": graphs.edges,
                "bytes": graphs.bytes,
                "class_names": list(self.class_names),
            },
        }
        text = StringIO()
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(front, text)
        kind = "whole graphs" if graphs.degrees is None else "forests of computation trees"
        told = [f"---\n{text.getvalue()}---\n", f"# {front['pretty_name']}\n"]
        told.append(
            f"{len(graphs)} {kind}, {graphs.nodes} nodes and {graphs.edges} directed edges, {graphs.bytes} bytes.\n"
        )
        if graphs.degrees is not None:
            told.append(
                "Edges lead from child to parent. Pass messages along them in as many layers as the trees are deep, read out "
                "`roots` only, draw graphs by `weight`; `degrees` are those of the nodes in their graphs, which GCN normalises "
                "with. On ordinary graphs the same network passes messages both ways and reads out all nodes.\n"
            )
        told.append(
            f"- `{TENSORS}` is without padding, in the smallest whole numbers (`load_graph_set` reads it).\n"
            f"- `{LINES}` has a graph per line, with the labels' own names.\n"
        )
        return "\n".join(told)


def _named(ids: Tensor, names: Sequence[str]) -> list[str] | list[int]:
    numbers: list[int] = ids.tolist()
    return [names[number] if number < len(names) else "unseen" for number in numbers] if names else numbers


def _save_huggingface(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import datasets

    quiet = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_list([dict(row) for row in rows]).save_to_disk(str(directory))
    finally:
        if not quiet:
            datasets.enable_progress_bars()
