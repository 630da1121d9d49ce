"""Autoencoder networks: shapes, published sizes, order of operations, where gradients and weight decay go."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses import latents as losses
from stillhouse.models.autoencoders import (
    CriticEncoder,
    DenseDecoder,
    DenseEncoder,
    GaussianLatent,
    ImageDecoder,
    ImageEncoder,
    StyleConvTranspose2d,
    StyleImageDecoder,
)
from stillhouse.modules.quantizers import LatentQuantizer

SMALL = {"widths": (4, 8), "dense_widths": (12, 12)}
SHAPE = (3, 16, 16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts():
    """The numbers of the released networks at 3 x 64 x 64 with 12 latents."""
    with torch.device("meta"):
        assert size(ImageEncoder((3, 64, 64), 12)) == 3_684_524
        assert size(StyleImageDecoder(12, (3, 64, 64))) == 3_967_136
        assert size(ImageDecoder(12, (3, 64, 64))) == 4_277_664
        small = {"widths": (64, 128, 256, 512), "dense_widths": (512,), "convolutions_per_stage": 1}
        assert size(ImageEncoder((3, 64, 64), 12, **small)) == 6_958_476
        assert size(StyleImageDecoder(12, (3, 64, 64), **small)) == 7_948_352
        assert size(DenseEncoder((20,), 6, widths=(64,) * 4)) == 14_726


@pytest.mark.parametrize("decoder", [StyleImageDecoder, ImageDecoder])
@pytest.mark.parametrize(("shape", "per_stage"), [((1, 16, 16), 3), ((3, 8, 24), 1), ((2, 16, 8), 2)])
def test_images_come_back_in_their_shape(decoder, shape, per_stage):
    encoder = ImageEncoder(shape, 5, **SMALL, convolutions_per_stage=per_stage)
    z = encoder(torch.rand(2, *shape))
    assert z.shape == (2, 5)
    assert encoder.map_shape == (8, shape[1] // 4, shape[2] // 4)
    assert decoder(5, shape, **SMALL, convolutions_per_stage=per_stage)(z).shape == (2, *shape)


def test_encoder_is_its_written_sequence():
    encoder = ImageEncoder(SHAPE, 5, **SMALL)
    images = torch.rand(2, *SHAPE)
    x = images
    parameters = iter(encoder.convolutions.parameters())
    for stage_width in SMALL["widths"]:
        for kernel, stride in [(3, 1), (3, 1), (4, 2)]:
            weight, scale, bias = next(parameters), next(parameters), next(parameters)
            assert weight.shape[0] == stage_width
            assert weight.shape[2:] == (kernel, kernel)
            x = F.conv2d(x, weight, stride=stride, padding=1)
            mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
            x = (x - mean) / (variance + 1e-6).sqrt() * scale[:, None, None] + bias[:, None, None]
            x = torch.where(x > 0, x, 0.2 * x)
    x = x.flatten(1)
    for layer in encoder.dense[::2]:
        x = (x @ layer.weight.T + layer.bias).relu()
    assert torch.allclose(encoder.features(images), x, atol=1e-5)
    assert torch.allclose(encoder(images), encoder.head(x), atol=1e-5)


def test_style_block_is_its_written_sequence():
    block = StyleConvTranspose2d(3, 6, 4, 2, num_styles=5)
    x, style = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    y = F.leaky_relu(F.conv_transpose2d(x, block.convolution.weight, stride=2, padding=1), 0.2)
    y = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True, unbiased=False) + 1e-6).sqrt()
    modulation = (style @ block.modulation.weight.T + block.modulation.bias).relu()
    expected = y * modulation[:, :6, None, None] + modulation[:, 6:, None, None]
    assert torch.allclose(block(x, style), expected, atol=1e-5)


def test_style_code_sets_level_and_contrast_of_every_channel():
    block = StyleConvTranspose2d(3, 6, 3, 1, num_styles=5)
    style = torch.randn(2, 5)
    y = block(100 * torch.randn(2, 3, 8, 8), style)
    scale, bias = block.modulation(style).relu().chunk(2, dim=1)
    assert torch.allclose(y.mean((2, 3)), bias, atol=1e-4)
    assert torch.allclose(y.std((2, 3), unbiased=False), scale, atol=1e-4)


def test_style_decoder_starts_from_one_learned_constant_map():
    decoder = StyleImageDecoder(5, SHAPE, **SMALL)
    assert torch.equal(decoder.start, torch.full((8, 4, 4), 0.1))
    decoder(torch.randn(3, 5)).square().sum().backward()
    assert decoder.start.grad.abs().sum() > 0


def test_plain_decoder_spreads_the_code_over_a_map():
    decoder = ImageDecoder(5, SHAPE, **SMALL)
    z = torch.randn(2, 5)
    x = z
    for layer in decoder.dense[::2]:
        x = layer(x).relu()
    assert torch.equal(decoder(z), decoder.head(decoder.convolutions(x.view(2, 8, 4, 4))))
    assert decoder.head.kernel_size == (1, 1)


@pytest.mark.parametrize("decoder", [StyleImageDecoder, ImageDecoder])
def test_transposed_convolutions_start_by_their_true_fan_in(decoder):
    layers = [m for m in decoder(5, SHAPE, **SMALL).modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels, *m.kernel_size, *m.stride) for m in layers] == [
        (8, 8, 3, 3, 1, 1),
        (8, 8, 3, 3, 1, 1),
        (8, 8, 4, 4, 2, 2),
        (8, 4, 3, 3, 1, 1),
        (4, 4, 3, 3, 1, 1),
        (4, 4, 4, 4, 2, 2),
    ]
    for layer in layers:
        limit = (layer.in_channels * layer.kernel_size[0] ** 2) ** -0.5
        assert 0.9 * limit < layer.weight.abs().max() <= limit
        assert layer.bias is None


def test_samples_do_not_mix():
    encoder, decoder = ImageEncoder(SHAPE, 5, **SMALL), StyleImageDecoder(5, SHAPE, **SMALL)
    images = torch.rand(4, *SHAPE)
    together = decoder(encoder(images))
    alone = torch.cat([decoder(encoder(image[None])) for image in images])
    assert torch.allclose(together, alone, atol=1e-5)


def test_dense_networks():
    encoder, decoder = DenseEncoder((2, 3), 4, widths=(8, 8)), DenseDecoder(4, (2, 3), widths=(8, 8))
    x = torch.randn(5, 2, 3)
    hidden = x.flatten(1)
    for linear, norm in [(encoder.dense[0], encoder.dense[1]), (encoder.dense[3], encoder.dense[4])]:
        hidden = norm(linear(hidden)).relu()
    assert torch.equal(encoder(x), encoder.head(hidden))
    assert decoder(encoder(x)).shape == (5, 2, 3)


def test_critic_shares_the_trunk():
    critic = CriticEncoder(ImageEncoder(SHAPE, 5, **SMALL))
    images = torch.rand(3, *SHAPE)
    outputs, value = critic(images)
    assert torch.equal(outputs, critic.encoder(images))
    assert torch.equal(value, critic.value(images))
    assert value.shape == (3,)
    losses.gradient_penalty(critic.value, images, torch.rand(3, *SHAPE)).backward()
    assert critic.encoder.convolutions[0].weight.grad.abs().sum() > 0  # the second derivative passes instance norm
    assert critic.encoder.head.weight.grad is None


def test_gaussian_latent_draws_what_it_says():
    latent = GaussianLatent(2)
    assert latent.num_inputs == 4
    mean, std = latent(torch.tensor([[1.0, -1.0, 0.0, 3.0]]).expand(20_000, 4))
    assert torch.allclose(std[0], torch.log(1 + torch.tensor([0.0, 3.0]).exp()))
    z = latent.sample(mean, std, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(z.mean(0), mean[0], atol=0.1)
    assert torch.allclose(z.std(0), std[0], rtol=0.05)


def test_decay_moves_kernels_only_when_gradients_are_zero():
    """Two AdamW groups: decoupled decay scales kernels by 1 - lr * decay, biases and values stay bit for bit."""
    model = nn.ModuleDict(
        {
            "encoder": ImageEncoder(SHAPE, 5, **SMALL),
            "quantizer": LatentQuantizer(5, 4),
            "decoder": StyleImageDecoder(5, SHAPE, **SMALL),
        }
    )
    exempt = {name for name, _ in model.named_parameters() if name.endswith(".bias") or name == "quantizer.values"}
    decayed = [p for name, p in model.named_parameters() if name not in exempt]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for name, p in model.named_parameters() if name in exempt], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        expected = before[name] if name in exempt else before[name] * (1 - 1e-3 * 0.1)
        assert torch.equal(p, expected), name


def test_reconstruction_loss_reaches_everything_but_the_values():
    encoder, quantizer = ImageEncoder(SHAPE, 5, **SMALL), LatentQuantizer(5, 4)
    decoder = StyleImageDecoder(5, SHAPE, **SMALL)
    images = torch.rand(4, *SHAPE)
    continuous = encoder(images)
    code = quantizer(continuous)
    losses.binary_cross_entropy(decoder(code.z), images).backward(retain_graph=True)
    assert quantizer.values.grad is None
    assert all(p.grad is not None for module in (encoder, decoder) for p in module.parameters())
    encoder.zero_grad()
    losses.quantization(continuous, code.quantized).backward(retain_graph=True)
    assert quantizer.values.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.parameters())
    quantizer.zero_grad()
    losses.commitment(continuous, code.quantized).backward()
    assert quantizer.values.grad is None
    assert encoder.head.weight.grad.abs().sum() > 0


def test_a_quantised_autoencoder_learns():
    """Four images, a code of two latents of two values: it fits exactly, so reconstruction must become nearly exact."""
    images = torch.zeros(4, 1, 8, 8)
    images[1, :, :4], images[2, :, :, :4] = 1, 1
    images[3, :, :4], images[3, :, :, :4] = 1, 1
    shape = {"widths": (8,), "dense_widths": (16,), "convolutions_per_stage": 2}
    encoder, decoder = ImageEncoder((1, 8, 8), 4, **shape), StyleImageDecoder(4, (1, 8, 8), **shape)
    quantizer = LatentQuantizer(4, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *quantizer.parameters(), *decoder.parameters()], lr=5e-3)
    first = None
    for _ in range(150):
        continuous = encoder(images)
        code = quantizer(continuous)
        reconstruction = losses.binary_cross_entropy(decoder(code.z), images)
        loss = reconstruction + 0.01 * losses.quantization(continuous, code.quantized)
        loss = loss + 0.01 * losses.commitment(continuous, code.quantized)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or reconstruction.item()
    assert reconstruction.item() < 0.05 < first
    assert len({tuple(row) for row in code.indices.tolist()}) == 4


@pytest.mark.parametrize(
    "network", [lambda s: ImageEncoder(s, 4), lambda s: StyleImageDecoder(4, s), lambda s: ImageDecoder(4, s)]
)
@pytest.mark.parametrize("shape", [(3, 60, 64), (3, 64, 72), (3, 16, 16)])
def test_sizes_that_cannot_be_halved_are_one_sentence(network, shape):
    with pytest.raises(UserError, match=f"{shape[1]} x {shape[2]} cannot be halved 4 times .* multiples of 16"):
        network(shape)
