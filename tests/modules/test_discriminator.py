"""The GAN head on a denoiser's bottleneck."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.modules.discriminator import BottleneckDiscriminator


def convolutions(head: nn.Module) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(m.kernel_size, m.stride) for m in head.modules() if isinstance(m, nn.Conv2d)]


def test_the_papers_layers_for_its_bottlenecks() -> None:
    head = BottleneckDiscriminator(768, (8, 8))
    assert convolutions(head) == [((4, 4), (2, 2)), ((4, 4), (1, 1)), ((1, 1), (1, 1))]
    assert [m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)] == [32, 32]
    assert head(torch.randn(2, 768, 8, 8)).shape == (2,)
    sdxl = convolutions(BottleneckDiscriminator(64, (32, 32)))
    assert sdxl == [((4, 4), (2, 2))] * 3 + [((4, 4), (1, 1)), ((1, 1), (1, 1))]


def test_equals_the_released_head_with_equal_weights() -> None:
    torch.manual_seed(0)
    head = BottleneckDiscriminator(256, (8, 8))
    released = nn.Sequential(
        nn.Conv2d(256, 256, 4, stride=2, padding=1),
        nn.GroupNorm(32, 256),
        nn.SiLU(),
        nn.Conv2d(256, 256, 4, stride=4),
        nn.GroupNorm(32, 256),
        nn.SiLU(),
        nn.Conv2d(256, 1, 1),
    )
    released.load_state_dict(head.layers.state_dict())
    x = torch.randn(3, 256, 8, 8)
    torch.testing.assert_close(head(x), released(x).squeeze(dim=(1, 2, 3)))


@pytest.mark.parametrize("size", [(), (1, 1), (2, 2), (4, 4), (7, 7), (5, 9), (16, 8)])
@pytest.mark.parametrize("channels", [3, 32, 48, 130])
def test_fits_any_bottleneck_and_reads_it(channels: int, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    head = BottleneckDiscriminator(channels, size)
    x = torch.randn(4, channels, *size)
    logits = head(x)
    assert logits.shape == (4,)
    # A norm with single-value groups would give the same logit to everything.
    assert logits.std() > 1e-3


def test_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"features of shape \(32, 4, 4\), not \(32, 8, 8\)"):
        BottleneckDiscriminator(32, (4, 4))(torch.randn(1, 32, 8, 8))
    with pytest.raises(UserError, match="cannot read 0 channels"):
        BottleneckDiscriminator(0, (4, 4))
