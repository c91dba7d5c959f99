"""Windows of a grid of tokens: pure functions, shapes in, shapes out.

A grid is (B, T, H, W, C). Sizes and shifts are (time, height, width). Windows are batched, (B * windows,
N, C) with N tokens in each: those of one grid next to each other, counted along time, height, width.

As in torchvision's Video Swin and the released weights: zero padding at the ends of the axes, then the
shift; padding takes part in the attention, only regions that a shift brings together are masked.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .embed import Size3

CACHED_SIZES = 64  # tensors that depend on sizes alone, of each kind
MASKED = -100.0  # added to what must not be asked: as in every released Swin


def clamp_window(window: Size3, shift: Size3, size: Size3) -> tuple[Size3, Size3]:
    """Window and shift for a grid of `size`: an axis no larger than the window is one window, unshifted."""
    fits = [n <= w for n, w in zip(size, window, strict=True)]
    window = tuple(n if fit else w for n, w, fit in zip(size, window, fits, strict=True))
    return window, tuple(0 if fit else s for s, fit in zip(shift, fits, strict=True))


def pad(x: Tensor, window: Size3) -> Tensor:
    """Zeros at the ends of the axes, up to whole windows."""
    t, h, w = (-size % n for size, n in zip(x.shape[1:4], window, strict=True))
    return F.pad(x, (0, 0, 0, w, 0, h, 0, t)) if t or h or w else x


def partition(x: Tensor, window: Size3) -> Tensor:
    """(B, T, H, W, C) of whole windows -> (B * windows, N, C)."""
    t, h, w = window
    return rearrange(x, "b (i t) (j h) (k w) c -> (b i j k) (t h w) c", t=t, h=h, w=w)


def merge(windows: Tensor, window: Size3, size: Size3) -> Tensor:
    """The inverse of `partition`: (B * windows, N, C) -> (B, T, H, W, C) of (T, H, W) = `size`."""
    (t, h, w), (i, j, k) = window, (n // w for n, w in zip(size, window, strict=True))
    return rearrange(windows, "(b i j k) (t h w) c -> b (i t) (j h) (k w) c", i=i, j=j, k=k, t=t, h=h, w=w)


def enlarge(x: Tensor, window: Size3, reach: tuple[int, int] = (1, 2)) -> Tensor:
    """(B, T, H, W, C) -> (B * windows, M, C): for every window the tokens in and around it.

    Along height and width the i-th window of w tokens sees them and as many before and after it as `reach`
    says, (a, b), from `clamp(w i - a, 0, H - w - a - b)` on (10 for windows of 7), or all of the axis where
    it is no larger; along time, the window's w frames. Padding is never seen: the grid is as it is, and a
    window that sticks out sees the last tokens inside.
    """
    for axis, n, (before, after) in zip((1, 3, 5), window, ((0, 0), reach, reach), strict=True):
        length = x.shape[axis]  # each axis becomes two
        seen = min(before + n + after, length)
        first = torch.arange(-(-length // n), device=x.device) * n - before
        places = first.clamp(0, length - seen)[:, None] + torch.arange(seen, device=x.device)
        x = x.index_select(axis, places.flatten()).unflatten(axis, places.shape)
    return rearrange(x, "b i t j h k w c -> (b i j k) (t h w) c")


def kept(build: Callable) -> Callable:
    """`build` with its tensors kept for later calls; those made while a graph is traced are not.

    Of the last `CACHED_SIZES`: where every image has its own, tensors of all sizes would fill the memory.
    """
    made: dict[tuple, Any] = {}

    @functools.wraps(build)
    def get(*key):
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return build(*key)
        if key not in made:
            if len(made) == CACHED_SIZES:
                made.pop(next(iter(made)), None)
            with torch.inference_mode(False):  # what is kept must serve training too
                made[key] = build(*key)
        return made[key]

    return get


Slab = tuple[tuple[slice, ...], ...]  # of each axis one piece, or the two that a shift brings together


@kept
def slabs(
    size: Size3, window: Size3, shift: Size3, device: torch.device
) -> list[tuple[Slab, Tensor | None]]:
    """Parts of a grid of `size`, whole windows each, whose windows share one mask (N, N) or need none.

    Windows begin at `shift`, and the last one of an axis holds its end and its beginning, which must not
    see each other. So windows differ only in which axes they are the last of: at most eight masks, however
    many windows, and none is expanded over the windows or the batch.
    """
    pieces = [  # the last window alone, where there is but one
        [(slice(s, n - w + s),), (slice(n - w + s, n), slice(0, s))][n == w :] if s else [(slice(0, n),)]
        for n, w, s in zip(size, window, shift, strict=True)
    ]
    parts_and_masks = []
    for slab in itertools.product(*pieces):
        shifted = [len(parts) > 1 for parts in slab]
        ends = [w - s if two else w for two, w, s in zip(shifted, window, shift, strict=True)]
        region = torch.cartesian_prod(
            *(torch.arange(w, device=device) >= end for w, end in zip(window, ends, strict=True))
        )
        apart = (region[:, None] != region).any(-1)
        parts_and_masks.append((slab, apart * MASKED if any(shifted) else None))
    return parts_and_masks


@kept
def roll_mask(size: Size3, window: Size3, shift: Size3, device: torch.device) -> Tensor:
    """(windows, N, N): the same for all windows of a grid that was rolled by -shift."""
    sides = [
        torch.arange(n, device=device) >= (n - s if s else n) for n, s in zip(size, shift, strict=True)
    ]
    region = partition(torch.cartesian_prod(*sides).view(1, *size, 3), window)
    return (region[:, :, None] != region[:, None]).any(-1) * MASKED


def take(x: Tensor, slab: Slab) -> Tensor:
    """A slab of the grid (B, T, H, W, C), its pieces joined."""
    for axis, parts in sorted(enumerate(slab, start=1), key=lambda item: len(item[1])):  # cut, then copy
        cut = [x.narrow(axis, part.start, part.stop - part.start) for part in parts]
        x = torch.cat(cut, axis) if len(cut) > 1 else cut[0]
    return x


def put(x: Tensor, slab: Slab, values: Tensor) -> None:
    """The inverse of `take`: write `values` into the slab's places of the grid `x`."""
    blocks = [values]
    for axis, parts in enumerate(slab, start=1):
        lengths = [part.stop - part.start for part in parts]
        blocks = [piece for block in blocks for piece in block.split(lengths, axis)]
    for place, block in zip(itertools.product(*slab), blocks, strict=True):
        x[(slice(None), *place)] = block


@kept
def relative_index(window: Size3, device: torch.device) -> Tensor:
    """(N, N): where the bias of two tokens of a window stands in a table over all their distances.

    The table's rows run over distances of time, height, width, each from 1 - w to w - 1.
    """
    places = torch.cartesian_prod(*(torch.arange(n, device=device) for n in window))
    distance = places[:, None] - places + torch.tensor(window, device=device) - 1
    _, h, w = (2 * n - 1 for n in window)
    return (distance[..., 0] * h + distance[..., 1]) * w + distance[..., 2]


def relative_bias(table: Tensor, window: Size3, clamped: Size3) -> Tensor:
    """Table (distances, heads) of `window` -> (1, heads, n, n), n being the `clamped` window's volume.

    A clamped window takes the first n rows and columns of the full window's, which are not its distances;
    this is what the released weights were trained with.
    """
    n = math.prod(clamped)
    index = relative_index(window, table.device)[:n, :n]
    return table.t().index_select(1, index.flatten()).view(1, -1, n, n)


def table_rows(window: Size3) -> int:
    """How many distances two tokens of a window can have."""
    return math.prod(2 * n - 1 for n in window)
