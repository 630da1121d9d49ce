"""Parts between student and teacher: shapes they reach, layers of the papers, initial values, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import masked_generation, variational_information
from stillhouse.modules.projectors import (
    AuxiliaryHead,
    Connector,
    EmbeddingProjector,
    LinearProjector,
    MaskedGenerator,
    Regressor,
    VariationalRegressor,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


SHAPES = [
    ((6, 8, 8), (10, 4, 4)),
    ((6, 4, 4), (10, 8, 8)),
    ((6, 8, 8), (10, 8, 8)),
    ((6, 9, 9), (10, 7, 7)),
    ((6, 4, 4), (10, 14, 14)),
    ((6, 3, 3), (10, 7, 7)),
    ((6, 4, 8), (10, 8, 4)),
    ((6, 1, 1), (10, 1, 1)),
    ((6, 16, 4), (10, 4, 4)),
    ((5, 6), (5, 9)),
    ((6,), (9,)),
]


@pytest.mark.parametrize(("student", "teacher"), SHAPES)
def test_a_regressor_reaches_any_shape_and_depends_on_all_of_its_input(student, teacher):
    regressor = Regressor(student, teacher, relu=False)
    x = torch.randn(3, *student, requires_grad=True)
    out = regressor(x)
    assert out.shape == (3, *teacher)
    (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert (gradient != 0).float().mean() > 0.95
    assert Regressor(student, teacher)(x).min() >= 0


def kinds(regressor: Regressor) -> tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]:
    first = regressor.layers[0]
    return type(first), first.kernel_size, first.stride


def test_a_regressors_layers_are_the_toolkits():
    assert kinds(Regressor((6, 8, 8), (10, 4, 4))) == (nn.Conv2d, (3, 3), (2, 2))
    assert kinds(Regressor((6, 4, 4), (10, 8, 8))) == (nn.ConvTranspose2d, (4, 4), (2, 2))
    assert kinds(Regressor((6, 8, 8), (10, 8, 8))) == (nn.Conv2d, (1, 1), (1, 1))
    assert kinds(Regressor((6, 9, 8), (10, 7, 7))) == (nn.Conv2d, (3, 2), (1, 1))


def test_a_regressor_says_what_it_cannot_lead_to():
    with pytest.raises(UserError, match=r"not from features of shape \(6, 8, 8\) to \(10,\)"):
        Regressor((6, 8, 8), (10,))
    with pytest.raises(UserError, match="the student has 5 and the teacher 7"):
        Regressor((5, 6), (7, 6))


def test_a_connector_has_no_bias_and_starts_like_the_papers():
    connector = Connector(64, 256)
    assert connector.convolution.bias is None
    assert connector.convolution.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert connector(torch.randn(4, 64, 3, 3)).shape == (4, 256, 3, 3)
    assert connector(torch.randn(4, 64)).shape == (4, 256, 1, 1)
    assert connector(torch.randn(4, 9, 64)).shape == (4, 256, 3, 3)


def test_a_variational_regressor_starts_at_its_variance():
    regressor = VariationalRegressor(6, 10)
    mean, variance = regressor(torch.randn(3, 6, 4, 4))
    assert mean.shape == (3, 10, 4, 4)
    torch.testing.assert_close(variance, torch.full((10,), 5.0))
    assert [m.bias for m in regressor.mean if isinstance(m, nn.Conv2d)] == [None] * 3
    assert VariationalRegressor(6, 10, hidden=7).mean[0].out_channels == 7
    with pytest.raises(UserError, match=r"variance \(0.0\) is above eps"):
        VariationalRegressor(6, 10, variance=0.0)


def test_training_the_variance_finds_the_error_of_each_channel():
    regressor, teacher = VariationalRegressor(3, 2), torch.randn(64, 2) * torch.tensor([1.0, 3.0])
    for parameter in regressor.mean.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS([regressor.log_scale], max_iter=60)

    def closure():
        optimizer.zero_grad()
        mean, variance = regressor(torch.zeros(64, 3))
        loss = variational_information(mean, variance, teacher)
        loss.backward()
        return loss

    optimizer.step(closure)
    _, variance = regressor(torch.zeros(1, 3))
    torch.testing.assert_close(variance.detach(), teacher.square().mean(0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("mask", ["positions", "channels"])
def test_a_masked_generator_masks_whole_positions_or_channels(mask):
    generator = MaskedGenerator(6, 10, ratio=0.4, mask=mask)
    seen = []
    generator.generation[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out = generator(torch.randn(40, 6, 5, 5))
    assert out.shape == (40, 10, 5, 5)
    zero = seen[0] == 0
    along = (1,) if mask == "positions" else (2, 3)
    assert torch.equal(zero.all(along, keepdim=True).expand_as(zero), zero), "a position goes as a whole, or a channel"
    assert zero.float().mean().item() == pytest.approx(0.4, abs=0.06)


def test_a_masks_source_and_a_mask_of_ones_own():
    generator, x = MaskedGenerator(4, 4), torch.randn(2, 4, 3, 3)
    assert isinstance(generator.align, nn.Identity)
    draws = [generator(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    kept = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    assert torch.equal(generator(x, kept=kept), generator.generation(torch.zeros_like(x)))
    assert masked_generation(generator(x), x).isfinite()
    with pytest.raises(UserError, match=r"ratio lies between 0 and 1, not 1\.0"):
        MaskedGenerator(4, 4, ratio=1.0)
    with pytest.raises(UserError, match="masks 'positions' or 'channels', not 'pixels'"):
        MaskedGenerator(4, 4, mask="pixels")


def test_a_linear_projector_of_unit_length():
    x = torch.randn(4, 6, 2, 2)
    assert LinearProjector(24, 8)(x).shape == (4, 8)
    unit = LinearProjector(24, 8, normalize=True)
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert unit(x).dtype == torch.float32


def test_an_embedding_projector_is_norm_dropout_linear():
    projector = EmbeddingProjector(6, 10)
    assert [type(layer) for layer in projector.layers] == [nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert projector.layers[1].p == 0.5
    assert projector.layers[2].bias.count_nonzero() == 0
    assert projector(torch.randn(4, 6)).shape == (4, 10)
    with pytest.raises(UserError, match=r"dropout lies between 0 and 1, not 1\.0"):
        EmbeddingProjector(6, 10, dropout=1.0)


def test_an_auxiliary_head_is_linear_or_the_official_two_layers():
    assert [type(layer) for layer in AuxiliaryHead(6, 10).layers] == [nn.Linear]
    head = AuxiliaryHead(6, 10, nonlinear=True)
    assert [type(layer) for layer in head.layers] == [nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert (head.layers[0].out_features, head.layers[1].p) == (200, 0.1)
    assert head(torch.randn(4, 6)).shape == (4, 10)
