"""DMD2's time per update of the generator: the engine beside a plain loop, and beside FastGen (NVIDIA) on request.

    OMP_NUM_THREADS=1 python benchmarks/dmd2.py
    git clone https://github.com/NVlabs/FastGen fastgen && pip install attrs omegaconf
    OMP_NUM_THREADS=1 python benchmarks/dmd2.py --framework fastgen

The small recipe's U-Net (untrained: weights do not change the time), data, batch and optimiser. Engine and loop do the same:
in each iteration one batch of generated images, the fake score's denoising loss and the discriminator's on its bottleneck;
in every fifth also distribution matching and the GAN loss of the generator, on the same images. The loop has float32
coefficients of EDM in its own words, warm-up, clipping, fused AdamW, a check of the loss for NaN, and a row of means every 50
iterations; the engine does all that it always does (seeds of every draw, checks of every gradient, log).

FastGen's DMD2 does other work: an iteration belongs either to the student or to the fake score, each generates afresh, and the
discriminator reads features of the frozen teacher, which nothing trains. So with ``--framework`` the engine runs that form as
well, in a method written below, and both take six iterations for one and five updates. FastGen's step is run without the
callbacks of its trainer (log, profiler, its clipping gradient by gradient) and clipped as the others are, with fused AdamW.

Runs alternate, and their order turns round; times are of the processor, in one thread. Prints the medians, the medians of the
ratios of neighbouring runs, and the peak of what torch holds in two cycles, the three networks and optimisers included.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from measuring import peak_memory
from stillhouse.data import Batch, Data, DataSpec, ObjectData
from stillhouse.engine import Losses, Modules, Run, RunDirectory, Settings, Silent, Stage, frozen_through
from stillhouse.losses.scores import distribution_matching, gan_generator
from stillhouse.methods.generators.dmd2 import DMD2, GENERATED, generated_condition
from stillhouse.methods.generators.process import Process
from stillhouse.models import Taps, UNetSpec, bottleneck
from stillhouse.modules.discriminator import BottleneckDiscriminator
from stillhouse.modules.noise import Condition, EDMNoise

CYCLE, WARM_UP, LOG_EVERY = 5, 10, 50
LR, RAMP, CLIP, WEIGHT_GAN, WEIGHT_DISCRIMINATOR, SIGMA_DATA, SIGMA_MAX = 5e-4, 20, 10.0, 3e-3, 1e-2, 0.5, 80.0

UNUSED = [
    "av",
    "boto3",
    "einops",
    "einops.layers",
    "einops.layers.torch",
    "ftfy",
    "hydra",
    "hydra.core",
    "hydra.core.config_store",
    "hydra.utils",
    "imageio",
    "imageio.v3",
    "pyspng",
    "timm",
    "timm.models",
    "timm.models.vision_transformer",
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "wandb",
    "wandb.util",
    "webdataset",
    "xformers",
    "xformers.ops",
]
"""What FastGen imports and this loss does not need; its log (loguru) is not wanted either."""


class Watch(Silent):
    """Notes when the steady part begins and ends."""

    def __init__(self, warm: int, steps: int) -> None:
        self.warm, self.steps, self.times = warm, steps, [0.0, 0.0]

    def step(self, step: int) -> None:
        """Look at the clock at two steps."""
        if step == self.warm:
            self.times[0] = time.process_time()
        elif step == self.steps:
            self.times[1] = time.process_time()

    def row(self, row: Mapping[str, Any]) -> None:
        """Ignore."""


class OtherForm(DMD2):
    """FastGen's form: either side has iterations of its own, and the discriminator reads the teacher."""

    def distillation(
        self, run: Run, process: Process, generator: nn.Module, teacher: nn.Module, fake: nn.Module, times: Tensor
    ) -> Stage:
        """The stage, with the guidance's turn where the generator has none."""
        stage = super().distillation(run, process, generator, teacher, fake, times)
        first, second = stage.updates
        second = replace(second, every=lambda run: run.step % self.generator_every != 0)
        return replace(stage, modules={**stage.modules, "teacher": frozen_through(teacher)}, updates=[first, second])

    def generator_loss(self, process: Process, m: Modules, batch: Batch, run: Run) -> Losses:
        """Both terms from one evaluation of the teacher."""
        x, condition, schedule = batch[GENERATED], generated_condition(process, batch), process.schedule
        t = schedule.draw(run.rand(len(x)))
        x_t = schedule.add_noise(x, run.randn(*x.shape), t)
        with torch.no_grad():
            fake = process.denoise(m.fake, x_t, t, condition)
        with Taps(m.teacher, self.feature_layer) as taps:
            real = process.denoise(m.teacher, x_t, t, condition)
            features = taps.take()[self.feature_layer]
        return {"dm": distribution_matching(x, real, fake), "gan": gan_generator(m.head(features))}

    def realism(self, process: Process, m: Modules, x: Tensor, condition: Condition, run: Run) -> Tensor:
        """Logits from the teacher's features."""
        schedule = process.schedule
        t = schedule.draw(run.rand(len(x)))
        with torch.no_grad():
            x_t = schedule.add_noise(x, run.randn(*x.shape), t)
            features = bottleneck(m.teacher, x_t, t, schedule, condition, layer=self.feature_layer)
        logits: Tensor = m.head(features)
        return logits


def by_engine(
    teacher: nn.Module, data: Data, batch_size: int, cycles: int, form: type[DMD2] = DMD2, cycle: int = CYCLE
) -> float:
    """Seconds per cycle of the stage that distils."""
    warm = WARM_UP // CYCLE * cycle
    steps = warm + cycle * cycles
    model = {"kind": "object", "object": teacher, "copy_on_build": False}
    method = form.model_validate(
        {
            "data": ObjectData.from_object(data),
            "teacher": {"kind": "pretrained", "model": model, "schedule": "edm", "prediction": "edm"},
            "num_steps": steps,
            "generator_every": cycle,
            "batch_size": batch_size,
            "optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.01, "warmup": RAMP, "clip_norm": CLIP},
            "weight_gan": WEIGHT_GAN,
            "weight_discriminator": WEIGHT_DISCRIMINATOR,
            "eval_samples": 0,
        }
    )
    watch = Watch(warm, steps)
    with tempfile.TemporaryDirectory() as place:
        directory = RunDirectory(Path(place))
        directory.lock()
        settings = Settings(device="cpu", log_every=LOG_EVERY)
        Run(method, directory, settings=settings, data=data, listener=watch).execute()
        directory.release()
    return (watch.times[1] - watch.times[0]) / max(1, cycles)


def by_hand(teacher: nn.Module, data: Data, batch_size: int, cycles: int) -> float:
    """Seconds per cycle of a plain loop."""
    pixels, labels = tensors(data)
    table = EDMNoise().times.float()
    generator, fake = (copy.deepcopy(teacher).requires_grad_(True).train() for _ in range(2))
    head = discriminator(teacher, pixels)
    mine, guidance = list(generator.parameters()), [*fake.parameters(), *head.parameters()]
    moving = [torch.optim.AdamW(group, lr=LR, weight_decay=0.01, fused=True) for group in (mine, guidance)]
    at_most = torch.full((batch_size,), SIGMA_MAX)
    draw = batches(pixels, labels, batch_size)
    sums, started = dict.fromkeys(("dm", "gan", "fake", "discriminator"), torch.zeros(())), 0.0

    def update(optimizer: torch.optim.Optimizer, group: list[nn.Parameter], loss: Tensor, firing: int, of: int) -> None:
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is NaN")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss, inputs=group)
        for one in optimizer.param_groups:
            one["lr"] = LR * min(1.0, (firing + 1) / of)
        nn.utils.clip_grad_norm_(group, CLIP, foreach=True)
        optimizer.step()

    def noised(x: Tensor, low: int = 0, high: int = len(table) - 1) -> tuple[Tensor, Tensor]:
        sigma = table[torch.randint(low, high + 1, (len(x),))]
        return x + sigma[:, None, None, None] * torch.randn_like(x), sigma

    with tempfile.TemporaryFile("w") as log:
        for step in range(WARM_UP + CYCLE * cycles):
            if step == WARM_UP:
                started = time.process_time()
            turn = step % CYCLE == 0
            real, real_labels = draw()
            given = torch.randint(int(labels.max()) + 1, (batch_size,))
            with torch.set_grad_enabled(turn):
                x = denoised(generator, SIGMA_MAX * torch.randn_like(real), at_most, given)
            if turn:
                with torch.no_grad():
                    x_t, sigma = noised(x, 20, 980)
                    by_teacher, by_fake = (denoised(net, x_t, sigma, given) for net in (teacher, fake))
                    scale = (x - by_teacher).abs().mean((1, 2, 3), keepdim=True)
                    target = x - torch.nan_to_num((by_fake - by_teacher) / scale)
                dm = 0.5 * F.mse_loss(x, target)
                gan = F.softplus(-head(encoded(fake, *noised(x), given))).mean()
                update(moving[0], mine, dm + WEIGHT_GAN * gan, step // CYCLE, RAMP // CYCLE)
                sums["dm"], sums["gan"] = sums["dm"] + dm.detach(), sums["gan"] + gan.detach()
                x = x.detach()
            x_t, sigma = noised(x)
            error = (denoised(fake, x_t, sigma, given) - x).square().mean((1, 2, 3))
            denoising = ((sigma**-2 + SIGMA_DATA**-2) * error).mean()
            says_real = head(encoded(fake, *noised(real), real_labels))
            says_fake = head(encoded(fake, *noised(x), given))
            realism = F.softplus(-says_real).mean() + F.softplus(says_fake).mean()
            update(moving[1], guidance, denoising + WEIGHT_DISCRIMINATOR * realism, step, RAMP)
            sums["fake"] = sums["fake"] + denoising.detach()
            sums["discriminator"] = sums["discriminator"] + realism.detach()
            if (step + 1) % LOG_EVERY == 0:
                firings = {"dm": LOG_EVERY / CYCLE, "gan": LOG_EVERY / CYCLE}
                row = {name: total.item() / firings.get(name, LOG_EVERY) for name, total in sums.items()}
                log.write(json.dumps({"step": step + 1, **row}) + "\n")
                log.flush()
                sums = dict.fromkeys(sums, torch.zeros(()))
    return (time.process_time() - started) / max(1, cycles)


def denoised(net: nn.Module, x_t: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """The clean images that a network with EDM's preconditioning sees (arXiv 2206.00364, Table 1)."""
    level = sigma[:, None, None, None]
    norm = (level**2 + SIGMA_DATA**2).sqrt()
    output: Tensor = net(x_t / norm, sigma.log() / 4, labels).sample
    return (SIGMA_DATA / norm) ** 2 * x_t + level * SIGMA_DATA / norm * output


def encoded(net: Any, x_t: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """What the bottleneck puts out, without a run of the decoder."""
    embedding = net.time_embedding(net.time_proj(sigma.log() / 4)) + net.class_embedding(labels)
    x = net.conv_in(x_t / (sigma[:, None, None, None] ** 2 + SIGMA_DATA**2).sqrt())
    for block in net.down_blocks:
        x, _ = block(x, embedding)
    found: Tensor = net.mid_block(x, embedding)
    return found


def framework(home: Path) -> SimpleNamespace:
    """What is needed of a clone of FastGen. Packages that it imports and this loss does not need may be missing here."""
    # Diffusers looks for packages by itself when it is first imported: not the stand-ins.
    importlib.import_module("diffusers")
    missing = {name for name in UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None}
    for name in (*missing, "loguru"):
        sys.modules[name] = MagicMock()
    sys.path.insert(0, str(home))
    edm, network, heads, dmd2, config = (
        importlib.import_module(f"fastgen.{name}")
        for name in (
            "networks.EDM.network",
            "networks.network",
            "networks.discriminators",
            "methods.distribution_matching.dmd2",
            "configs.methods.config_dmd2",
        )
    )

    class Network(network.FastGenNetwork):  # type: ignore[misc, name-defined]
        """A U-Net in the framework's form, with the framework's own preconditioning."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__(net_pred_type="x0", schedule_type="edm")
            self.net, self.schedule = copy.deepcopy(net).requires_grad_(True), EDMNoise()

        def forward(
            self,
            x_t: Tensor,
            t: Tensor,
            condition: Tensor,
            return_features_early: bool = False,
            feature_indices: set[int] | None = None,
            fwd_pred_type: str = "x0",
        ) -> Any:
            """Clean images, features, or both."""
            if return_features_early:
                return [bottleneck(self.net, x_t, t, self.schedule, condition)]
            x, time_, _ = edm.precond_input(x_t, t, sigma_data=SIGMA_DATA)
            if not feature_indices:
                return edm.precond_output(self.net(x, time_.float(), condition).sample, x_t, t, sigma_data=SIGMA_DATA)
            with Taps(self.net, "mid_block") as taps:
                output = self.net(x, time_.float(), condition).sample
                features = taps.take()["mid_block"]
            return [edm.precond_output(output, x_t, t, sigma_data=SIGMA_DATA), [features]]

    class Head(heads.Discriminator):  # type: ignore[misc, name-defined]
        """The same discriminator in the framework's form."""

        def __init__(self, head: nn.Module) -> None:
            super().__init__(feature_indices={0})
            self.head = head

        def forward(self, feats: list[Tensor]) -> Tensor:
            """Logits."""
            logits: Tensor = self.head(feats[0])[:, None]
            return logits

    return SimpleNamespace(Network=Network, Head=Head, Model=dmd2.DMD2Model, Config=config.ModelConfig)


def by_framework(code: SimpleNamespace, teacher: nn.Module, data: Data, batch_size: int, cycles: int) -> float:
    """Seconds per cycle of FastGen's own step."""
    pixels, labels = tensors(data)
    config = code.Config()
    config.device, config.input_shape, config.pretrained_model_path = "cpu", list(pixels.shape[1:]), ""
    config.net = {"_target_": code.Network, "net": teacher}
    config.discriminator = {"_target_": code.Head, "head": discriminator(teacher, pixels)}
    config.gan_loss_weight_gen, config.student_update_freq = WEIGHT_GAN, CYCLE + 1
    config.sample_t_cfg.time_dist_type = "polynomial"
    for part, ramp in (("net", RAMP // CYCLE), ("fake_score", RAMP), ("discriminator", RAMP)):
        getattr(config, f"{part}_optimizer").update({"lr": LR, "fused": True})
        getattr(config, f"{part}_scheduler").warm_up_steps = [ramp]
    model = code.Model(config)
    model.on_train_begin()
    model.init_optimizers()
    draw, started, total = batches(pixels, labels, batch_size), 0.0, torch.zeros(())
    warm = WARM_UP // CYCLE * (CYCLE + 1)
    for step in range(warm + (CYCLE + 1) * cycles):
        if step == warm:
            started = time.process_time()
        real, given = draw()
        losses, _ = model.single_train_step({"real": real, "condition": given, "neg_condition": None}, step)
        loss = losses["total_loss"]
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is NaN")
        model.grad_scaler.scale(loss).backward()
        for optimizer in model.get_optimizers(step):
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP, foreach=True)
        model.optimizers_schedulers_step(step)
        model.optimizers_zero_grad(step)
        total = total + loss.detach()
    return (time.process_time() - started) / max(1, cycles)


def tensors(data: Data) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    found = data.split("train").tensors
    assert found is not None
    return found["pixel_values"], found["labels"]


def discriminator(teacher: nn.Module, pixels: Tensor) -> BottleneckDiscriminator:
    """The head for the teacher's bottleneck."""
    one = torch.ones(1)
    with torch.no_grad():
        features = encoded(teacher, pixels[:1], one, one.long())
    return BottleneckDiscriminator(features.shape[1], features.shape[2:])


def batches(pixels: Tensor, labels: Tensor, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws batches, epoch after epoch."""
    order: list[Tensor] = []

    def draw() -> tuple[Tensor, Tensor]:
        if not order:
            order.extend(torch.randperm(len(pixels)).split(size)[: len(pixels) // size])
        chosen = order.pop()
        return pixels.index_select(0, chosen), labels.index_select(0, chosen)

    return draw


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", type=Path, help="a clone of FastGen, to measure as well")
    parser.add_argument("--width", type=int, default=16, help="channels of the U-Net's first level")
    parser.add_argument("--batch", type=int, default=32, help="images of an iteration")
    parser.add_argument("--cycles", type=int, default=8, help="updates of the generator in a run")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = DataSpec.parse({"kind": "digits", "pixels": "symmetric"}).load()
    teacher = UNetSpec(width=options.width, multipliers=(1, 2)).build(data.facts).requires_grad_(False).eval()
    ways: dict[str, Callable[..., float]] = {"engine": by_engine, "by hand": by_hand}
    pairs = [("engine", "by hand")]
    if options.framework is not None:
        ways["engine, other form"] = partial(by_engine, form=OtherForm, cycle=CYCLE + 1)
        ways["FastGen"] = partial(by_framework, framework(options.framework))
        pairs.append(("engine, other form", "FastGen"))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats):
        # Which goes first turns round: a machine drifts while it is measured.
        for name in list(ways) if repeat % 2 else list(ways)[::-1]:
            seconds[name].append(ways[name](teacher, data, options.batch, options.cycles))
    memory = {}
    for name, way in ways.items():
        gc.collect()
        # The warm-up alone is two cycles.
        memory[name] = peak_memory(partial(way, teacher, data, options.batch, 0), torch.device("cpu"))
    print(f"digits, width {options.width}, batch {options.batch}, torch {torch.__version__}")
    for (first, second), iterations in zip(pairs, (CYCLE, CYCLE + 1), strict=False):
        for name in (first, second):
            cycle = 1e3 * statistics.median(seconds[name])
            print(
                f"  {name}: {cycle / iterations:.1f} ms per iteration, {cycle:.0f} ms per update of the generator, peak "
                f"{memory[name]:.1f} MiB"
            )
        ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[second], strict=True))
        print(
            f"  ratio {ratio:.3f} (of the fastest {min(seconds[first]) / min(seconds[second]):.3f}), of the peaks "
            f"{memory[first] / memory[second]:.3f}"
        )


if __name__ == "__main__":
    main()
