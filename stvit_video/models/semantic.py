"""Semantic tokens: a few cluster centres, pooled from a grid of patch tokens and recovered by attention.

"Making Vision Transformers Efficient from A Token Sparsification View" (CVPR 2023), section 3; the
pooling over time and space is this project's extension to video. On the whole grid (`SemanticTokens`, for
ViT), in windows (`SemanticWindows`, for Swin), and back to the patches (its `recover`, STViT-R).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import windows
from .embed import Size3, resize_grid
from .layers import Block
from .merging import merge
from .tokens import Tokens, regions

MERGE = "merge"  # a start that is no pooling


class SemanticTokens(nn.Module):
    """Condense tokens into t*h*w semantic ones with the layers it is handed: a reducer.

    P = pooled X;  S1 = layer(query=P, context=X);  S2 = layer(query=S1 + G, context=[S1, X]); further
    layers ask [S, X] too. The layers belong to the backbone and stand in its ordinary places, so that a
    dense checkpoint loads into them by name; only `centres` (G) is new.

    semantic_tokens: how many (t, h, w); semantic_layers: how many layers it is handed.
    pool: "max", "avg", or "grid": the patch in the middle of each token's region, which a dense model's
        layers know; or "merge": the means of patches that are alike, wherever they lie (ToMe's matching, by
        their features), so that the tokens lie on no grid.
    centres: learn G, one vector per semantic token, which needs two layers and a grid.
    semantic_proportional: later layers ask a token as often as it stands for patches: log(size) on its key
        (ToMe's proportional attention, ICLR 2023, equation 1).
    """

    def __init__(
        self,
        grid: Size3,
        dim: int,
        *,
        semantic_tokens: Size3,
        semantic_layers: int = 2,
        pool: str = "max",
        centres: bool = True,
        semantic_proportional: bool = False,
    ):
        super().__init__()
        size = check_fits(semantic_tokens, grid)
        self.pool = None if pool == MERGE else make_pool(pool, MERGE)
        self.tokens = None if self.pool is None else size
        self.merges = self.pool is None
        self.layers, self.budget = semantic_layers, math.prod(size)
        self.proportional = semantic_proportional
        needed = centres and semantic_layers > 1 and self.pool is not None
        self.centres = nn.Parameter(torch.zeros(1, *size, dim)) if needed else None
        token = regions(grid, size)
        sizes = torch.zeros(1, self.budget).scatter_add(1, token, torch.ones(token.shape))
        self.register_buffer("token", token, persistent=False)
        self.register_buffer("asked", sizes if semantic_proportional else None, persistent=False)

    def forward(self, tokens: Tokens, layers: Sequence[Block], clip: Tensor | None = None) -> Tokens:
        """Any tokens and the semantic layers -> (B, t*h*w, C)."""
        start = self._start(tokens)
        return start.with_sequence(_semantic_layer(layers[-1], *self._last_question(tokens, start, layers)))

    def maps(self, tokens: Tokens, layers: Sequence[Block]) -> Tensor:
        """How much each semantic token took from each patch: (B, t*h*w, T, H, W), each summing to 1.

        The last layer's attention, averaged over heads, restricted to the patches and renormalised.
        """
        start = self._start(tokens)
        query, bias, *context = self._last_question(tokens, start, layers)
        weights = layers[-1].attention_map(query, torch.cat(context, 1), bias=bias).mean(1)
        weights = tokens.share(weights[:, -start.x.shape[1] :, -tokens.x.shape[1] :])
        return (weights / weights.sum(-1, keepdim=True)).unflatten(-1, tokens.grid)

    def _start(self, tokens: Tokens) -> Tokens:
        """P, with the class token."""
        if self.pool is None:
            return merge(tokens, tokens.x, self.budget, proportional=self.proportional)
        pooled = self.pool(tokens.to_grid(), self.tokens).flatten(1, 3)
        return Tokens(pooled, tokens.grid, self.token, asked=self.asked, class_token=tokens.class_token)

    def _last_question(
        self, tokens: Tokens, start: Tokens, layers: Sequence[Block]
    ) -> tuple[Tensor | None, ...]:
        """What the last layer asks (B, t*h*w, C), the bias, and whom: (B, M, C), one part or two.

        A class token is the first query and the first key.
        """
        query, bias, context = start.sequence(), tokens.bias(), (tokens.sequence(),)
        for i, layer in enumerate(layers[:-1]):
            made = query = _semantic_layer(layer, query, bias, *context)
            if i == 0:
                if self.centres is not None:
                    centres = self.centres.flatten(1, 3)
                    query = made + F.pad(centres, (0, 0, made.shape[1] - centres.shape[1], 0))
                if bias is not None:
                    bias = torch.cat([_once(start).bias(), bias[..., -tokens.x.shape[1] :]], -1)
            context = (made, tokens.x)
        return query, bias, *context


def _once(tokens: Tokens) -> Tokens:
    """The same tokens, each asked as one, but padding never."""
    weight = torch.ones_like(tokens.x[..., 0]) if tokens.weight is None else tokens.weight
    return tokens._replace(asked=(weight > 0).float().expand(tokens.x.shape[:2]))


def _semantic_layer(layer: Block, query: Tensor, bias: Tensor | None, *context: Tensor) -> Tensor:
    """A semantic layer. Its backward pass makes the keys and values of all patches anew.

    To keep them is a tenth of a training step's memory, to make them a fortieth of its arithmetic.
    """

    def run(query: Tensor, bias: Tensor | None, *context: Tensor) -> Tensor:
        return layer(query, torch.cat(context, 1) if len(context) > 1 else context[0], bias=bias)

    if not layer.training:
        return run(query, bias, *context)
    return checkpoint(run, query, bias, *context, use_reentrant=False)


def check_fits(tokens: Size3, size: Size3, what: str = "grid") -> Size3:
    """`tokens` as a tuple. Raises ValueError unless the grid has as many patches along every axis."""
    if tokens is None or len(tokens) != 3 or any(n > most for n, most in zip(tokens, size, strict=True)):
        raise ValueError(
            f"semantic_tokens={tokens} (t, h, w) must each lie between 1 and the number of "
            f"patches along its axis of the {what}, here {size}"
        )
    return tuple(tokens)


class SemanticWindows(nn.Module):
    """Condense each window of a grid into (t, h, w) tokens with the layers it is handed.

    P = each window's pooled X. The layers ask within a window and across all windows by turns, beginning
    within: there, the keys are the window's own tokens and X in a larger window around it; across, all
    tokens and all of X. The first `semantic_layers` ask X too, the rest only the semantic tokens. G joins
    before the second layer, as on the whole grid.

    size: the grid that it is made for; others are taken too, and G is resized.
    window: (t, h, w) patches; per_window: how many tokens (t, h, w) for each.
    `tokens` says how many there are on the grid that it is made for.
    """

    def __init__(
        self,
        size: Size3,
        window: Size3,
        per_window: Size3,
        dim: int,
        *,
        semantic_layers: int = 2,
        pool: str = "max",
        centres: bool = False,
    ):
        super().__init__()
        self.window, self.per_window = window, check_fits(per_window, window, "window (window_size)")
        self.semantic_layers = semantic_layers
        self.pool = make_pool(pool)
        clamped, count = self._clamped(size)
        self.tokens = tuple(-(-n // w) * k for n, w, k in zip(size, clamped, count, strict=True))
        self.centres = nn.Parameter(torch.zeros(1, *self.tokens, dim)) if centres else None

    def forward(self, x: Tensor, layers: Sequence[Block], *, centres: bool = True) -> Tensor:
        """Grid (B, T, H, W, C) and the layers -> all windows' tokens as one grid (B, t, h, w, C).

        centres: False leaves G out.
        """
        tokens = self._pooled(x)
        for i, layer in enumerate(layers):
            tokens = self._attend(i, layer, tokens, x, centres)
        return tokens

    def recover(self, x: Tensor, tokens: Tensor, layer: Block) -> Tensor:
        """The patches (B, T, H, W, C) ask the semantic tokens (B, t, h, w, C): back to the patch grid."""
        return layer(x.flatten(1, 3), tokens.flatten(1, 3)).unflatten(1, x.shape[1:4])

    def maps(self, x: Tensor, layers: Sequence[Block]) -> Tensor:
        """How much each semantic token took from each patch: (B, n, T, H, W), each summing to 1.

        The last layer that asks X, averaged over heads, restricted to the patches and renormalised.
        """
        last, size = self.semantic_layers - 1, x.shape[1:4]

        def look(*question: Tensor, **how) -> Tensor:
            """Windows' tokens (B', n, C) -> what they take from tokens and all patches (B', n, M)."""
            del how["windows"]  # nothing is dropped here
            weights = layers[last].attention_map(*question, **how).mean(1)
            if (reach := self._reach(last)) is None:
                return weights
            # each window has looked at its own patches: put them into their places
            patch = torch.arange(size.numel(), device=x.device).view(1, *size, 1)
            patch = windows.enlarge(patch, self._clamped(size)[0], reach).mT  # (windows, 1, M)
            weights = weights[..., -patch.shape[-1] :]
            patch = patch.repeat(len(x), weights.shape[1], 1)
            return weights.new_zeros(*weights.shape[:2], size.numel()).scatter(-1, patch, weights)

        tokens = self.forward(x, layers[:last])
        weights = self._attend(last, look, tokens, x).flatten(1, 3)[..., -size.numel() :]
        return (weights / weights.sum(-1, keepdim=True)).unflatten(-1, size)

    def _reach(self, i: int) -> tuple[int, int] | None:
        """How many patches before and after a window layer i asks; None: all, wherever they are."""
        return None if i % 2 else (1, 2)

    def _clamped(self, size: Size3) -> tuple[Size3, Size3]:
        """The window on a grid of `size`, and its tokens: no more than it has patches."""
        window, _ = windows.clamp_window(self.window, (0, 0, 0), size)
        return window, tuple(map(min, self.per_window, window))

    def _pooled(self, x: Tensor) -> Tensor:
        window, count = self._clamped(x.shape[1:4])
        x = windows.pad(x, window)
        size = tuple(n // w * k for n, w, k in zip(x.shape[1:4], window, count, strict=True))
        parts = windows.partition(x, window).unflatten(1, window)
        return windows.merge(self.pool(parts, count).flatten(1, 3), count, size)

    def _attend(
        self, i: int, layer: Callable[..., Tensor], tokens: Tensor, x: Tensor, centres: bool = True
    ) -> Tensor:
        """What layer i makes of the tokens (B, t, h, w, C), as a grid like theirs.

        In even layers each window's tokens ask apart, in odd ones all of a clip, as one window.
        """
        size, (window, count) = tokens.shape[1:4], self._clamped(x.shape[1:4])
        context = None
        if i < self.semantic_layers:
            context = torch.cat([tokens.flatten(1, 3), x.flatten(1, 3)], 1)
        if i == 1 and centres and self.centres is not None:
            tokens = tokens + resize_grid(self.centres, size)

        def around(projected: Tensor) -> Tensor:
            """Keys (or values) of all tokens and patches -> of those in and around each window."""
            inside, outside = projected.split([size.numel(), x.shape[1:4].numel()], 1)
            inside = windows.partition(inside.unflatten(1, size), count)
            outside = windows.enlarge(outside.unflatten(1, x.shape[1:4]), window, self._reach(i))
            return torch.cat([inside, outside], 1)

        group = size if i % 2 else count
        regroup = around if context is not None and i % 2 == 0 else None
        number = size.numel() // math.prod(group)  # of windows
        parts = layer(windows.partition(tokens, group), context, regroup=regroup, windows=number)
        return windows.merge(parts, group, size)


def make_pool(name: str, *more: str) -> Callable[[Tensor, Size3], Tensor]:
    """What pools (B, T, H, W, C) to (B, t, h, w, C): a name of `POOLS`. Raises ValueError for others.

    more: what the caller takes beside these.
    """
    if name not in POOLS:
        raise ValueError(f"pool={name!r} is none of {sorted((*POOLS, *more))}")
    return POOLS[name]


def _avg_pool(x: Tensor, size: Size3) -> Tensor:
    return F.adaptive_avg_pool3d(x.movedim(-1, 1), size).movedim(1, -1)


def _max_pool(x: Tensor, size: Size3) -> Tensor:
    """Chosen and then taken: unlike torch's own pooling, this keeps no copy of x for the backward pass."""
    with torch.no_grad():
        _, places = F.adaptive_max_pool3d(x.movedim(-1, 1), size, return_indices=True)
    return x.flatten(1, 3).gather(1, places.flatten(2).transpose(1, 2)).unflatten(1, size)


def _take_middle(x: Tensor, size: Size3) -> Tensor:
    """Of each region (`tokens.regions`) the patch in its middle, the later one of two."""
    for axis, n in enumerate(size, start=1):
        ends = [-(-i * x.shape[axis] // n) for i in range(n + 1)]
        middles = [(first + end) // 2 for first, end in itertools.pairwise(ends)]
        x = x.index_select(axis, torch.tensor(middles, device=x.device))
    return x


POOLS = {"max": _max_pool, "avg": _avg_pool, "grid": _take_middle}
