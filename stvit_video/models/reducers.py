"""What makes few tokens of a grid of patches: the semantic tokens, and the controls that they must beat.

A reducer takes the grid (B, T, H, W, C) and the first layers after it, as many as its `layers` says, and
returns (B, n, C) and, where it merges, how many patches each token stands for: (B, n), else None. `tokens`
is their number along (t, h, w), where they still lie on a grid, else (n, 1, 1).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .embed import Size3
from .layers import Block
from .semantic import SemanticTokens, make_pool

Reduced = tuple[Tensor, Tensor | None]


class PooledTokens(nn.Module):
    """Pooling over time and space, and no more: where the semantic tokens start."""

    layers = 0

    def __init__(self, tokens: Size3, pool: str):
        super().__init__()
        self.tokens, self.pool = tokens, make_pool(pool)

    def forward(self, x: Tensor, layers: Sequence[Block]) -> Reduced:
        """Grid (B, T, H, W, C) -> (B, t*h*w, C), None."""
        return self.pool(x, self.tokens).flatten(1, 3), None


class RandomTokens(nn.Module):
    """Patches kept at random in training, each clip its own; in scoring a regular grid of them."""

    layers = 0

    def __init__(self, tokens: Size3):
        super().__init__()
        self.places, self.tokens = tokens, (math.prod(tokens), 1, 1)

    def forward(self, x: Tensor, layers: Sequence[Block]) -> Reduced:
        """Grid (B, T, H, W, C) -> (B, n, C), None; in the order of the patches."""
        if not self.training:
            for axis, n in enumerate(self.places, start=1):  # the middle of each of n equal parts
                middle = (2 * torch.arange(n, device=x.device) + 1) * x.shape[axis] // (2 * n)
                x = x.index_select(axis, middle)
            return x.flatten(1, 3), None
        x = x.flatten(1, 3)
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)
        kept = order[:, : self.tokens[0]].sort(1).values
        return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])), None


class MergedTokens(nn.Module):
    """The patches that are most alike, merged between attention and MLP of one layer.

    "Token Merging: Your ViT But Faster" (ICLR 2023), section 3; here at one depth, down to the budget.
    """

    layers = 1

    def __init__(self, tokens: Size3):
        super().__init__()
        self.tokens = (math.prod(tokens), 1, 1)

    def forward(self, x: Tensor, layers: Sequence[Block]) -> Reduced:
        """Grid (B, T, H, W, C) and a layer -> (B, n, C), sizes (B, n)."""
        (layer,) = layers
        return layer(x.flatten(1, 3), merge=partial(merge_similar, n=self.tokens[0]))


def merge_similar(x: Tensor, keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C) with keys (B, N, D) -> n of them (B, n, C), and of how many each is the mean (B, n).

    Bipartite soft matching: every second token looks for the other one with the most similar key (cosine),
    and those with the most similar partner join it. A round leaves half of the tokens or more, so there
    are as many rounds as n asks for; keys are merged as the tokens are. Sizes are float32, no gradient.
    """
    dim, dtype = x.shape[-1], x.dtype
    ones = keys.new_ones(*x.shape[:2], 1)
    x = torch.cat([part.float() for part in (x, keys.detach(), ones)], -1)  # sums; bfloat16 counts to 256
    while x.shape[1] > n:
        gone = min(x.shape[1] - n, x.shape[1] // 2)
        directions = nn.functional.normalize(x[..., dim:-1].detach(), dim=-1)
        similarity, partner = (directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)).max(-1)
        order = similarity.argsort(1, descending=True)
        joining, staying = order[:, :gone], order[:, gone:].sort(1).values
        x, others = x[:, ::2], x[:, 1::2]
        target = partner.gather(1, joining)[..., None].expand(-1, -1, x.shape[-1])
        others = others.scatter_add(1, target, _select(x, joining))
        x = torch.cat([_select(x, staying), others], 1)
    sizes = x[..., -1].detach()
    return (x[..., :dim] / sizes[..., None]).to(dtype), sizes


def _select(x: Tensor, places: Tensor) -> Tensor:
    """(B, N, C), (B, n) -> (B, n, C)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def make_reducer(
    name: str,
    grid: Size3,
    tokens: Size3,
    dim: int,
    *,
    semantic_layers: int,
    pool: str,
    centres: bool,
) -> nn.Module:
    """The reducer of this name, to `tokens` (t, h, w) of the grid's patches, or as many as that is.

    Raises ValueError, naming value and rule.
    """
    if len(tokens) != 3 or not all(1 <= n <= size for n, size in zip(tokens, grid, strict=True)):
        raise ValueError(
            f"semantic_tokens={tokens} (t, h, w) must each lie between 1 and the number of "
            f"patches along its axis, here {grid}"
        )
    if name == "semantic":
        return SemanticTokens(tokens, dim, layers=semantic_layers, pool=pool, centres=centres)
    if name == "pool":
        return PooledTokens(tokens, pool)
    return {"random": RandomTokens, "tome": MergedTokens}[name](tokens)


REDUCERS = ("semantic", "pool", "random", "tome")
