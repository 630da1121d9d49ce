"""CLIP: image and text towers from pairs; the foundation that light labellers are made from, and a small one of one's own."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from stillhouse.data import Batch, DataSpec, Split
from stillhouse.engine import (
    Compute,
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
    Weight,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.losses.contrastive import image_text
from stillhouse.models import HubTowers, ModelSpec, TwoTowers, TwoTowersSpec, count_parameters


class CLIP(Method):
    """Train an image tower and a text tower so that the embeddings of an image and of its own text agree most.

    ``L = (CE(s I T^T, own) + CE(s T I^T, own)) / 2`` over the normalised embeddings I and T of a batch of pairs, with a
    learned scale s of at most 100. Texts that are equal are each a right answer.
    """

    name: ClassVar[str] = "clip"
    family: ClassVar[str] = "representations"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Learning Transferable Visual Models From Natural Language Supervision",
        2021,
        arxiv="2103.00020",
        venue="ICML 2021",
    )
    summary: ClassVar[str] = "image and text towers in one space from captioned images; classifies by names alone"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    data: DataSpec = Field(DataSpec.parse("characters"), description="captioned images (pixel_values with input_ids)")
    model: ModelSpec = Field(TwoTowersSpec(), description="the two towers")
    optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, weight_decay=0.1, schedule="cosine"), description="optimiser of both towers"
    )
    epochs: float = Field(30, gt=0, description="passes over the training split")
    batch_size: int = Field(256, ge=2, description="pairs per process and step")
    prompt: str = Field("a picture of a {}", description="what asks for a class, its name in place of the braces")
    weight_pairs: Weight = Field(1.0, description="weight of the contrastive loss")

    def stages(self, run: Run) -> Stages:
        """One stage, then zero-shot classification where the data has class names."""
        facts = run.data.facts
        if not {"pixel_values", "input_ids"} <= set(facts.inputs):
            raise UserError(
                f"data: {self.name} needs captioned images (pixel_values and input_ids), and {run.data.name!r} has "
                f"{', '.join(facts.inputs)}."
            )
        model = self.model.build(facts)
        if not isinstance(model, TwoTowers):
            raise UserError(f"model: {self.name} trains a model of kind 'two-towers', not {self.model.kind!r}.")
        scale = run.data.scale
        if scale is not None:
            model.mean.copy_(torch.tensor(scale.mean))
            model.std.copy_(torch.tensor(scale.std))
        batches = run.data.split("train").batches(self.batch_size)
        yield Stage(
            "towers",
            modules={"model": model},
            updates=[Update(self.loss, {"model": self.optimizer}, couples=True)],
            batches=batches,
            steps=max(1, round(self.epochs * batches.per_epoch(run.world.size))),
        )
        numbers: dict[str, float] = {}
        if facts.task == "classification" and "test" in run.data.splits:
            numbers["test/zero-shot"] = yield Compute(
                "zero-shot",
                lambda _: zero_shot_accuracy(
                    model, prompts(self.prompt, facts.class_names), run.data.split("test"), run
                ),
                form=float,
            )
        columns = ["model", "parameters", *numbers]
        row: list[str | float | int] = [self.model.kind, count_parameters(model), *numbers.values()]
        return Result(
            artefacts={"model": model},
            metrics={"scale": float(model.scale.detach()), **numbers},
            tables=[Table("Towers", columns, [row])],
        )

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """The contrastive loss over the pairs of all processes."""
        images, texts = m.model(batch["pixel_values"], batch["input_ids"])
        ids = run.gather(batch["input_ids"])
        same = (ids[:, None] == ids[None]).all(2)
        return {"pairs": image_text(run.gather(images), run.gather(texts), m.model.scale, same=same)}


def prompts(template: str, names: tuple[str, ...]) -> list[str]:
    """What asks for each class.

    Raises:
        UserError: there are no names, two are alike, or the template has no place for them.

    >>> prompts("a {}", ("cat", "dog"))
    ['a cat', 'a dog']
    """
    if not names:
        raise UserError("The data has no class names to ask for; set them, or train a labeller without text_init.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"Two classes are named {twice!r}, so no text tells them apart.")
    if "{}" not in template:
        raise UserError(f"The prompt {template!r} has no place for a class name; write it as in 'a picture of a {{}}'.")
    return [template.replace("{}", name) for name in names]


def zero_shot_accuracy(model: TwoTowers | HubTowers, texts: list[str], split: Split, run: Run) -> float:
    """Share of images that are most like the text of their own class."""
    model.to(run.world.device)
    right = 0
    with measuring(model):
        wanted = model.encode_texts(texts)
        for batch in split.in_order(512, device=run.world.device):
            found = (model.encode_images(batch["pixel_values"]) @ wanted.T).argmax(1)
            right += int((found == batch.labels).sum())
    return right / len(split)
