"""KRR-ST: distil images without labels for transfer, by kernel ridge regression on a self-supervised model (arXiv 2310.06511)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from statistics import fmean, pstdev
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.data import Augment, Batch, Data, DataSpec, Facts, Split
from stillhouse.data.dataset import hard
from stillhouse.data.export import Card, DistilledExport
from stillhouse.engine import (
    SKIP,
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
    SubRun,
    Table,
    Update,
    adamw,
    frozen,
    measuring,
    sgd,
)
from stillhouse.engine.stage import Skip
from stillhouse.errors import UserError
from stillhouse.losses.kernel_ridge import descent_predict, ridge_predict, with_bias
from stillhouse.losses.redundancy import barlow_twins
from stillhouse.methods.barlow_twins import BarlowTwins, images_only, represented, width_of
from stillhouse.methods.datasets.condensation import grid
from stillhouse.methods.supervised import quality
from stillhouse.methods.teacher import TeacherSpec, TrainedTeacher
from stillhouse.metrics.representation import linear_probe
from stillhouse.models import (
    BatchStatistics,
    ConvNetSpec,
    ModelSpec,
    Taps,
    as_embedding,
    embedding,
    forward,
    initialise,
    logits,
)
from stillhouse.modules.coresets import k_means
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.siamese import DSA
from stillhouse.spec import Tagged

Protocol = Literal["probe", "finetune", "data-free"]

JUDGED = 1024
"""Held-out images at most on which the closed-form head is measured during distillation."""


class TargetSpec(Tagged):
    """What gives the representations: ``barlow-twins`` is trained before the run, anything else is read as a teacher."""

    noun = "target model"

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Also accept whatever a teacher is written as."""
        kind = value.get("kind") if isinstance(value, dict) else value
        if isinstance(value, cls) or (isinstance(kind, str) and kind in cls.members):
            return super().parse(value)
        return TeacherTarget(teacher=TeacherSpec.parse(value))  # type: ignore[return-value]

    def ready(self, run: Run) -> Generator[SubRun, Any, nn.Module]:
        """Train or load the model whose output is the representation."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it gets ready.")


class BarlowTwinsTarget(TargetSpec):
    """A network trained by Barlow Twins on the data at hand, with a seed of its own: once, then found in the cache."""

    kind = "barlow-twins"

    model: ModelSpec = Field("imagenet-resnet", description="the network", validate_default=True)
    projector: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (2048, 2048, 2048), min_length=1, description="widths of the projection head's layers"
    )
    augment: Augment = Field("resized-crop", description="how the first view is made", validate_default=True)
    second_augment: Augment | None = Field(None, description="how the second view is made; like the first by default")
    optimizer: Optimizer = Field(
        Optimizer(name="adam", lr=1e-3, weight_decay=1e-6, schedule="cosine"), description="its optimiser"
    )
    epochs: float = Field(1000, gt=0, description="passes over the training split")
    batch_size: int = Field(512, ge=2, description="samples per process and step")
    seed: int = Field(0, ge=0, description="its own seed, so that every run meets the same model")

    def ready(self, run: Run) -> Generator[SubRun, Any, nn.Module]:
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "seed"}
        result = yield SubRun("target", BarlowTwins(data=run.method.data, **fields), seed=self.seed, data=run.data)
        model: nn.Module = result.model
        return model


class TeacherTarget(TargetSpec):
    """A teacher's output, or that of one of its modules, as the representation."""

    kind = "teacher"

    teacher: TeacherSpec = Field(description="a pretrained model, or a network to train on labels")
    layer: str | None = Field(None, description="path of the module whose output is taken; the model's own by default")

    def ready(self, run: Run) -> Generator[SubRun, Any, nn.Module]:
        model = yield from self.teacher.ready(run, "target")
        return model if self.layer is None else Inner(model, self.layer)


class Inner(nn.Module):
    """A model that gives back what one of its modules puts out."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model = model
        self._taps = Taps(model, layer)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The output of the layer, its positions averaged."""
        forward(self.model, {"pixel_values": pixel_values})
        found = self._taps.take()[self._taps.paths[0]]
        return found.flatten(2).mean(2) if found.dim() > 2 else found


class Representation(nn.Module):
    """The target model g: one vector per image, standardised by fixed numbers where that is asked for.

    Args:
        model: what computes it.
        width: its width.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Representations (samples, width)."""
        found = as_embedding(forward(self.model, {"pixel_values": pixel_values}), of="The target model")
        return (found - self.shift) / self.scale


@dataclass(frozen=True)
class Turns:
    """Which member of the pool takes part in each step, and how old it is then (full-batch steps since it was drawn)."""

    members: Sequence[int]
    ages: Sequence[int]

    @classmethod
    def of(cls, members: Sequence[int], started: Sequence[int], oldest: int, *, restarts: bool = True) -> Turns:
        """The ages that follow from who takes part.

        Args:
            members: the member of each step.
            started: age of each member before the first step.
            oldest: a member of this age is drawn afresh in its next turn, in place of another step.
            restarts: it then grows up again; in the released code its count is not set back, so that from there on it is
                drawn afresh in each of its turns.

        >>> Turns.of([0, 0, 0, 0], [2], oldest=3).ages, Turns.of([0, 0, 0, 0], [2], oldest=3, restarts=False).ages
        ((2, 3, 0, 1), (2, 3, 3, 3))
        """
        now, ages = list(started), []
        for member in members:
            ages.append(now[member])
            if now[member] < oldest:
                now[member] += 1
            elif restarts:
                now[member] = 0
        return cls(tuple(members), tuple(ages))


class KRRST(Method):
    """Learn a few images and representations such that networks trained to map one to the other resemble a target model.

    In each step a network of a pool gives features of the set, ``f(X_s)``, and of a batch of real images, ``f(x)``; the
    head that maps the first to ``Y_s`` is solved by kernel ridge regression, and what it says of the real images is compared
    with the target model's ``g(x)``:

    ``L = || K_rs (K_ss + l I)^-1 Y_s - g(x) ||^2 / (n d)``, ``K = [f, 1] [f, 1]^T``, ``l = 1e-6 trace(K_ss)``

    Images and representations take a step; then the network takes one on the new set, or is drawn afresh when it is old.
    """

    name: ClassVar[str] = "krr-st"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "Self-Supervised Dataset Distillation for Transfer Learning", 2024, arxiv="2310.06511", venue="ICLR 2024"
    )
    summary: ClassVar[str] = "a tiny unlabelled set to pre-train on, by kernel ridge regression to a target model"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    target: TargetSpec = Field(
        BarlowTwinsTarget(), description="the target model g: barlow-twins is trained first, else any teacher"
    )
    standardize: bool = Field(False, description="standardise g's representation over the training images")
    num_images: int = Field(1000, ge=2, description="images in the set (m)")
    init: Literal["random", "k-means"] = Field(
        "random", description="real images to start from: any, or those nearest to the k-means of g's representations"
    )
    raw_start: bool = Field(
        True, description="start from pixels in [0, 1], as the released code does, though real images are standardised"
    )
    network: ModelSpec = Field(
        ConvNetSpec(width=(128, 256, 512), norm="batch"),
        description="networks of the pool, and that pre-trained to score",
    )
    pool_size: int = Field(10, ge=1, description="networks in the pool (L)")
    pool_steps: int = Field(1000, ge=2, description="full-batch steps after which one is drawn afresh (T)")
    pool_optimizer: Optimizer = Field(
        sgd(0.1, momentum=0.9, weight_decay=1e-3), description="optimiser of the pool's networks"
    )
    variant: Literal["paper", "code"] = Field(
        "paper", description="paper: a network that was drawn afresh grows old again; code: as released, it never does"
    )
    num_steps: int = Field(160_000, ge=0, description="outer steps; 0 keeps the real images and g's representations")
    batch_size: int = Field(1024, ge=2, description="real images per process and step")
    augment: Augment = Field("crop-flip", description="augmentation of real images", validate_default=True)
    optimizer: Optimizer = Field(
        adamw(1e-3, schedule="linear"), description="optimiser of the images and representations"
    )
    learn_targets: bool = Field(True, description="learn the representations, besides the images")
    ridge: float = Field(1e-6, ge=0, description="ridge l relative to the trace of K_ss")
    head: Literal["ridge", "descent"] = Field(
        "ridge", description="solve the head, or unroll gradient descent on it (an ablation)"
    )
    head_steps: int = Field(100, ge=1, description="steps of head=descent")
    outer: Literal["representation", "barlow-twins"] = Field(
        "representation",
        description="compare with g, or make two views agree (an ablation: no target in the outer loss)",
    )
    eval_networks: int = Field(3, ge=1, description="fresh networks that are pre-trained on the set")
    eval_architectures: tuple[ModelSpec, ...] = Field(
        (), description="unseen architectures to score the set on as well"
    )
    eval_epochs: int = Field(1000, ge=1, description="passes over the set in pre-training")
    eval_batch_size: int = Field(256, ge=2, description="batch size in pre-training")
    eval_optimizer: Optimizer = Field(
        sgd(0.1, momentum=0.9, weight_decay=1e-3), description="optimiser in pre-training"
    )
    compare_start: bool = Field(True, description="also score the images it started from, with g's representations")
    transfer: tuple[DataSpec, ...] = Field(
        (), description="labelled data sets to transfer to, with images of one shape"
    )
    protocols: tuple[Protocol, ...] = Field(
        ("finetune",), description="how: probe (frozen features), finetune, data-free (a teacher's outputs on the set)"
    )
    compare_scratch: bool = Field(True, description="also score networks that were not pre-trained")
    probe_steps: int = Field(5000, ge=1, description="steps of a linear probe")
    probe_batch_size: int = Field(512, ge=1, description="batch size of a linear probe")
    probe_lr: float = Field(0.2, gt=0, description="learning rate of a linear probe (SGD, momentum 0.9, cosine)")
    finetune_steps: int = Field(
        5000, ge=1, description="steps of fine-tuning; 10000 for the larger targets of the paper"
    )
    finetune_batch_size: int = Field(256, ge=1, description="batch size of fine-tuning")
    finetune_optimizer: Optimizer = Field(
        sgd(0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine"), description="optimiser of fine-tuning"
    )
    data_free_teacher: TeacherSpec = Field(
        {"kind": "trained", "model": "imagenet-resnet", "augment": "crop-flip"},
        description="the teacher of a transfer task in protocol data-free",
        validate_default=True,
    )
    data_free_epochs: int = Field(1000, ge=1, description="passes over the set in protocol data-free")
    data_free_batch_size: int = Field(512, ge=2, description="batch size in protocol data-free")
    data_free_optimizer: Optimizer = Field(
        adamw(1e-4, schedule="cosine"), description="optimiser in protocol data-free"
    )
    data_free_bn: Literal["batch", "running"] = Field(
        "batch",
        description="what the teacher's batch norms use there, and the measured student's: the batch (as released), or their own",
    )
    data_free_augment: DSA = Field(DSA(), description="augmentation of the set's images in protocol data-free")

    # Distilling -----------------------------------------------------------------------------------------------------

    def stages(self, run: Run) -> Stages:
        """Target model, start, pool, distillation, scores."""
        self.check_data(run)
        target = yield from self.target_model(run)
        width = len(target.shift)
        distilled = yield from self.start(run, target)
        scored = [("start", self.copied(distilled))] if self.compare_start and self.num_steps else []
        before, metrics = grid(distilled), {}
        if self.num_steps:
            metrics = yield from self.distilled(run, target, distilled, width)
        scored.append(("distilled", distilled))
        scores: dict[str, dict[str, list[float]]] = {}
        for name, part in scored:
            nets = yield from self.pretrained(run, part, name, width)
            scores[name] = yield from self.scored(run, nets, target, part, name)
        if self.compare_scratch and self.transfer:
            nets = {
                key: [self.fresh(spec, run, width) for _ in range(self.eval_networks)] for key, spec in self.specs()
            }
            scores["scratch"] = yield from self.scored(run, nets, None, distilled, "scratch")
        return self.concluded(run, distilled, scores, dict(metrics), {"start": before} if self.num_steps else {})

    def distilled(
        self, run: Run, target: Representation, distilled: DistilledSet, width: int
    ) -> Generator[Any, Any, dict[str, float]]:
        """Bring up the pool, distil, and say how far the closed-form head's error fell."""
        pool = nn.ModuleList(self.fresh(self.network, run, width) for _ in range(self.pool_size))
        started = torch.randint(1, self.pool_steps, (self.pool_size,)).tolist()
        members = torch.randint(self.pool_size, (self.num_steps,)).tolist()
        turns = Turns.of(members, started, self.pool_steps, restarts=self.variant == "paper")
        yield [
            Later(f"pool/{number}", partial(self.raised, f"pool/{number}", net, distilled, steps))
            for number, (net, steps) in enumerate(zip(pool, started, strict=True))
        ]
        taps = [Taps(net, head_of(net), side="input") for net in pool]
        judge = partial(self.judged, run, taps, pool, distilled, target)
        at_first = yield Compute("judged", lambda _: judge(), form=float)
        both: dict[str | tuple[str, ...], Optimizer] = {"set.images": self.optimizer}
        if self.learn_targets:
            both["set.labels"] = self.optimizer
        trained = yield Stage(
            "distillation",
            modules={"set": distilled, "pool": pool, "target": frozen(target)},
            updates=[
                Update(partial(self.match, taps, turns), both, name="match", eval=("pool",)),
                Update(partial(self.refresh, turns), {"pool": self.pool_optimizer}, name="refresh", sparse=True),
            ],
            steps=self.num_steps,
            batches=self.real_batches(run),
            evaluate=Evaluation(
                lambda m: {"validation/outer": judge()},
                every=max(1, self.num_steps // 10),
                monitor="validation/outer",
                mode="min",
            ),
            show=lambda m, run: {"images": grid(m.set)},
        )
        for tap in taps:
            tap.close()
        outer = trained.metrics["validation/outer"]
        return {"outer/start": at_first, "outer/end": outer, "outer/fall": 1 - outer / at_first if at_first else 0.0}

    def match(self, taps: Sequence[Taps], turns: Turns, m: Modules, batch: Batch, run: Run) -> Losses:
        """Predict the target's representations of real images by the head that the set alone gives."""
        member = turns.members[run.step]
        net, tap = m.pool[member], taps[member]
        features = with_bias(read(net, tap, m.set.images))
        if self.outer == "barlow-twins":
            sides = []
            for _ in range(2):
                with torch.no_grad():
                    queries = with_bias(read(net, tap, self.viewed(batch, run)))
                sides.append(run.gather(self.predict(features, m.set.labels, queries).float()))
            invariance, redundancy = barlow_twins(*sides)
            return {"barlow": invariance + 0.0051 * redundancy}
        with torch.no_grad():
            queries = with_bias(read(net, tap, batch["pixel_values"]))
            # The same view as the network's: another one would be the noise that a regression is there to avoid.
            wanted = m.target(batch["pixel_values"])
        predicted = self.predict(features, m.set.labels, queries)
        return {"representation": F.mse_loss(predicted, wanted.to(predicted.dtype))}

    def predict(self, features: Tensor, targets: Tensor, queries: Tensor) -> Tensor:
        """What the head says of the queries."""
        if self.head == "descent":
            return descent_predict(features, targets, queries, self.head_steps)
        return ridge_predict(features, targets, queries, self.ridge)

    def refresh(self, turns: Turns, m: Modules, batch: Batch, run: Run) -> Losses | Skip:
        """The network of this step goes on with the new set; an old one is drawn afresh instead."""
        net = m.pool[turns.members[run.step]]
        if turns.ages[run.step] >= self.pool_steps:
            initialise(net, run.generator())
            run.reset(net)
            return SKIP
        return self.regression(net, m.set)

    def regression(self, net: nn.Module, distilled: DistilledSet) -> Losses:
        """Squared error of a network on the whole set, which gets no gradient."""
        images, wanted = distilled.images.detach(), distilled.labels.detach()
        return {"regression": F.mse_loss(logits(net, {"pixel_values": images}), wanted)}

    def raised(self, name: str, net: nn.Module, distilled: DistilledSet, steps: int) -> Stage:
        """A network of the pool, trained on the set so far for its first age."""
        update = Update(lambda m, batch, run: self.regression(m.net, m.set), {"net": self.pool_optimizer}, name="raise")
        return Stage(name, {"net": net, "set": frozen(distilled)}, [update], steps=steps)

    def viewed(self, batch: Batch, run: Run) -> Tensor:
        """A view of its own of the batch's images."""
        unit = run.data.to_unit(batch["pixel_values"])
        return run.data.from_unit(self.augment(unit, rank=run.world.rank, world=run.world.size))

    def real_batches(self, run: Run) -> Any:
        """Batches of real images, augmented once each."""
        split = run.data.split("train")
        size = min(self.batch_size, max(1, len(split) // run.world.size))
        return split.batches(size, augment="none" if self.outer == "barlow-twins" else self.augment)

    def judged(
        self, run: Run, taps: Sequence[Taps], pool: nn.ModuleList, distilled: DistilledSet, target: nn.Module
    ) -> float:
        """Squared error of the solved head on held-out images, a mean over the pool."""
        split = run.data.split("validation" if "validation" in run.data.splits else "train")
        real = split.batch(range(min(JUDGED, len(split))), device=run.world.device)["pixel_values"]
        for module in (pool, distilled, target):
            module.to(run.world.device)
        with measuring(pool, target):
            wanted = target(real)
            found = []
            for net, tap in zip(pool, taps, strict=True):
                features, queries = (with_bias(read(net, tap, images)) for images in (distilled.images, real))
                found.append(F.mse_loss(self.predict(features, distilled.labels, queries).float(), wanted).item())
        return fmean(found)

    # Where it starts ------------------------------------------------------------------------------------------------

    def check_data(self, run: Run) -> None:
        """Refuse what has no images, or fewer than are asked for."""
        facts = run.data.facts
        if "pixel_values" not in facts.inputs:
            raise UserError(f"data: {self.name} needs images, and {run.data.name!r} has {', '.join(facts.inputs)}.")
        count = len(run.data.split("train"))
        if self.num_images > count:
            raise UserError(f"num_images is {self.num_images}, but {run.data.name!r} has only {count} training images.")

    def target_model(self, run: Run) -> Generator[Any, Any, Representation]:
        """The target model, trained or loaded."""
        model = yield from self.target.ready(run)
        split = run.data.split("train")
        target = Representation(model, width_of(model, split, run)).to(run.world.device)
        if self.standardize:
            moments = yield Compute("moments", lambda _: moments_of(target, split, run), form=lambda: still(target))
            target.shift.copy_(moments["mean"])
            target.scale.copy_(moments["std"])
        return target

    def start(self, run: Run, target: Representation) -> Generator[Any, Any, DistilledSet]:
        """Real images with the target's representations of them."""
        split = run.data.split("train")

        def chosen(_: Any) -> dict[str, Tensor]:
            if self.init == "k-means":
                index = k_means(represented(target, split, run), self.num_images)
            else:
                index = torch.randperm(len(split))[: self.num_images].sort().values
            return {"index": index, "targets": represented(target, split.subset(index), run)}

        width = len(target.shift)
        found = yield Compute(
            "start",
            chosen,
            form=lambda: {"index": torch.arange(self.num_images), "targets": torch.zeros(self.num_images, width)},
        )
        images = split.batch(found["index"])["pixel_values"]
        scale, space = run.data.scale, dict[str, Any]()
        if self.raw_start and scale is not None and not scale.given:
            images = scale.to_unit(images)
        elif scale is not None:
            space = {"mean": scale.mean, "std": scale.std}
        return DistilledSet(
            images,
            found["targets"],
            target="features",
            learn_labels=self.learn_targets,
            provenance={
                "method": self.name,
                "data": run.data.name,
                "seed": run.seed,
                "start": {"samples": found["index"].tolist()},
            },
            **space,
        )

    def copied(self, distilled: DistilledSet) -> DistilledSet:
        """The set as it stands now."""
        return DistilledSet(distilled.images, distilled.labels, target="features")

    # How a set is scored --------------------------------------------------------------------------------------------

    def specs(self) -> list[tuple[str, ModelSpec]]:
        """The architectures by key: nothing for the pool's own."""
        others = [(f"{number}-{spec.kind}", spec) for number, spec in enumerate(self.eval_architectures)]
        return [("", self.network), *others]

    def fresh(self, spec: ModelSpec, run: Run, width: int) -> nn.Module:
        """A network that puts out representations.

        Raises:
            UserError: the network says itself how wide it is, and not as wide as the target's.
        """
        own = getattr(spec, "num_outputs", None)
        if own not in (None, width):
            raise UserError(
                f"network: it has {own} outputs and the target's representation {width}; leave out num_outputs."
            )
        net = spec.build(replace(run.data.facts, num_classes=width, task="classification", class_names=()))
        head_of(net)
        return net

    def pretrained(
        self, run: Run, part: DistilledSet, name: str, width: int
    ) -> Generator[Any, Any, dict[str, list[nn.Module]]]:
        """Fresh networks trained to map the set's images to its representations, by architecture; last epoch."""
        tensors = {"pixel_values": part.images.detach().cpu().clone(), "labels": part.labels.detach().cpu().clone()}
        split = Split("distilled", replace(run.data.facts, num_classes=None, task="unlabelled"), tensors)
        batches = split.batches(max(1, min(self.eval_batch_size, len(part)) // run.world.size), drop_last=False)
        steps = self.eval_epochs * batches.per_epoch(run.world.size)
        nets: dict[str, list[nn.Module]] = {key: [] for key, _ in self.specs()}

        def build(key: str, spec: ModelSpec, stage: str) -> Stage:
            net = self.fresh(spec, run, width)
            nets[key].append(net)
            return Stage(
                stage, {"net": net}, [Update(mapped, {"net": self.eval_optimizer})], steps=steps, batches=batches
            )

        stages = []
        for key, spec in self.specs():
            for number in range(self.eval_networks):
                stage = f"pretrain/{name}{'-' + key if key else ''}-{number}"
                stages.append(Later(stage, partial(build, key, spec, stage)))
        yield stages
        return nets

    def scored(
        self, run: Run, nets: Mapping[str, list[nn.Module]], target: nn.Module | None, part: DistilledSet, name: str
    ) -> Generator[Any, Any, dict[str, list[float]]]:
        """Numbers of pre-trained networks: distance to the target, and accuracy after transfer, a value per network."""
        found: dict[str, list[float]] = {}
        if target is not None:
            split = run.data.split("test" if "test" in run.data.splits else "train")
            measured = yield Compute(
                f"distance/{name}",
                lambda _: {key: distances(each, target, split, run) for key, each in nets.items()},
                form=lambda: {key: [0.0 for _ in each] for key, each in nets.items()},
            )
            found |= {"/".join(filter(None, ("test/mse", key))): values for key, values in measured.items()}
        for number, spec in enumerate(self.transfer):
            data = self.transfer_data(spec, run)
            title = f"transfer/{number}-{data.name}" if len(self.transfer) > 1 else f"transfer/{data.name}"
            for protocol in self.protocols:
                place = f"{protocol}/{name}/{number}"
                for key, values in (yield from self.transferred(run, nets, part, data, spec, protocol, place)).items():
                    found["/".join(filter(None, (title, protocol, key)))] = values
        return found

    def transfer_data(self, spec: DataSpec, run: Run) -> Data:
        """A transfer set.

        Raises:
            UserError: it has no classes, no test split, or images of another shape.
        """
        data = spec.load()
        own, other = run.data.facts.inputs["pixel_values"], data.facts.inputs.get("pixel_values")
        if data.facts.task != "classification" or "test" not in data.splits:
            raise UserError(f"transfer: {data.name!r} needs class labels and a test split.")
        if own != other:
            raise UserError(
                f"transfer: the images of {data.name!r} are {other} and those of {run.data.name!r} {own}; set image_size of "
                "either."
            )
        return data

    def transferred(
        self,
        run: Run,
        nets: Mapping[str, list[nn.Module]],
        part: DistilledSet,
        data: Data,
        spec: DataSpec,
        protocol: Protocol,
        place: str,
    ) -> Generator[Any, Any, dict[str, list[float]]]:
        """Test accuracy on another data set, by architecture."""
        if protocol == "probe":
            probed: dict[str, list[float]] = yield Compute(
                place,
                lambda _: {key: [self.probed(net, data, run) for net in each] for key, each in nets.items()},
                form=lambda: {key: [0.0 for _ in each] for key, each in nets.items()},
            )
            return probed
        teacher: nn.Module = nn.Identity()
        switched: BatchStatistics | None = None
        if protocol == "data-free":
            teacher = yield from self.taught(data, spec, run, place)
            switched = BatchStatistics(teacher) if self.data_free_bn == "batch" else None
        tuned: dict[str, list[nn.Module]] = {key: [] for key in nets}

        def build(key: str, architecture: ModelSpec, net: nn.Module, stage: str) -> Stage:
            student = with_new_head(architecture, net, data.facts)
            tuned[key].append(student)
            if protocol == "data-free":
                return self.data_free_stage(stage, student, teacher, part, run)
            size = min(self.finetune_batch_size, max(1, len(data.split("train")) // run.world.size))
            return Stage(
                stage,
                {"net": student},
                [Update(classified, {"net": self.finetune_optimizer}, name="finetune")],
                steps=self.finetune_steps,
                batches=data.split("train").batches(size, augment=self.augment),
            )

        stages = []
        for key, architecture in self.specs():
            for number, net in enumerate(nets[key]):
                stage = f"{place}{'-' + key if key else ''}-{number}"
                stages.append(Later(stage, partial(build, key, architecture, net, stage)))
        yield stages
        if switched is not None:
            switched.close()
        measured: dict[str, list[float]] = yield Compute(
            f"{place}/accuracy",
            lambda _: {key: [self.accuracy(net, data, run, protocol) for net in each] for key, each in tuned.items()},
            form=lambda: {key: [0.0 for _ in each] for key, each in tuned.items()},
        )
        return measured

    def accuracy(self, net: nn.Module, data: Data, run: Run, protocol: Protocol) -> float:
        """Test accuracy of a tuned network."""
        # Of the set's images alone it knows no statistics of the task's.
        batchwise = protocol == "data-free" and self.data_free_bn == "batch"
        with BatchStatistics(net) if batchwise else nullcontext():
            return quality(net, data.split("test"), run)["accuracy"]

    def probed(self, net: nn.Module, data: Data, run: Run) -> float:
        """Test accuracy of a linear layer trained on frozen features."""
        with Taps(net, head_of(net), side="input") as tap:
            known, asked = (features_of(net, tap, data.split(name), run) for name in ("train", "test"))
        return linear_probe(*known, *asked, steps=self.probe_steps, batch_size=self.probe_batch_size, lr=self.probe_lr)

    def taught(self, data: Data, spec: DataSpec, run: Run, place: str) -> Generator[SubRun, Any, nn.Module]:
        """The teacher of a transfer task, trained once and found again by every set that is scored."""
        teacher = self.data_free_teacher
        if isinstance(teacher, TrainedTeacher) and teacher.data is None:
            teacher = teacher.model_copy(update={"data": spec})
        return (yield from teacher.ready(run, f"{place}/teacher"))

    def data_free_stage(self, name: str, student: nn.Module, teacher: nn.Module, part: DistilledSet, run: Run) -> Stage:
        """A student that imitates the teacher on augmented images of the set: none of the task's images is seen."""
        tensors = {"pixel_values": part.images.detach().cpu().clone()}
        split = Split("distilled", replace(run.data.facts, num_classes=None, task="unlabelled"), tensors)
        batches = split.batches(max(1, min(self.data_free_batch_size, len(part)) // run.world.size), drop_last=False)

        def imitated(m: Modules, batch: Batch, run: Run) -> Losses:
            images = {"pixel_values": self.data_free_augment.augment(batch["pixel_values"])}
            return {"soft": losses.soft_cross_entropy(logits(m.net, images), logits(m.teacher, images))}

        update = Update(imitated, {"net": self.data_free_optimizer})
        steps = self.data_free_epochs * batches.per_epoch(run.world.size)
        return Stage(name, {"net": student, "teacher": frozen(teacher)}, [update], steps=steps, batches=batches)

    # How it is handed over ------------------------------------------------------------------------------------------

    def concluded(
        self,
        run: Run,
        distilled: DistilledSet,
        scores: Mapping[str, Mapping[str, list[float]]],
        metrics: dict[str, float],
        pictures: Mapping[str, Tensor],
    ) -> Result:
        """The set in open formats with its card, a row per set and number."""
        rows: list[list[str | float | int]] = []
        for label, found in scores.items():
            for key, values in found.items():
                name = key if label == "distilled" else f"{label}/{key}"
                metrics[name], metrics[f"{name}/std"] = fmean(values), pstdev(values)
                rows.append([label, key, round(fmean(values), 4), round(pstdev(values), 4)])
        card = Card(
            method=self.name,
            source=run.data.name,
            seed=run.seed,
            protocol={
                "network": self.network.dump(),
                "epochs": self.eval_epochs,
                "batch_size": self.eval_batch_size,
                "optimizer": self.eval_optimizer.dump(),
                "loss": "squared error of the network's outputs to the labels; the last layer is then replaced",
            },
            paper=self.paper.title,
            results={name: value for name, value in metrics.items() if name.startswith(("test", "transfer"))},
        )
        notes = []
        if run.data.facts.task == "classification":
            notes.append("the class labels of the data were not used to distil.")
        if find_spec("datasets") is None:
            notes.append(
                "the Hugging Face data set was left out: pip install 'stillhouse[datasets]' and resume the run."
            )
        title = f"Networks pre-trained on {len(distilled)} images ({self.eval_networks} networks, last epoch)"
        return Result(
            artefacts={"set": DistilledExport(distilled, card)},
            metrics=metrics,
            tables=[Table(title, ["pre-trained on", "measured", "mean", "std"], rows)],
            pictures={"distilled": grid(distilled), **pictures},
            notes=notes,
        )


def mapped(m: Modules, batch: Batch, run: Run) -> Losses:
    """Squared error of a network's outputs to the representations of a set's images."""
    return {"regression": F.mse_loss(logits(m.net, images_only(batch)), batch.labels)}


def classified(m: Modules, batch: Batch, run: Run) -> Losses:
    """Cross-entropy on the labels of a transfer task."""
    return {"ce": losses.cross_entropy(logits(m.net, batch), batch.labels)}


def head_of(net: nn.Module) -> str:
    """Path of the last linear layer, whose input are the features.

    Raises:
        UserError: there is none.
    """
    found = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise UserError(f"network: {type(net).__name__} has no linear layer whose input could serve as features.")
    last: str = found[-1]
    return last


def read(net: nn.Module, tap: Taps, images: Tensor) -> Tensor:
    """Features (samples, width) of images, with gradient to them."""
    forward(net, {"pixel_values": images})
    return tap.take()[tap.paths[0]].flatten(1)


def features_of(net: nn.Module, tap: Taps, split: Split, run: Run) -> tuple[Tensor, Tensor]:
    """Features and classes of a whole split, on the CPU."""
    net.to(run.world.device)
    features, labels = [], []
    with measuring(net):
        for batch in split.in_order(512, device=run.world.device):
            features.append(read(net, tap, batch["pixel_values"]).float().cpu())
            labels.append(hard(batch.labels).cpu())
    return torch.cat(features), torch.cat(labels)


def with_new_head(spec: ModelSpec, net: nn.Module, facts: Facts) -> nn.Module:
    """A network for other classes with the weights of ``net`` in all but the last layer."""
    new, head = spec.build(facts), head_of(net)
    kept = {name: value for name, value in net.state_dict().items() if not name.startswith(f"{head}.")}
    new.load_state_dict(kept, strict=False)
    return new


def distances(nets: Sequence[nn.Module], target: nn.Module, split: Split, run: Run) -> list[float]:
    """Mean squared difference between each network's outputs and the target's representations of a split."""
    wanted = represented(target, split, run)
    found = []
    for net in nets:
        net.to(run.world.device)
        with measuring(net):
            batches = split.in_order(512, device=run.world.device)
            outputs = torch.cat([embedding(net, images_only(batch)).float().cpu() for batch in batches])
        found.append(F.mse_loss(outputs, wanted).item())
    return found


def moments_of(target: Representation, split: Split, run: Run) -> dict[str, Tensor]:
    """Mean and deviation of each component over a split."""
    found = represented(target, split, run)
    return {"mean": found.mean(0), "std": found.std(0, correction=0).clamp_min(1e-6)}


def still(target: Representation) -> dict[str, Tensor]:
    """What :func:`moments_of` gives, without looking."""
    return {"mean": target.shift.cpu(), "std": target.scale.cpu()}
