"""A video of any length, read once from start to end in constant memory; and windows that slide over it."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from .decode import (
    HIGHEST_RATE,
    IMAGE_SUFFIXES,
    PLAYLISTS,
    DecodeError,
    beginning,
    demux,
    opened,
    upright,
)
from .transforms import TestTransform
from .views import Sampling

JUMP = 1.0  # seconds back in time; less is a rounded clock
UNIFORM_WINDOW = 4.0  # seconds, where a checkpoint's clips span whole videos (Something-Something's last 4)
IMAGE_STEP = 1.0  # seconds between windows of one frame
ANSWER = 1.0  # seconds after which a child process hands over what it has, to show that it lives
TICK = 1e-6  # seconds, or frames: less is rounding


class Shown(NamedTuple):
    """A frame of a video, when it is shown and for how long (seconds)."""

    time: float
    lasts: float
    frame: av.VideoFrame


class VideoStream:
    """A video file read once from its start to its end: constant memory and no index, however long it is.

    fps: frames/s. seconds: how long it lasts, by its header; 0.0: unknown.
    """

    def __init__(self, path: Path, container: av.container.InputContainer, stream: av.VideoStream):
        self.path, self._container, self._stream = path, container, stream
        rates = (float(rate or 0) for rate in (stream.average_rate, stream.guessed_rate))
        self.fps = next((rate for rate in rates if 0 < rate <= HIGHEST_RATE), 25.0)
        self.seconds = float((stream.duration or 0) * (stream.time_base or 0))
        self.seconds = self.seconds or (container.duration or 0) / av.time_base
        self._rgb = VideoReformatter()

    def __iter__(self) -> Iterator[Shown]:
        """Every frame in the order shown, at its presentation time; the file starts at 0, as in players.

        Frames before the first sound one are left out. Raises DecodeError at the first frame after it that
        cannot be read.
        """
        unit, start = float(self._stream.time_base or 0), (self._container.start_time or 0) / av.time_base
        end, begun = 0.0, False
        try:
            for packet in demux(self._container, self._stream):
                for frame in packet.decode():
                    if frame.is_corrupt and begun:
                        raise DecodeError(f"{self.path}: after {end:.2f} s: a corrupt frame")
                    if frame.is_corrupt:
                        continue
                    time = end if frame.pts is None else frame.pts * unit - start
                    if begun and time < end - JUMP:  # a recording that was joined: its clock starts anew
                        start, time = start - (end - time), end
                    lasts = (frame.duration or 0) * unit or 1 / self.fps
                    yield Shown(time, lasts, frame)
                    end, begun = time + lasts, True
        except av.FFmpegError as error:
            raise DecodeError(f"{self.path}: after {end:.2f} s: {error.strerror or error}") from error
        if not begun:
            raise DecodeError(f"{self.path}: the video stream holds no frame")

    def seek(self, seconds: float) -> None:
        """Go on from the last key frame before this time."""
        start = self._container.start_time or 0
        self._container.seek(round(seconds * av.time_base) + start)

    def pixels(self, frame: av.VideoFrame) -> np.ndarray:
        """-> uint8 (H, W, 3), RGB, upright."""
        return upright(self._rgb, frame)


@contextlib.contextmanager
def open_stream(path: str | os.PathLike[str], threads: int = 0) -> Iterator[VideoStream]:
    """Open a video file to read it from start to end. Raises DecodeError, also for images and folders."""
    path = Path(path)
    start = beginning(path)
    if start is None or path.suffix.lower() in IMAGE_SUFFIXES:
        raise DecodeError(f"{path}: images have no times; a timeline needs a video file")
    if not start or start.startswith(PLAYLISTS):
        raise DecodeError(f"{path}: {'a playlist of other files, not a video' if start else 'empty file'}")
    with opened(path, threads) as (container, stream):
        yield VideoStream(path, container, stream)


class Window(NamedTuple):
    """A clip of a longer video: from `start` to `end` (seconds); uint8 (crops, 3, T, S, S)."""

    start: float
    end: float
    clips: np.ndarray


class Layout(NamedTuple):
    """Where windows begin and which frames they take.

    every: seconds from the start of one to the start of the next.
    offsets, length: of a window's frames and of its end behind its start; in seconds where `by_time`, else
        in frames.
    """

    every: float
    offsets: list[float]
    length: float
    by_time: bool

    @classmethod
    def of(
        cls, sampling: Sampling, fps: float, seconds: float, every: float | None, window: float | None
    ) -> "Layout":
        """Of a video: frames/s, seconds in all (0.0: unknown); every, window: seconds, None: by `sampling`.

        A window is as long as the checkpoint's clips, num_frames x stride frames. With `window`, or with
        sampling "uniform", it is so many seconds (no more than the video has), and its frames are those on
        screen at the middle of each of num_frames equal parts. By default windows touch.
        """
        frames = sampling.num_frames
        if window is None and sampling.kind == "uniform":
            window = UNIFORM_WINDOW
        if window is not None:
            window = min(window, seconds or window)
            offsets = [(i + 0.5) * window / frames for i in range(frames)]
            return cls(every or window, offsets, window, True)
        clip = sampling.test(SimpleNamespace(num_frames=1 << 40, fps=fps), 0.0)
        offsets = [index - clip[0] for index in clip]
        length = round(offsets[-1] * frames / (frames - 1)) if frames > 1 else 1
        return cls(every or (length / fps if frames > 1 else IMAGE_STEP), offsets, length, False)


class WindowReader:
    """The windows of a video, a list at each call: what is there after `batch` of them or `ANSWER` seconds.

    Window k begins with the first frame at or after k x `every` seconds, if no earlier one does. A window
    that reaches past the end of the video is filled up with the last frame, as the clips of short videos
    are; with less than half of its frames there it is left out, unless it is the only one.
    Where a frame cannot be read, the video ends, and DecodeError is raised behind the last window.

    skip: windows at the beginning that are left out.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sampling: Sampling,
        transform: TestTransform,
        *,
        every: float | None,
        window: float | None,
        skip: int,
        batch: int,
    ):
        self.path, self.sampling, self.transform = path, sampling, transform
        self.every, self.window, self.skip, self.batch = every, window, skip, batch
        self._windows: Iterator[Window | None] | None = (
            None  # made at the first call, in the process that reads
        )

    def __call__(self, _: object = None) -> list[Window] | None:
        """-> the next windows, perhaps none yet; None: there are no more. Raises DecodeError."""
        self._windows = self._windows or self._read()
        windows, until = [], time.monotonic() + ANSWER
        for window in self._windows:
            if window is not None:
                windows.append(window)
            if len(windows) == self.batch or time.monotonic() > until:
                return windows
        return windows or None

    def _read(self) -> Iterator[Window | None]:
        """Windows as they end; None after each frame."""
        with open_stream(self.path) as stream:
            layout = Layout.of(self.sampling, stream.fps, stream.seconds, self.every, self.window)
            open_windows: deque[_Open] = deque()
            number, due, last, error = 0, -float("inf"), None, None
            try:
                for index, shown in enumerate(stream):
                    now = shown.time if layout.by_time else index
                    for window in open_windows:
                        window.take(now, last)
                    while open_windows and open_windows[0].end <= now + TICK:
                        yield open_windows.popleft().closed(shown.time)
                    if shown.time >= due - TICK:
                        if number >= self.skip:
                            open_windows.append(_Open(shown.time, now, layout, number == 0))
                        number += 1
                        due = (int((shown.time + TICK) / layout.every) + 1) * layout.every
                    last = _Picture(shown, stream, self.transform)
                    yield None
            except DecodeError as caught:
                error = caught
            if last is not None:
                end = last.shown.time + last.shown.lasts
                for window in open_windows:
                    if window.first or 2 * window.frames_until(end if layout.by_time else index + 1) >= len(
                        layout.offsets
                    ):
                        window.take(float("inf"), last)
                        yield window.closed(end)
            if error is not None:
                raise error


class _Picture:
    """A frame, cut and resized when a window first needs it."""

    def __init__(self, shown: Shown, stream: VideoStream, transform: TestTransform):
        self.shown, self._stream, self._transform = shown, stream, transform
        self._crops: Tensor | None = None

    def crops(self) -> Tensor:
        """-> uint8 (crops, 3, S, S)."""
        if self._crops is None:
            pixels = torch.from_numpy(np.ascontiguousarray(self._stream.pixels(self.shown.frame)))
            self._crops = torch.cat(self._transform(pixels.permute(2, 0, 1)[None]))
        return self._crops


class _Open:
    """A window that is not yet at its end."""

    def __init__(self, start: float, now: float, layout: Layout, first: bool):
        self.start, self.first, self.by_time = start, first, layout.by_time
        self.wanted = [now + offset for offset in layout.offsets]
        self.end = now + layout.length
        self.frames: list[Tensor] = []

    def take(self, now: float, picture: _Picture) -> None:
        """`picture` is on screen until `now`."""
        while len(self.frames) < self.frames_until(now):
            self.frames.append(picture.crops())

    def frames_until(self, now: float) -> int:
        return sum(at < now - TICK for at in self.wanted)

    def closed(self, now: float) -> Window:
        end = min(now, self.end) if self.by_time else now
        return Window(self.start, end, torch.stack(self.frames, 2).numpy())
