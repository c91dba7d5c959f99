"""STViT-R's backbone for detection, as the authors released it: what it has beside their classifier.

Keys are windowed: 14 x 14 and 21 x 21 patches around a window of 7, and 27 x 27 semantic tokens in the
recovery. Windows are never clamped, maps are padded, and padding is masked as the released code executes
it, which its weights were trained with.
Source: changsn/STViT-R-Object-Detection, mmdet/models/backbones (commit 8b8eb1e).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import windows
from .embed import ConvStem, as_clip
from .layers import Block
from .semantic import SemanticWindows
from .swin import NORM_EPS, SEMANTIC_STAGE, VideoSwin, WindowAttention

WINDOWS_AROUND = 4  # that recovery asks, before and after each window along both axes


class DetectionWindows(SemanticWindows):
    """`SemanticWindows` of images whose two semantic layers and recovery ask what lies around each window.

    All padding is zero before a layer's norm, so it is one and the same key wherever it stands: it is made
    once, stands before the grid's, and is asked as often as a window sees it.
    """

    def recover(self, x: Tensor, tokens: Tensor, layer: Block) -> Tensor:
        """The patches (B, 1, H, W, C) ask the semantic tokens (B, 1, h, w, C) around their windows."""
        n, k = self.window[1], self.per_window[1]
        (height, width), size = x.shape[2:4], tuple(tokens.shape[2:4])
        seen = asked(size, k, (WINDOWS_AROUND * k,) * 2, self._missing(x), x.device)
        rows, columns = (torch.arange(m, device=x.device) // n for m in (height, width))
        window = (rows[:, None] * (size[1] // k) + columns).flatten()
        bias = seen.log().to(x.dtype).index_select(0, window)[None, None]
        return layer(x.flatten(1, 3), _after_padding(tokens), bias=bias).unflatten(1, x.shape[1:4])

    def _attend(
        self, i: int, layer: Callable[..., Tensor], tokens: Tensor, x: Tensor, centres: bool = True
    ) -> Tensor:
        if i >= self.semantic_layers:
            return super()._attend(i, layer, tokens, x, centres)
        size = tuple(x.shape[2:4])
        place, bias = around(size, self.window[1], self._reach(i), self._missing(x), x.device)
        parts = windows.partition(tokens, self.per_window)
        bias = bias.to(x.dtype).repeat(len(x), 1)[:, None, None]
        how = {"bias": bias, "regroup": lambda keys: keys[:, place].flatten(0, 1), "windows": len(place)}
        made = layer(parts, _after_padding(x), **how)
        return windows.merge(made, self.per_window, tokens.shape[1:4])

    def _reach(self, i: int) -> tuple[int, int]:
        n = self.window[1]
        return (n, n) if i else (n // 2, n - n // 2)

    def _clamped(self, size):
        return self.window, self.per_window

    def _missing(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns to whole windows."""
        n = self.window[1]
        return -x.shape[2] % n, -x.shape[3] % n


def _after_padding(x: Tensor) -> Tensor:
    """Grid (B, 1, H, W, C) -> (B, 1 + H W, C): a zero for all padding, then its tokens."""
    return F.pad(x.flatten(1, 3), (0, 0, 1, 0))


def asked(
    size: tuple[int, int], n: int, reach: tuple[int, int], missing: tuple[int, int], device: torch.device
) -> Tensor:
    """How often each window of n x n asks each token of an (H, W) grid: (windows, 1 + H W).

    Column 0 is padding: what the grid lacks to whole windows, and all around it as far as `reach` (places
    before and after a window). The released code masks what is around, and of the last windows what
    `[-rows:, -columns:]` cuts out if `missing` is (rows, columns): a corner, or everything where one is 0.
    A window whose keys are all masked asks all of them.
    """
    rows, columns = size
    place = torch.arange(1, rows * columns + 1, device=device).view(size)
    place = F.pad(place, (0, -columns % n, 0, -rows % n))
    masked = torch.zeros_like(place, dtype=torch.bool)
    masked[-missing[0] :, -missing[1] :] = True
    place, masked = (
        F.pad(grid, reach * 2, value=value).unfold(0, sum(reach) + n, n).unfold(1, sum(reach) + n, n)
        for grid, value in ((place, 0), (masked, True))
    )
    place, masked = place.flatten(2).flatten(0, 1), masked.flatten(2).flatten(0, 1)
    counts = (~masked | masked.all(1, keepdim=True)).float()
    return counts.new_zeros(len(place), 1 + rows * columns).scatter_add(1, place, counts)


@windows.kept
def around(
    size: tuple[int, int], n: int, reach: tuple[int, int], missing: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which columns of `asked` each window needs, and their bias: (windows, M) both, padding first."""
    place = torch.arange(1, size[0] * size[1] + 1, device=device).view(1, 1, *size, 1)
    place = F.pad(windows.enlarge(place, (1, n, n), reach)[..., 0], (1, 0))
    return place, asked(size, n, reach, missing, device).gather(1, place).log()


class PaddedStem(ConvStem):
    """`ConvStem` for images of any size, padded with zeros to multiples of 4 at their ends.

    Two-dimensional convolutions with the channels last: twice as fast on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, 1, H, W) -> grid (B, 1, h, w, C). Raises ValueError for other shapes."""
        clip = as_clip(x)
        if clip.shape[2] != 1:
            raise ValueError(f"input of shape {tuple(x.shape)}, but the model takes images (B, 3, H, W)")
        x = F.pad(clip[:, :, 0], (0, -clip.shape[4] % 4, 0, -clip.shape[3] % 4))
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = F.conv2d(x, conv.weight[:, :, 0], stride=2, padding=1)
            x = F.hardswish(norm(x.unsqueeze(2))).squeeze(2)
        return x.permute(0, 2, 3, 1).unsqueeze(1)


class DetectionSwin(VideoSwin):
    """STViT-R for images (B, 3, H, W) of any height and width, with a norm for the grid of each stage.

    Sizes as of `VideoSwin` with recovery, but all of one frame, and windows and their tokens square.
    Raises ValueError, naming value and rule, where they are not.
    """

    semantic_windows = DetectionWindows

    def __init__(self, **sizes):
        if sizes["num_frames"] != 1:
            raise ValueError(f"num_frames={sizes['num_frames']}: a backbone for detection takes images, 1")
        for name in ("patch_size", "window_size", "semantic_tokens"):
            size = sizes[name]
            if size is not None and (size[0] != 1 or size[1:-1] != size[2:]):
                raise ValueError(f"{name}={size}: a backbone for detection has squares (1, n, n)")
        super().__init__(**sizes, recovery=True)
        self.patch_embed = PaddedStem(tuple(sizes["patch_size"]), sizes["embed_dim"])
        del self.norm
        self.norms = nn.ModuleList(
            nn.LayerNorm(sizes["embed_dim"] * 2**i, eps=NORM_EPS) for i in range(len(self.layers))
        )
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.clamped = False
        for block in self.layers[SEMANTIC_STAGE].blocks:
            block.residual = True

    def pooled_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C): the mean of the last normed grid."""
        (grid,) = self.grids(x, (len(self.layers),))
        return grid.mean((1, 2, 3))

    def grids(self, x: Tensor, stages: Sequence[int] = (1, 2, 3, 4)) -> list[Tensor]:
        """(B, 3, H, W) -> the patch grids (B, 1, h, w, C) that these stages end with, normed.

        At strides 4, 8, 16 and 32. Raises ValueError for other stages.
        """
        grids = super().grids(x, stages)
        return [self.norms[stage - 1](grid) for stage, grid in zip(stages, grids, strict=True)]
