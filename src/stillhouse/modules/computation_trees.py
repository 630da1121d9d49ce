"""Computation trees: what a message-passing network of L layers sees of a graph (Mirage, arXiv 2310.09486).

The tree of a node has the node as its root and, below each of its nodes down to depth L, all neighbours of that node in the
graph, the one it was reached from included. After L rounds of messages along child -> parent edges the vector of the root is
that of the node in the graph, for aggregations that do not look at the degrees of neighbours (and for those that do, with
true degrees stored beside the leaves).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

Key = tuple[int, ...] | tuple[int, tuple[tuple[int, int], ...]]
"""A tree by its parts: the root's label (and a leaf's degree), or label and sorted (edge label, number of the subtree)."""


@dataclass(frozen=True)
class Tree:
    """One computation tree, its root first and every parent before its children.

    Attributes:
        labels: label of each node.
        parents: position of each node's parent; -1 of the root.
        edge_labels: label of the edge to the parent; -1 of the root.
        degrees: number of neighbours in the graph; of leaves, which have no children here, as :class:`TreeIndex` says.
    """

    labels: list[int]
    parents: list[int]
    edge_labels: list[int]
    degrees: list[int]


class TreeIndex:
    """Numbers the distinct computation trees of graphs, in one pass of L rounds over their edges.

    Two nodes get one number if and only if their trees are isomorphic as rooted trees with labels on nodes and edges. That is
    L rounds of Weisfeiler-Lehman colours, found without writing a tree down: a tree is its root's label and the sorted
    numbers of the subtrees below it.

    Args:
        depth: L, the depth of the trees.
        leaf_degrees: tell trees apart by the degrees of their leaves too, which GCN then sees as they are. Otherwise a leaf
            has the mean degree of its label's nodes, rounded.

    >>> import torch
    >>> index = TreeIndex(depth=1)
    >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> index.number(torch.zeros(1, 3, dtype=torch.long), path[None])
    [[0, 1, 0]]
    >>> index.form(1)
    (0, ((0, (0,)), (0, (0,))))
    """

    def __init__(self, depth: int, *, leaf_degrees: bool = False) -> None:
        self.depth, self.leaf_degrees = depth, leaf_degrees
        self._numbers: list[dict[Key, int]] = [{} for _ in range(depth + 1)]
        self._keys: list[list[Key]] = [[] for _ in range(depth + 1)]
        self._sizes: list[dict[int, int]] = [{} for _ in range(depth + 1)]
        self._degrees: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._keys[self.depth])

    def number(
        self,
        node_labels: Int[Tensor, "graphs nodes"],
        edge_index: Int[Tensor, "graphs 2 edges"],
        edge_labels: Int[Tensor, "graphs edges"] | None = None,
    ) -> list[list[int]]:
        """The number of the tree of each node of padded graphs (filled with -1), whose edges are there in both directions."""
        found = []
        labelled = [None] * len(node_labels) if edge_labels is None else edge_labels.tolist()
        for labels, (sources, targets), kinds in zip(node_labels.tolist(), edge_index.tolist(), labelled, strict=True):
            nodes = [label for label in labels if label >= 0]
            neighbours: list[list[tuple[int, int]]] = [[] for _ in nodes]
            for place, (source, target) in enumerate(zip(sources, targets, strict=True)):
                if source >= 0:
                    neighbours[target].append((0 if kinds is None else kinds[place], source))
            for label, around in zip(nodes, neighbours, strict=True):
                self._degrees.setdefault(label, [0, 0])
                self._degrees[label][0] += 1
                self._degrees[label][1] += len(around)
            if self.leaf_degrees:
                first = [(label, len(around)) for label, around in zip(nodes, neighbours, strict=True)]
            else:
                first = [(label,) for label in nodes]  # type: ignore[misc]
            colours = [self._numbered(0, key) for key in first]
            for step in range(1, self.depth + 1):
                colours = [
                    self._numbered(step, (label, tuple(sorted((kind, colours[other]) for kind, other in around))))
                    for label, around in zip(nodes, neighbours, strict=True)
                ]
            found.append(colours)
        return found

    def _numbered(self, step: int, key: Key) -> int:
        numbers = self._numbers[step]
        number = numbers.get(key)
        if number is None:
            number = numbers[key] = len(numbers)
            self._keys[step].append(key)
        return number

    def form(self, number: int, depth: int | None = None) -> tuple[object, ...]:
        """The canonical form: (label, children), children sorted as (edge label, form); (label,) or (label, degree) of a leaf.

        It does not depend on the order in which trees were numbered.
        """
        step = self.depth if depth is None else depth
        key = self._keys[step][number]
        if step == 0:
            return key
        return key[0], tuple(sorted((kind, self.form(child, step - 1)) for kind, child in key[1]))  # type: ignore[misc, union-attr]

    def nodes(self, number: int, depth: int | None = None) -> int:
        """Number of nodes of a tree, which grows like degree ** depth; found without growing it."""
        step = self.depth if depth is None else depth
        if step == 0:
            return 1
        known = self._sizes[step]
        if number not in known:
            children = self._keys[step][number][1]
            known[number] = 1 + sum(self.nodes(child, step - 1) for _, child in children)  # type: ignore[misc, union-attr]
        return known[number]

    def mean_degree(self, label: int) -> int:
        """Mean degree of the nodes with a label, rounded (a half up) and at least 1."""
        count, total = self._degrees[label]
        return max(1, (2 * total + count) // (2 * count))

    def grow(self, number: int) -> Tree:
        """The tree itself, its children in the order of its canonical form."""
        tree = Tree([], [], [], [])

        def below(form: tuple[object, ...], step: int, parent: int, kind: int) -> None:
            place, label = len(tree.labels), form[0]
            assert isinstance(label, int)
            tree.labels.append(label)
            tree.parents.append(parent)
            tree.edge_labels.append(kind)
            if step == 0:
                degree = form[1] if self.leaf_degrees else self.mean_degree(label)
                assert isinstance(degree, int)
                tree.degrees.append(degree)
                return
            children = form[1]
            assert isinstance(children, tuple)
            tree.degrees.append(len(children))
            for child_kind, child in children:
                below(child, step - 1, place, child_kind)

        below(self.form(number), self.depth, -1, -1)
        return tree


def coverage(numbers: Sequence[Sequence[int]], top: int = 10) -> float:
    """Share of all nodes whose tree is one of the ``top`` most frequent: how skewed the trees are.

    >>> coverage([[0, 0, 1], [0, 2]], top=1)
    0.6
    """
    counts = Counter(number for part in numbers for number in part)
    return sum(count for _, count in counts.most_common(top)) / max(1, counts.total())
