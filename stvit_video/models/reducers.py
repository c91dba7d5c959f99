"""What makes few tokens of many: the semantic tokens, and the controls that they must beat.

A reducer is made from the grid of patches and the width, and its sizes are its keyword arguments. It is
called with the tokens, the next blocks, `layers` of them, which it uses up, and the clip; it returns tokens
that say which patches each stands for. It takes tokens at any depth, reduced or padded before. A new one
is a class, its line in `REDUCERS` and its name in `Sizes.reducer`.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .embed import Size3
from .layers import Block
from .merging import merge
from .semantic import SemanticTokens, check_fits, make_pool
from .tokens import Tokens, regions, select


class Reducer(Protocol):
    """layers: how many blocks it uses up; tokens: how many (t, h, w), where they still lie on a grid;
    merges: whether it joins the tokens that there are, or (default) makes new ones of the whole grid."""

    layers: int
    tokens: Size3 | None
    merges: bool

    def __call__(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens: ...


class PooledTokens(nn.Module):
    """Pooling over time and space, and no more: where the semantic tokens start."""

    layers = 0

    def __init__(self, grid: Size3, dim: int, *, semantic_tokens: Size3, pool: str = "max"):
        super().__init__()
        self.tokens, self.pool = check_fits(semantic_tokens, grid), make_pool(pool)
        self.register_buffer("token", regions(grid, self.tokens), persistent=False)

    def forward(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens:
        """Any tokens -> (B, t*h*w, C)."""
        x = self.pool(tokens.to_grid(), self.tokens).flatten(1, 3)
        return Tokens(x, tokens.grid, self.token, class_token=tokens.class_token)


class RandomTokens(nn.Module):
    """Patches kept at random: in training others of each clip, in scoring the same draw for all clips.

    What is not kept is stood for by the nearest patch that is.
    """

    layers, tokens = 0, None

    def __init__(self, grid: Size3, dim: int, *, semantic_tokens: Size3):
        super().__init__()
        self.number = math.prod(check_fits(semantic_tokens, grid))
        drawn = np.random.default_rng(0).permutation(math.prod(grid))[: self.number]
        self.register_buffer("drawn", torch.tensor(sorted(drawn)), persistent=False)

    def forward(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens:
        """Any tokens -> (B, n, C), in the order of the patches."""
        x, kept = tokens.to_grid().flatten(1, 3), self.drawn[None]
        if self.training:
            order = torch.rand(x.shape[:2], device=x.device).argsort(1)
            kept = order[:, : self.number].sort(1).values
        return Tokens(
            select(x, kept), tokens.grid, _nearest(kept, tokens.grid), class_token=tokens.class_token
        )


def _nearest(kept: Tensor, grid: Size3) -> Tensor:
    """Kept patches (B, n) -> for every patch (B, P) which of them is nearest on the grid, in patches."""
    places = torch.cartesian_prod(*(torch.arange(size, device=kept.device) for size in grid)).int()
    apart = sum((axis[:, None] - axis[kept][:, None]) ** 2 for axis in places.unbind(1))  # (B, P, n)
    return apart.argmin(-1)


class MergedTokens(nn.Module):
    """The tokens that are most alike, merged between attention and MLP of one layer.

    "Token Merging: Your ViT But Faster" (ICLR 2023), section 3.

    semantic_tokens: merged at one depth, in rounds, down to as many as this.
    tome_r: the paper's schedule instead: so many fewer, at most half, in each layer that it is put at.
    proportional: from the next layer on, a token is asked as often as it has patches in it (equation 1).
    """

    layers, tokens, merges = 1, None, True

    def __init__(
        self,
        grid: Size3,
        dim: int,
        *,
        semantic_tokens: Size3 | None = None,
        tome_r: int | None = None,
        proportional: bool = True,
    ):
        super().__init__()
        self.budget = None if tome_r else math.prod(check_fits(semantic_tokens, grid))
        self.tome_r, self.proportional = tome_r, proportional

    def forward(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens:
        """Any tokens (B, N, C) and a layer -> (B, n, C)."""
        (layer,) = layers
        x, keys = layer.attend(tokens.sequence(), tokens.bias())
        keys = keys[:, -tokens.x.shape[1] :]
        tokens = merge(
            tokens.with_sequence(x), keys, self.budget, r=self.tome_r, proportional=self.proportional
        )
        return tokens.with_sequence(layer.transform(tokens.sequence()))


REDUCERS = {
    "semantic": SemanticTokens,
    "pool": PooledTokens,
    "random": RandomTokens,
    "tome": MergedTokens,
}
