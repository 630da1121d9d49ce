"""Denoisers: building, calling, features from the middle, and diffusers reading what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models.denoiser import DiffusersSpec, PointDenoiser, PointDenoiserSpec, UNetSpec, bottleneck
from stillhouse.models.spec import ModelSpec
from stillhouse.modules.noise import EDMNoise, VPNoise, denoise, predict
from stillhouse.modules.samplers import multistep
from stillhouse.spec import Spec, read

diffusers = pytest.importorskip("diffusers")

DIGITS = Facts({"pixel_values": (1, 16, 16)}, num_classes=10)
POINTS = Facts({"features": (2,)}, num_classes=3)


class Holder(Spec):
    model: ModelSpec


def unet(**fields: object) -> nn.Module:
    torch.manual_seed(0)
    return read(Holder, {"model": {"kind": "unet", "width": 8, **fields}}).model.build(DIGITS)


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 1, 16, 16), EDMNoise().draw(torch.rand(batch)), torch.randint(0, 10, (batch,))


def test_the_unet_is_a_model_of_diffusers_with_a_null_class() -> None:
    net = UNetSpec().build(DIGITS)
    assert type(net) is diffusers.UNet2DModel
    assert net.config["num_class_embeds"] == 11
    assert 300_000 < sum(p.numel() for p in net.parameters()) < 1_000_000
    x, t, labels = inputs()
    assert denoise(net, x, t, EDMNoise(), "edm", labels).shape == x.shape
    assert UNetSpec(conditional=False).build(DIGITS).config["num_class_embeds"] is None


def test_text_forms() -> None:
    assert read(Holder, {"model": "unet:32"}).model == UNetSpec(width=32)
    assert read(Holder, {"model": "diffusers:owner/name:unet"}).model == DiffusersSpec(
        name="owner/name", subfolder="unet"
    )
    with pytest.raises(UserError, match="'wide' is not a width"):
        read(Holder, {"model": "unet:wide"})
    with pytest.raises(UserError, match="give either 'name'"):
        read(Holder, {"model": "diffusers"})


def test_bad_data_is_refused() -> None:
    with pytest.raises(UserError, match="takes images"):
        UNetSpec().build(POINTS)
    with pytest.raises(UserError, match="halves images of 14x14 2 times"):
        UNetSpec().build(Facts({"pixel_values": (1, 14, 14)}))
    with pytest.raises(UserError, match="the data has no classes"):
        UNetSpec(conditional=True).build(Facts({"pixel_values": (1, 16, 16)}))
    with pytest.raises(UserError, match="takes vectors"):
        PointDenoiserSpec().build(DIGITS)


def test_classes_and_times_matter() -> None:
    net = unet().eval()
    x, t, labels = inputs()
    out = predict(net, x, t, EDMNoise(), labels)
    assert not torch.allclose(out, predict(net, x, t, EDMNoise(), (labels + 1) % 10))
    assert not torch.allclose(out, predict(net, x, 2 * t, EDMNoise(), labels) * 1.0)


def test_bottleneck_is_the_middle_of_the_full_forward_pass() -> None:
    net = unet().eval()
    x, t, labels = inputs()
    seen: dict[str, torch.Tensor] = {}
    handle = net.mid_block.register_forward_hook(lambda m, a, out: seen.update(mid=out))
    predict(net, x, t, EDMNoise(), labels)
    handle.remove()
    features = bottleneck(net, x, t, EDMNoise(), labels)
    assert features.shape == (3, 32, 4, 4)
    assert torch.equal(features, seen["mid"])
    assert not net.mid_block._forward_hooks


def test_bottleneck_runs_no_decoder_and_keeps_the_graph() -> None:
    net = unet()
    x, t, labels = inputs()
    x.requires_grad_(True)
    calls = []
    for block in net.up_blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    bottleneck(net, x, t, EDMNoise(), labels).sum().backward()
    assert not calls
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert net.conv_in.weight.grad is not None
    assert net.conv_out.weight.grad is None


def test_frozen_parameters_still_pass_gradients_to_the_sample() -> None:
    net = unet().requires_grad_(False)
    x, t, labels = inputs()
    x.requires_grad_(True)
    bottleneck(net, x, t, EDMNoise(), labels).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in net.parameters())


def test_bottleneck_of_any_layer() -> None:
    net = unet()
    x, t, labels = inputs()
    assert bottleneck(net, x, t, EDMNoise(), labels, layer="down_blocks.0").shape == (3, 8, 8, 8)
    with pytest.raises(UserError, match="did you mean 'mid_block"):
        bottleneck(net, x, t, EDMNoise(), labels, layer="midblock")
    net.unused = nn.Linear(1, 1)
    with pytest.raises(UserError, match="does not call its layer 'unused'"):
        bottleneck(net, x, t, EDMNoise(), labels, layer="unused")


def test_bottleneck_of_a_compiled_network() -> None:
    net = unet().eval()
    x, t, labels = inputs()
    expected = bottleneck(net, x, t, EDMNoise(), labels)
    net.compile(backend="eager")
    predict(net, x, t, EDMNoise(), labels)
    assert torch.equal(bottleneck(net, x, t, EDMNoise(), labels), expected)
    assert bottleneck(net.to(torch.bfloat16), x, t, EDMNoise(), labels).dtype == torch.bfloat16


def test_tokens_come_back_as_a_map() -> None:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=2,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,
    )
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 4]), torch.tensor([1, 2])
    condition = {"class_labels": labels}
    assert predict(transformer.eval(), x, t, VPNoise(), condition).shape == x.shape
    features = bottleneck(transformer, x, t, VPNoise(), condition, layer="transformer_blocks.0")
    assert features.shape == (2, 8, 4, 4)


def test_text_conditional_unet() -> None:
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    x, t, text, null = torch.randn(2, 4, 8, 8), torch.tensor([3, 400]), torch.randn(2, 5, 6), torch.zeros(1, 5, 6)
    plain = predict(net, x, t, VPNoise(), text)
    torch.testing.assert_close(plain, predict(net, x, t, VPNoise(), {"encoder_hidden_states": text}))
    torch.testing.assert_close(plain, net(x, t, text).sample)
    without = net(x, t, null.expand(2, -1, -1)).sample
    guided = predict(net, x, t, VPNoise(), text, null_condition=null, guidance_scale=1.75)
    torch.testing.assert_close(guided, without + 1.75 * (plain - without), rtol=1e-4, atol=1e-5)
    assert bottleneck(net, x, t, VPNoise(), text).shape == (2, 16, 4, 4)


def test_a_saved_student_runs_in_diffusers(tmp_path: Path) -> None:
    """One step of diffusers' own scheduler on the saved network is our one-step generator."""
    net = unet().eval()
    net.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path)
    ours = read(Holder, {"model": f"diffusers:{tmp_path}"}).model.build(DIGITS)
    noise, _, labels = inputs()
    schedule = EDMNoise()

    def student(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return denoise(ours.eval(), x, t, schedule, "edm", labels)

    images = multistep(student, noise, schedule, schedule.grid(1)).samples
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(1)
    x, time = noise * scheduler.sigmas[0], scheduler.timesteps[0]
    with torch.no_grad():
        output = theirs(scheduler.scale_model_input(x, time), time, labels).sample
    torch.testing.assert_close(images, scheduler.step(output, time, x).prev_sample, rtol=1e-4, atol=1e-4)


def test_models_of_diffusers(tmp_path: Path) -> None:
    config = dict(unet().config)
    random = read(Holder, {"model": {"kind": "diffusers", "config": {**config, "_class_name": "UNet2DModel"}}}).model
    assert type(random.build(DIGITS)) is diffusers.UNet2DModel
    unet().save_pretrained(tmp_path / "unet")
    half = DiffusersSpec(name=str(tmp_path), subfolder="unet", dtype="bfloat16").build(DIGITS)
    assert next(half.parameters()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="takes 1 channels and the data has 3"):
        DiffusersSpec(name=str(tmp_path), subfolder="unet").build(Facts({"pixel_values": (3, 16, 16)}))
    with pytest.raises(UserError, match="could not be made"):
        DiffusersSpec(name=str(tmp_path)).build(DIGITS)
    with pytest.raises(UserError, match="no model class 'Nothing'"):
        DiffusersSpec(config={"_class_name": "Nothing"}).build(DIGITS)
    with pytest.raises(UserError, match="needs '_class_name'"):
        read(Holder, {"model": {"kind": "diffusers", "config": {"in_channels": 3}}})


def test_point_denoiser() -> None:
    torch.manual_seed(0)
    net = PointDenoiserSpec(width=16).build(POINTS)
    assert isinstance(net, PointDenoiser)
    x, t, labels = torch.randn(5, 2), EDMNoise().draw(torch.rand(5)), torch.tensor([0, 1, 2, 3, 0])
    assert denoise(net, x, t, EDMNoise(), "edm", labels).shape == (5, 2)
    assert bottleneck(net, x, t, EDMNoise(), labels).shape == (5, 16)
    assert not torch.allclose(predict(net, x, t, EDMNoise(), labels), predict(net, x, t, EDMNoise(), 0 * labels))
    with pytest.raises(UserError, match="give it 'class_labels'"):
        predict(net, x, t, EDMNoise())
    unconditional = PointDenoiserSpec(conditional=False).build(POINTS)
    assert predict(unconditional, x, t, EDMNoise()).shape == (5, 2)
