"""What flows between layers: tokens, and which patches of the grid each of them stands for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .embed import Size3

PADDING = -3e4  # added to scores: leaves a share of 0, yet stays finite in float16, times log2(e) too


class Tokens(NamedTuple):
    """Tokens of a batch of clips, made of the same grid of patches. P = t * h * w patches, N tokens.

    x: (B, N, C); real tokens first, padding after them.
    grid: (t, h, w), of the patches.
    token: (B or 1, P), the token that stands for each patch, -1: it has left; None: token i is patch i.
    size: (B or 1, N) float32, patches in each token, 0: padding; None: one each.
    left: (B, P, C), the features that patches had when their token left, zero elsewhere; None: none has.
    padded: whether there may be padding, which nobody asks and no mean counts.
    merged: whether tokens are means over their patches, so that the mean over tokens goes by size.
    proportional: whether a token is asked as often as it has patches in it (ToMe, equation 1).
    """

    x: Tensor
    grid: Size3
    token: Tensor | None = None
    size: Tensor | None = None
    left: Tensor | None = None
    padded: bool = False
    merged: bool = False
    proportional: bool = False

    @classmethod
    def of(cls, grid: Tensor) -> "Tokens":
        """Grid (B, t, h, w, C) -> a token for each patch."""
        return cls(grid.flatten(1, 3), tuple(grid.shape[1:4]))

    def bias(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """What is added to attention's scores: (B or 1, 1, 1, N), by default of the dtype of x.

        None where all tokens are asked alike. A clip of padding alone gives no NaN.
        """
        if self.size is None or not (self.padded or self.proportional):
            return None
        dtype = dtype or self.x.dtype
        size = self.size.clamp(min=1) if self.padded else self.size
        bias = (size.log() if self.proportional else torch.zeros_like(size)).to(dtype)
        if self.padded:
            bias = bias.masked_fill(self.size == 0, PADDING)
        return bias[:, None, None]

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
        part = weights / self.size.clamp(min=1)[:, None]
        token = self.token.expand(len(weights), -1)[:, None].expand(-1, weights.shape[1], -1)
        return part.gather(2, token.clamp(min=0)) * (token >= 0)

    def pooled(self) -> Tensor:
        """(B, C): the mean over tokens; over patches, where they are merged or have left."""
        if not self.merged and not self.padded and self.left is None:
            return self.x.mean(1)
        by_patch = self.merged or self.left is not None
        count = self.size if by_patch else (self.size > 0).float()
        total = count.sum(1, keepdim=True)
        if self.left is not None:
            total = total + (self.token < 0).sum(1, keepdim=True)
        share = (count / total.clamp(min=1)).to(self.x.dtype)
        mean = (self.x * share[..., None]).sum(1)
        return mean if self.left is None else mean + self.left.sum(1) / total.clamp(min=1).to(self.x.dtype)

    def leave(self, gone: Tensor) -> "Tokens":
        """gone (B, N) bool -> without these tokens. Their patches keep the features that they have now.

        x becomes as short as the clip that keeps most allows: how many go shows in its shape.
        """
        everyone = self.explicit()
        kept = ~gone & (everyone.size > 0)
        number = kept.sum(1, keepdim=True)
        n = max(int(number.max()), 1)
        order = (~kept).int().argsort(dim=1, stable=True)[:, :n]
        token = everyone.token
        place = torch.where(kept, kept.cumsum(1) - 1, -1).gather(1, token.clamp(min=0))
        place = place.masked_fill(token < 0, -1)
        features = self.to_grid().flatten(1, 3)
        return everyone._replace(
            x=select(self.x, order),
            token=place,
            size=everyone.size.gather(1, order) * (torch.arange(n, device=gone.device) < number),
            left=features.masked_fill((place >= 0)[..., None], 0),
            padded=True,
        )

    def explicit(self) -> "Tokens":
        """The same with `token` (B, P) and `size` (B, N) written out."""
        b, n, _ = self.x.shape
        token = torch.arange(n, device=self.x.device)[None] if self.token is None else self.token
        size = self.x.new_ones(1, n, dtype=torch.float32) if self.size is None else self.size
        return self._replace(token=token.expand(b, -1), size=size.expand(b, -1))


def batch(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of the same grid, of one or more clips each, as one batch: padded to the largest number."""
    parts = [part.explicit() for part in parts]
    n = max(part.x.shape[1] for part in parts)
    left = None
    if any(part.left is not None for part in parts):
        left = torch.cat(
            [torch.zeros_like(p.to_grid().flatten(1, 3)) if p.left is None else p.left for p in parts]
        )
    return parts[0]._replace(
        x=torch.cat([F.pad(part.x, (0, 0, 0, n - part.x.shape[1])) for part in parts]),
        token=torch.cat([part.token for part in parts]),
        size=torch.cat([F.pad(part.size, (0, n - part.size.shape[1])) for part in parts]),
        left=left,
        padded=any(part.padded or part.x.shape[1] < n for part in parts),
    )


def regions(grid: Size3, tokens: Size3) -> tuple[Tensor, Tensor]:
    """Which of `tokens` (t, h, w) each patch of a grid belongs to, (1, P): place p of T to floor(p t / T)
    along each axis; and how many patches each has, (1, n), whole numbers."""
    axes = [torch.arange(size) * n // size for size, n in zip(grid, tokens, strict=True)]
    counts = [(axis == torch.arange(n)[:, None]).sum(1) for axis, n in zip(axes, tokens, strict=True)]
    t, h, w = torch.meshgrid(*axes, indexing="ij")
    size = counts[0][:, None, None] * counts[1][:, None] * counts[2]
    return ((t * tokens[1] + h) * tokens[2] + w).view(1, -1), size.view(1, -1)


def select(x: Tensor, places: Tensor) -> Tensor:
    """(B, N, C), (B or 1, n) -> (B, n, C)."""
    return x.gather(1, places[..., None].expand(len(x), -1, x.shape[-1]))
