"""From one video to its clips, decoded once. Training views are random, test views are spread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sampling
from .augment import augment, cut, split
from .batch import empty
from .transforms import TestTransform, TrainTransform

if TYPE_CHECKING:
    from .decode import Video  # a machine that only computes may have no decoder

Make = Callable[[Sequence[int]], Tensor]  # shape -> uint8, where the clips are to lie


@dataclass(frozen=True)
class Sampling:
    """Which frames make a clip.

    kind: "dense" (every `stride`-th frame, from anywhere), "uniform" (one frame from each of `num_frames`
        segments of the whole video) or "middle" (dense, and always the centre).
    target_fps: if set and the video's rate is known, `stride` counts frames at this rate, whatever the
        video's own.
    """

    kind: str
    num_frames: int
    stride: int = 1
    target_fps: float | None = None

    def spread(self, clips: int) -> list[float]:
        """Where `clips` test clips lie."""
        return (sampling.spread_in_segments if self.kind == "uniform" else sampling.spread)(clips)

    def test(self, video: "Video", at: float) -> list[int]:
        """Frame indices of the clip at `at`: dense, from 0 (starts at the first frame) to 1 (ends at the
        last); uniform, how far into its segment each frame lies."""
        if self.kind == "uniform":
            return sampling.uniform(video.num_frames, self.num_frames, at)
        at = 0.5 if self.kind == "middle" else at
        return sampling.dense(video.num_frames, self.num_frames, self._stride(video), at)

    def around(self, video: "Video", centre: int) -> list[int]:
        """Frame indices of the dense clip around this frame."""
        return sampling.around(video.num_frames, self.num_frames, self._stride(video), centre)

    def _stride(self, video: "Video") -> float:
        """In the video's own frames."""
        if self.target_fps and video.fps:
            return self.stride * video.fps / self.target_fps
        return self.stride

    def train(self, video: "Video") -> list[int]:
        """Frame indices of a random clip (torch's global generator)."""
        if self.kind == "uniform":
            places = torch.rand(self.num_frames).tolist()
            return sampling.segments(video.num_frames, self.num_frames, places)
        return self.test(video, torch.rand(()).item())


@dataclass(frozen=True)
class TrainViews:
    """`repeats` random clips of one decoded video (repeated augmentation).

    on_device: clips are cut out here, and augmented and resized behind the upload (`augment.finish`).
    """

    sampling: Sampling
    transform: TrainTransform
    repeats: int = 1
    on_device: bool = False

    def __call__(self, video: "Video", target: Any, make: Make = empty) -> tuple:
        """-> clips uint8 (V, 3, T, H, W), V targets: a crop may move one, mirroring change it.

        On the device: uint8 (T, h, w, 3), what `cut` leaves of each clip, one behind the other, flat;
        targets; draws.
        """
        indices = [self.sampling.train(video) for _ in range(self.repeats)]
        frames, clips = read_once(video, indices, self.transform.short_side)
        frames = self.transform.prepare(frames)
        draws = [self.transform.draw(frames, target) for _ in clips]
        targets = [self.transform.move(target, draw) for draw in draws]
        cuts = [[cut(frames[i], draw) for i in clip] for clip, draw in zip(clips, draws, strict=True)]
        if self.on_device:
            out = make([sum(frame.numel() for clip in cuts for frame in clip)])
            for frames, part in zip(cuts, split(out, draws), strict=True):
                torch.stack(frames, out=part)
            return out, targets, draws
        out = make((len(clips), 3, len(clips[0]), *[self.transform.size] * 2))
        for frames, draw, pixels in zip(cuts, draws, out, strict=True):
            augment(torch.stack(frames), draw, pixels)
        return out, targets


@dataclass(frozen=True)
class TestViews:
    """`clips` x `crops` views of one decoded video; view index = clip * crops + crop.

    preview: makes one of the frames that were decoded, uint8 (N, 3, H, W), for the scoring's report.
    """

    sampling: Sampling
    transform: TestTransform
    clips: int = 1
    preview: Callable[[Tensor], bytes] | None = None

    def __call__(
        self, video: "Video", target: Any, make: Make = empty
    ) -> tuple[Tensor, list] | tuple[Tensor, list, None, bytes]:
        """-> clips uint8 (V, 3, T, H, W), V times the target as it is; no draws; the preview, if any."""
        indices = [self.sampling.test(video, at) for at in self.sampling.spread(self.clips)]
        frames, clips = read_once(video, indices, self.transform.short_side)
        crops = self.transform(frames)
        views = [[crop[place] for place in clip] for clip in clips for crop in crops]
        extra = () if self.preview is None else (None, self.preview(frames))
        return stack_frames(views, make), [target] * len(views), *extra


@dataclass(frozen=True)
class WholeView:
    """One clip of a video with all its pixels, and the target that belongs to them.

    transform: frames uint8 (T, 3, H, W), the row's target -> frames (T, 3, H', W'), what batches carry;
        what is random about it is drawn by torch's global generator.
    random: whether the clip lies anywhere, or in the middle.
    """

    sampling: Sampling
    transform: Callable[[Tensor, Any], tuple[Tensor, Any]]
    random: bool = False

    def __call__(self, video: "Video", target: Any, make: Make = empty) -> tuple[Tensor, list]:
        """-> clip uint8 (1, 3, T, H', W'), whose size may differ from sample to sample; one target."""
        clip = self.sampling.train(video) if self.random else self.sampling.test(video, 0.5)
        frames, (places,) = read_once(video, [clip])
        frames, target = self.transform(frames[places], target)
        return stack_frames([frames], make), [target]


def read_once(
    video: "Video", clips: Sequence[list[int]], short_side: int | None = None
) -> tuple[Tensor, list[list[int]]]:
    """Every frame that some clip needs, read once (N, 3, H, W), and each clip's places among them.

    short_side: what a frame may be made smaller to while it is decoded, where that is less work.
    """
    needed = sorted(set().union(*clips))
    place = {frame: i for i, frame in enumerate(needed)}
    return video.read(needed, short_side), [[place[frame] for frame in clip] for clip in clips]


def stack_frames(views: Sequence[Sequence[Tensor]], make: Make) -> Tensor:
    """Frames (3, H, W) of each view -> (V, 3, T, H, W), contiguous: each pixel is copied once."""
    out = make((len(views), 3, len(views[0]), *views[0][0].shape[1:]))
    for view, frames in zip(out, views, strict=True):
        torch.stack(list(frames), 1, out=view)
    return out
