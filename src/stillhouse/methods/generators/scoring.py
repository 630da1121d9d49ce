"""How good samples are: what generators are compared by, with features of a classifier trained on the spot."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.data import Batch, Split
from stillhouse.engine import Compute, Method, Optimizer, Run, SubRun, Table, measuring
from stillhouse.errors import UserError
from stillhouse.methods.generators.process import Diffusion
from stillhouse.methods.supervised import Supervised
from stillhouse.metrics.generation import (
    FeatureStatistics,
    frechet_distance,
    mode_recall,
    precision_recall,
    sliced_wasserstein,
)
from stillhouse.models import ModelSpec, Taps, fingerprint, logits

FEWEST = 10
"""Samples below which nothing is measured."""


class Generating(Method):
    """Base of methods that end in a generator; its fields say how samples are measured."""

    probe: ModelSpec = Field(
        "cnn",
        description="classifier trained on the data, whose features and decisions measure images",
        validate_default=True,
    )
    probe_epochs: float = Field(30, gt=0, description="passes over the data in its training")
    eval_samples: int = Field(
        50_000, ge=0, description="samples of each generator that are measured; 0: no measurement"
    )
    eval_batch_size: int = Field(256, ge=1, description="samples at once in measurements")

    @model_validator(mode="after")
    def _enough(self) -> Generating:
        if 0 < self.eval_samples < FEWEST:
            raise ValueError(f"'eval_samples' is {self.eval_samples}; measure at least {FEWEST} samples, or 0 for none")
        return self

    def measured(
        self, run: Run, generators: Mapping[str, Diffusion], name: str = "quality"
    ) -> Generator[SubRun | Compute, Any, Measured]:
        """Measure generators on the same noise and conditions, and draw a picture of each.

        The Frechet distance and precision are to the training split; the row ``real`` is the test split's own distance
        from it, the floor.
        """
        if self.eval_samples == 0 or self.data is None:
            return Measured({}, [], {}, [])
        probe: Probe | None = None
        if "pixel_values" in run.data.facts.inputs and run.data.facts.task == "classification":
            training = Supervised(
                data=self.data,
                model=self.probe,
                epochs=self.probe_epochs,
                batch_size=min(64, len(run.data.split("train"))),
                optimizer=Optimizer(name="adamw", lr=2e-3, schedule="cosine"),
            )
            result = yield SubRun("probe", training, data=run.data)
            probe = Probe(result.model, f"{self.probe.kind}-{fingerprint(result.model)[:8]}")
        stored = yield Compute(
            name,
            lambda _: Scorer(self, run, probe).compare(generators),
            part=lambda _, share: Scorer(self, run, probe, share).compare(generators),
            form=lambda: {"numbers": {label: {} for label in generators}, "pictures": {}, "probe_accuracy": 0.0},
        )
        rows: list[list[str | float | int]] = [
            [label, generators[label].nfe if label in generators else "", *(round(v, 4) for v in numbers.values())]
            for label, numbers in stored["numbers"].items()
        ]
        columns = list(next(iter(stored["numbers"].values())))
        where = f", features of the probe {probe.name}" if probe is not None else ""
        table = Table(f"Generators ({self.eval_samples} samples{where})", ["model", "NFE", *columns], rows)
        metrics = {f"test/{label}/{k}": v for label, numbers in stored["numbers"].items() for k, v in numbers.items()}
        notes = []
        if probe is not None:
            accuracy = stored["probe_accuracy"]
            notes.append(
                f"Frechet distance, precision and recall are in the features of the probe {probe.name} (test accuracy "
                f"{accuracy:.4f}), trained on this data; they compare with no other extractor's."
            )
            metrics["test/probe/accuracy"] = accuracy
        return Measured(metrics, [table], stored["pictures"], notes)


@dataclass(frozen=True)
class Measured:
    """Numbers, tables, pictures and notes for a result."""

    metrics: dict[str, float]
    tables: list[Table]
    pictures: dict[str, Tensor]
    notes: list[str]


@dataclass(frozen=True)
class Probe:
    """A classifier whose last linear layer's input serves as features.

    Attributes:
        net: the classifier.
        name: its kind and the start of its fingerprint.
    """

    net: nn.Module
    name: str

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features and logits of a batch of images."""
        last = [path for path, layer in self.net.named_modules() if isinstance(layer, nn.Linear)]
        if not last:
            raise UserError(
                f"probe: {type(self.net).__name__} has no linear layer whose input could serve as features."
            )
        with Taps(self.net, last[-1], side="input") as taps:
            found = logits(self.net, batch)
            return taps.take()[last[-1]].flatten(1), found


class Scorer:
    """Measures samples against the training split.

    Args:
        method: for the number of samples.
        run: the run.
        probe: the classifier, for images with classes.
        share: share of the samples to measure.
    """

    def __init__(self, method: Generating, run: Run, probe: Probe | None, share: float = 1.0) -> None:
        self.run, self.probe, self.device = run, probe, run.world.device
        self.count, self.batch_size = max(FEWEST, round(share * method.eval_samples)), method.eval_batch_size
        if probe is not None:
            probe.net.to(self.device)

    def compare(self, generators: Mapping[str, Diffusion]) -> dict[str, Any]:
        """Numbers and pictures of each generator, from the same noise and conditions."""
        run, data, process = self.run, self.run.data, next(iter(generators.values())).process
        train = self._features(data.split("train"))
        self.reach = 1.1 * float(train.abs().max())
        numbers: dict[str, dict[str, float]] = {}
        pictures: dict[str, Tensor] = {}
        held = data.split("test") if "test" in data.splits and len(data.split("test")) >= FEWEST else None
        noise = torch.randn(self.count, *process.shape)
        given: dict[str, Tensor] = {}
        if process.fields:
            source = held if held is not None else data.split("train")
            drawn = source.batch(torch.arange(self.count) % len(source))
            given = {name: drawn[name] for name in process.fields}
        elif process.classes is not None:
            given = {"labels": torch.arange(self.count) % process.classes}
        projections = int(torch.randint(2**31, ()))
        for label, generator in generators.items():
            generator.net.to(self.device)
            found = []
            for start in range(0, self.count, self.batch_size):
                rows = slice(start, start + self.batch_size)
                condition = process.condition({name: value[rows].to(self.device) for name, value in given.items()})
                found.append(generator(noise[rows].to(self.device), condition).float())
            samples = torch.cat(found)
            numbers[label] = self._numbers(samples, given.get("labels"), train, projections)
            if (picture := pictured(samples, process.classes, run, self.reach)) is not None:
                pictures[label] = picture
        if held is not None:
            real = torch.cat([self._samples(batch) for batch in held.in_order(self.batch_size, device=self.device)])
            labels = held.labels if self.probe is not None and process.classes is not None else None
            numbers["real"] = self._numbers(real[: self.count], labels, train, projections)
            order = (
                torch.cat([held.by_class()[label][:8] for label in range(process.classes)]).view(process.classes, -1).T
                if process.classes is not None and min(map(len, held.by_class().values())) >= 8
                else torch.arange(len(real))
            )
            shown = real[order.flatten().to(self.device)]
            if (picture := pictured(shown, process.classes, run, self.reach)) is not None:
                pictures["real"] = picture
        accuracy = 0.0
        if self.probe is not None and held is not None:
            with measuring(self.probe.net):
                right = [
                    self.probe.read(batch)[1].argmax(1) == batch.labels
                    for batch in held.in_order(self.batch_size, device=self.device)
                ]
            accuracy = float(torch.cat(right).double().mean())
        return {"numbers": numbers, "pictures": pictures, "probe_accuracy": accuracy}

    def _samples(self, batch: Batch) -> Tensor:
        found: Tensor = batch["pixel_values"] if "pixel_values" in batch else batch["features"]
        return found

    def _features(self, split: Split) -> Tensor:
        """What samples are compared by, of at most ``count`` (but 10 000 at least) training samples."""
        most = max(self.count, 10_000)
        part = split.take(most) if len(split) > most else split
        batches = part.in_order(self.batch_size, device=self.device)
        if self.probe is None:
            return torch.cat([self._samples(batch).flatten(1) for batch in batches])
        with measuring(self.probe.net):
            return torch.cat([self.probe.read(batch)[0] for batch in batches])

    def _numbers(self, samples: Tensor, labels: Tensor | None, train: Tensor, projections: int) -> dict[str, float]:
        if self.probe is None:
            return self._without_probe(samples, train, projections)
        with measuring(self.probe.net):
            read = [self.probe.read(Batch(pixel_values=part)) for part in torch.split(samples, self.batch_size)]
        features = torch.cat([part for part, _ in read])
        statistics = [FeatureStatistics(name=self.probe.name).update(part) for part in (train, features)]
        most = 10_000
        precision, recall = precision_recall(train[:most], features[:most])
        numbers = {"frechet": frechet_distance(*statistics), "precision": precision, "recall": recall}
        if labels is not None:
            decided = torch.cat([part for _, part in read]).argmax(1)
            numbers["accuracy"] = float((decided.cpu() == labels[: len(decided)]).double().mean())
        return numbers

    def _without_probe(self, samples: Tensor, train: Tensor, projections: int) -> dict[str, float]:
        generator = torch.Generator(train.device).manual_seed(projections)
        numbers = {"sliced_wasserstein": sliced_wasserstein(train, samples.flatten(1), generator=generator)}
        split = self.run.data.split("train")
        if samples.ndim == 2 and split.facts.num_classes is not None:
            points = torch.cat([batch["features"] for batch in split.in_order(self.batch_size, device=self.device)])
            modes = [points[members.to(points.device)] for members in split.by_class().values()]
            centres = torch.stack([mode.mean(0) for mode in modes])
            std = math.sqrt(sum(float(mode.double().var(0).mean()) for mode in modes) / len(modes))
            found = mode_recall(samples, centres, radius=3 * std)
            numbers |= {"mode_recall": found.recall, "mode_quality": found.quality}
        return numbers


def pictured(samples: Tensor, classes: int | None, run: Run, reach: float) -> Tensor | None:
    """Images in a grid with a class per column; points in the plane as a density, up to ``reach``."""
    if samples.ndim == 4 and run.data.scale is not None:
        columns = _columns(classes)
        return grid(run.data.to_unit(samples[: 8 * columns].cpu()), columns)
    return density(samples.cpu(), reach) if samples.ndim == 2 and samples.shape[1] == 2 else None


def _columns(classes: int | None) -> int:
    return classes if classes is not None and classes <= 20 else 10


def progress(generator: Diffusion, run: Run) -> dict[str, Tensor]:
    """Two rows of samples, from noise of torch's global generator, as :attr:`Stage.show` draws them.

    Nothing where samples are neither images of one or three channels nor points in the plane.
    """
    process, train, device = generator.process, run.data.split("train"), run.world.device
    points = len(process.shape) == 1
    if process.shape[0] not in (1, 3) if not points else process.shape != (2,):
        return {}
    count = 1000 if points else 2 * _columns(process.classes)
    noise = torch.randn(count, *process.shape)
    given = train.batch(torch.arange(count) % len(train)) if process.fields else {}
    if process.classes is not None:
        given = {"labels": torch.arange(count) % process.classes}
    condition = process.condition({name: value.to(device) for name, value in given.items()})
    reach = 1.1 * float(train.batch(range(min(count, len(train))))["features"].abs().max()) if points else 0.0
    picture = pictured(generator(noise.to(device), condition).float(), process.classes, run, reach)
    return {} if picture is None else {"samples": picture}


def grid(images: Float[Tensor, "images channels height width"], columns: int) -> Float[Tensor, "channels height width"]:
    """Images in [0, 1] as one picture, row by row with a line of white between them, enlarged when they are small."""
    count, channels, height, width = images.shape
    enlarge = max(1, 32 // height)
    images = images.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    height, width = images.shape[2:]
    rows = math.ceil(count / columns)
    picture = torch.ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for place, image in enumerate(images):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        picture[:, top : top + height, left : left + width] = image
    return picture


def density(points: Float[Tensor, "points 2"], reach: float, bins: int = 200) -> Float[Tensor, "1 bins bins"]:
    """Points in the plane as a picture of their density, dark where there are many; the square is ``±reach`` wide."""
    counts = torch.histogramdd(points.float(), bins=[bins, bins], range=[-reach, reach, -reach, reach]).hist
    shade = (counts / counts.max().clamp(min=1)).sqrt()
    return 1 - shade.T.flip(0)[None]
