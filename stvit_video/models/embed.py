"""From pixels to a grid of tokens: tubelet embedding and position tables."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

Size3 = tuple[int, int, int]


class PatchEmbed(nn.Module):
    """Tubelets of (frames, height, width) pixels, each projected to one token.

    The weight has a convolution's shape (C, 3, t, h, w), as checkpoints have it; it is applied as one
    matrix product, which every device and exporter handles well.
    """

    def __init__(self, clip_size: Size3, patch_size: Size3, dim: int):
        super().__init__()
        if len(patch_size) != 3:
            raise ValueError(f"patch_size={patch_size} must be (frames, height, width)")
        axes = ("frames (num_frames)", "rows (image_size)", "columns (image_size)")
        for axis, size, patch in zip(axes, clip_size, patch_size, strict=True):
            if size % patch:
                raise ValueError(
                    f"clip of {size} {axis} does not divide into tubelets of {patch} "
                    f"(patch_size={patch_size})"
                )
        self.clip_size, self.patch_size = clip_size, patch_size
        self.grid = tuple(size // patch for size, patch in zip(clip_size, patch_size, strict=True))
        self.proj = nn.Conv3d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) where T is 1 -> grid (B, t, h, w, C)."""
        return tubelets(self.checked(x), self.proj)

    def checked(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) where T is 1 -> (B, 3, T, H, W). Raises ValueError else."""
        x = as_clip(x)
        if x.shape[2:] != self.clip_size:
            frames, rows, columns = self.clip_size
            raise ValueError(
                f"input of shape {tuple(x.shape)}, but the model takes (B, 3, {frames}, {rows}, "
                f"{columns}) (num_frames={frames}, image_size={(rows, columns)})"
            )
        return x


class PaddedPatchEmbed(nn.Module):
    """Swin's: clips of any size, padded with zeros at their ends to whole tubelets; then a LayerNorm."""

    def __init__(self, patch_size: Size3, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) for one frame -> grid (B, t, h, w, C)."""
        x = as_clip(x)
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        x = F.pad(x, [0, missing[2], 0, missing[1], 0, missing[0]])
        return self.norm(tubelets(x, self.proj))


class ConvStem(nn.Module):
    """STViT-R's: twice a 3x3 convolution of stride 2, BatchNorm and Hardswish; no norm after it.

    On video, the first convolution covers the frames of a tubelet.
    """

    def __init__(self, patch_size: Size3, dim: int):
        super().__init__()
        self.frames = frames = patch_size[0]
        if patch_size[1:] != (4, 4):
            raise ValueError(f"patch_size={patch_size}: a convolutional stem has strides of (t, 4, 4)")
        self.conv1 = nn.Conv3d(3, dim // 2, (frames, 3, 3), (frames, 2, 2), (0, 1, 1), bias=False)
        self.norm1 = nn.BatchNorm3d(dim // 2)
        self.conv2 = nn.Conv3d(dim // 2, dim, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        self.norm2 = nn.BatchNorm3d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) for one frame -> grid (B, t, h, w, C)."""
        x = as_clip(x)
        x = F.pad(x, [0, 0, 0, 0, 0, -x.shape[2] % self.frames])
        x = F.hardswish(self.norm1(self.conv1(x)))
        x = F.hardswish(self.norm2(self.conv2(x)))
        return x.movedim(1, -1).contiguous()  # or every layer's sums are slow


def clip_size(num_frames: int, image_size: int | Sequence[int]) -> Size3:
    """(frames, height, width), of one image size or of (height, width)."""
    return (num_frames, *((image_size,) * 2 if isinstance(image_size, int) else image_size))


def as_clip(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3, 1, H, W); clips (B, 3, T, H, W) stay. Raises ValueError for other shapes."""
    clip = x.unsqueeze(2) if x.ndim == 4 else x
    if clip.ndim != 5 or clip.shape[1] != 3:
        raise ValueError(f"input of shape {tuple(x.shape)}, but the model takes (B, 3, T, H, W)")
    return clip


def tubelets(x: Tensor, proj: nn.Conv3d) -> Tensor:
    """Clips (B, 3, T, H, W) of whole tubelets, each projected to one token: (B, t, h, w, C)."""
    return F.linear(split_tubelets(x, proj.kernel_size).flatten(4), proj.weight.flatten(1), proj.bias)


def split_tubelets(x: Tensor, patch_size: Size3) -> Tensor:
    """A view of clips (B, 3, T, H, W) of whole tubelets: (B, t, h, w, 3, pt, ph, pw)."""
    pt, ph, pw = patch_size
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b t h w c pt ph pw", pt=pt, ph=ph, pw=pw)


def sincos_table(grid: Size3, dim: int) -> Tensor:
    """Fixed sine-cosine positions over the flattened token index: (1, t, h, w, C).

    Feature j of position p is sin or cos (j even or odd) of p / 10000^(2 (j // 2) / C): VideoMAE's
    table, which its checkpoints do not hold.
    """
    position = torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.float64)
    feature = torch.arange(dim)
    angle = position[:, None] / 10000 ** (2 * (feature // 2) / dim)
    table = torch.where(feature % 2 == 0, angle.sin(), angle.cos())
    return table.float().view(1, *grid, dim)


def resize_grid(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Positions or G (1, t, h, w, C) -> (1, *grid, C).

    In space bicubic (timm's function), in time linear; a table of one frame is repeated.
    """
    _, t, h, w, c = table.shape
    if (h, w) != tuple(grid[1:]):
        frames = table.float().permute(0, 2, 3, 1, 4).reshape(1, h * w, t * c)
        frames = resample_abs_pos_embed(frames, list(grid[1:]), [h, w], num_prefix_tokens=0)
        table = frames.view(1, *grid[1:], t, c).permute(0, 3, 1, 2, 4)
    if t == 1:
        return table.repeat(1, grid[0], 1, 1, 1)
    if t != grid[0]:
        rows = table.float().flatten(2).transpose(1, 2)  # (1, h w C, t)
        rows = F.interpolate(rows, size=grid[0], mode="linear")
        table = rows.transpose(1, 2).unflatten(2, (*grid[1:], c))
    return table
