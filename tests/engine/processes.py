"""Trains small methods in as many processes as it is started with. Usage: python processes.py DIR CASE BATCH_SIZE."""

import sys
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from stillhouse import losses
from stillhouse.data import ObjectData
from stillhouse.engine import Method, Paper, Result, Run, RunDirectory, Settings, Stage, Update, World, adamw, sgd
from stillhouse.methods.language.sinkd import SinKD


class Case(Method):
    """One stage for each kind of loss that data parallelism must get right."""

    name: ClassVar[str] = "case"
    family: ClassVar[str] = "tests"
    paper: ClassVar[Paper] = Paper("none", 2026)
    summary: ClassVar[str] = "for processes"

    case: str
    batch_size: int

    def persample(self, m, batch, run):
        return {"ce": F.cross_entropy(m.net(batch["features"]), batch.labels)}

    def coupled(self, m, batch, run):
        student = run.gather(m.net(batch["features"]))
        teacher = run.gather(batch["features"][:, :3])
        return {"sinkhorn": losses.sinkhorn_distance(student, teacher)}

    def submodule(self, m, batch, run):
        return {"ce": F.cross_entropy(m.net[2](torch.tanh(m.net[0](batch["features"]))), batch.labels)}

    def functional(self, m, batch, run):
        halved = {name: 0.5 * parameter for name, parameter in m.net.named_parameters()}
        return {"ce": F.cross_entropy(functional_call(m.net, halved, (batch["features"],)), batch.labels)}

    def masked(self, m, batch, run):
        each = F.cross_entropy(m.net(batch["features"]), batch.labels, reduction="none")
        return {"ce": run.mean(each, batch.labels != 0)}

    def noisy(self, m, batch, run):
        noise = run.randn(batch.size, 4) + run.rand(batch.size, 1) + run.randint(3, batch.size, 1)
        return {"ce": F.cross_entropy(m.net(batch["features"] + noise), batch.labels)}

    def adversary(self, m, batch, run):
        return {"value": m.critic(m.net(batch["features"])).square().mean()}

    def stages(self, run):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        critic = nn.Linear(3, 1)
        updates = {
            "two": [
                Update(self.persample, {"net": adamw(1e-2)}, every=2),
                Update(self.adversary, {"critic": sgd(0.1, momentum=0.9)}),
            ]
        }.get(self.case) or [Update(getattr(self, self.case), {"net": sgd(0.1, clip_norm=1.0)})]
        batches = run.data.split("train").batches(self.batch_size)
        modules = {"net": net, "critic": critic}
        yield Stage("one", modules, updates, steps=20, batches=batches)
        return Result(artefacts={"net": net, "critic": critic}, metrics={"world": float(run.world.size)})


def sinkd(batch_size: int, data, *, gather: bool) -> SinKD:
    """The real method, with the Sinkhorn term strong enough to see; a student that learns by SGD."""
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return SinKD(
        data=data,
        teacher=teacher,
        student=student,
        optimizer=sgd(0.1, clip_norm=1.0),
        batch_size=batch_size,
        epochs=6,
        evaluations=1,
        weight_sinkhorn=0.2,
        gather=gather,
        compare_alone=False,
    )


def main() -> None:
    torch.set_num_threads(1)
    home, batch_size = Path(sys.argv[1]), int(sys.argv[3])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    spec = ObjectData.from_object((x, y))
    data = spec.load()
    world = World.start("cpu")
    for case in sys.argv[2].split(","):
        directory = RunDirectory(home / case, writes=world.is_main)
        directory.lock()
        settings = Settings(device="cpu", log_every=5)
        if case in ("sinkd", "sinkd-apart"):
            method: Method = sinkd(batch_size, spec, gather=case == "sinkd")
        else:
            method = Case(case=case, batch_size=batch_size)
        run = Run(method, directory, seed=0, settings=settings, data=data, world=world)
        result = run.execute()
        if world.is_main:
            state = {f"{n}.{k}": v.contiguous() for n, m in result.artefacts.items() for k, v in m.state_dict().items()}
            save_file(state, home / f"{case}.safetensors")
        directory.release()
    if world.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
