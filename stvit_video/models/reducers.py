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
from .tokens import Tokens, flat_index, regions, select


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
        self.register_buffer("token", regions(grid, self.tokens), persistent=False)

    def forward(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens:
        """Any tokens -> (B, t*h*w, C)."""
        x = self.pool(tokens.to_grid(), self.tokens).flatten(1, 3)
        return Tokens(x, tokens.grid, self.token, class_token=tokens.class_token)


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
            kept = flat_index(middles, tokens.grid)
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
        x, keys = layer.attend(tokens.sequence(), tokens.bias())
        tokens = tokens.with_sequence(x)
        size = None if tokens.token is None else tokens.sizes()
        keys = keys[:, -tokens.x.shape[1] :]
        x, weight, joined = merge_similar(tokens.x, keys, self.budget, size, r=self.tome_r)
        token = joined
        if tokens.token is not None:
            token = joined.gather(1, tokens.places().clamp(min=0)).masked_fill(tokens.token < 0, -1)
        asked = weight if self.proportional else None
        if asked is None and tokens.asked is not None:
            asked = (weight > 0).float()  # there may be padding
        tokens = tokens._replace(x=x, token=token, weight=weight, asked=asked)
        return tokens.with_sequence(layer.transform(tokens.sequence()))


def merge_similar(
    x: Tensor, keys: Tensor, n: int | None, size: Tensor | None = None, *, r: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N, C) with keys (B, N, D) -> n of them (B, n, C), their sizes (B, n), and which of these
    every token has become or joined (B, N).

    Bipartite soft matching: every second token looks for the other one with the most similar key (cosine),
    and those with the most similar partner join it. A round leaves half of the tokens or more, so there
    are as many rounds as n asks for; keys are merged as the tokens are. Sizes (B or 1, N; None: 1 each) are
    float32, no gradient; 0: padding, and every clip becomes what it would alone, padded.

    r: one round that takes so many, at most half; n counts for nothing then.
    """
    dim, dtype = x.shape[-1], x.dtype
    # sums over the patches of tokens, keys and size, in float32: bfloat16 counts to 256 only
    sums = torch.cat([part.float() for part in (x, keys.detach(), keys.new_ones(*x.shape[:2], 1))], -1)
    if size is not None:
        sums = sums * size[..., None]
    joined = index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    number = (sums[..., -1:] > 0).sum(1)  # of real tokens in each clip: (B, 1)
    goal = n if r is None else number - (number // 2).clamp(max=r)
    n = n if r is None else max(x.shape[1] - r, -(-x.shape[1] // 2))
    while sums.shape[1] > n:
        width = max(n, -(-sums.shape[1] // 2))
        index = index[:, : sums.shape[1]]
        similarity, partner = _most_similar(sums[..., dim:-1].detach(), index >= number)
        gone = torch.minimum((number - goal).clamp(min=0), number // 2)
        order = similarity.argsort(1, descending=True)  # padding comes last
        stays = order.argsort(1) >= gone
        place = torch.zeros_like(index)
        place[:, ::2] = torch.where(stays, stays.cumsum(1) - 1, partner + (number + 1) // 2 - gone)
        place[:, 1::2] = (number + 1) // 2 - gone + index[:, : sums.shape[1] // 2]
        place = torch.where(gone > 0, place, index)  # a clip that is done keeps its order
        place = place.clamp(max=width - 1)  # of padding, which adds nothing
        order = torch.cat([index[:, 1::2], 2 * order], 1)  # the most similar are added first
        sums = sums.new_zeros(x.shape[0], width, sums.shape[-1]).scatter_add(
            1, place.gather(1, order)[..., None].expand(-1, -1, sums.shape[-1]), select(sums, order)
        )
        number, joined = number - gone, place.gather(1, joined)
    size = sums[..., -1].detach()
    return (sums[..., :dim] / size.clamp(min=1)[..., None]).to(dtype), size, joined


def _most_similar(keys: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (B, N, D), padding (B, N) -> of every second token the similarity to the other most like it,
    -inf where either is padding, and which (B, N / 2)."""
    keys = nn.functional.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    return similarity.masked_fill_(padding[:, ::2, None] | padding[:, None, 1::2], -torch.inf).max(-1)


REDUCERS = {
    "semantic": SemanticTokens,
    "pool": PooledTokens,
    "random": RandomTokens,
    "tome": MergedTokens,
}
