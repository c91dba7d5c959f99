"""From an image or video and its masks to what a segmenter is trained on, and to what it is scored on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from . import sampling
from .batch import empty
from .masks import IGNORED, Masks
from .views import Make, Sampling, read_once, stack_frames

if TYPE_CHECKING:
    from .decode import Video  # a machine that only computes may have no decoder

TRIES = 10  # at a crop that no class fills, as in mmsegmentation

# mmsegmentation's PhotoMetricDistortion in its ranges, each of the four in half of the clips; by
# torchvision's operations, which scale brightness instead of shifting it.
DISTORT = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5)
        for jitter in ({"brightness": 0.125}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1})
    ]
)


@dataclass(frozen=True)
class MaskReader:
    """A row's target and frames of its video -> masks uint8 (T, H, W); see `Masks.read`."""

    classes: int
    ignore: int

    def __call__(
        self, target: Masks | None, frames: Sequence[int], video: "Video", size: Sequence[int]
    ) -> Tensor:
        """All ignored where there is no target."""
        if target is None:
            return torch.full((len(frames), *size), IGNORED, dtype=torch.uint8)
        values = target.read(frames, video.num_frames, size, classes=self.classes, ignore=self.ignore)
        return torch.from_numpy(values)


@dataclass(frozen=True)
class MaskTrainViews:
    """`repeats` random clips: scaled, cropped, mirrored, distorted, padded, all frames alike.

    size: of the square crops. short_side: of images before `zoom` scales them at random; None: their own.
    max_share: of one class in a crop, where ten tries give one.
    mirror: what mirroring does to a mask; None: nothing is mirrored. fill: RGB, around small images.
    """

    sampling: Sampling
    masks: MaskReader
    size: int
    short_side: int | None
    zoom: tuple[float, float]
    max_share: float
    mirror: Callable[[Tensor], Tensor] | None
    distort: bool
    fill: tuple[int, int, int]
    repeats: int = 1

    def __call__(self, video: "Video", target: Masks, make: Make = empty) -> tuple[Tensor, list[Tensor]]:
        """-> clips uint8 (V, 3, T, size, size), V masks uint8 (T, size, size)."""
        clips = [self.sampling.train(video) for _ in range(self.repeats)]
        frames, places = read_once(video, clips)
        views = []
        for clip, place in zip(clips, places, strict=True):
            masks = self.masks(target, clip, video, frames.shape[2:])
            views.append(self.augment(frames[place], masks))
        return stack_frames([view for view, _ in views], make), [masks for _, masks in views]

    def augment(self, frames: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (T, 3, H, W), (T, H, W) -> the same, size x size; by torch's global generator."""
        low, high = self.zoom
        scale = low + (high - low) * torch.rand(()).item()
        frames = resize(frames, self.short_side or min(frames.shape[2:]), scale)
        masks = F.interpolate(masks[None], frames.shape[2:], mode="nearest-exact")[0]
        top, left = self._crop(masks)
        frames = frames[..., top : top + self.size, left : left + self.size]
        masks = masks[..., top : top + self.size, left : left + self.size]
        if self.mirror is not None and torch.rand(()) < 0.5:
            frames, masks = frames.flip(-1), self.mirror(masks.flip(-1))
        if self.distort:
            frames = DISTORT(frames)
        short = [0, self.size - frames.shape[-1], 0, self.size - frames.shape[-2]]
        if any(short):
            fill = torch.tensor(self.fill, dtype=torch.uint8).view(3, 1, 1)
            padded = fill.repeat(len(frames), 1, *[self.size] * 2)
            padded[..., : frames.shape[-2], : frames.shape[-1]] = frames
            frames, masks = padded, F.pad(masks, short, value=IGNORED)
        return frames, masks

    def _crop(self, masks: Tensor) -> tuple[int, int]:
        """Top and left of a random box: of ten the first with several classes and none too large."""
        for _ in range(TRIES):
            room = [max(length - self.size, 0) for length in masks.shape[1:]]
            top, left = (torch.randint(free + 1, ()).item() for free in room)
            inside = masks[:, top : top + self.size, left : left + self.size]
            counts = torch.bincount(inside.flatten(), minlength=IGNORED + 1)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return top, left


class Truth(NamedTuple):
    """What a clip is scored by: masks uint8 (T, H, W), at their own size, and which frames they are of.

    short_side: pixels to score the clip at, where it has its own size; None: it was brought to that.
    """

    masks: Tensor
    frames: list[int]
    short_side: int | None = None


@dataclass(frozen=True)
class MaskTestViews:
    """Every frame of a video, or an image, in clips of `sampling.num_frames`, `sampling.stride` apart.

    zoomed: frames keep their own size, to be scaled once: each zoom starts from what the file holds.
    """

    sampling: Sampling
    masks: MaskReader
    short_side: int | None
    zoomed: bool = False
    preview: Callable[[Tensor], bytes] | None = None

    def __call__(self, video: "Video", target: Masks | None, make: Make = empty) -> tuple[Any, ...]:
        """-> clips uint8 (V, 3, T, H', W'), V times their `Truth`; no draws; the preview, if any."""
        clips = sampling.every_frame(video.num_frames, self.sampling.num_frames, self.sampling.stride)
        frames, places = read_once(video, clips)
        size = frames.shape[2:]
        left = self.short_side if self.zoomed else None
        truths = [Truth(self.masks(target, clip, video, size), clip, left) for clip in clips]
        scaled = frames if self.zoomed else resize(frames, self.short_side or min(size))
        extra = () if self.preview is None else (None, self.preview(frames))
        return stack_frames([scaled[place] for place in places], make), truths, *extra


def resize(frames: Tensor, short_side: int, scale: float = 1.0) -> Tensor:
    """uint8 (T, 3, H, W), whose short side becomes `short_side` x `scale` pixels; bilinear, antialiased."""
    factor = short_side * scale / min(frames.shape[2:])
    size = [max(round(length * factor), 1) for length in frames.shape[2:]]
    if size == list(frames.shape[2:]):
        return frames
    return v2.functional.resize(frames, size, antialias=True)
