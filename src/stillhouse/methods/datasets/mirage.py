"""Mirage: a tiny set of forests that any message-passing network can be trained on (arXiv 2310.09486)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.data import Batch, DataSpec, Facts, Split
from stillhouse.data.graph_sets import GraphExport, GraphSet
from stillhouse.data.graphs import PADDING
from stillhouse.engine import (
    Compute,
    Evaluation,
    Later,
    Losses,
    Method,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stage,
    Stages,
    Table,
    Update,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.metrics import accuracy, roc_auc
from stillhouse.models import GNNSpec, ModelSpec, logits
from stillhouse.modules.computation_trees import TreeIndex, coverage
from stillhouse.modules.itemsets import TooManyItemsets, frequent_itemsets

Patterns = Literal["itemsets", "trees", "random-trees", "random-graphs", "all"]
Itemsets = dict[tuple[int, ...], int]

LABELS: dict[str, str] = {
    "itemsets": "trees that occur together",
    "trees": "most frequent trees, one by one",
    "random-trees": "random trees, one by one",
    "random-graphs": "random training graphs",
    "all": "all training graphs",
}


@dataclass(frozen=True)
class _Mining:
    """The training graphs as what is mined.

    Attributes:
        index: the distinct trees.
        ranks: place of each tree in the order of the canonical forms, which that of the graphs does not change.
        transactions: for each class, the different trees of each of its graphs.
        single: trees that are one node, and are left out.
        large: trees of more nodes than asked for, likewise.
        covered: share of the nodes whose tree is one of the ten most frequent.
    """

    index: TreeIndex
    ranks: list[int]
    transactions: list[list[set[int]]]
    single: int
    large: int
    covered: float


class Mirage(Method):
    """Mine the computation trees that often occur together in the graphs of a class; each such set is a training graph.

    What a message-passing network of L layers sees of a graph is the multiset of its nodes' computation trees. Sets of trees
    that at least ``thresholds[c]`` graphs of class c have (FP-Growth) become forests with child -> parent edges, read out at
    the roots and drawn as often as they occur. No network is trained for it, and no gradient taken.
    """

    name: ClassVar[str] = "mirage"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "Mirage: Model-Agnostic Graph Distillation for Graph Classification",
        2024,
        arxiv="2310.09486",
        venue="ICLR 2024",
    )
    summary: ClassVar[str] = (
        "a tiny set of forests to train any graph network on, mined from labelled graphs without training"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    data: DataSpec = Field(
        DataSpec.parse("tudataset:NCI1"), description="labelled graphs: tudataset:NAME, graph-motifs"
    )
    depth: int = Field(
        2, ge=1, le=20, description="depth L of the computation trees: the layers of the networks to come"
    )
    thresholds: tuple[int, ...] | None = Field(
        None,
        description="for each class, graphs that a set of trees must be part of; None lowers them to fit the budget",
    )
    budget: float = Field(
        0.01,
        gt=0,
        le=1,
        description="bytes of the set as a share of those of the training graphs, where thresholds are searched",
    )
    search_step: float = Field(
        0.02, gt=0, lt=1, description="by how much of a class's graphs thresholds are lowered at a time in the search"
    )
    max_trees: int | None = Field(None, ge=1, description="most trees in a set; any number by default")
    max_itemsets: int = Field(10_000, ge=1, description="most sets of a class before the mining stops with a sentence")
    max_tree_nodes: int = Field(10_000, ge=2, description="larger trees are left out (they grow like degree ** depth)")
    discriminative: bool = Field(True, description="drop sets that are frequent in every class")
    leaf_degrees: bool = Field(
        False, description="tell trees apart by their leaves' degrees too: exact for GCN, but trees come more rarely"
    )
    patterns: Patterns = Field(
        "itemsets",
        description="what the set is made of: the method's itemsets, or as many bytes of single frequent trees, random trees "
        "or random training graphs; or all training graphs",
    )
    weighting: Literal["frequency", "loss", "none"] = Field(
        "frequency", description="graphs are drawn as often as they occur, or weigh so much in the loss, or are alike"
    )
    direction: Literal["up", "both"] = Field(
        "up", description="edges of the forests: child to parent, or both (an ablation)"
    )
    read_out: Literal["roots", "all"] = Field(
        "roots", description="nodes of the forests that are read out (all: an ablation)"
    )
    compare: tuple[Patterns, ...] = Field(
        ("random-graphs", "all"), description="what networks are trained on as well, for the table"
    )
    network: ModelSpec = Field(GNNSpec(dropout=0.5), description="network that is trained on the set to score it")
    eval_architectures: tuple[ModelSpec, ...] = Field((), description="further networks to score the set on")
    eval_networks: int = Field(10, ge=1, description="fresh networks that are trained on a set")
    eval_best: int = Field(5, ge=1, description="of these, so many with the best validation AUC make the paper's mean")
    eval_steps: int = Field(300, ge=1, description="steps of each of them, whatever the set")
    eval_batch_size: int = Field(128, ge=1, description="graphs of a step")
    eval_optimizer: Optimizer = Field(Optimizer(name="adam", lr=1e-3), description="optimiser in scoring")
    evaluations: int = Field(10, ge=1, description="measurements on the validation split in scoring")
    keep: Literal["best", "last"] = Field(
        "best", description="weights that are tested: the best on validation, or the last"
    )

    @model_validator(mode="after")
    def _whole(self) -> Mirage:
        if self.thresholds is not None and min(self.thresholds, default=0) < 1:
            raise ValueError("thresholds are one number for each class, and at least 1")
        return self

    def stages(self, run: Run) -> Stages:
        """Mine, then train fresh networks on the set and on what it is compared with."""
        facts = self.check_data(run)
        mined = yield Compute("mined", lambda _: self.mined(run), form=lambda: blank(facts))
        whole = whole_set(run.data.split("train"))
        names: list[Patterns] = list(dict.fromkeys((self.patterns, *self.compare)))
        sets = {name: whole if name == "all" else GraphSet(**mined["sets"][name]) for name in names}
        scores: dict[Patterns, dict[str, dict[str, list[float]]]] = {}
        for name in names:
            scores[name] = yield from self.scored(run, facts, sets[name], name)
        return self.concluded(run, facts, mined, sets, scores, whole.bytes)

    def check_data(self, run: Run) -> Facts:
        """The facts of the data, with the numbers of labels where it does not say them.

        Raises:
            UserError: it has no labelled graphs, no test split, or nothing of a class.
        """
        facts = run.data.facts
        if not {"node_labels", "edge_index"} <= set(facts.inputs):
            raise UserError(
                f"data: {self.name} needs graphs (node_labels and edge_index), and {run.data.name!r} has "
                f"{', '.join(facts.inputs)}."
            )
        if facts.task != "classification" or facts.num_classes is None:
            raise UserError(f"data: {self.name} needs class labels, and {run.data.name!r} has none.")
        if "test" not in run.data.splits:
            raise UserError(f"data: {self.name} scores its set on a test split, and {run.data.name!r} has none.")
        if self.thresholds is not None and len(self.thresholds) != facts.num_classes:
            raise UserError(
                f"thresholds has {len(self.thresholds)} numbers, and {run.data.name!r} has {facts.num_classes} classes; give one "
                "for each."
            )
        for label, members in run.data.split("train").by_class().items():
            if len(members) == 0:
                raise UserError(
                    f"data: class {label} of {run.data.name!r} has no training graph; every class needs one."
                )
        if facts.vocabulary_size is not None:
            return facts
        tensors = run.data.split("train").batch(range(len(run.data.split("train"))))
        if tensors["node_labels"].is_floating_point():
            raise UserError(
                "data: node_labels are numbers with fractions; cut continuous features into bins and give their ids."
            )
        nodes = int(tensors["node_labels"].max()) + 2
        edges = int(tensors["edge_labels"].max()) + 2 if "edge_labels" in tensors else None
        return replace(facts, vocabulary_size=nodes, edge_vocabulary_size=edges)

    # Mining ---------------------------------------------------------------------------------------------------------

    def mined(self, run: Run) -> dict[str, Any]:
        """The sets that are asked for, as tensors, and what was found on the way."""
        whole = whole_set(run.data.split("train"))
        classes = run.data.split("train").by_class()
        mining = self.transactions(whole, [members.tolist() for members in classes.values()])
        shares = [len(members) / len(whole) for members in classes.values()]
        each = [float(whole.bytes_each[members].sum()) for members in classes.values()]
        kept, thresholds = self.itemsets(mining, [self.budget * size for size in each], run.data.facts.class_names)
        itemsets = [(trees, count, label) for label, found in enumerate(kept) for trees, count in found.items()]
        labelled = whole.edge_labels is not None
        main = forests(mining.index, itemsets, shares, edge_labels=labelled)
        room = [float(main.bytes_each[main.labels == label].sum()) for label in range(len(kept))]
        sets: dict[str, GraphSet] = {"itemsets": main}
        wanted = {self.patterns, *self.compare}
        for name in sorted(wanted & {"trees", "random-trees"}):
            sets[name] = self.single_trees(mining, room, shares, edge_labels=labelled, random=name == "random-trees")
        if "random-graphs" in wanted:
            sets["random-graphs"] = whole.select(
                torch.cat([_drawn(whole, members, size) for members, size in zip(classes.values(), room, strict=True)])
            )
        return {
            "sets": {name: _stored(found) for name, found in sets.items()},
            "thresholds": thresholds,
            "patterns": [len(found) for found in kept],
            "numbers": {
                "trees": float(len(mining.index)),
                "coverage": mining.covered,
                "single": float(mining.single),
                "large": float(mining.large),
            },
        }

    def transactions(self, whole: GraphSet, classes: Sequence[Sequence[int]]) -> _Mining:
        """Number the trees of the training graphs and put down which ones each graph has."""
        index = TreeIndex(self.depth, leaf_degrees=self.leaf_degrees)
        numbers = index.number(whole.node_labels, whole.edge_index, whole.edge_labels)
        counts = [index.nodes(number) for number in range(len(index))]
        order = sorted(range(len(index)), key=index.form)
        ranks = [0] * len(order)
        for rank, number in enumerate(order):
            ranks[number] = rank
        fits = [2 <= count <= self.max_tree_nodes for count in counts]
        rows = [[{number for number in numbers[place] if fits[number]} for place in members] for members in classes]
        single, large = sum(count < 2 for count in counts), sum(count > self.max_tree_nodes for count in counts)
        return _Mining(index, ranks, rows, single, large, coverage(numbers))

    def itemsets(
        self, mining: _Mining, room: Sequence[float], class_names: Sequence[str] = ()
    ) -> tuple[list[Itemsets], list[int]]:
        """The sets of trees of each class, most frequent first, and the thresholds that they have reached.

        Args:
            mining: what is mined.
            room: bytes of each class, where thresholds are searched.
            class_names: for the messages.

        Raises:
            UserError: nothing of a class is frequent, or too much.
        """
        counts = [len(rows) for rows in mining.transactions]
        if self.thresholds is not None:
            found = self._frequent(mining, self.thresholds)
            for label, (kept, threshold) in enumerate(zip(found, self.thresholds, strict=True)):
                if not kept:
                    name = class_names[label] if label < len(class_names) else label
                    raise UserError(
                        f"thresholds: no set of trees is in {threshold} of the {counts[label]} training graphs of class {name!r}"
                        f"{' and not frequent in the others too' if self.discriminative else ''}; lower its threshold."
                    )
            return found, list(self.thresholds)
        best: tuple[list[Itemsets], list[int]] | None = None
        share = 1.0
        while share > self.search_step:
            share -= self.search_step
            thresholds = [max(1, round(share * count)) for count in counts]
            try:
                found = self._frequent(mining, thresholds)
            except TooManyItemsets:
                break
            if all(found):
                best = found, thresholds
                if all(sum(self._sizes(mining, kept)) >= size for kept, size in zip(found, room, strict=True)):
                    break
        if best is None:
            raise UserError(
                f"The search for thresholds ended at {thresholds} without a set of trees for every class"
                f"{' that is not frequent in all of them' if self.discriminative else ''}; set max_trees or a larger "
                "max_itemsets, or thresholds."
            )
        cut = [self._within(mining, kept, size) for kept, size in zip(best[0], room, strict=True)]
        return cut, best[1]

    def _frequent(self, mining: _Mining, thresholds: Sequence[int]) -> list[Itemsets]:
        """Frequent sets of each class, without those that are frequent in all."""
        found = [
            frequent_itemsets(rows, threshold, max_size=self.max_trees, limit=self.max_itemsets)
            for rows, threshold in zip(mining.transactions, thresholds, strict=True)
        ]
        shared = set.intersection(*(set(part) for part in found)) if self.discriminative else set()
        ranks = mining.ranks

        def place(pair: tuple[tuple[int, ...], int]) -> tuple[int, int, list[int]]:
            return -pair[1], len(pair[0]), sorted(ranks[number] for number in pair[0])

        return [dict(sorted(((s, n) for s, n in part.items() if s not in shared), key=place)) for part in found]

    def _sizes(self, mining: _Mining, itemsets: Itemsets) -> list[int]:
        """Bytes of each set as a forest, if its numbers fit one byte each."""
        nodes = [(sum(mining.index.nodes(number) for number in trees), len(trees)) for trees in itemsets]
        return [7 + 2 * count + 2 * (count - roots) for count, roots in nodes]

    def _within(self, mining: _Mining, itemsets: Itemsets, room: float) -> Itemsets:
        """The most frequent sets that have room, and the first one in any case."""
        used = 0.0
        kept: Itemsets = {}
        for (trees, count), size in zip(itemsets.items(), self._sizes(mining, itemsets), strict=True):
            used += size
            if kept and used > room:
                break
            kept[trees] = count
        return kept

    def single_trees(
        self, mining: _Mining, room: Sequence[float], shares: Sequence[float], *, edge_labels: bool, random: bool
    ) -> GraphSet:
        """Single trees of each class in as many bytes as ``room``: the most frequent ones, or random ones alike in weight."""
        chosen: list[tuple[tuple[int, ...], int, int]] = []
        for label, rows in enumerate(mining.transactions):
            counts = frequent_itemsets(rows, 1, max_size=1)
            order = sorted(counts, key=lambda s: (-counts[s], mining.ranks[s[0]]))
            if random:
                order = [order[place] for place in torch.randperm(len(order)).tolist()]
            ranked = {trees: 1 if random else counts[trees] for trees in order}
            chosen += [(trees, count, label) for trees, count in self._within(mining, ranked, room[label]).items()]
        return forests(mining.index, chosen, shares, edge_labels=edge_labels)

    # Scoring --------------------------------------------------------------------------------------------------------

    def scored(
        self, run: Run, facts: Facts, graphs: GraphSet, name: str
    ) -> Generator[Any, Any, dict[str, dict[str, list[float]]]]:
        """AUC and accuracy on the test split of fresh networks that are trained on a set, by architecture."""
        specs = {"": self.network}
        specs |= {
            f"{n}-{getattr(spec, 'convolution', spec.kind)}": spec for n, spec in enumerate(self.eval_architectures)
        }
        nets: dict[str, list[nn.Module]] = {key: [] for key in specs}
        inputs = self.inputs(graphs)

        def build(key: str, spec: ModelSpec, stage: str) -> Stage:
            net = spec.build(facts)
            nets[key].append(net)
            evaluation = None
            if "validation" in run.data.splits:
                evaluation = Evaluation(
                    lambda m: {
                        f"validation/{k}": v for k, v in told(m["net"], run.data.split("validation"), run).items()
                    },
                    every=max(1, self.eval_steps // self.evaluations),
                    monitor="validation/auc",
                )
            return Stage(
                stage,
                {"net": net},
                [Update(self.train_loss, {"net": self.eval_optimizer}, name="train", sparse=True)],
                steps=self.eval_steps,
                prepare=partial(self.drawn, inputs, graphs),
                evaluate=evaluation,
                keep=self.keep if evaluation else "last",
            )

        stages = []
        for key, spec in specs.items():
            for number in range(self.eval_networks):
                stage = f"score/{name}{'-' + key if key else ''}-{number}"
                stages.append(Later(stage, partial(build, key, spec, stage)))
        yield stages

        def measured(_: Any) -> dict[str, dict[str, list[float]]]:
            found: dict[str, dict[str, list[float]]] = {}
            for key, trained in nets.items():
                test = [told(net, run.data.split("test"), run) for net in trained]
                found[key] = {name: [numbers[name] for numbers in test] for name in ("auc", "accuracy")}
                if "validation" in run.data.splits:
                    found[key]["validation"] = [told(net, run.data.split("validation"), run)["auc"] for net in trained]
            return found

        nothing = {"auc": [0.0], "accuracy": [0.0]}
        scores: dict[str, dict[str, list[float]]] = yield Compute(
            f"scores/{name}", measured, form=lambda: dict.fromkeys(nets, nothing)
        )
        return scores

    def inputs(self, graphs: GraphSet) -> dict[str, Tensor]:
        """What networks are fed of a set: directions of edges and roots as the ablations ask."""
        found = graphs.graphs()
        if graphs.degrees is not None and self.direction == "both":
            found["edge_index"] = torch.cat([found["edge_index"], found["edge_index"].flip(1)], 2)
            if "edge_labels" in found:
                found["edge_labels"] = found["edge_labels"].repeat(1, 2)
        if self.read_out == "all":
            found.pop("roots", None)
        return found

    def drawn(self, inputs: Mapping[str, Tensor], graphs: GraphSet, m: Modules, batch: Batch, run: Run) -> Batch:
        """A batch of a set, drawn with replacement; ``weight`` is that of each graph in the loss."""
        alike = torch.ones_like(graphs.weight)
        chances = graphs.weight if self.weighting == "frequency" else alike
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        index = torch.multinomial(chances, self.eval_batch_size, replacement=True, generator=generator)
        index = index[run.world.rank :: run.world.size]
        weight = graphs.weight[index] * len(graphs) if self.weighting == "loss" else alike[index]
        found = {name: value[index] for name, value in inputs.items()}
        return Batch({**found, "labels": graphs.labels[index], "weight": weight}).to(run.world.device)

    def train_loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Cross-entropy on a set's graphs."""
        rows = F.cross_entropy(logits(m.net, batch), batch.labels, reduction="none")
        return {"ce": (rows * batch["weight"]).mean()}

    # Handing over ---------------------------------------------------------------------------------------------------

    def concluded(
        self,
        run: Run,
        facts: Facts,
        mined: Mapping[str, Any],
        sets: Mapping[Patterns, GraphSet],
        scores: Mapping[Patterns, Mapping[str, Mapping[str, list[float]]]],
        whole: int,
    ) -> Result:
        """The set in open formats, a row per score, sizes."""
        metrics: dict[str, float] = {}
        rows: list[list[str | float | int]] = []
        for name, by_architecture in scores.items():
            graphs = sets[name]
            sized = {"graphs": len(graphs), "nodes": graphs.nodes, "edges": graphs.edges, "bytes": graphs.bytes}
            metrics |= {f"size/{name}/{what}": float(count) for what, count in sized.items()}
            metrics[f"size/{name}/share"] = graphs.bytes / whole
            for key, found in by_architecture.items():
                prefix = f"test/{name}/{key}" if key else f"test/{name}"
                numbers = {
                    "auc": fmean(found["auc"]),
                    "auc_std": pstdev(found["auc"]),
                    "auc_best": self._best(found),
                    "accuracy": fmean(found["accuracy"]),
                }
                metrics |= {f"{prefix}/{what}": value for what, value in numbers.items()}
                network = key.partition("-")[2] if key else getattr(self.network, "convolution", self.network.kind)
                rounded = [round(value, 4) for value in numbers.values()]
                rows.append([LABELS[name], network, *rounded, *sized.values(), round(graphs.bytes / whole, 5)])
        for what in ("auc", "auc_best", "accuracy"):
            metrics[f"test/{what}"] = metrics[f"test/{self.patterns}/{what}"]
        for what in ("bytes", "share", "graphs"):
            metrics[f"size/{what}"] = metrics[f"size/{self.patterns}/{what}"]
        metrics |= {f"mined/{what}": value for what, value in mined["numbers"].items()}
        best = min(self.eval_best, self.eval_networks)
        title = f"{self.eval_networks} fresh networks on each set (AUC and accuracy on the test graphs)"
        columns = ["trained on", "network", "AUC", "std", f"AUC, best {best} by validation", "accuracy"]
        columns += ["graphs", "nodes", "directed edges", "bytes", "of all"]
        card = {
            "method": self.name,
            "paper": self.paper.title,
            "data": run.data.name,
            "seed": run.seed,
            "patterns": self.patterns,
            "depth": self.depth,
            "thresholds": list(mined["thresholds"]),
            "training_bytes": whole,
            "results": {what: round(metrics[f"test/{what}"], 4) for what in ("auc", "accuracy")},
        }
        export = GraphExport(
            sets[self.patterns], card, facts.class_names, node_names=facts.vocabulary, edge_names=facts.edge_vocabulary
        )
        return Result(
            artefacts={"set": export},
            metrics=metrics,
            tables=[Table(title, columns, rows)],
            notes=self._notes(facts, mined),
        )

    def _best(self, found: Mapping[str, list[float]]) -> float:
        """Mean of the networks that are best on validation: the paper's number."""
        order = sorted(range(len(found["auc"])), key=lambda place: -found.get("validation", found["auc"])[place])
        if "validation" not in found:
            order = list(range(len(found["auc"])))
        return fmean(found["auc"][place] for place in order[: self.eval_best])

    def _notes(self, facts: Facts, mined: Mapping[str, Any]) -> list[str]:
        numbers = mined["numbers"]
        names = facts.class_names or tuple(map(str, range(len(mined["thresholds"]))))
        parts = [
            f"{count} of class {name} (in {threshold} graphs or more)"
            for name, count, threshold in zip(names, mined["patterns"], mined["thresholds"], strict=True)
        ]
        told = [
            f"{numbers['trees']:.0f} different trees of depth {self.depth}, the ten most frequent of which cover "
            f"{numbers['coverage']:.0%} of the nodes; sets of trees: {', '.join(parts)}."
        ]
        if numbers["single"]:
            told.append(f"{numbers['single']:.0f} trees are single nodes and were left out.")
        if numbers["large"]:
            told.append(f"{numbers['large']:.0f} trees have more than {self.max_tree_nodes} nodes and were left out.")
        layers = getattr(self.network, "layers", self.depth)
        if layers != self.depth:
            told.append(
                f"The trees are {self.depth} deep and the network has {layers} layers: its roots do not see what nodes see."
            )
        return told


def told(net: nn.Module, split: Split, run: Run) -> dict[str, float]:
    """AUC and accuracy of a network on a split of graphs."""
    with measuring(net):
        pairs = [(logits(net, batch), batch.labels) for batch in split.in_order(512, device=run.world.device)]
    outputs, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return {"auc": float(roc_auc(outputs, labels)), "accuracy": float(accuracy(outputs, labels))}


def whole_set(split: Split) -> GraphSet:
    """All graphs of a split, alike in weight."""
    batch = split.batch(range(len(split)))
    return GraphSet(
        batch["node_labels"],
        batch["edge_index"],
        batch.labels,
        torch.full((len(split),), 1 / len(split)),
        edge_labels=batch.get("edge_labels"),
    )


def forests(
    index: TreeIndex,
    itemsets: Sequence[tuple[tuple[int, ...], int, int]],
    shares: Sequence[float],
    *,
    edge_labels: bool,
) -> GraphSet:
    """Sets of trees as forests.

    Args:
        index: the trees.
        itemsets: (trees, frequency, class) of each.
        shares: weight of each class, divided among its sets by their frequency.
        edge_labels: whether edges have labels.
    """
    grown = [[index.grow(number) for number in sorted(trees, key=index.form)] for trees, _, _ in itemsets]
    nodes = max(sum(len(tree.labels) for tree in trees) for trees in grown)
    edges = max(sum(len(tree.labels) - 1 for tree in trees) for trees in grown)
    rows, ends = (
        torch.full((2, len(grown), nodes), PADDING, dtype=torch.int32),
        torch.full((3, len(grown), edges), PADDING),
    )
    for place, trees in enumerate(grown):
        start, edge = 0, 0
        for tree in trees:
            size = len(tree.labels)
            rows[0, place, start : start + size] = torch.tensor(tree.labels)
            rows[1, place, start : start + size] = torch.tensor(tree.degrees)
            above = torch.tensor([tree.parents[1:], tree.edge_labels[1:]])
            ends[0, place, edge : edge + size - 1] = torch.arange(start + 1, start + size)
            ends[1, place, edge : edge + size - 1] = above[0] + start
            ends[2, place, edge : edge + size - 1] = above[1]
            start, edge = start + size, edge + size - 1
    counts = torch.tensor([float(count) for _, count, _ in itemsets])
    labels = torch.tensor([label for _, _, label in itemsets])
    totals = torch.zeros(len(shares)).index_add(0, labels, counts)
    weight = counts / totals[labels] * torch.tensor(shares)[labels]
    ends = ends.int()
    return GraphSet(
        rows[0], ends[:2].transpose(0, 1).contiguous(), labels, weight, ends[2] if edge_labels else None, rows[1]
    )


def _drawn(whole: GraphSet, members: Tensor, room: float) -> Tensor:
    """Random members that take at least ``room`` bytes as a set of their own, whose numbers may be narrower than all graphs'."""
    order = members[torch.randperm(len(members))]
    enough = int((whole.bytes_each[order].cumsum(0) < room).sum()) + 1
    while enough < len(order) and whole.select(order[:enough]).bytes < room:
        enough += 1
    return order[:enough].sort().values


def _stored(graphs: GraphSet) -> dict[str, Tensor]:
    return {name: value for name, value in vars(graphs).items() if value is not None}


def blank(facts: Facts) -> dict[str, Any]:
    """What mining gives, of trees of two nodes: a forecast's stand-in."""
    classes = facts.num_classes or 1
    pair, edge = torch.zeros(classes, 2, dtype=torch.int32), torch.tensor([[[1], [0]]], dtype=torch.int32)
    one = {
        "node_labels": pair,
        "edge_index": edge.repeat(classes, 1, 1),
        "labels": torch.arange(classes),
        "weight": torch.full((classes,), 1 / classes),
    }
    if "edge_labels" in facts.inputs:
        one["edge_labels"] = torch.zeros(classes, 1, dtype=torch.int32)
    forest = {**one, "degrees": torch.ones_like(pair)}
    return {
        "sets": {"itemsets": forest, "trees": forest, "random-trees": forest, "random-graphs": one},
        "thresholds": [1] * classes,
        "patterns": [1] * classes,
        "numbers": {"trees": 1.0, "coverage": 1.0, "single": 0.0, "large": 0.0},
    }
