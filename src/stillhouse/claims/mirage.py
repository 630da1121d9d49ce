"""Mirage's claim: in the bytes of a few graphs, forests of mined trees teach more than random graphs do."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

BUSHES: dict[str, Any] = {"data": "graph-motifs", "max_trees": 3}
CHAINS: dict[str, Any] = {"data": {"kind": "graph-motifs", "skewed": True}, "budget": 0.01}
MUTAG: dict[str, Any] = {"data": {"kind": "tudataset", "name": "MUTAG", "test": 0.4}, "budget": 0.05, "max_trees": 3}
NCI1: dict[str, Any] = {"data": {"kind": "tudataset", "name": "NCI1", "test": 0.1}, "budget": 0.02, "max_trees": 3}
PROTEINS: dict[str, Any] = {
    "data": {"kind": "tudataset", "name": "PROTEINS", "test": 0.2},
    "budget": 0.02,
    "max_trees": 3,
}


def compared(name: str, fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Mirage, random training graphs in at least as many bytes, and all training graphs."""
    made_of = {"mirage": "itemsets", "random": "random-graphs", "all": "all"}
    return {f"{name}-{arm}": {**fields, "patterns": patterns} for arm, patterns in made_of.items()}


claim = Claim(
    name="mirage",
    statement=(
        "Networks trained on Mirage's forests reach at least 3 points more test AUC than on random training graphs of at least "
        "as many bytes: on drawn graphs of 3,000 different trees, and on MUTAG, NCI1 and PROTEINS, there with 2 points more "
        "accuracy too; more forests of a lower threshold are no worse; and where a few trees cover most nodes, one per cent of "
        "the bytes is within 3 points of all training graphs."
    ),
    base={
        "method": "mirage",
        "run": {"threads": 1},
        "depth": 2,
        "compare": [],
        "network": {"kind": "gnn", "convolution": "gin", "width": 32, "readout": "mean"},
        "eval_networks": 2,
        "eval_best": 1,
        "eval_steps": 300,
        "eval_batch_size": 64,
        "eval_optimizer": {"name": "adam", "lr": 5e-3},
        "evaluations": 5,
    },
    arms={
        "bushes-80-mirage": {**BUSHES, "thresholds": [80, 80]},
        "bushes-80-random": {**BUSHES, "thresholds": [80, 80], "patterns": "random-graphs"},
        "bushes-50-mirage": {**BUSHES, "thresholds": [50, 50]},
        "bushes-50-random": {**BUSHES, "thresholds": [50, 50], "patterns": "random-graphs"},
        "bushes-all": {**BUSHES, "thresholds": [80, 80], "patterns": "all"},
        **compared("chains", CHAINS),
        **compared("mutag", MUTAG),
        **compared("nci1", NCI1),
        **compared("proteins", PROTEINS),
        "nci1-trees": {**NCI1, "patterns": "trees"},
    },
    margins=[
        Margin("bushes-80-mirage", "bushes-80-random", "test/auc", by=0.03),
        Margin("bushes-50-mirage", "bushes-80-mirage", "test/auc", by=0.0),
        Margin("chains-mirage", "chains-all", "test/auc", by=-0.03),
        Margin("mutag-mirage", "mutag-random", "test/auc", by=0.03),
        Margin("nci1-mirage", "nci1-random", "test/auc", by=0.03),
        Margin("proteins-mirage", "proteins-random", "test/auc", by=0.03),
        Margin("mutag-mirage", "mutag-random", "test/accuracy", by=0.02),
        Margin("nci1-mirage", "nci1-random", "test/accuracy", by=0.02),
        Margin("proteins-mirage", "proteins-random", "test/accuracy", by=0.02),
    ],
    metrics=["test/auc_best", "size/bytes", "size/share", "size/graphs", "mined/trees", "mined/coverage"],
    seeds=(0, 1, 2, 3, 4),
    remark=(
        "Two-layer networks of width 32, sets of at most three trees, 2 to 5 % of the bytes, two networks a score of which the "
        "better on validation counts, 300 steps. On drawn graphs and PROTEINS the margins hold, on PROTEINS within noise; where "
        "few trees cover the nodes, one per cent of the bytes does as well as all graphs. On MUTAG (four forests against four "
        "graphs of 25 nodes in 250 bytes) random graphs are 13 points of AUC better in the mean, and on NCI1 there is no "
        "difference; single frequent trees do as well as sets of them there (0.64 against 0.62). Why was not established. A "
        "first record had random graphs of PROTEINS in three fifths of the bytes, because a few graphs are stored in narrower "
        "numbers than all of them; the random arms were run again with as many bytes, and the gain fell from 14.6 to 11.4 "
        "points of AUC."
    ),
)
