"""Features as tokens on a grid."""

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.modules.tokens import common_grid, feature_grid, grid_tokens


@pytest.mark.parametrize("before", [0, 1, 2])
def test_tokens_that_stand_for_no_patch_are_left_out(before):
    patches = torch.randn(2, 16, 5)
    tokens = torch.cat([torch.randn(2, before, 5), patches], 1)
    grid = feature_grid(tokens, (32, 32))
    assert torch.equal(grid, patches.transpose(1, 2).unflatten(2, (4, 4)))
    # And as tokens again they are in the same order.
    assert torch.equal(grid_tokens(grid, (4, 4)), patches)


def test_a_grid_has_the_ratio_of_the_image():
    assert feature_grid(torch.zeros(1, 8, 3), (64, 32)).shape == (1, 3, 4, 2)
    assert feature_grid(torch.zeros(1, 9, 3), (32, 64)).shape == (1, 3, 2, 4)
    assert feature_grid(torch.zeros(1, 21, 3), (8, 8), prefix=5).shape == (1, 3, 4, 4)
    maps = torch.rand(2, 3, 5, 7)
    assert feature_grid(maps) is maps


def test_the_finer_grid_is_pooled_to_the_coarser():
    fine = torch.rand(2, 3, 8, 8)
    assert common_grid(fine, torch.rand(2, 6, 4, 4)) == (4, 4)
    assert common_grid(fine, fine, side=2) == (2, 2)
    mean = grid_tokens(fine, (4, 4))
    torch.testing.assert_close(mean[:, 1], fine[:, :, :2, 2:4].mean((2, 3)))
    flat = grid_tokens(fine, (4, 4), "flatten")
    assert flat.shape == (2, 16, 12)
    assert torch.equal(flat[:, 1], fine[:, :, :2, 2:4].flatten(1))
    assert grid_tokens(torch.rand(1, 2, 7, 7), (4, 4)).shape == (1, 16, 2)


def test_what_has_no_grid_is_refused():
    with pytest.raises(UserError, match="not from features of shape"):
        feature_grid(torch.zeros(2, 5))
    with pytest.raises(UserError, match="15 tokens, less 0, 1 or 2 that stand for no patch, fill no grid"):
        feature_grid(torch.zeros(2, 15, 4))
    with pytest.raises(UserError, match="17 tokens, less 5 that stand"):
        feature_grid(torch.zeros(2, 17, 4), prefix=5)
    with pytest.raises(UserError, match="are maps: no token stands before their patches"):
        feature_grid(torch.zeros(2, 5, 4, 4), prefix=1)
    with pytest.raises(UserError, match="4x2 and 2x4 have no common one"):
        common_grid(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 2, 4))
    with pytest.raises(UserError, match="8x8 is finer than the features, 4x4"):
        common_grid(torch.zeros(1, 1, 4, 4), side=8)
    with pytest.raises(UserError, match="7x7 is not cut into 4x4 equal patches"):
        grid_tokens(torch.zeros(1, 1, 7, 7), (4, 4), "flatten")
