"""DataDAM: data set distillation by attention matching (arXiv 2310.00093), and distribution matching beside it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Compute, Losses, Modules, Paper, Run, Stage, Stages, Term, Update, Weight, scratch, sgd
from stillhouse.errors import UserError
from stillhouse.losses.features import attention_matching, mean_matching
from stillhouse.methods.datasets.condensation import Condensation, Start, grid
from stillhouse.models import ConvNetSpec, ModelSpec, Taps, forward, initialise, resolve_paths
from stillhouse.modules.siamese import apply


class Matching(Condensation):
    """Base: in each step a fresh random network, real and tiny images through it under one augmentation, a match."""

    norm_advice: ClassVar[str] = "norm=instance"

    init: Start = Field("random", description="where images start: random, herding or k-center real ones, or noise")
    num_steps: int = Field(8000, ge=1, description="steps, each with a network of its own")
    batch_real: int = Field(128, ge=1, description="real images of each class per step; small classes are drawn twice")
    lr_images: float | None = Field(
        None, gt=0, description="learning rate of the pixels; 1 up to 50 images a class, then 10"
    )
    momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the pixels")
    siamese: bool = Field(True, description="augment real and tiny images of a class alike")
    fixed_network: bool = Field(False, description="keep one random network instead (an ablation: it is overfitted)")
    classes_per_group: int | None = Field(None, ge=1, description="classes that go through the network at once; all")
    attention_layers: str = Field(
        "blocks.*.activation", description="paths of the maps, after the ReLU; the last is left out"
    )
    feature_layer: str = Field("blocks", description="path of the features: the flattened output of this module")
    compare_start: bool = Field(True, description="also score the images that it started from, for the table")
    weight_attention: Weight = Field(0.0, description="weight of the attention term")
    weight_features: Weight = Field(0.0, description="weight of the feature term")

    def map_power(self) -> float:
        """The power p of the attention maps."""
        return 1.0

    def stages(self, run: Run) -> Stages:
        """Start, match, score."""
        distilled = yield from self.start(run, self.init)
        scores: dict[str, dict[str, list[float]]] = {}
        if self.compare_start:
            scores["start"] = yield from self.scored(run, distilled, "start")
        before = grid(distilled)
        net = self.architecture().build(run.data.facts)
        self.check_split(net, len(distilled.by_class), run)
        taps = self._tapped(net)
        lr = self.lr_images or (1.0 if self.images_per_class <= 50 else 10.0)
        yield Stage(
            "matching",
            modules={"set": distilled, "net": scratch(net)},
            updates=[Update(partial(self.match, taps), {"set.images": sgd(lr, momentum=self.momentum)}, name="match")],
            steps=self.num_steps,
            prepare=self.prepare,
            show=lambda m, run: {"images": grid(m.set)},
        )
        taps.close()
        scores["distilled"] = yield from self.scored(run, distilled, "distilled")
        clipped = yield Compute("clipped", lambda _: float(distilled.clipped), form=float)
        note = f"{100 * clipped:.1f}% of the learned pixel values lie outside [0, 1] and are clipped in pictures and exports."
        return self.concluded(run, distilled, scores, pictures={"start": before}, notes=[note])

    def prepare(self, m: Modules, batch: Batch, run: Run) -> Batch:
        """A fresh network and real images of each class, or where they are if groups of classes are read one by one."""
        if not self.fixed_network:
            initialise(m.net)
        index = self.drawn(run, self.batch_real)
        if self.classes_per_group is not None:
            return Batch(index=index)
        return Batch(index=index, real=self.fetched(run, index))

    def fetched(self, run: Run, index: Tensor) -> Tensor:
        """Real images at ``index``, [classes, n, channels, height, width]."""
        real = run.data.split("train").batch(index.flatten(), device=run.world.device)["pixel_values"]
        return real.view(*index.shape, *real.shape[1:])

    def match(self, taps: Taps, m: Modules, batch: Batch, run: Run) -> Iterator[Losses]:
        """The terms, in pieces of ``classes_per_group`` classes; exact, because the loss is a sum over classes."""
        synthetic = m.set.by_class
        count, size = len(synthetic), (synthetic.shape[-2], synthetic.shape[-1])
        params = self.augment.draw(count, size, generator=run.generator())
        others = params if self.siamese else self.augment.draw(count, size, generator=run.generator())
        classes = torch.arange(count)[run.world.rank :: run.world.size]
        for group in torch.split(classes, self.classes_per_group or count):
            with torch.no_grad():
                real = batch["real"][group] if "real" in batch else self.fetched(run, batch["index"][group])
                real_layers = self._layers(m.net, apply(real, params[group]), taps)
            layers = self._layers(m.net, apply(synthetic[group], others[group]), taps)
            # The engine averages over processes, and each of them sums over its own classes only.
            scale = run.world.size
            terms: dict[str, Term] = {}
            if len(layers) > 1:
                terms["attention"] = partial(self._attention, real_layers[:-1], layers[:-1], scale)
            terms["features"] = partial(_features, real_layers[-1], layers[-1], scale)
            yield terms

    def _attention(self, real: list[Tensor], synthetic: list[Tensor], scale: int) -> Tensor:
        power = self.map_power()
        terms = [attention_matching(r, s, power=power) for r, s in zip(real, synthetic, strict=True)]
        return scale * torch.stack(terms).sum()

    def _layers(self, net: nn.Module, images: Tensor, taps: Taps) -> list[Tensor]:
        """Maps and features of images [classes, n, ...], each as [classes, n, ...]."""
        forward(net, {"pixel_values": images.flatten(0, 1)})
        read = taps.take()
        return [read[path].view(*images.shape[:2], *read[path].shape[1:]) for path in taps.paths]

    def _tapped(self, net: nn.Module) -> Taps:
        if self.weight_attention == 0:
            return Taps(net, self.feature_layer)
        maps = resolve_paths(net, [self.attention_layers])
        if len(maps) < 2:
            raise UserError(
                f"network: the last of the maps {self.attention_layers!r} is left out, so attention needs at least two, "
                "not one; use depth=2 or more."
            )
        # The last block gives features, not attention.
        return Taps(net, [*maps[:-1], self.feature_layer])

    def check_split(self, net: nn.Module, classes: int, run: Run) -> None:
        """Refuse to split classes among groups or processes where the loss is not a sum of theirs."""
        if run.world.size > classes:
            raise UserError(f"{run.world.size} processes cannot share {classes} classes; start at most {classes}.")
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
            return
        why = "with batch norm the loss of a class depends on the other classes"
        if not self.batch_norm():
            raise UserError(f"network: {why}; use {self.norm_advice}.")
        if (self.classes_per_group or classes) < classes:
            raise UserError(
                f"classes_per_group is {self.classes_per_group}, but {why}; leave it out, or use norm=instance."
            )
        if run.world.size > 1:
            raise UserError(
                f"network: {why}, which {run.world.size} processes would split; start one, or use variant=paper."
            )

    def batch_norm(self) -> bool:
        """Whether networks with batch norm are accepted."""
        return False


def _features(real: Tensor, synthetic: Tensor, scale: int) -> Tensor:
    return scale * mean_matching(real.flatten(2), synthetic.flatten(2))


class DataDAM(Matching):
    """Match the spatial attention of real and tiny class batches on a fresh random network in every step.

    ``L = 100 (L_SAM + lambda L_MMD)``: attention maps after the ReLU of all blocks but the last, normalised for each
    sample, their class means compared; and the class means of the last features (lambda 0.01, 0.02 at high resolution).
    """

    name: ClassVar[str] = "datadam"
    family: ClassVar[str] = "datasets"
    paper: ClassVar[Paper] = Paper(
        "DataDAM: Efficient Dataset Distillation with Attention Matching", 2023, arxiv="2310.00093", venue="ICCV 2023"
    )
    summary: ClassVar[str] = "a tiny training set, by matching attention on fresh random networks"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"
    norm_advice: ClassVar[str] = "norm=instance, or variant=code as in the released code"

    variant: Literal["paper", "code"] = Field(
        "paper",
        description="paper: instance norm, power 4, 8000 steps of 128 real images; code: batch norm, 1, 20000, 64, as "
        "released (a field that is given wins)",
    )
    power: float = Field(4.0, ge=1, description="power p of the attention maps; 1 with variant=code")
    weight_attention: Weight = Field(100.0, description="weight of the attention term L_SAM")
    weight_features: Weight = Field(1.0, description="weight of the feature term L_MMD (100 lambda)")

    @model_validator(mode="before")
    @classmethod
    def _released(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("variant") == "code":
            return {"power": 1.0, "num_steps": 20000, "batch_real": 64, **values}
        return values

    def map_power(self) -> float:
        """4 in the paper's table, 1 in the released code."""
        return self.power

    def architecture(self) -> ModelSpec:
        """With batch norm in the released code, for matching and for scoring."""
        if self.variant == "code" and isinstance(self.network, ConvNetSpec):
            return self.network.model_copy(update={"norm": "batch"})
        return self.network

    def batch_norm(self) -> bool:
        """Only as released."""
        return self.variant == "code"


class DM(Matching):
    """Match the class means of features on a fresh random network in every step."""

    name: ClassVar[str] = "dm"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Dataset Condensation with Distribution Matching", 2023, arxiv="2110.04181", venue="WACV 2023"
    )
    summary: ClassVar[str] = "a tiny training set, by matching class means of features on fresh random networks"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    num_steps: int = Field(20000, ge=1, description="steps, each with a network of its own")
    batch_real: int = Field(256, ge=1, description="real images of each class per step; small classes are drawn twice")
    weight_features: Weight = Field(1.0, description="weight of the feature term")
