"""Key frames: moments of a video with people in boxes, what they do, and the clip around each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..errors import DecodeError, InputError
from .batch import empty
from .views import Make, Sampling, read_once, stack_frames

if TYPE_CHECKING:
    from .decode import Video

RelativeBox = tuple[float, float, float, float]  # x1, y1, x2, y2 as shares of the frame's width and height


class KeyFrame(NamedTuple):
    """What a list says of one moment of a video; the target of a row.

    second: as the list counts. actions: of each box, class ids in rising order; none: not known, or none.
    """

    video: str
    second: float
    boxes: tuple[RelativeBox, ...] = ()
    actions: tuple[tuple[int, ...], ...] = ()

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(sorted({action for actions in self.actions for action in actions}))

    @property
    def at(self) -> tuple[str, float]:
        """What tells it from other key frames."""
        return self.video, self.second


@dataclass(frozen=True)
class KeyFrameViews:
    """The clip around a key frame, and its boxes in pixels, which move with them.

    target: key frame -> boxes (n, 4) as shares of the frame, and tensors with an entry for each box.
    transform: frames uint8 (T, 3, H, W), target with tv_tensors -> both changed.
    first_second: which second of the list is the start of a video file.
    repeats: clips of one decoded video; they differ where the transform is random.
    """

    sampling: Sampling
    transform: Callable[[Tensor, Any], tuple[Tensor, Any]]
    target: Callable[[KeyFrame], tuple[np.ndarray, dict[str, Tensor]]]
    first_second: float = 0.0
    repeats: int = 1

    def __post_init__(self):
        if self.sampling.kind != "dense":
            raise InputError(f"data.sampling={self.sampling.kind}: clips lie around key frames: dense")

    def __call__(self, video: "Video", key: KeyFrame, make: Make = empty) -> tuple[Tensor, list]:
        """-> clips uint8 (V, 3, T, H', W'); V dicts: boxes (n, 4) in pixels, `frame` (the key frame's
        index), and what `target` gives. Boxes that a crop left less than a pixel of are gone.

        Raises DecodeError for a second that is not in the video.
        """
        at = self.frame(video, key)
        frames, (places,) = read_once(video, [self.sampling.around(video, at)])
        shares, each = self.target(key)
        height, width = frames.shape[-2:]
        boxes = torch.from_numpy(shares * [width, height, width, height]).float().view(-1, 4)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        views, targets = [], []
        for _ in range(self.repeats):
            clip, target = self.transform(frames[places], {"boxes": boxes, **each})
            moved = target["boxes"].as_subclass(Tensor)
            left = (moved[:, 2:] - moved[:, :2]).amin(1) >= 1
            views.append(clip)
            targets.append(
                {"boxes": moved[left]} | {key: target[key][left] for key in each} | {"frame": at}
            )
        return stack_frames(views, make), targets

    def frame(self, video: "Video", key: KeyFrame) -> int:
        """Which frame the key frame is. Frames without a rate have `data.target_fps`."""
        fps = video.fps or self.sampling.target_fps
        if not fps:
            raise InputError(f"{key.video}: images have no times; data.target_fps: frames a second")
        at, end = round((key.second - self.first_second) * fps), video.num_frames / fps
        if not 0 <= at < video.num_frames:
            raise DecodeError(
                f"{key.video}: second {key.second:g} is outside the video, which has seconds "
                f"{self.first_second:g} to {self.first_second + end:g} (data.first_second)"
            )
        return at


@dataclass(frozen=True)
class Resized:
    """All of a frame. size: (height, width), or the short side of frames that keep their shape."""

    size: Sequence[int]

    def __call__(self, frames: Tensor, target: Any) -> tuple[Tensor, Any]:
        frames, target = v2.Resize(self.size, antialias=True)(tv_tensors.Video(frames), target)
        return frames.as_subclass(Tensor), target
