"""What makes few tokens of many: the semantic tokens, and the controls that they must beat.

A reducer is made from the grid of patches and the width, and its sizes are its keyword arguments. It is
called with the tokens, the next blocks, `layers` of them, which it uses up, and the clip; it returns tokens
that say which patches each stands for. It takes tokens at any depth, reduced or padded before. A new one
is a class and its line in `REDUCERS`.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .embed import Size3
from .layers import Block
from .semantic import SemanticTokens, check_fits, make_pool
from .tokens import Tokens, regions, select


class Reducer(Protocol):
    """layers: how many blocks it uses up; tokens: how many (t, h, w), where they still lie on a grid."""

    layers: int
    tokens: Size3 | None

    def __call__(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens: ...


class PooledTokens(nn.Module):
    """Pooling over time and space, and no more: where the semantic tokens start."""

    layers = 0

    def __init__(self, grid: Size3, dim: int, *, semantic_tokens: Size3, pool: str = "max"):
        super().__init__()
        self.tokens, self.pool = check_fits(semantic_tokens, grid), make_pool(pool)
        token, count = regions(grid, self.tokens)
        self.register_buffer("token", token, persistent=False)
        self.register_buffer("count", count, persistent=False)

    def forward(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens:
        """Any tokens -> (B, t*h*w, C)."""
        x = self.pool(tokens.to_grid(), self.tokens).flatten(1, 3)
        return Tokens(x, tokens.grid, self.token, self.count.float())


class RandomTokens(nn.Module):
    """Patches kept at random in training, each clip its own; in scoring a regular grid of them.

    What is not kept is stood for by the nearest patch that is.
    """

    layers, tokens = 0, None

    def __init__(self, grid: Size3, dim: int, *, semantic_tokens: Size3):
        super().__init__()
        self.places = check_fits(semantic_tokens, grid)

    def forward(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens:
        """Any tokens -> (B, n, C), in the order of the patches."""
        x = tokens.to_grid().flatten(1, 3)
        if self.training:
            order = torch.rand(x.shape[:2], device=x.device).argsort(1)
            kept = order[:, : math.prod(self.places)].sort(1).values
        else:  # the middle of each of n equal parts of an axis
            middles = [
                (2 * torch.arange(n, device=x.device) + 1) * size // (2 * n)
                for n, size in zip(self.places, tokens.grid, strict=True)
            ]
            t, h, w = torch.meshgrid(*middles, indexing="ij")
            kept = ((t * tokens.grid[1] + h) * tokens.grid[2] + w).view(1, -1)
        token = _nearest(kept, tokens.grid)
        ones = torch.ones(token.shape, device=x.device)
        size = torch.zeros(kept.shape, device=x.device).scatter_add(1, token, ones)
        return Tokens(select(x, kept), tokens.grid, token, size)


def _nearest(kept: Tensor, grid: Size3) -> Tensor:
    """Kept patches (B, n) -> for every patch (B, P) which of them is nearest on the grid, in patches."""
    axes = torch.meshgrid(*(torch.arange(size, device=kept.device) for size in grid), indexing="ij")
    apart = 0
    for axis in (axis.flatten().int() for axis in axes):
        apart = apart + (axis[:, None] - axis[kept][:, None]) ** 2  # (B, P, n)
    return apart.argmin(-1)


class MergedTokens(nn.Module):
    """The tokens that are most alike, merged between attention and MLP of one layer.

    "Token Merging: Your ViT But Faster" (ICLR 2023), section 3.

    semantic_tokens: merged at one depth, in rounds, down to as many as this.
    tome_r: the paper's schedule instead: so many fewer, at most half, in each layer that it is put at.
    proportional: from the next layer on, a token is asked as often as it has patches in it (equation 1).
    """

    layers, tokens = 1, None

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
        x, keys = layer.attend(tokens.x, tokens.bias())
        goal = self.budget if self.tome_r is None else max(x.shape[1] - self.tome_r, -(-x.shape[1] // 2))
        if tokens.padded:
            merged = merge_padded(x, keys, tokens.size, goal, self.tome_r)
        else:
            merged = merge_similar(x, keys, goal, tokens.size)
        x, size, joined = merged
        token = joined
        if tokens.token is not None:
            token = joined.gather(1, tokens.token.clamp(min=0).expand(len(x), -1))
            token = token.masked_fill(tokens.token < 0, -1)
        return tokens._replace(
            x=layer.transform(x), token=token, size=size, merged=True, proportional=self.proportional
        )


Merged = tuple[Tensor, Tensor, Tensor]


def merge_similar(x: Tensor, keys: Tensor, n: int, size: Tensor | None = None) -> Merged:
    """Tokens (B, N, C) with keys (B, N, D) -> n of them (B, n, C), their sizes (B, n), and which of these
    every token has become or joined (B, N).

    Bipartite soft matching: every second token looks for the other one with the most similar key (cosine),
    and those with the most similar partner join it. A round leaves half of the tokens or more, so there
    are as many rounds as n asks for; keys are merged as the tokens are. Sizes (B or 1, N; None: 1 each) are
    float32, no gradient.
    """
    dim, dtype = x.shape[-1], x.dtype
    x, joined = _sums(x, keys, size), _range(x)
    while x.shape[1] > n:
        gone = min(x.shape[1] - n, x.shape[1] // 2)
        similarity, partner = _most_similar(x, dim)
        order = similarity.argsort(1, descending=True)
        joining, staying = order[:, :gone], order[:, gone:].sort(1).values
        x, others = x[:, ::2], x[:, 1::2]
        target = partner.gather(1, joining)
        place = torch.empty(
            joined.shape[0], x.shape[1] + others.shape[1], dtype=torch.long, device=x.device
        )
        kept = staying.shape[1]
        place[:, 1::2] = torch.arange(kept, kept + others.shape[1], device=x.device)
        place[:, ::2] = (
            torch.zeros_like(order)
            .scatter(1, joining, target + kept)
            .scatter(1, staying, torch.arange(kept, device=x.device).expand_as(staying))
        )
        joined = place.gather(1, joined)
        others = others.scatter_add(1, target[..., None].expand(-1, -1, x.shape[-1]), select(x, joining))
        x = torch.cat([select(x, staying), others], 1)
    sizes = x[..., -1].detach()
    return (x[..., :dim] / sizes[..., None]).to(dtype), sizes, joined


def merge_padded(x: Tensor, keys: Tensor, size: Tensor, n: int, r: int | None = None) -> Merged:
    """`merge_similar` of a padded batch: every clip becomes what it would alone, and is padded to n.

    r: tokens that a clip loses at most; None: it loses those beyond n.
    """
    dim, dtype = x.shape[-1], x.dtype
    x, joined = _sums(x, keys, size), _range(x)
    number = (size > 0).sum(1, keepdim=True).expand(len(x), 1)
    goal = n if r is None else number - (number // 2).clamp(max=r)
    while x.shape[1] > n:
        width = max(n, -(-x.shape[1] // 2))
        similarity, partner = _most_similar(x, dim, number)
        gone = torch.minimum((number - goal).clamp(min=0), number // 2)
        rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(1)  # padding comes last
        stays = rank >= gone
        others = torch.arange(x.shape[1] // 2, device=x.device)
        kept = (number + 1) // 2 - gone
        place = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
        place[:, ::2] = torch.where(stays, stays.cumsum(1) - 1, partner + kept)
        place[:, 1::2] = kept + others
        place = torch.where(gone > 0, place, _range(x))  # a clip that is done keeps its order
        place = place.clamp(max=width - 1)  # of padding, which adds nothing
        number = number - gone
        x = x.new_zeros(len(x), width, x.shape[-1]).scatter_add(1, place[..., None].expand_as(x), x)
        joined = place.gather(1, joined)
    sizes = x[..., -1].detach()
    return (x[..., :dim] / sizes.clamp(min=1)[..., None]).to(dtype), sizes, joined


def _sums(x: Tensor, keys: Tensor, size: Tensor | None) -> Tensor:
    """Tokens, keys and size as sums over the patches: (B, N, C + D + 1), as bfloat16 counts to 256 only."""
    ones = keys.new_ones(*x.shape[:2], 1)
    sums = torch.cat([part.float() for part in (x, keys.detach(), ones)], -1)
    return sums if size is None else sums * size[..., None]


def _range(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def _most_similar(x: Tensor, dim: int, number: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of every second token the similarity to the other most like it, and which (B, N / 2) each.

    number: of real tokens in each clip (B, 1), where others are padding.
    """
    directions = nn.functional.normalize(x[..., dim:-1].detach(), dim=-1)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    if number is not None:
        padding = torch.arange(x.shape[1], device=x.device) >= number
        similarity = similarity.masked_fill(padding[:, ::2, None] | padding[:, None, 1::2], -torch.inf)
    return similarity.max(-1)


REDUCERS = {
    "semantic": SemanticTokens,
    "pool": PooledTokens,
    "random": RandomTokens,
    "tome": MergedTokens,
}
