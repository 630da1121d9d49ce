"""What makers of tiny training sets have in common: where images start, and how a set is handed over."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import fmean, pstdev
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Facts, Split
from stillhouse.data.export import Card, DistilledExport
from stillhouse.engine import Compute, Result, Run, Saveable, Stages, SubRun, Table, measuring
from stillhouse.errors import UserError
from stillhouse.methods.datasets.scoring import Scoring
from stillhouse.methods.supervised import Supervised
from stillhouse.models import ModelSpec, Taps, logits
from stillhouse.modules.coresets import herding, k_center, random_selection
from stillhouse.modules.distilled import DistilledSet

Start = Literal["random", "herding", "k-center", "noise"]


class Condensation(Scoring):
    """Base of methods that end in a tiny training set. It is always scored on fresh networks, at their last epoch."""

    images_per_class: int = Field(1, ge=1, description="images of each class in the tiny set (IPC)")
    features_network: ModelSpec | None = Field(
        None, description="network whose features herding and k-center use; a copy of the scored one by default"
    )
    features_epochs: float = Field(
        20, ge=0, description="training of the network whose features are used; 0 takes it as drawn"
    )

    # Where the images start -----------------------------------------------------------------------------------------

    def start(self, run: Run, how: Start, **more: Any) -> Generator[Compute | SubRun, Any, DistilledSet]:
        """The set before any training: chosen real images, or noise; ``more`` goes to :class:`DistilledSet`."""
        split, facts = run.data.split("train"), run.data.facts
        classes = self.check_data(run)
        scale = run.data.scale
        space: dict[str, Any] = {**more, "mean": scale.mean, "std": scale.std} if scale is not None else more
        if how == "noise":
            size = (classes * self.images_per_class, *image(facts))
            made = yield Compute(
                "start", lambda _: {"images": torch.randn(size)}, form=lambda: {"images": torch.zeros(size)}
            )
            labels = torch.arange(classes).repeat_interleave(self.images_per_class)
            provenance = {"method": self.name, "data": run.data.name, "seed": run.seed, "start": "noise"}
            return DistilledSet(made["images"], labels, num_classes=classes, provenance=provenance, **space)
        features: Callable[[Split], Tensor] = lambda _: torch.empty(0)  # noqa: E731
        if how != "random":
            spec = self.features_network or self.architecture()
            if self.features_epochs > 0:
                fields = {"data": self.data, "model": spec, "epochs": self.features_epochs}
                trained = yield SubRun("features", Supervised(**fields), seed=0, data=run.data)
                model = trained.model
            else:
                model = spec.build(facts).to(run.world.device)
            features = partial(penultimate, model, run)

        def some(share: float) -> Tensor:
            """A share of the work, and as many images as are chosen."""
            part = split.spaced(max(1, round(share * len(split))))
            fewest = int(torch.unique_consecutive(part.labels.sort().values, return_counts=True)[1].min())
            select(how, part.labels, min(self.images_per_class, fewest), partial(features, part))
            return random_selection(split.labels, self.images_per_class)

        chosen = yield Compute(
            "start",
            lambda _: select(how, split.labels, self.images_per_class, partial(features, split)),
            form=lambda: random_selection(split.labels, self.images_per_class),
            part=lambda _, share: some(share),
        )
        return self.chosen_images(run, chosen, **more)

    def chosen_images(self, run: Run, index: Tensor, **more: Any) -> DistilledSet:
        """The real images at ``index`` of the training split, grouped by class; ``more`` goes to :class:`DistilledSet`."""
        split, scale = run.data.split("train"), run.data.scale
        images = torch.cat([split.batch(part)["pixel_values"] for part in torch.split(index, 512)])
        space: dict[str, Any] = {"mean": scale.mean, "std": scale.std} if scale is not None else {}
        start = {"samples": index.tolist()}
        provenance = {"method": self.name, "data": run.data.name, "seed": run.seed, "start": start}
        classes = run.data.facts.num_classes
        return DistilledSet(images, split.labels[index], num_classes=classes, provenance=provenance, **space, **more)

    def drawn(self, run: Run, count: int) -> Int[Tensor, "classes count"]:
        """Positions of ``count`` random training images of each class; of fewer in a class some are drawn twice."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        rows = []
        for members in run.data.split("train").by_class().values():
            enough = len(members) >= count
            drawn = torch.randperm(len(members), generator=generator)[:count]
            if not enough:
                drawn = torch.randint(len(members), (count,), generator=generator)
            rows.append(members[drawn])
        return torch.stack(rows)

    def check_data(self, run: Run) -> int:
        """The number of classes, when the data can be condensed at all."""
        facts = run.data.facts
        if facts.num_classes is None or facts.task != "classification":
            raise UserError(f"data: {self.name} needs class labels, and {run.data.name!r} has none.")
        if "pixel_values" not in facts.inputs:
            raise UserError(f"data: {self.name} needs images, and {run.data.name!r} has {', '.join(facts.inputs)}.")
        if "test" not in run.data.splits:
            raise UserError(f"data: {self.name} scores its set on a test split, and {run.data.name!r} has none.")
        for label, members in run.data.split("train").by_class().items():
            if len(members) == 0:
                raise UserError(
                    f"data: class {label} of {run.data.name!r} has 0 training images; every class needs one."
                )
            if len(members) < self.images_per_class:
                raise UserError(
                    f"images_per_class is {self.images_per_class}, but class {label} has only {len(members)} images."
                )
        return facts.num_classes

    # How a set is scored --------------------------------------------------------------------------------------------

    def scored(self, run: Run, distilled: DistilledSet, name: str) -> Generator[Any, Any, dict[str, list[float]]]:
        """Test accuracy of fresh networks trained on the set, by architecture; last epoch, never the best."""
        # The set as it stands now: a later stage may go on changing it.
        tensors = {"pixel_values": distilled.images.detach().cpu().clone(), "labels": distilled.targets().cpu().clone()}
        optimizer = self.scoring_optimizer(distilled)
        trainings = {
            key: [replace(self.training(spec, tensors), optimizer=optimizer)] * self.eval_networks
            for key, spec in self.architectures().items()
        }
        return (yield from self.trained(run, name, trainings))

    def scoring_optimizer(self, distilled: DistilledSet) -> Optimizer:
        """The optimiser of networks that are trained on the set; a set that has a step size of its own brings it along."""
        if distilled.lr is None:
            return self.eval_optimizer
        return self.eval_optimizer.model_copy(update={"lr": float(distilled.lr.detach())})

    # How it is handed over ------------------------------------------------------------------------------------------

    def concluded(
        self,
        run: Run,
        distilled: DistilledSet,
        scores: dict[str, dict[str, list[float]]],
        protocol: Mapping[str, Any] | None = None,
        artefacts: Mapping[str, Saveable] | None = None,
        **more: Any,
    ) -> Result:
        """The result: the set in open formats with its card, a row per score, pictures.

        ``protocol`` says in the card what differs from the usual training on the set.
        """
        metrics: dict[str, float] = {}
        rows: list[list[str | float | int]] = []
        for label, by_architecture in scores.items():
            for key, values in by_architecture.items():
                network = self.architecture().kind if not key else key.partition("-")[2] + " (unseen)"
                prefix = f"test/{label}" if not key else f"test/{label}/{key}"
                metrics[f"{prefix}/accuracy"], metrics[f"{prefix}/std"] = fmean(values), pstdev(values)
                rows.append([label, network, round(fmean(values), 4), round(pstdev(values), 4), len(distilled)])
        main = "distilled" if "distilled" in scores else next(iter(scores))
        metrics["test/accuracy"] = metrics[f"test/{main}/accuracy"]
        usual = {
            "network": self.architecture().dump(),
            "networks": self.eval_networks,
            "epochs": self.eval_epochs,
            "batch_size": self.eval_batch_size,
            "optimizer": self.scoring_optimizer(distilled).dump(),
            "augment": self.augment.dump(),
        }
        card = Card(
            method=self.name,
            source=run.data.name,
            seed=run.seed,
            protocol={**usual, **(protocol or {})},
            paper=self.paper.title,
            results={name: value for name, value in metrics.items() if name.endswith("accuracy")},
            class_names=run.data.facts.class_names,
            data=self.data.dump() if self.data.kind != "object" else {},
        )
        notes = list(more.pop("notes", []))
        if find_spec("datasets") is None:
            notes.append(
                "the Hugging Face data set was left out: pip install 'stillhouse[datasets]' and resume the run."
            )
        title = f"Networks trained on {len(distilled)} images (test accuracy at the last epoch, {self.eval_networks} networks)"
        return Result(
            artefacts={"set": DistilledExport(distilled, card), **(artefacts or {})},
            metrics=metrics,
            tables=[Table(title, ["images", "network", "mean", "std", "number of images"], rows)],
            pictures={"distilled": grid(distilled), **more.pop("pictures", {})},
            notes=notes,
            **more,
        )


class Selection(Condensation):
    """Base of the classics that choose real images."""

    how: ClassVar[Start]

    def stages(self, run: Run) -> Stages:
        """Choose, then score."""
        chosen = yield from self.start(run, self.how)
        scores = yield from self.scored(run, chosen, "chosen")
        return self.concluded(run, chosen, {"chosen": scores})


def select(how: Start, labels: Tensor, per_class: int, features: Callable[[], Tensor]) -> Tensor:
    """Positions of the chosen samples; draws from torch's global generator."""
    match how:
        case "herding":
            return herding(features(), labels, per_class)
        case "k-center":
            return k_center(features(), labels, per_class)
        case _:
            return random_selection(labels, per_class)


def penultimate(model: nn.Module, run: Run, split: Split) -> Tensor:
    """What the last linear layer of a network reads, for every sample of a split."""
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise UserError(f"network: {type(model).__name__} has no linear layer whose input could serve as features.")
    found = []
    with Taps(model, last[-1], side="input") as taps, measuring(model):
        for batch in split.in_order(512, device=run.world.device):
            logits(model, batch)
            found.append(taps.take()[last[-1]].flatten(1).cpu())
    return torch.cat(found)


def image(facts: Facts) -> tuple[int, int, int]:
    """Channels, height and width of the images."""
    channels, height, width = facts.inputs["pixel_values"]
    return channels, height, width


def grid(distilled: DistilledSet, columns: int = 10) -> Tensor:
    """The set as one picture: a row per class (at most ten images of it), a white line between images."""
    pixels = distilled.pixels.detach().cpu()
    count, channels, _, width = pixels.shape
    if channels not in (1, 3):
        pixels = pixels[:, :1]
    per_row = min(columns, distilled.images_per_class or columns) if (distilled.images_per_class or 1) > 1 else columns
    padded = F.pad(pixels, (1, 1, 1, 1), value=1.0)
    rows = [padded[i : i + per_row] for i in range(0, count, per_row)]
    strips = [F.pad(torch.cat(list(row), 2), (0, (per_row - len(row)) * (width + 2), 0, 0), value=1.0) for row in rows]
    return torch.cat(strips, 1)
