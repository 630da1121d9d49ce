"""Trains DataDAM and DMD2 in as many processes as it is started with. Usage: python shared.py DIR GLOBAL_BATCH."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillhouse.data import ObjectData
from stillhouse.engine import Result, Run, RunDirectory, Settings, World
from stillhouse.methods.datasets.datadam import DataDAM
from stillhouse.methods.generators.dmd2 import DMD2
from stillhouse.methods.generators.process import Process
from stillhouse.models import ModelSpec
from stillhouse.modules.noise import EDMNoise


class OnlyDistillation(DMD2):
    """DMD2 without what surrounds it: an untrained teacher, nothing measured."""

    def stages(self, run):
        net = ModelSpec.parse({"kind": "unet", "width": 8, "multipliers": [1]}).build(run.data.facts)
        process = Process.of(net, EDMNoise(), "edm", run.data.facts)
        generator, fake = self.started(net, "student"), self.started(net, "fake")
        stage = self.distillation(run, process, generator, net, fake, self.times(process))
        yield stage
        return Result(artefacts={"generator": generator, "fake": fake, "head": stage.modules["head"]}, metrics={})


def datadam(world):
    return DataDAM.model_validate(
        {
            "network": {"kind": "convnet", "width": 4, "depth": 2},
            "num_steps": 6,
            "batch_real": 4,
            "compare_start": False,
            "eval_networks": 1,
            "eval_epochs": 2,
        }
    )


def dmd2(world):
    # Adam would blow up the rounding of gradients that are zero but for it.
    optimizer = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "clip_norm": 10.0}
    fields = {
        "batch_size": int(sys.argv[2]) // world.size,
        "num_steps": 6,
        "generator_every": 3,
        "optimizer": optimizer,
    }
    return OnlyDistillation.model_validate(fields)


def main() -> None:
    torch.set_num_threads(1)
    home, world = Path(sys.argv[1]), World.start("cpu")
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(64, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(64) % 4
    data = ObjectData.from_object({"train": (images, labels), "test": (images[:8], labels[:8])}).load()
    for build in (datadam, dmd2):
        name = build.__name__
        directory = RunDirectory(home / name, writes=world.is_main)
        directory.lock()
        run = Run(build(world), directory, settings=Settings(device="cpu", log_every=3), data=data, world=world)
        result = run.execute()
        if world.is_main:
            if name == "datadam":
                found = {"images": result.artefacts["set"].distilled.images.detach()}
            else:
                found = {f"{n}.{k}": v for n, m in result.artefacts.items() for k, v in m.state_dict().items()}
            save_file({key: value.contiguous() for key, value in found.items()}, home / f"{name}.safetensors")
            (home / f"{name}.world").write_text(str(world.size))
        directory.release()
    if world.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
