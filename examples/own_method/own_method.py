"""A method of your own: a class in your package, with its own recipe and resume for free."""

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field

from stillhouse.engine import Method, Optimizer, Paper, Result, Stage, Update, frozen
from stillhouse.models import ModelSpec, logits


class BornAgain(Method):
    """Train a network, then train its twin to match it: two stages, each resumed where it was killed."""

    name: ClassVar[str] = "born-again"
    family: ClassVar[str] = "knowledge"
    paper: ClassVar[Paper] = Paper("Born-Again Neural Networks", 2018, arxiv="1805.04770")
    summary: ClassVar[str] = "a student with its teacher's shape"

    model: ModelSpec = Field("mlp", description="the network", validate_default=True)
    optimizer: Optimizer = Field(Optimizer(lr=1e-3), description="optimiser of both generations")
    steps: int = Field(200, ge=1, description="steps of each generation")
    weight_soft: float = Field(1.0, ge=0, description="weight of the match with the generation before")

    def labels(self, m, batch, run):
        return {"ce": F.cross_entropy(logits(m.parent, batch), batch.labels)}

    def match(self, m, batch, run):
        child, parent = logits(m.child, batch), logits(m.parent, batch)
        return {"soft": lambda: F.cross_entropy(child, parent.softmax(-1)), "ce": F.cross_entropy(child, batch.labels)}

    def stages(self, run):
        batches = run.data.split("train").batches(64)
        parent, child = self.model.build(run.data.facts), self.model.build(run.data.facts)
        train = {"batches": batches, "steps": self.steps}
        yield Stage("parent", {"parent": parent}, [Update(self.labels, {"parent": self.optimizer})], **train)
        held = {"parent": frozen(parent), "child": child}
        yield Stage("child", held, [Update(self.match, {"child": self.optimizer})], **train)
        return Result(artefacts={"child": child})
