"""A student that learns from the moving average of its own weights (Mean Teacher, arXiv 1703.01780): a control."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from stillhouse import losses
from stillhouse.data import Batch
from stillhouse.engine import Compute, Losses, Modules, Paper, Ramp, Result, Run, Stages, Table, Update, Weight
from stillhouse.methods.distillation import output_error, soft_loss
from stillhouse.methods.supervised import Supervised, hard_loss, held_out, placed
from stillhouse.methods.temperature import Temperature
from stillhouse.models import count_parameters, logits
from stillhouse.modules.moving_average import MovingAverage


class EMATeacher(Supervised):
    """Distil a network from its own moving average: ``L = weight_ce CE + weight_soft T^2 KL(average || student)``.

    What a distillation gains beyond it comes from the teacher and not from soft targets or averaged weights.
    """

    name: ClassVar[str] = "ema-teacher"
    family: ClassVar[str] = "knowledge"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep learning "
        "results",
        2017,
        arxiv="1703.01780",
        venue="NeurIPS 2017",
    )
    summary: ClassVar[str] = "self-distillation from the moving average of the weights: the gain without any teacher"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"

    decay: float = Field(0.999, ge=0, lt=1, description="share of the average that stays, once it is warm (0.999)")
    temperature: Temperature = Field(
        4.0, description="softmax temperature of both sides: a number, {start, end}, or std, as for kd"
    )
    weight_ce: Weight = Field(1.0, description="weight of the loss on the labels (1)")
    weight_soft: Weight = Field(
        Ramp(start=0.0, end=1.0, until=0.25),
        description="weight of the divergence from the average; it grows as in the paper, while the average knows little",
    )

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """The labels' loss, and the divergence from the average; the squared error between regressors."""
        said = logits(m.model, batch)

        def soft() -> torch.Tensor:
            with torch.no_grad():
                average = logits(m.average.network, batch)
            if run.data.facts.task == "regression":
                return output_error(said, average)
            labels = placed(m.model, batch, run) if said.dim() > 2 else None
            return soft_loss(losses.kl, said, average, self.temperature, labels, run, squared=True)

        return {"ce": lambda: hard_loss(m.model, said, batch, run), "soft": soft}

    def stages(self, run: Run) -> Stages:
        """One stage; both the student and the average are measured and kept."""
        model = self.model.build(run.data.facts)
        average = MovingAverage(model, self.decay)
        trained = yield self.training_stage(
            run,
            "model",
            {"model": model, "average": average},
            Update(self.loss, trains={"model": self.optimizer}),
            trained="model",
        )
        networks = {"model": model, "average": average.network}
        test = yield Compute("test", lambda _: {name: held_out(network, run) for name, network in networks.items()})
        metrics = {**trained.kept, **test["model"]}
        metrics |= {name.replace("test/", "test/average/"): value for name, value in test["average"].items()}
        rows: list[list[str | float | int]] = [
            [name, count_parameters(network), *test[name].values()] for name, network in networks.items()
        ]
        return Result(
            artefacts=dict(networks),
            metrics=metrics,
            tables=[Table("Result", ["model", "parameters", *test["model"]], rows)],
        )
