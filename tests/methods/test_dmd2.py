"""DMD2 over the engine: who trains whom and when, the same samples in both turns, the switches, bad input, the result."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import stillhouse as sh
from stillhouse.data import Batch
from stillhouse.engine import Interrupted, Modules, Run, RunDirectory, Signals, Silent, World
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.front import run_recipe
from stillhouse.losses.scores import denoising, denoising_weight, distribution_matching
from stillhouse.methods.generators import dmd2 as module
from stillhouse.methods.generators.dmd2 import DMD2
from stillhouse.methods.generators.process import Process, ScaledEDMNoise, trainable_copy
from stillhouse.models import PointDenoiser, PointDenoiserSpec, fingerprint
from stillhouse.modules.discriminator import BottleneckDiscriminator
from stillhouse.modules.noise import EDMNoise, VPNoise
from stillhouse.recipe import build_recipe, load_recipe
from stillhouse.spec import read

RING = {"kind": "ring", "modes": 3, "samples": 300}
POINTS = {
    "data": RING,
    "teacher": {"kind": "trained", "model": {"kind": "point_denoiser", "width": 16}, "num_steps": 3, "batch_size": 8},
    "batch_size": 8,
    "num_steps": 7,
    "generator_every": 3,
    "optimizer": {"lr": 1e-3, "weight_decay": 0.01, "clip_norm": 10.0},
    "teacher_steps": 3,
    "eval_samples": 30,
    "settings": {"device": "cpu", "threads": 1},
}
IMAGES = {
    "data": {"kind": "digits", "pixels": "symmetric", "train_size": 200},
    "teacher": {
        "kind": "trained",
        "model": {"kind": "unet", "width": 8, "multipliers": [1]},
        "num_steps": 2,
        "batch_size": 4,
    },
    "batch_size": 4,
    "num_steps": 3,
    "generator_every": 2,
    "probe_epochs": 1,
    "optimizer": {"lr": 1e-3},
    "teacher_steps": 2,
    "eval_samples": 20,
    "settings": {"device": "cpu", "threads": 1},
}


def distil(base, **fields):
    return sh.distil("dmd2", **{**base, **fields})


@pytest.fixture
def turn(tmp_path):
    """A method, its run at a step, its modules (all copies of one random teacher) and the process."""

    def make(step=0, null=True, **fields):
        method = DMD2(**{"data": RING, "batch_size": 8, **fields})
        torch.manual_seed(0)
        teacher = PointDenoiser(2, 16, 3, num_class_embeds=4 if null else 3)
        process = Process(EDMNoise(), "edm", (2,), 3, 3 if null else None)
        m = Modules(
            generator=trainable_copy(teacher),
            teacher=copy.deepcopy(teacher).eval().requires_grad_(False),
            fake=trainable_copy(teacher),
            head=BottleneckDiscriminator(16),
        )
        run = Run(method, RunDirectory(tmp_path / "run"))
        run.enter("student", step, 10)
        run.place("prepare", "batch", 0, "")
        batch = Batch(features=torch.randn(8, 2), labels=torch.arange(8) % 3, index=torch.arange(8))
        return method, process, m, batch, run

    return make


def prepared(method, process, m, batch, run):
    return method.prepare(process, method.times(process), m, batch, run)


def valued(losses):
    pieces = [losses] if isinstance(losses, dict) else list(losses)
    return {name: term() if callable(term) else term for piece in pieces for name, term in piece.items()}


def watch(*modules):
    """Names of the parameters for which a gradient is computed from now on."""
    seen = set()
    for index, net in enumerate(modules):
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda _, name=f"{index}.{name}": seen.add(name))
    return seen


# Defaults -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    method = DMD2()
    assert (method.generator_every, method.t_range, method.gan_t_range) == (5, (0.02, 0.98), (0.0, 1.0))
    assert (method.weight_dm, method.weight_gan, method.weight_fake, method.weight_discriminator) == (1, 3e-3, 1, 1e-2)
    assert (method.guidance_scale, method.fake_guidance_scale, method.student_steps, method.regression) == (
        1,
        1,
        None,
        "none",
    )
    assert (method.lora_rank, method.lora_alpha, method.ema) == (0, 8.0, None)
    optimizer = method.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.weight_decay) == (
        "adamw",
        2e-6,
        (0.9, 0.999),
        0.01,
    )
    assert (optimizer.warmup, optimizer.schedule, optimizer.clip_norm) == (500, "constant", 10.0)
    assert method.fake_optimizer is None, "both learning rates are equal"


# The two turns ------------------------------------------------------------------------------------------------------


def test_the_generators_turn_reaches_no_parameter_of_guidance_or_teacher(turn):
    method, process, m, batch, run = turn()
    batch = prepared(method, process, m, batch, run)
    # At first all scores are equal and nothing would move.
    nn.init.normal_(m.fake.out.weight)
    seen = watch(m.fake, m.head)
    total = sum(valued(method.generator_loss(process, m, batch, run)).values())
    torch.autograd.backward(total, inputs=list(m.generator.parameters()))
    assert not seen
    assert all(p.grad is None for name in ("teacher", "fake", "head") for p in m[name].parameters())
    assert all(p.grad is not None for p in m.generator.parameters())
    assert m.generator.out.weight.grad.abs().sum() > 0


def test_the_guidances_turn_reaches_no_parameter_of_the_generator(turn):
    method, process, m, batch, run = turn()
    batch = prepared(method, process, m, batch, run)
    assert batch["generated"].requires_grad
    total = sum(valued(method.guidance_loss(process, m, batch, run)).values())
    total.backward()
    assert all(p.grad is None for p in m.generator.parameters())
    assert all(p.grad is not None for name in ("fake", "head") for p in m[name].parameters())


def test_both_turns_see_the_same_samples_and_the_generator_fires_every_third_time(monkeypatch):
    events = []
    for name in ("generator_loss", "guidance_loss"):
        original = getattr(DMD2, name)

        def recorded(self, process, m, batch, run, name=name, original=original):
            x = batch["generated"]
            events.append((name, run.step, x.detach().clone(), x.requires_grad))
            return original(self, process, m, batch, run)

        monkeypatch.setattr(DMD2, name, recorded)
    distil(POINTS)
    generator = [event for event in events if event[0] == "generator_loss"]
    guidance = [event for event in events if event[0] == "guidance_loss"]
    assert [step for _, step, *_ in guidance] == list(range(7))
    assert [step for _, step, *_ in generator] == [0, 3, 6]
    assert len(generator) == math.ceil(7 / 3)
    by_step = {step: x for _, step, x, _ in guidance}
    assert all(torch.equal(x, by_step[step]) for _, step, x, _ in generator)
    assert [graph for *_, graph in guidance] == [step % 3 == 0 for step in range(7)]
    assert not torch.equal(by_step[0], by_step[1])


def test_one_optimiser_holds_fake_score_and_head_and_both_rates_are_equal(turn):
    method, process, m, _, run = turn()
    stage = method.distillation(run, process, m.generator, m.teacher, m.fake, method.times(process))
    generator, guidance = stage.updates
    assert list(guidance.trains) == [("fake", "head")]
    assert next(iter(guidance.trains.values())) == method.optimizer
    # 500 iterations of warm-up are 100 updates of the generator.
    assert next(iter(generator.trains.values())) == method.optimizer.model_copy(update={"warmup": 100})
    assert (generator.every, guidance.every, stage.keep) == (5, 1, "last")


def test_nothing_moves_while_the_scores_agree_and_then_along_the_papers_direction(turn):
    method, process, m, batch, run = turn()
    batch = prepared(method, process, m, batch, run)
    x, labels = batch["generated"], batch["generated/labels"]
    assert method.matching(process, m, x, labels, run) == 0
    nn.init.normal_(m.fake.out.weight)
    run.place("loss", "generator", 0, 0)
    found = method.matching(process, m, x, labels, run)
    run.place("loss", "generator", 0, 0)
    t = process.schedule.draw(run.rand(8), 0.02, 0.98)
    x_t = process.schedule.add_noise(x, run.randn(8, 2), t).detach()
    real, fake = (process.denoise(m[name], x_t, t, labels) for name in ("teacher", "fake"))
    torch.testing.assert_close(found, distribution_matching(x, real, fake))


def test_the_fake_score_learns_from_the_generated_samples_with_edms_weight(turn):
    method, process, m, batch, run = turn()
    batch = prepared(method, process, m, batch, run)
    run.place("loss", "guidance", 0, 0)
    found = valued(method.guidance_loss(process, m, batch, run))["fake"]
    run.place("loss", "guidance", 0, 0)
    t = process.schedule.draw(run.rand(8))
    x = batch["generated"].detach()
    x_t = process.schedule.add_noise(x, run.randn(8, 2), t)
    x0 = process.denoise(m.fake, x_t, t, batch["generated/labels"])
    weight = denoising_weight(torch.ones(8), t, "edm", 0.5)
    torch.testing.assert_close(found, denoising(x0, x, weight), rtol=1e-5, atol=1e-6)


def test_only_the_real_score_is_guided(turn):
    method, process, m, batch, run = turn(guidance_scale=2.0)
    batch = prepared(method, process, m, batch, run)
    sizes = {}
    for name in ("teacher", "fake"):
        m[name].register_forward_pre_hook(lambda _, args, name=name: sizes.update({name: len(args[0])}))
    loss = method.matching(process, m, batch["generated"], batch["generated/labels"], run)
    assert sizes == {"teacher": 16, "fake": 8}
    assert loss > 0


def test_classes_are_drawn_independently_of_the_real_ones(turn):
    _, process, _, batch, run = turn()
    drawn = torch.stack([process.drawn(run, batch, 8)["labels"] for _ in range(100)])
    assert drawn.min() == 0
    assert drawn.max() == 2
    assert len(torch.unique(drawn, dim=0)) > 90


def test_without_a_gan_weight_there_is_no_discriminator():
    plain = distil(POINTS, weight_gan=0.0)
    other = distil(POINTS, weight_gan=0.0, weight_discriminator=5.0)
    assert fingerprint(plain.student.net) == fingerprint(other.student.net)
    assert fingerprint(plain.student.net) != fingerprint(distil(POINTS).student.net)


# Few steps ----------------------------------------------------------------------------------------------------------


def test_a_few_step_student_meets_all_its_steps_and_every_process_the_same(turn, monkeypatch):
    steps = []
    original = module.backward_simulation

    def recorded(denoiser, noise, schedule, times, step, **more):
        steps.append(step)
        return original(denoiser, noise, schedule, times, step, **more)

    monkeypatch.setattr(module, "backward_simulation", recorded)
    method, process, m, batch, run = turn(student_steps=(999, 749, 499, 249))
    inputs = []
    m.generator.register_forward_pre_hook(lambda _, args: inputs.append(torch.is_grad_enabled()))
    for step in range(40):
        run.enter("student", step, 40)
        run.place("prepare", "batch", 0, "")
        prepared(method, process, m, batch, run)
        simulated = steps[-1]
        # All evaluations of the simulation have no graph, and the last has one when the generator's turn comes.
        assert inputs == [False] * simulated + [step % 5 == 0]
        inputs.clear()
    assert set(steps) == {0, 1, 2, 3}
    first = list(steps)
    steps.clear()
    run.world = World(1, 2, run.world.device)
    for step in range(40):
        run.enter("student", step, 40)
        run.place("prepare", "batch", 0, "")
        prepared(method, process, m, batch, run)
    assert steps == first


def test_few_steps_run_and_are_sampled_in_as_many_evaluations():
    result = distil(POINTS, student_steps=[999, 499], ema=0.5)
    assert result.metrics["nfe/student"] == 2
    calls = []
    result.student.net.register_forward_pre_hook(lambda *_: calls.append(1))
    assert result.sample(6).shape == (6, 2)
    assert len(calls) == 2
    assert torch.equal(result.sample(6, seed=3), result.sample(6, seed=3))


# Adapters, pairs, phases --------------------------------------------------------------------------------------------


def test_lora_changes_weights_by_a_low_rank_and_is_merged():
    fields = {"lora_layers": ["*.0", "*.0.0"], "lora_alpha": 2.0, "optimizer": {"lr": 1e-2}}
    result = distil(POINTS, lora_rank=2, **fields)
    start = distil(POINTS, num_steps=1, optimizer={"lr": 1e-30}).student.net
    changed = 0
    for name, weight in result.student.net.state_dict().items():
        change = weight - start.state_dict()[name]
        if change.abs().max() > 1e-6:
            assert name.endswith("0.weight")
            assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
            changed += 1
    assert changed == 3
    with pytest.raises(UserError, match="has no linear or convolution layer named"):
        distil(POINTS, lora_rank=2)


def test_pairs_are_the_teachers_and_the_student_may_start_from_them():
    quiet = {"num_steps": 1, "optimizer": {"lr": 1e-30}, "regression_pairs": 12, "regression_steps": 2}
    quiet["regression_optimizer"] = {"lr": 1e-2}
    plain = distil(POINTS, **quiet, regression="baseline")
    pretrained = distil(POINTS, **quiet, regression="pretrain")
    assert plain.metrics["test/regression/sliced_wasserstein"] == pretrained.metrics["test/student/sliced_wasserstein"]
    assert plain.metrics["test/student/sliced_wasserstein"] == plain.metrics["test/teacher-1-step/sliced_wasserstein"]


def test_regression_pairs_lie_on_the_teachers_paths(turn):
    method, process, m, _, run = turn(regression_pairs=5, teacher_steps=3, eval_batch_size=2)
    full = method.sampled(module.Teacher(m.teacher, process))
    pairs = method.pairs(run, full)
    assert {name: len(value) for name, value in pairs.items()} == {"noise": 5, "target": 5, "labels": 5}
    torch.testing.assert_close(full(pairs["noise"], pairs["labels"]), pairs["target"])


def test_what_pairs_are_drawn_from_does_not_depend_on_how_many_are_made_at_once(turn):
    found = []
    for size in (2, 5, 256):
        method, process, m, _, run = turn(regression_pairs=7, teacher_steps=3, eval_batch_size=size)
        run.place("compute")
        found.append(method.pairs(run, method.sampled(module.Teacher(m.teacher, process))))
    for other in found[1:]:
        assert torch.equal(other["noise"], found[0]["noise"])
        assert torch.equal(other["labels"], found[0]["labels"])
        torch.testing.assert_close(other["target"], found[0]["target"])


def test_the_key_of_pairs_names_all_that_they_depend_on(turn):
    def key(net=None, threads=1, device="cpu", changed=None, **fields):
        method, process, m, _, run = turn(**{"regression_pairs": 5, "teacher_steps": 3, **fields})
        run.world = World(0, 1, torch.device(device))
        teacher = module.Teacher(net or m.teacher, dataclasses.replace(process, **(changed or {})))
        torch.set_num_threads(threads)
        try:
            return next(method.regress(run, teacher, method.sampled(teacher))).key
        finally:
            torch.set_num_threads(1)

    assert key() == key()
    fields = {"fields": {"states": (2,)}, "classes": None, "null": None}
    others = [
        key(eval_batch_size=2),
        key(regression_pairs=6),
        key(teacher_steps=4),
        key(teacher_sampler="ddim"),
        key(guidance_scale=2.0),
        key(threads=2),
        key(device="meta"),
        key(changed={"null": None}),
        key(changed={"classes": 2}),
        key(changed={"schedule": EDMNoise(sigma_max=70.0)}),
        key(changed={"prediction": "sample"}),
        key(changed=fields),
        key(changed={**fields, "null_fields": {"states": torch.zeros(2)}}),
        key(changed={**fields, "null_fields": {"states": torch.ones(2)}}),
    ]
    assert len({key(), *others}) == 1 + len(others)
    # Data matter where conditions are looked up in them, and not where classes are drawn.
    fewer = {**RING, "samples": 200}
    assert key(data=fewer) == key()
    assert key(data=fewer, changed=fields) != key(changed=fields)


def test_networks_of_equal_weights_and_other_configs_have_other_pairs(turn):
    diffusers = pytest.importorskip("diffusers")
    method, process, _, _, run = turn(regression_pairs=5, teacher_steps=3)
    keys = []
    for size in (4, 8, 8):
        torch.manual_seed(0)
        net = image_denoiser(diffusers, attention_head_dim=size, block_out_channels=(8,), add_attention=True)
        teacher = module.Teacher(net, dataclasses.replace(process, shape=(1, 8, 8)))
        keys.append(next(method.regress(run, teacher, method.sampled(teacher))).key)
    assert keys[0] != keys[1]
    assert keys[1] == keys[2]


def test_a_run_that_finds_pairs_equals_one_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    fields = {
        "regression": "baseline",
        "regression_pairs": 12,
        "regression_steps": 2,
        "regression_optimizer": {"lr": 1e-2},
    }
    distil(POINTS, **fields, eval_batch_size=5)
    for size in (5, 256):
        found, made = (distil(POINTS, **fields, eval_batch_size=size, cache=cache) for cache in (True, False))
        assert found.metrics == made.metrics
    assert len(list((tmp_path / "cache" / "computes").iterdir())) == 2


def test_a_second_phase_starts_where_the_first_ended(tmp_path):
    first = distil(IMAGES, keep_fake=True, eval_samples=0, out=tmp_path / "first")
    start = str(tmp_path / "first" / "result")
    again = distil(IMAGES, start=start, num_steps=1, optimizer={"lr": 1e-30}, keep_fake=True, eval_samples=0)
    for name in ("student", "fake"):
        for one, two in zip(
            first.artefacts[name].net.parameters(), again.artefacts[name].net.parameters(), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match=r"start: .* does not exist; name the 'result' directory"):
        distil(IMAGES, start=str(tmp_path), eval_samples=0)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fake_guidance_scale": 2.0}, "'fake_guidance_scale' is 2.0, but the fake score is never guided"),
        ({"generator_every": 0}, "generator_every: expected at least 1"),
        ({"student_steps": [499, 249]}, "starts at the last step 999"),
        ({"student_steps": [999, 249, 499]}, "'student_steps' is .*, but a few-step schedule descends to at least 0"),
        ({"student_steps": [999, -1]}, "descends to at least 0"),
        ({"student_steps": []}, "descends to at least 0"),
        ({"student_steps": [999, 499], "conditioning_step": 3}, "'conditioning_step' is for a one-step student"),
        ({"conditioning_step": 1000}, "conditioning_step: 1000 is no place in the teacher's table"),
        (
            {"t_range": (0.9, 0.1)},
            r"'t_range' is \[0.9, 0.1\], but its fractions of the table need 0 <= low < high <= 1",
        ),
        ({"gan_t_range": (0.0, 1.5)}, "'gan_t_range' is "),
        ({"weight_discriminator": 0.0}, "would follow a discriminator that is never trained"),
        ({"start": "runs/first/result", "regression": "pretrain"}, "both say which weights the student begins with"),
        ({"feature_layer": "middle"}, "middle"),
        ({"data": None}, "a GAN needs real samples"),
        ({"weight_gan": 0.0, "data": None, "regression": "baseline"}, "without data nothing is measured"),
        ({"teacher": {"kind": "trained", "model": "point_denoiser", "prediction": "noise"}}, "prediction"),
    ],
)
def test_bad_fields_are_refused_in_a_sentence(fields, message, tmp_path):
    values = {"method": "dmd2", **{k: v for k, v in {**POINTS, **fields}.items() if k != "settings"}}
    with pytest.raises(UserError, match=message):
        run_recipe(build_recipe(values), tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student_steps": [999, 249, 499]}, "descends"),
        ({"student_steps": [499, 249]}, "student_steps: A few-step schedule starts at the last step 999"),
        ({"conditioning_step": 1000}, "conditioning_step: 1000 is no place"),
        ({"t_range": (-0.1, 0.5)}, "'t_range'"),
        ({"gan_t_range": (0.5, 0.5)}, "'gan_t_range'"),
        ({"teacher": {**POINTS["teacher"], "schedule": "vp"}, "teacher_steps": 1001}, "teacher_steps: A sampler takes"),
    ],
)
def test_what_is_wrong_before_any_teacher_is_trained_is_said_before(fields, message):
    values = {"method": "dmd2", **{k: v for k, v in {**POINTS, **fields}.items() if k != "settings"}}
    with pytest.raises(UserError, match=message):
        build_recipe(values)


def test_times_are_checked_against_the_table_that_a_pretrained_teacher_names():
    net, short = PointDenoiser(2, 16, 3, num_class_embeds=4), {"kind": "edm", "num_train_timesteps": 100}
    with pytest.raises(UserError, match="student_steps: A few-step schedule starts at the last step 99"):
        build_recipe(
            {"method": "dmd2", "data": RING, "teacher": pretrained(net, schedule=short), "student_steps": [999, 9]}
        )


def pretrained(net, **fields):
    return {"kind": "pretrained", "model": net, "schedule": "edm", "prediction": "edm", **fields}


def test_teachers_that_do_not_fit_the_data_are_refused():
    classes = PointDenoiser(2, 8, 3, num_class_embeds=9)
    with pytest.raises(UserError, match="the teacher is told one of 9 classes, and the data has 3"):
        distil(POINTS, teacher=pretrained(classes))
    with pytest.raises(UserError, match="no class for 'no condition'"):
        distil(POINTS, teacher=pretrained(PointDenoiser(2, 8, 3, num_class_embeds=3)), guidance_scale=2.0)
    with pytest.raises(UserError, match="nothing says which process"):
        distil(POINTS, teacher=classes)
    diffusers = pytest.importorskip("diffusers")
    small = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=11,
    )
    with pytest.raises(UserError, match=r"the samples have the shape \(1, 8, 8\) and the teacher's \(1, 16, 16\)"):
        distil(IMAGES, teacher=pretrained(small))


# Whole runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [("vp", "epsilon"), ("vp", "v_prediction"), ("flow", "flow_prediction"), ("edm", "sample")],
)
def test_every_process_can_be_distilled(schedule, prediction):
    teacher = {**POINTS["teacher"], "schedule": schedule, "prediction": prediction}
    result = distil(POINTS, teacher=teacher)
    assert math.isfinite(result.metrics["test/sliced_wasserstein"])


def test_the_last_step_of_a_schedule_without_signal_is_refused_for_noise_predictions():
    teacher = {**POINTS["teacher"], "schedule": {"kind": "vp", "rescale_betas_zero_snr": True}, "prediction": "epsilon"}
    with pytest.raises(UserError, match="no signal is left"):
        distil(POINTS, teacher=teacher)


def test_an_unconditional_teacher_needs_no_labels():
    model = {"kind": "point_denoiser", "width": 16, "conditional": False}
    result = distil(POINTS, teacher={**POINTS["teacher"], "model": model})
    assert result.student(torch.randn(4, 2)).shape == (4, 2)
    assert 0 <= result.metrics["test/mode_recall"] <= 1


def test_the_teacher_is_not_changed_and_ends_as_it_began():
    net = PointDenoiser(2, 16, 3, num_class_embeds=4)
    before = fingerprint(net)
    result = distil(POINTS, teacher=pretrained(net))
    assert fingerprint(net) == before
    assert any(before in note for note in result.notes)
    assert fingerprint(result.student.net) != before
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_without_data_a_pretrained_teacher_is_distilled_from_noise_alone(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=8,
        num_class_embeds=5,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    recipe = build_recipe(
        {
            "method": "dmd2",
            "data": None,
            "teacher": pretrained(net),
            "weight_gan": 0,
            "num_steps": 2,
            "batch_size": 2,
            "teacher_steps": 2,
        }
    )
    result = run_recipe(recipe, tmp_path / "run")
    assert result.sample(3, torch.tensor([0, 4, 1])).shape == (3, 1, 8, 8)


def image_denoiser(diffusers, **fields):
    given = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8,),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
        "num_class_embeds": 11,
    }
    return diffusers.UNet2DModel(**{**given, **fields})


BLIND = {"data": None, "weight_gan": 0, "num_steps": 2, "batch_size": 16, "teacher_steps": 2, "guidance_scale": 2.0}


def seen_classes(net, monkeypatch, out, **teacher):
    """The classes that a student is trained for without data, and the process that it ends with."""
    drawn = []
    original = Process.drawn
    monkeypatch.setattr(Process, "drawn", lambda *args: drawn.append(found := original(*args)) or found)
    values = {**BLIND, "teacher": pretrained(net, **teacher), "run": {"threads": 1, "device": "cpu"}}
    result = run_recipe(build_recipe({"method": "dmd2", **values}), out)
    return set(torch.cat([one["labels"] for one in drawn]).tolist()), result


def test_without_data_a_dits_null_class_is_no_class(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    )
    fields = {"schedule": "vp", "prediction": "epsilon"}
    classes, result = seen_classes(net, monkeypatch, tmp_path / "run", **fields)
    assert classes == {0, 1, 2}
    assert (result.student.process.classes, result.student.process.null) == (3, 3)
    assert Process.of(net, VPNoise(), "epsilon", None).null_condition(torch.tensor([0, 2])).tolist() == [3, 3]
    with pytest.raises(UserError, match="one of 4 classes, of which 3 stands for none, and the data has 4"):
        Process.of(net, VPNoise(), "epsilon", Facts({"pixel_values": (1, 8, 8)}, num_classes=4))


def test_without_data_the_teacher_names_its_null_class(tmp_path, monkeypatch):
    net = image_denoiser(pytest.importorskip("diffusers"))
    with pytest.raises(
        UserError, match=r"no class for 'no condition' .* say which it is with the teacher's 'null_class'"
    ):
        seen_classes(net, monkeypatch, tmp_path / "unnamed")
    classes, result = seen_classes(net, monkeypatch, tmp_path / "named", null_class=10)
    assert classes <= set(range(10))
    assert len(classes) > 5
    assert (result.student.process.classes, result.student.process.null) == (10, 10)
    # The student says it of itself, so that it can be a teacher without data in its turn.
    home = tmp_path / "named" / "result" / "student" / "unet"
    again = run_recipe(
        build_recipe({"method": "dmd2", **BLIND, "teacher": f"diffusers:{home.parent}:unet"}), tmp_path / "again"
    )
    assert (again.student.process.classes, again.student.process.null) == (10, 10)


def test_a_null_class_that_cannot_be_is_refused():
    diffusers = pytest.importorskip("diffusers")
    for net, message in (
        (image_denoiser(diffusers), "null_class: it is 11, but the teacher is told one of 11 classes from 0"),
        (image_denoiser(diffusers, num_class_embeds=None), "null_class: it is 11, but the teacher is told no class"),
    ):
        with pytest.raises(UserError, match=message):
            distil({**IMAGES, **BLIND}, teacher=pretrained(net, null_class=11))
    with pytest.raises(UserError, match="of which 9 stands for none, and the data has 10"):
        distil(IMAGES, teacher=pretrained(image_denoiser(diffusers), null_class=9))
    with pytest.raises(UserError, match="beside 'conditions' give 'null_conditions'"):
        distil(IMAGES, teacher=pretrained(image_denoiser(diffusers), null_class=10, conditions=["labels"]))


def test_a_run_that_is_stopped_and_resumed_equals_a_straight_one(tmp_path):
    values = {k: v for k, v in POINTS.items() if k != "settings"}
    recipe = build_recipe(
        {"method": "dmd2", **values, "student_steps": [999, 499], "ema": 0.9, "run": {"threads": 1, "device": "cpu"}},
        [],
    )

    class Stopper(Silent):
        """Asks to stop at step 4 of the student, between two updates of the generator."""

        def stage(self, name, steps, done):
            self.name = name

        def step(self, step):
            signals.stop = self.name == "student" and step == 4 and not stopped

    stopped, signals = [], Signals()
    straight = run_recipe(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path / "resumed", listener=Stopper(), signals=signals)
    stopped.append(True)
    signals.stop = False
    resumed = run_recipe(recipe, tmp_path / "resumed", listener=Stopper(), signals=signals)
    assert fingerprint(straight.student.net) == fingerprint(resumed.student.net)
    assert straight.metrics == resumed.metrics
    assert (tmp_path / "straight" / "metrics.jsonl").read_bytes() == (
        tmp_path / "resumed" / "metrics.jsonl"
    ).read_bytes()


def test_the_small_run_measures_everything_and_diffusers_alone_loads_the_student(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    result = distil(IMAGES, regression="baseline", regression_pairs=8, regression_steps=2, out=tmp_path / "run")
    for row in ("teacher", "teacher-1-step", "regression", "student", "real"):
        assert {f"test/{row}/{k}" for k in ("frechet", "precision", "recall", "accuracy")} <= set(result.metrics)
        assert row in result.pictures
    [table] = result.tables
    assert "features of the probe cnn-" in table.title
    assert [row[0] for row in table.rows] == ["teacher", "teacher-1-step", "regression", "student", "real"]
    assert [row[1] for row in table.rows[:4]] == [3, 1, 1, 1]

    home = tmp_path / "run" / "result" / "student"
    net = diffusers.UNet2DModel.from_pretrained(home / "unet").eval()
    scheduler = diffusers.EDMEulerScheduler.from_pretrained(home / "scheduler")
    scheduler.set_timesteps(1)
    torch.manual_seed(0)
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([2, 0, 7])
    x = noise * 80.0
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net(scheduler.scale_model_input(x, t), t, labels).sample
            x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(x, result.student(noise, labels), rtol=1e-4, atol=1e-4)

    # And it is a teacher for the next one, its process read from the files beside it.
    again = distil(IMAGES, teacher=f"diffusers:{home}:unet", num_steps=1, optimizer={"lr": 1e-30}, eval_samples=0)
    assert fingerprint(again.student.net) == fingerprint(result.student.net)


def test_a_pipeline_of_diffusers_is_a_teacher():
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=8,
        add_attention=False,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline = diffusers.DDPMPipeline(unet=net, scheduler=diffusers.DDPMScheduler(num_train_timesteps=50))
    result = distil(IMAGES, teacher=pipeline)
    assert result.student.process.schedule == VPNoise(num_train_timesteps=50)
    assert result.student.process.prediction == "epsilon"


def test_the_imagenet_recipe_trains_with_local_stand_ins_for_the_hub(tmp_path):
    """The real recipe with its hub ids exchanged for directories of the same formats, smaller."""
    datasets, diffusers = pytest.importorskip("datasets"), pytest.importorskip("diffusers")
    import numpy as np

    rng = np.random.default_rng(0)
    rows = {"image": [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(60)], "label": [0, 1] * 30}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "images")
    net = diffusers.UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 4, 4, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        num_class_embeds=2,
        attention_head_dim=4,
    )
    net.save_pretrained(tmp_path / "teacher" / "unet")
    overrides = [
        f"data.path={tmp_path / 'images'}",
        f"teacher.model.name={tmp_path / 'teacher'}",
        "num_steps=2",
        "batch_size=2",
        "probe={kind: cnn, channels: [4]}",
        "probe_epochs=1",
        "eval_samples=10",
        "teacher_steps=2",
        "run.device=cpu",
        "run.threads=1",
    ]
    result = run_recipe(load_recipe("dmd2/paper", overrides), tmp_path / "run")
    assert math.isfinite(result.metrics["test/frechet"])
    assert isinstance(result.student.process.schedule, ScaledEDMNoise)


def test_the_text_recipe_trains_with_local_stand_ins_for_the_hub(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import save_file

    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    net.save_pretrained(tmp_path / "sd" / "unet")
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "sd" / "scheduler")
    save_file({"encoder_hidden_states": torch.randn(5, 6)}, tmp_path / "null.safetensors")
    (tmp_path / "my_latents.py").write_text(
        "import torch\n\n\ndef load():\n"
        "    return {'pixel_values': torch.randn(20, 4, 8, 8), 'encoder_hidden_states': torch.randn(20, 5, 6)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        f"teacher.model.name={tmp_path / 'sd'}",
        f"teacher.null_conditions={tmp_path / 'null.safetensors'}",
        "num_steps=2",
        "batch_size=2",
        "eval_samples=10",
        "teacher_steps=2",
        "regression=baseline",
        "regression_pairs=4",
        "regression_steps=1",
        "run.device=cpu",
        "run.threads=1",
    ]
    recipe = load_recipe("dmd2/paper-sd15", overrides)
    result = run_recipe(recipe, tmp_path / "run")
    assert isinstance(result.student.process.schedule, VPNoise)
    assert math.isfinite(result.metrics["test/sliced_wasserstein"])
    states = torch.randn(3, 5, 6)
    assert result.sample(3, encoder_hidden_states=states).shape == (3, 4, 8, 8)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "run" / "result" / "student" / "unet")
    assert fingerprint(again) == fingerprint(result.student.net)


def test_specs_read_what_a_person_writes():
    assert DMD2(teacher="unet:32").teacher.kind == "trained"
    assert DMD2(teacher="diffusers:owner/name:unet").teacher.kind == "pretrained"
    assert DMD2(teacher={"kind": "diffusers", "config": {"_class_name": "UNet2DModel"}}).teacher.kind == "trained"
    assert DMD2(teacher="point_denoiser").teacher.model == PointDenoiserSpec()
    with pytest.raises(UserError, match=r"there is no model 'unett'; did you mean 'unet'\?"):
        read(DMD2, {"teacher": "unett"})
