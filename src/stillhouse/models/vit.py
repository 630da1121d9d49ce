"""A vision transformer with every projection a module of its own, so that each can be tapped."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models.spec import NetworkSpec


class _Linear(nn.Linear):
    """A linear layer drawn from a normal of deviation 0.02 cut at two deviations, with zero bias."""

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.bias)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = _Linear(dim, dim)
        self.key = _Linear(dim, dim)
        self.value = _Linear(dim, dim)
        self.output = _Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(x), self.key(x), self.value(x))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = _Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("up", _Linear(dim, hidden))
        self.mlp.add_module("activation", nn.GELU())
        self.mlp.add_module("down", _Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


class ViT(nn.Module):
    """Vision transformer (arXiv 2010.11929) with pre-normalized blocks and learned positions.

    Args:
        image: shape (channels, height, width) of one image.
        outputs: size of the output; 0 returns the features.
        patch: side of a patch in pixels; divides both sides of the image.
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads; divides ``dim``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        dropout: probability of dropping attention weights and the outputs of both halves of a block.
        pooling: features are the class token (``cls``) or the mean of the patch tokens (``mean``, no class token).
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        outputs: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        pooling: Literal["cls", "mean"] = "cls",
    ) -> None:
        super().__init__()
        channels, height, width = image
        tokens = (height // patch) * (width // patch)
        self.patch_embedding = nn.Conv2d(channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim)) if pooling == "cls" else None
        self.position = nn.Parameter(torch.empty(1, tokens + (pooling == "cls"), dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(dim, heads, round(dim * mlp_ratio), dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.classifier = _Linear(dim, outputs) if outputs else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class token and the positions; the submodules draw their own parameters."""
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02, a=-0.04, b=0.04)
        nn.init.trunc_normal_(self.position, std=0.02, a=-0.04, b=0.04)

    def tokens(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """The normalized tokens after the last block; the class token, if there is one, comes first."""
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        normalized: Tensor = self.norm(self.blocks(self.dropout(tokens + self.position)))
        return normalized

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """The class token, or the mean of the tokens."""
        tokens = self.tokens(x)
        return tokens.mean(1) if self.class_token is None else tokens[:, 0]

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.classifier(self.features(x))
        return outputs


class ViTSpec(NetworkSpec):
    """A small vision transformer (by default 6 blocks of width 192, 2.7 million parameters)."""

    kind = "vit"

    patch: int = Field(default=4, ge=1)
    """Side of a patch in pixels; divides both sides of the image."""
    dim: int = Field(default=192, ge=1)
    """Width of a token."""
    depth: int = Field(default=6, ge=1, le=1000)
    """Number of blocks."""
    heads: int = Field(default=3, ge=1)
    """Attention heads; divides 'dim'."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLP over 'dim'."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping attention weights and the outputs of both halves of a block."""
    pooling: Literal["cls", "mean"] = "cls"
    """Features are a class token, or the mean of the patch tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"'heads' ({self.heads}) must divide 'dim' ({self.dim})")
        return self

    def build(self, facts: Facts) -> ViT:
        image = self.image(facts)
        if image[1] % self.patch or image[2] % self.patch:
            raise UserError(
                f"The model 'vit' cuts images into patches of {self.patch} pixels, which must divide their sides; "
                f"these are {image[1]}x{image[2]}."
            )
        return ViT(
            image,
            self.outputs(facts),
            self.patch,
            self.dim,
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.dropout,
            self.pooling,
        )
