"""What methods on features share: layers in pairs, embeddings, sums over layers, a stage before the student's."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Loss, Optimizer, Run, Stage, Update, Weight, frozen
from stillhouse.losses.feature_matching import feature_maps
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.modules.projectors import Connector
from stillhouse.modules.tokens import feature_grid


def maps(features: Tensor, batch: Batch) -> Tensor:
    """Features as maps: tokens of images laid out as their patches, vectors as maps of one position."""
    pixels = batch.get("pixel_values")
    if features.dim() == 3 and pixels is not None:
        return feature_grid(features, (pixels.shape[-2], pixels.shape[-1]))
    return feature_maps(features)


def layers(pair: Pair) -> list[tuple[Tensor, Tensor]]:
    """The student's and the teacher's features at the end of each stage, in pairs, as maps."""
    return _paired(pair.student.features, pair.teacher.features, pair.batch)


def layers_before(pair: Pair) -> list[tuple[Tensor, Tensor]]:
    """The same before the activation that ends each stage."""
    return _paired(pair.student.before, pair.teacher.before, pair.batch)


def embeddings(pair: Pair, gather: Run | None = None) -> tuple[Tensor, Tensor]:
    """What the two classifiers read, of the samples of all processes with ``gather``."""
    mine, theirs = pair.student.embedding, pair.teacher.embedding
    assert mine is not None
    assert theirs is not None
    return (mine, theirs) if gather is None else (gather.gather(mine), gather.gather(theirs))


def for_each(pairs: Sequence[tuple[Tensor, Tensor]], make: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    """A module for each pair of layers, made for so many channels of the student and of the teacher."""
    return nn.ModuleList(make(mine.shape[1], theirs.shape[1]) for mine, theirs in pairs)


def widened(pair: Pair) -> dict[str, nn.Module]:
    """Connectors of the student's layers to the teacher's channels, for losses that need the same; none where they agree."""
    pairs = layers(pair)
    if all(mine.shape[1] == theirs.shape[1] for mine, theirs in pairs):
        return {}
    return {"connectors": for_each(pairs, Connector)}


def connected(pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
    """The student's layers, through their connectors where there are any, and the teacher's."""
    pairs = layers(pair)
    connectors = pair.parts.get("connectors", [nn.Identity()] * len(pairs))
    mine = [connector(one) for connector, (one, _) in zip(connectors, pairs, strict=True)]
    return mine, [theirs for _, theirs in pairs]


def summed(terms: Sequence[Tensor], *, halved: bool = False) -> Tensor:
    """The sum over layers; ``halved``: the last counts 1 and each before it half of the next."""
    return torch.stack([term / 2 ** (len(terms) - 1 - at if halved else 0) for at, term in enumerate(terms)]).sum()


def averaged(wiring: Wiring, values: Sequence[Tensor]) -> Tensor:
    """The mean over teachers, by their weights, of a value for each."""
    return torch.stack([link.weight * value for link, value in zip(wiring.links, values, strict=True)]).sum()


def own(wiring: Wiring, place: int, part: str) -> tuple[str, ...]:
    """Names in the stage of an objective's parts of one name, one for each teacher."""
    parts = [parts[part] for parts in wiring.parts[place] if part in parts]
    return tuple(name for name, module in wiring.modules().items() if any(module is one for one in parts))


def pretraining(
    wiring: Wiring,
    run: Run,
    name: str,
    loss: Loss,
    *,
    weights: dict[str, Weight],
    trains: tuple[str, ...],
    optimizer: Optimizer,
    epochs: float,
) -> Generator[Stage, Any, None]:
    """Yield the stage that comes before the student's, on the same batches; nothing where it has no epochs or no weight.

    Args:
        wiring: everything wired.
        run: the run.
        name: name of the stage.
        loss: its loss. It need not reach all of what is trained: what the features do not depend on stays as it is.
        weights: of its terms.
        trains: names of the modules that it trains.
        optimizer: what trains them.
        epochs: passes over the training split.
    """
    if epochs == 0 or all(weight == 0 for weight in weights.values()):
        return
    whole = wiring.objectives[0]
    batches = run.data.split("train").batches(whole.batch_size, augment=whole.augment)
    known = {"student": wiring.student, **wiring.modules()}
    yield Stage(
        name,
        modules={
            **{module: known[module] for module in trains},
            **{teacher: frozen(network) for teacher, network in wiring.teachers.items()},
        },
        updates=[Update(loss, trains={trains: optimizer}, weights=weights, sparse=True, name=name)],
        batches=batches,
        steps=max(1, round(epochs * batches.per_epoch(run.world.size) / whole.accumulate)),
        accumulate=whole.accumulate,
    )


def _paired(student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> list[tuple[Tensor, Tensor]]:
    return [(maps(mine, batch), maps(theirs, batch)) for mine, theirs in zip(student, teacher, strict=True)]
