"""Which pixels: one set of random parameters a clip, uint8 in and out."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from ..errors import InputError
from .augment import Draw, augment, cut, draw_operations
from .batch import empty

Clip = Tensor  # uint8 (T, 3, H, W)
CACHE = 1 << 20  # bytes
LARGEST = 10 / 7  # of a crop's size: 320 for crops of 224, the larger size at which Kinetics is stored


class TrainTransform:
    """RandAugment, random resized crop, flip: uint8 (T, 3, H, W), target -> ((T, 3, S, S), target).

    What is random is drawn first (`draw`): pixels may be changed elsewhere than the target (`move`).
    torchvision's tv_tensors in the target (boxes, masks), also within dicts, lists and tuples, move with
    the pixels; they have the size of the frames. RandAugment cannot move them: InputError.

    scale: range of the crop's share of the area; ratio: range of its aspect ratio.
    interpolation: how crops are resized, "bilinear" or "bicubic".
    rand_augment: (number of operations, magnitude of 10), None for none: timm's `rand-m7-n4-mstd0.5-inc1`
        is (4, 7). Frames have then a short side of `short_side` at most (`prepare`).
    flip: whether half of the clips are mirrored.
    mirror: target -> target of a mirrored clip (a left/right twin's class); None: the same.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (0.75, 4 / 3),
        interpolation: str = "bilinear",
        rand_augment: tuple[int, int] | None = None,
        flip: bool = False,
        mirror: Callable[[Any], Any] | None = None,
    ):
        self.size, self.crop = size, v2.RandomResizedCrop(size, scale=scale, ratio=ratio)
        self.operations, self.magnitude = rand_augment or (0, 0)
        self.short_side = math.ceil(LARGEST * size) if self.operations else None
        self.interpolation, self.flip, self.mirror = interpolation, flip, mirror

    def __call__(self, clip: Clip, target: Any) -> tuple[Clip, Any]:
        clip = self.prepare(clip)
        draw = self.draw(clip, target)
        out = torch.empty(3, len(clip), self.size, self.size, dtype=torch.uint8)
        augment(cut(clip, draw), draw, out)
        return out.transpose(0, 1), self.move(target, draw)

    def prepare(self, frames: Clip) -> Clip:
        """Smaller where they are too large for RandAugment, whose cost is by their pixels: it goes before
        the crop."""
        if self.short_side is None or min(frames.shape[-2:]) <= self.short_side:
            return frames
        return v2.functional.resize(frames, [self.short_side], antialias=True)

    def draw(self, clip: Clip, target: Any) -> Draw:
        """By torch's global generator; the box as torchvision's RandomResizedCrop."""
        moving = [leaf for leaf in tree_leaves(target) if isinstance(leaf, tv_tensors.TVTensor)]
        if moving and self.operations:
            raise InputError(
                f"data.rand_augment: cannot move targets of kind {type(moving[0]).__name__} "
                "with the pixels; null: no RandAugment"
            )
        box = self.crop.make_params([tv_tensors.Video(clip), *moving])
        return Draw(
            box=(box["top"], box["left"], box["height"], box["width"]),
            size=self.size,
            frame=tuple(clip.shape[-2:]),
            interpolation=self.interpolation,
            operations=draw_operations(self.operations, self.magnitude, tuple(clip.shape[-2:])),
            flip=self.flip and torch.rand(()).item() < 0.5,
        )

    def move(self, target: Any, draw: Draw) -> Any:
        """The target of a clip that was cropped and mirrored like this."""

        def moved(part: tv_tensors.TVTensor) -> tv_tensors.TVTensor:
            part = v2.functional.resized_crop(part, *draw.box, [draw.size] * 2, antialias=True)
            return v2.functional.horizontal_flip(part) if draw.flip else part

        target = tree_map_only(tv_tensors.TVTensor, moved, target)
        return self.mirror(target) if draw.flip and self.mirror is not None else target


class TestTransform:
    """Short side to `size / crop_ratio`, then `crops` squares of `size` along the longer side.

    One crop is the centre; several are spread from the left (top) end to the right (bottom) end.
    uint8 (T, 3, H, W) -> list of `crops` uint8 (T, 3, S, S), left to right or top to bottom.
    interpolation: "bilinear" or "bicubic".
    """

    def __init__(
        self, size: int, *, crops: int = 1, crop_ratio: float = 1.0, interpolation: str = "bilinear"
    ):
        self.size, self.crops = size, crops
        self.short_side = round(size / crop_ratio)
        self.resize = v2.Resize(self.short_side, InterpolationMode(interpolation), antialias=True)

    def __call__(self, clip: Clip) -> list[Clip]:
        clip = self._resized(clip)
        rows, columns = (length - self.size for length in clip.shape[-2:])
        places = [0.5] if self.crops == 1 else [i / (self.crops - 1) for i in range(self.crops)]
        out = []
        for place in places:
            down, right = (place, 0.5) if rows > columns else (0.5, place)
            top, left = int(down * rows + 0.5), int(right * columns + 0.5)
            out.append(clip[..., top : top + self.size, left : left + self.size])
        return out

    def _resized(self, clip: Clip) -> Clip:
        """Channels first; a few frames at a time, which are still in the cache when they are copied."""
        out, few = None, max(CACHE // clip[0].numel(), 1)
        for start in range(0, len(clip), few):
            frames = self.resize(clip[start : start + few])
            out = empty((len(clip), *frames.shape[1:])) if out is None else out
            out[start : start + few] = frames
        return out


class Normalise(nn.Module):
    """uint8 (..., 3, T, H, W) -> float32, (x / 255 - mean) / std by channel; runs on the device."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1, 1), persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        """Contiguous, whatever the layout of `clips`."""
        if clips.is_cuda:
            return clips.contiguous().to(torch.float32, copy=True).sub_(self.mean).div_(self.std)
        out = empty(clips.shape, torch.float32)
        shape = clips.shape[-4:]  # clip by clip: what is written is still in the cache when it is read
        for clip, values in zip(out.view(-1, *shape), _each(clips, len(shape)), strict=True):
            clip.copy_(values).sub_(self.mean).div_(self.std)
        return out


def _each(clips: Tensor, dims: int) -> Iterator[Tensor]:
    """The clips of a batch of any layout, in order, as views."""
    if clips.ndim == dims:
        yield clips
    else:
        for part in clips:
            yield from _each(part, dims)


class Mix:
    """Random erasing of each clip, then mixup or cutmix of the batch; after normalisation.

    Float (B, 3, T, H, W), labels (B,) or (B, K) -> clips, targets: (B, K) where labels were mixed, else the
    labels. Clips are changed in place. Erasing draws one box a clip, the same in all frames, filled with
    noise; mixup and cutmix take turns at random.

    erasing: share of the clips; mixup, cutmix: alpha of the Beta distribution, 0 for none.
    """

    def __init__(self, num_classes: int, *, erasing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0):
        self.erase, self.black = (
            v2.RandomErasing(p=erasing, scale=(0.02, 1 / 3), value=value) for value in ("random", 0.0)
        )
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for clip in clips if self.erase.p else ():
            self._erase(clip.transpose(0, 1))  # v2 wants (T, 3, H, W)
        if self.mixes:
            mix = self.mixes[torch.randint(len(self.mixes), ()).item()]
            clips, labels = mix(tv_tensors.Video(clips), labels)
            clips = clips.as_subclass(Tensor)
        return clips, labels

    def _erase(self, clip: Tensor) -> None:
        """In place; the box is drawn on the CPU, the noise where the clip is: no device is waited for."""
        if torch.rand(1) >= self.erase.p:
            return
        box = (self.black if clip.is_cuda else self.erase).make_params([clip])
        noise = box.pop("v")
        if noise is None:  # no box of that size fits
            return
        if clip.is_cuda:
            noise = torch.randn(clip.shape[1], box["h"], box["w"], device=clip.device)
        v2.functional.erase(clip, v=noise, inplace=True, **box)
