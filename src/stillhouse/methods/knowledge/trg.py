"""TRG: the student's patches, of many images, relate to each other as the teacher's do (arXiv 2306.12442)."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stillhouse import losses
from stillhouse.engine import Losses, Modules, Optimizer, Paper, Ramp, Run, Term, Weight
from stillhouse.errors import UserError
from stillhouse.losses.contrastive import info_nce
from stillhouse.losses.relations import contextual_similarity, local_preserving
from stillhouse.methods.distillation import CIFAR_SGD, KnowledgeDistillation, Reads, soft_loss
from stillhouse.methods.temperature import Temperature
from stillhouse.methods.wiring import Pair, Wiring
from stillhouse.metrics import distance_correlation, neighbour_overlap, retrieval_rank1
from stillhouse.modules.tokens import common_grid, feature_grid, grid_tokens

PROBED = 64
"""Images whose tokens the probes compare."""


class TRG(KnowledgeDistillation):
    """Distil how tokens relate: within an image, among near tokens of many images, and each to its teacher's among all.

    ``L = weight_ce CE + weight_kd T^2 KL + weight_inner L_inner + weight_local L_local + weight_global L_global``. L_inner
    compares the attention of an image's tokens to each other, L_local the rows of the two k-nearest-neighbour graphs over
    tokens sampled from the whole batch, L_global is InfoNCE over the same tokens with a falling temperature.
    """

    name: ClassVar[str] = "trg"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper(
        "Knowledge Distillation via Token-level Relationship Graph", 2023, arxiv="2306.12442"
    )
    summary: ClassVar[str] = "relations of patches across images, for long-tailed data and for any mix of CNN and ViT"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"
    couples: ClassVar[bool] = True
    reads: ClassVar[frozenset[Reads]] = frozenset({"features"})
    one_layer: ClassVar[bool] = True

    temperature: Temperature = Field(
        4.0, description="softmax temperature of the logits' term: a number, {start, end}, or std, as for kd"
    )
    nodes: Literal["tokens", "images"] = Field(
        "tokens", description="nodes of the graph; images: pooled features of whole images, the graphs that came before"
    )
    grid: int | None = Field(None, ge=1, description="side of the token grid; the coarser of both networks' by default")
    patch: Literal["mean", "flatten"] = Field("mean", description="a token is the mean of its patch, or all of it")
    tokens_per_image: int | None = Field(
        8, ge=1, description="positions drawn per image and step, the same in both networks; all where not given"
    )
    neighbours: int = Field(8, ge=1, description="nearest neighbours k of a token in the graph")
    neighbours_of: Literal["own", "teacher"] = Field(
        "own", description="each side's own neighbours, or the teacher's for both, which is steadier"
    )
    nearness: Literal["row", "column"] = Field(
        "row",
        description="a row of the graph weighs a token's own nearest; or, as printed, those that have it among their nearest",
    )
    sigma: Literal["median"] | float = Field(0.5, description="width of the graph's Gaussian weights; or median")
    scale: Literal["norm", "distance", "none"] = Field(
        "norm", description="what tokens are divided by in the graph: their length, the mean distance, nothing"
    )
    local_temperature: float = Field(
        1.0, gt=0, description="of the softmax over a graph's row; below 1 sharpens flat rows"
    )
    local_direction: Literal["student", "teacher"] = Field(
        "student", description="whose row comes first in the divergence; the student's as printed"
    )
    global_temperature: Ramp = Field(
        Ramp(start=0.5, end=0.1), description="temperature of the contrast over the training: coarse first, then fine"
    )
    projection_width: int | None = Field(
        None, ge=1, description="width to project both sides to; the student to the teacher's else"
    )
    false_negatives: float | None = Field(
        None,
        gt=-1,
        le=1,
        description="leave out negatives whose teacher tokens are more alike than this (0.95), by cosine",
    )
    inner_power: int = Field(
        2, ge=0, le=2, description="the inner term is multiplied by so high a power of the tokens' number"
    )
    gather: bool = Field(False, description="a graph over the samples of all processes, not of each alone")
    student_prefix: int | None = Field(
        None,
        ge=0,
        description="tokens of a student transformer before its patches' (class, ...); found by their number",
    )
    teacher_prefix: int | None = Field(None, ge=0, description="those of the teacher")
    weight_ce: Weight = Field(0.1, description="weight of the cross-entropy with the labels")
    weight_kd: Weight = Field(0.9, description="weight of the divergence of the logits (lambda)")
    weight_inner: Weight = Field(1.0, description="weight of the term within images (alpha)")
    weight_local: Weight = Field(1.0, description="weight of the neighbour graphs (beta)")
    weight_global: Weight = Field(0.1, description="weight of the contrast (gamma)")
    optimizer: Optimizer = Field(
        CIFAR_SGD,
        description="optimiser of the student and the projection",
    )
    epochs: float = Field(240, gt=0, description="passes over the training split")

    def parts(self, pair: Pair, run: Run) -> dict[str, nn.Module]:
        """The projections of the contrast."""
        if self.weight_global == 0:
            return {}
        mine, theirs = (tokens.shape[2] for tokens in self.tokens(pair))
        if self.projection_width is None:
            return {"projector": nn.Linear(mine, theirs)}
        return {
            "projector": nn.Linear(mine, self.projection_width),
            "teacher-projector": nn.Linear(theirs, self.projection_width),
        }

    def terms(self, pair: Pair, run: Run) -> Losses:
        """The divergence of the logits and the three terms of tokens; those are taken when the first of them asks."""
        tokens = cache(lambda: self.tokens(pair))
        nodes = cache(lambda: self.sampled(*tokens(), run))
        terms: dict[str, Term] = {
            "kd": lambda: soft_loss(
                losses.kl, pair.student.logits, pair.teacher.logits, self.temperature, None, run, squared=True
            ),
            "local": lambda: self.local(*nodes()),
            "global": lambda: self.contrast(*nodes(), pair, run),
        }
        if self.nodes == "tokens":
            terms["inner"] = lambda: self.inner(*tokens())
        return terms

    def tokens(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Tokens of student and teacher at the last pair of layers, (batch, tokens, width), on one grid."""
        pixels = pair.batch.get("pixel_values")
        image = (1, 1) if pixels is None else (pixels.shape[-2], pixels.shape[-1])
        mine = feature_grid(pair.student.features[-1], image, self.student_prefix)
        theirs = feature_grid(pair.teacher.features[-1], image, self.teacher_prefix)
        if self.nodes == "images":
            return grid_tokens(mine, (1, 1)), grid_tokens(theirs, (1, 1))
        grid = common_grid(mine, theirs, side=self.grid)
        return grid_tokens(mine, grid, self.patch), grid_tokens(theirs, grid, self.patch)

    def sampled(self, student: Tensor, teacher: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Tokens at positions drawn for each image, the same on both sides, as nodes (batch x positions, width)."""
        batch, count, _ = student.shape
        wanted = 1 if self.nodes == "images" else self.tokens_per_image
        if wanted is not None and wanted > count:
            raise UserError(
                f"tokens_per_image is {wanted} and an image has {count} tokens; draw fewer, or use a finer layer."
            )
        if wanted is not None and wanted < count:
            chosen = run.rand(batch, count).argsort(1)[:, :wanted, None]
            student, teacher = (x.gather(1, chosen.expand(-1, -1, x.shape[2])) for x in (student, teacher))
        mine, theirs = student.flatten(0, 1), teacher.flatten(0, 1)
        return (run.gather(mine), run.gather(theirs)) if self.gather else (mine, theirs)

    def inner(self, student: Tensor, teacher: Tensor) -> Tensor:
        """How the tokens of each image attend to each other."""
        return contextual_similarity(student, teacher) * float(student.shape[1] ** self.inner_power)

    def local(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The rows of the two neighbour graphs."""
        return local_preserving(
            student,
            teacher,
            self.neighbours,
            self.sigma,
            temperature=self.local_temperature,
            direction=self.local_direction,
            neighbours=self.neighbours_of,
            nearness=self.nearness,
            scale=self.scale,
        )

    def contrast(self, student: Tensor, teacher: Tensor, pair: Pair, run: Run) -> Tensor:
        """InfoNCE between each token and its teacher's, the others being the negatives."""
        mine = pair.parts["projector"](student)
        theirs = pair.parts["teacher-projector"](teacher) if self.projection_width is not None else teacher
        return info_nce(mine, theirs, self.temperature_at(run), false_negatives=self.false_negatives)

    def temperature_at(self, run: Run) -> float:
        """The contrast's temperature: its start at the first step, its end at the last."""
        return self.global_temperature.at(run.step / max(1, run.steps - 1))

    def measure(self, wiring: Wiring, place: int, run: Run) -> dict[str, float]:
        """Probes on test images: do the student's tokens lie to each other as the teacher's do?"""
        m = Modules({"student": wiring.student, **wiring.teachers, **wiring.modules()})

        def both(split: str) -> list[tuple[Tensor, Tensor]]:
            part = run.data.split(split)
            pairs = wiring.pairs(m, part.batch(range(min(PROBED, len(part))), device=run.world.device))[place]
            return [tuple(x.flatten(0, 1).float().cpu() for x in self.tokens(pair)) for pair in pairs]  # type: ignore[misc]

        test = "test" if "test" in run.data.splits else "validation"
        found: dict[str, float] = {}
        for link, (mine, theirs), (seen, targets) in zip(wiring.links, both(test), both("train"), strict=True):
            # A fresh probe, the same for a student that was trained with a projection and for one without.
            predicted = _affine(mine) @ torch.linalg.lstsq(_affine(seen), targets.double()).solution
            numbers = {
                "distance_correlation": distance_correlation(mine, theirs),
                "neighbour_overlap": neighbour_overlap(mine, theirs, min(10, len(mine) - 1)),
                "retrieval": retrieval_rank1(predicted, theirs.double()),
            }
            where = "probe" if len(wiring.links) == 1 else f"probe/{link.name}"
            found |= {f"{where}/{name}": float(value) for name, value in numbers.items()}
            found[f"{where}/retrieval_chance"] = 1 / len(mine)
        return found

    def notes(self, run: Run) -> list[str]:
        """Over what the graph was taken."""
        over = "the samples of all processes together" if self.gather else "the samples of each process on its own"
        number = f"{run.world.size} process" + ("es" if run.world.size > 1 else "")
        per_image = (
            "one node an image" if self.nodes == "images" else f"{self.tokens_per_image or 'all'} tokens an image"
        )
        return [f"the graph was taken over {over} ({number}, {self.batch_size} samples in each, {per_image})."]


def _affine(tokens: Tensor) -> Tensor:
    return torch.cat([tokens.double(), torch.ones(len(tokens), 1, dtype=torch.float64)], 1)
