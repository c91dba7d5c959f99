"""What flows between layers: tokens, and which patches of the grid each of them stands for."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .embed import Size3

PADDING = -3e4  # added to scores: leaves a share of 0, yet stays finite in float16, times log2(e) too
LENGTH_GROUPS = 8  # of clips with about as many tokens: at most an eighth of what is computed is padding


class Tokens(NamedTuple):
    """Tokens of a batch of clips, made of the same grid of patches. P = t * h * w patches, N tokens.

    x: (B, N, C); real tokens first, padding after them.
    grid: (t, h, w), of the patches.
    token: (B or 1, P), the token that stands for each patch, -1: it has left; None: token i is patch i.
    weight: (B or 1, N) float32, how much each counts in a mean over tokens; 0: padding; None: all alike.
    asked: (B or 1, N) float32, as how many tokens each is asked; 0: padding, never; None: all as one.
    left: (B, P, C), the features that patches had when their token left, zero elsewhere; None: none has.
    class_token: (B, 1, C), which stands for no patch and counts among the N nowhere; None: there is none.
    """

    x: Tensor
    grid: Size3
    token: Tensor | None = None
    weight: Tensor | None = None
    asked: Tensor | None = None
    left: Tensor | None = None
    class_token: Tensor | None = None

    @classmethod
    def of(cls, grid: Tensor) -> "Tokens":
        """Grid (B, t, h, w, C) -> a token for each patch."""
        return cls(grid.flatten(1, 3), tuple(grid.shape[1:4]))

    def places(self) -> Tensor:
        """`token` written out: (B, P)."""
        token = (
            torch.arange(self.x.shape[1], device=self.x.device)[None] if self.token is None else self.token
        )
        return token.expand(self.x.shape[0], -1)

    def sizes(self) -> Tensor:
        """How many patches each token stands for: (B, N) float32; 0: padding."""
        token = self.places()
        sizes = torch.zeros(self.x.shape[:2], device=token.device)
        return sizes.scatter_add(1, token.clamp(min=0), (token >= 0).float())

    def count(self) -> Tensor:
        """How many tokens each clip has, without padding: (B)."""
        return (self.sizes() > 0).sum(1)

    def alike(self) -> list[tuple[Tensor, int]]:
        """Clips with about as many tokens, to be computed together with little padding: of each group which
        clips these are, and the length of the longest `sequence`. Empty: no clip is padded."""
        if self.asked is None or len(self.asked) == 1 or self.asked.is_meta:
            return []
        number = (self.asked > 0).sum(1).clamp(min=1)
        level = (number * LENGTH_GROUPS - 1) // self.asked.shape[1]
        groups = [(level == one).nonzero()[:, 0] for one in level.unique()]
        first = int(self.class_token is not None)
        return [(clips, first + int(number[clips].max())) for clips in groups]

    def sequence(self) -> Tensor:
        """What attends to itself: the class token, where there is one, then x. (B, N or 1 + N, C)."""
        return self.x if self.class_token is None else torch.cat([self.class_token, self.x], 1)

    def with_sequence(self, x: Tensor) -> "Tokens":
        """These features instead of those of `sequence`."""
        if self.class_token is None:
            return self._replace(x=x)
        return self._replace(class_token=x[:, :1], x=x[:, 1:])

    def bias(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """What is added to attention's scores: (B or 1, 1, 1, N or 1 + N), as in `sequence`; by default of
        the dtype of x.

        None where all tokens are asked alike. A clip of padding alone gives no NaN.
        """
        if self.asked is None:
            return None
        bias = self.asked.clamp(min=1).log().to(dtype or self.x.dtype)
        bias = bias.masked_fill(self.asked == 0, PADDING)[:, None, None]
        return bias if self.class_token is None else F.pad(bias, (1, 0))

    def to_grid(self) -> Tensor:
        """(B, t, h, w, C): every patch with its token's features, or those that it left with."""
        if self.token is None:
            return self.x.unflatten(1, self.grid)
        patches = select(self.x, self.token.clamp(min=0))
        if self.left is not None:
            patches = torch.where((self.token < 0)[..., None], self.left, patches)
        return patches.unflatten(1, self.grid)

    def share(self, weights: Tensor) -> Tensor:
        """Weights of tokens (B, n, N) -> of their patches (B, n, P), shared out; 0 where it has left."""
        if self.token is None:
            return weights
        part = weights / self.sizes().clamp(min=1)[:, None]
        token = self.places()[:, None].expand(-1, weights.shape[1], -1)
        return part.gather(2, token.clamp(min=0)) * (token >= 0)

    def pooled(self) -> Tensor:
        """(B, C): the class token; without one the mean by weight, a patch that has left counts as one."""
        if self.class_token is not None:
            return self.class_token[:, 0]
        if self.weight is None:
            return self.x.mean(1)
        total = self.weight.sum(1, keepdim=True)
        if self.left is not None:
            total = total + (self.token < 0).sum(1, keepdim=True)
        total = total.clamp(min=1)
        mean = (self.x * (self.weight / total).to(self.x.dtype)[..., None]).sum(1)
        return mean if self.left is None else mean + self.left.sum(1) / total.to(self.x.dtype)

    def leave(self, gone: Tensor) -> "Tokens":
        """gone (B, N) bool -> without these tokens. Their patches keep the features that they have now.

        x becomes as short as the clip that keeps most allows: how many go shows in its shape. Where none
        does, these tokens come back as they are.
        """
        if not gone.is_meta and not gone.any():
            return self
        token, sizes = self.places(), self.sizes()
        kept = ~gone & (sizes > 0)
        number = kept.sum(1, keepdim=True)
        n = gone.shape[1] if gone.is_meta else max(int(number.max()), 1)  # meta: the cost at most
        order = (~kept).int().argsort(dim=1, stable=True)[:, :n]
        real = torch.arange(n, device=gone.device) < number
        place = torch.where(kept, kept.cumsum(1) - 1, -1).gather(1, token.clamp(min=0))
        place = place.masked_fill(token < 0, -1)
        asked = None
        if self.asked is not None or not real.all():
            asked = torch.ones_like(sizes) if self.asked is None else self.asked.expand_as(sizes)
            asked = asked.gather(1, order) * real
        return self._replace(
            x=select(self.x, order),
            token=place,
            weight=sizes.gather(1, order) * real,
            asked=asked,
            left=self.to_grid().flatten(1, 3).masked_fill((place >= 0)[..., None], 0),
        )


def batch(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of the same grid, of one or more clips each, as one batch: padded to the largest number."""
    n, left = max(part.x.shape[1] for part in parts), None
    if any(part.left is not None for part in parts):  # then means are over patches
        parts = [p if p.weight is not None else p._replace(weight=p.sizes()) for p in parts]
        grids = [p.to_grid().flatten(1, 3) for p in parts]
        left = torch.cat(
            [
                grid.masked_fill((p.places() >= 0)[..., None], 0)
                for p, grid in zip(parts, grids, strict=True)
            ]
        )

    def rows(key: str) -> Tensor | None:
        """A field (B, n) of all parts, 0 in padding; None: all tokens are alike."""
        if all(getattr(p, key) is None and p.x.shape[1] == n for p in parts):
            return None
        ones = [torch.ones_like(p.x[..., 0], dtype=torch.float32) for p in parts]
        values = [getattr(p, key) for p in parts]
        values = [o if v is None else v.expand_as(o) for v, o in zip(values, ones, strict=True)]
        return torch.cat([F.pad(value, (0, n - value.shape[1])) for value in values])

    return Tokens(
        torch.cat([F.pad(p.x, (0, 0, 0, n - p.x.shape[1])) for p in parts]),
        parts[0].grid,
        token=torch.cat([p.places() for p in parts]),
        weight=rows("weight"),
        asked=rows("asked"),
        left=left,
        class_token=None if parts[0].class_token is None else torch.cat([p.class_token for p in parts]),
    )


def regions(grid: Size3, tokens: Size3) -> Tensor:
    """Which of `tokens` (t, h, w) each patch of a grid belongs to, (1, P): place p of T to floor(p t / T)
    along each axis."""
    axes = [torch.arange(size) * n // size for size, n in zip(grid, tokens, strict=True)]
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    return ((t * tokens[1] + h) * tokens[2] + w).view(1, -1)


def select(x: Tensor, places: Tensor) -> Tensor:
    """(B, N, C), (B or 1, n) -> (B, n, C)."""
    return x.gather(1, places[..., None].expand(x.shape[0], -1, x.shape[-1]))


def highest_first(x: Tensor) -> Tensor:
    """(B, n) -> the order of the values, the highest first: (B, n). Equal ones keep theirs."""
    return x.argsort(dim=1, descending=True, stable=True)


def in_float32(x: Tensor) -> AbstractContextManager:
    """Where products of float32 stay float32, whatever autocast is for them."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
