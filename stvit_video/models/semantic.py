"""Semantic tokens: a few cluster centres, pooled from a grid of patch tokens and recovered by attention.

"Making Vision Transformers Efficient from A Token Sparsification View" (CVPR 2023), section 3; the
pooling over time and space is this project's extension to video.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embed import Size3
from .layers import Block

POOLS = {"max": F.adaptive_max_pool3d, "avg": F.adaptive_avg_pool3d}


class SemanticTokens(nn.Module):
    """Condense a grid (B, T, H, W, C) into (B, t, h, w, C) with the layers it is handed.

    P = pooled X;  S1 = layer(query=P, context=X);  S2 = layer(query=S1 + G, context=[S1, X]); further
    layers ask [S, X] too. The layers belong to the backbone and stand in its ordinary places, so that a
    dense checkpoint loads into them by name; only `centres` (G) is new.

    tokens: how many (t, h, w); pool: "max" or "avg"; centres: learn G, one vector per semantic token.
    """

    def __init__(self, grid: Size3, tokens: Size3, dim: int, *, pool: str = "max", centres=True):
        super().__init__()
        if len(tokens) != 3 or not all(1 <= n <= size for n, size in zip(tokens, grid, strict=True)):
            raise ValueError(
                f"semantic_tokens={tokens} (t, h, w) must each lie between 1 and the number of "
                f"patches along its axis, here {grid}"
            )
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r} is none of {sorted(POOLS)}")
        self.tokens, self.pool = tokens, POOLS[pool]
        self.centres = nn.Parameter(torch.zeros(1, *tokens, dim)) if centres else None

    def forward(self, x: Tensor, layers: Sequence[Block]) -> Tensor:
        """Grid (B, T, H, W, C) and the semantic layers -> semantic tokens (B, t, h, w, C)."""
        return layers[-1](*self._last_question(x, layers)).unflatten(1, self.tokens)

    def maps(self, x: Tensor, layers: Sequence[Block]) -> Tensor:
        """How much each semantic token took from each patch: (B, t*h*w, T, H, W), each summing to 1.

        The last layer's attention, averaged over heads, restricted to the patches and renormalised.
        """
        grid = x.shape[1:4]
        weights = layers[-1].attention_map(*self._last_question(x, layers)).mean(1)
        weights = weights[..., -grid.numel() :]
        return (weights / weights.sum(-1, keepdim=True)).unflatten(-1, grid)

    def _last_question(self, x: Tensor, layers: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """What the last semantic layer asks (B, t*h*w, C), and whom (B, M, C)."""
        query = self.pool(x.movedim(-1, 1), self.tokens).flatten(2).transpose(1, 2)
        x = context = x.flatten(1, 3)
        for i, layer in enumerate(layers[:-1]):
            tokens = query = layer(query, context)
            if i == 0 and self.centres is not None:
                query = tokens + self.centres.flatten(1, 3)
            context = torch.cat([tokens, x], 1)
        return query, context
