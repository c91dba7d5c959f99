"""A video of any length, read once from start to end in constant memory; and windows that slide over it."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Self

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import DecodeError
from .decode import HIGHEST_RATE, PLAYLISTS, beginning, demux, opened, upright
from .demo import ENCODER
from .media import IMAGE_SUFFIXES
from .transforms import TestTransform
from .views import Sampling

JUMP = 1.0  # seconds back in time; less is a rounded clock
UNIFORM_WINDOW = 4.0  # seconds, where a checkpoint's clips span whole videos (Something-Something's last 4)
ANSWER = 1.0  # seconds after which a child process hands over what it has, to show that it lives
CUT, CUT_BYTES = 8, 1 << 19  # small frames are resized some at a time, larger ones one by one: cache
CHUNK = 1 << 26  # bytes of frames that wait to be worked on
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

    def __init__(self, path: Path | str, container: av.container.InputContainer, stream: av.VideoStream):
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
        end, begun, lost = 0.0, False, None
        try:
            for packet in demux(self._container, self._stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if begun:
                        raise
                    frames, lost = [], lost or error  # of a recording or a camera that is joined midway
                for frame in frames:
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
            if lost is not None and not begun:
                raise lost
        except av.ExitError:  # what was opened with a time limit has not answered
            raise
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
def open_stream(path: str | os.PathLike[str], threads: int = 1) -> Iterator[VideoStream]:
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
        cls, sampling: Sampling, fps: float, seconds: float, every: float, window: float | None
    ) -> "Layout":
        """Of a video of `fps` frames/s and `seconds` in all (0.0: unknown).

        A window is as long as the checkpoint's clips, num_frames x stride frames. With `window`, or with
        sampling "uniform", it is so many seconds, no more than the video has, and its frames are those on
        screen at the middle of each of num_frames equal parts.
        """
        frames = sampling.num_frames
        if window is None and sampling.kind == "uniform":
            window = UNIFORM_WINDOW
        if window is not None:
            window = min(window, seconds or window)
            offsets = [(i + 0.5) * window / frames for i in range(frames)]
            return cls(every, offsets, window, True)
        clip = sampling.test(SimpleNamespace(num_frames=1 << 40, fps=fps), 0.0)
        offsets = [index - clip[0] for index in clip]
        length = round(offsets[-1] * frames / max(frames - 1, 1))
        return cls(every, offsets, max(length, offsets[-1] + 1), False)  # frames of slow videos repeat


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
        every: float,
        window: float | None,
        skip: int,
        batch: int,
    ):
        self.path, self.sampling, self.transform = path, sampling, transform
        self.every, self.window, self.skip, self.batch = every, window, skip, batch
        self._windows: Iterator[Window | None] | None = None  # made in the process that reads
        self._broken = False

    def __call__(self, _: object = None) -> list[Window] | None:
        """-> the next windows, perhaps none yet; None: there are no more. Raises DecodeError."""
        self._windows = self._windows or self._read()
        windows, until = [], time.monotonic() + ANSWER
        for window in self._windows:
            if window is not None:
                windows.append(window)
            if len(windows) == self.batch or self._broken or time.monotonic() > until:
                return windows
        return windows or None

    def _read(self) -> Iterator[Window | None]:
        """Windows as they end; None after each frame."""
        with open_stream(self.path) as stream:
            layout = Layout.of(self.sampling, stream.fps, stream.seconds, self.every, self.window)
            cutter = _Cutter(stream, self.transform)
            windows: deque[_Open] = deque()
            number, due, last, error = 0, -float("inf"), None, None
            try:
                for index, shown in enumerate(stream):
                    now = shown.time if layout.by_time else index
                    for window in windows:
                        window.take(now, last)
                    while windows and windows[0].end <= now + TICK:
                        yield windows.popleft().closed(shown.time)
                    if shown.time >= due - TICK:
                        if number >= self.skip:
                            windows.append(_Open(shown.time, now, layout, cutter))
                        number += 1
                        due = (int((shown.time + TICK) / layout.every) + 1) * layout.every
                    last = _Picture(shown)
                    yield None
            except DecodeError as caught:
                error = caught
            end = last.shown.time + last.shown.lasts if last else 0.0
            for window in windows:
                there = sum(at < (end if layout.by_time else index + 1) - TICK for at in window.wanted)
                if 2 * there >= len(window.wanted) or number == 1:
                    window.take(float("inf"), last)
                    yield window.closed(end)
            if error is not None:
                self._broken = True
                yield None  # the windows before it are handed over first
                raise error


class _Picture:
    """A frame of a video: `crops` uint8 (crops, 3, S, S) where a window needs it, and _Cutter made them."""

    def __init__(self, shown: Shown):
        self.shown = shown
        self.pixels: np.ndarray | None = None
        self.crops: Tensor | None = None


class _Cutter:
    """Resizes and cuts pictures, some at a time, which is faster than one by one."""

    def __init__(self, stream: VideoStream, transform: TestTransform):
        self.stream, self.transform = stream, transform
        self.waiting: list[_Picture] = []

    def add(self, picture: _Picture) -> None:
        if picture.pixels is not None or picture.crops is not None:
            return
        picture.pixels = self.stream.pixels(picture.shown.frame)
        if self.waiting and picture.pixels.shape != self.waiting[0].pixels.shape:
            self.cut()
        self.waiting.append(picture)
        if len(self.waiting) == CUT or picture.pixels.size >= CUT_BYTES:
            self.cut()

    def cut(self) -> None:
        if not self.waiting:
            return
        clip = torch.from_numpy(np.stack([picture.pixels for picture in self.waiting]))
        for picture, *crops in zip(self.waiting, *self.transform(clip.permute(0, 3, 1, 2)), strict=True):
            picture.crops, picture.pixels = torch.stack(crops), None
        self.waiting.clear()


class _Open:
    """A window that is not yet at its end."""

    def __init__(self, start: float, now: float, layout: Layout, cutter: _Cutter):
        self.start, self.by_time, self.cutter = start, layout.by_time, cutter
        self.wanted = [now + offset for offset in layout.offsets]
        self.end = now + layout.length
        self.pictures: list[_Picture] = []

    def take(self, now: float, picture: _Picture) -> None:
        """`picture` is on screen until `now`."""
        while len(self.pictures) < len(self.wanted) and self.wanted[len(self.pictures)] < now - TICK:
            self.cutter.add(picture)
            self.pictures.append(picture)

    def closed(self, now: float) -> Window:
        self.cutter.cut()
        end = min(now, self.end) if self.by_time else now
        clips = torch.stack([picture.crops for picture in self.pictures], 2)
        return Window(self.start, end, clips.numpy())


def seconds_of(path: str | os.PathLike[str]) -> float:
    """How long a video lasts, by its header; 0.0: unknown. Raises DecodeError."""
    with open_stream(path) as stream:
        return stream.seconds


def pictures_at(path: str | os.PathLike[str], seconds: float, height: int = 120) -> np.ndarray:
    """What a video shows at a time: uint8 (height, W, 3). Raises DecodeError."""
    with open_stream(path) as stream:
        stream.seek(seconds)
        for shown in stream:
            if shown.time + shown.lasts > seconds:
                break
        image = Image.fromarray(stream.pixels(shown.frame))
        return np.asarray(image.resize((max(round(image.width * height / image.height), 1), height)))


class FrameReader:
    """The frames of a video file from start to end: a call gives as many as a second or `CHUNK` bytes hold.

    -> (time, how long it lasts, uint8 (H, W, 3)) of each; None: no more. Raises DecodeError for what cannot
    be read, after the frames before it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self._frames, self._error = path, None, None

    def __call__(self, _: object = None) -> list[tuple[float, float, np.ndarray]] | None:
        self._frames = self._frames or self._read()
        until, frames, size = time.monotonic() + ANSWER, [], 0
        for frame in self._frames:
            frames.append(frame)
            size += frame[2].nbytes
            if size >= CHUNK or time.monotonic() > until:
                break
        if not frames and self._error is not None:
            raise self._error
        return frames or None

    def _read(self) -> Iterator[tuple[float, float, np.ndarray]]:
        try:
            with open_stream(self.path) as stream:
                for shown in stream:
                    yield shown.time, shown.lasts, np.ascontiguousarray(stream.pixels(shown.frame))
        except DecodeError as error:
            self._error = error


class VideoWriter:
    """A video as H.264 in mp4, without sound, frame by frame; an odd height or width loses a pixel."""

    def __init__(self, path: str | os.PathLike[str], fps: float):
        self.path, self.fps, self._out = path, fps, None

    def __enter__(self) -> Self:
        self._container = av.open(str(self.path), "w", format="mp4")
        return self

    def add(self, pixels: np.ndarray, time: float, lasts: float) -> None:
        """uint8 (H, W, 3), shown at `time` for so long (seconds)."""
        unit = Fraction(1, 90_000)
        if self._out is None:
            rate = Fraction(self.fps).limit_denominator(1001)
            out = self._container.add_stream("libx264", rate=rate, options=ENCODER | {"threads": "0"})
            out.height, out.width = (max(side // 2 * 2, 2) for side in pixels.shape[:2])
            out.pix_fmt, out.codec_context.time_base = "yuv420p", unit
            self._out = out
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = frame.reformat(self._out.width, self._out.height, "yuv420p")
        frame.pts, frame.time_base, frame.duration = round(time / unit), unit, round(lasts / unit)
        self._container.mux(self._out.encode(frame))

    def __exit__(self, *exception: object) -> None:
        with self._container:
            if self._out is not None and exception[0] is None:
                self._container.mux(self._out.encode(None))


class DrawnCopy:
    """Writes a video as H.264 in mp4, without sound, each frame as `draw` makes it.

    draw: uint8 (H, W, 3), its time in seconds -> uint8 (H', W', 3), of one size.
    A call works for `ANSWER` seconds: -> the time it got to; None: at the end, also where a frame cannot be
    read.
    """

    def __init__(self, source: Path, target: Path, draw: Callable[[np.ndarray, float], np.ndarray]):
        self.source, self.target, self.draw = source, target, draw
        self._times: Iterator[float] | None = None

    def __call__(self, _: object = None) -> float | None:
        self._times = self._times or self._write()
        until = time.monotonic() + ANSWER
        for reached in self._times:
            if time.monotonic() > until:
                return reached
        return None

    def _write(self) -> Iterator[float]:
        with (
            open_stream(self.source) as stream,
            VideoWriter(self.target, stream.fps) as out,
            contextlib.suppress(DecodeError),
        ):
            for shown in stream:
                pixels = self.draw(np.ascontiguousarray(stream.pixels(shown.frame)), shown.time)
                out.add(pixels, shown.time, shown.lasts)
                yield shown.time


class LabelledCopy(DrawnCopy):
    """A copy with labels (start, end, name, score) drawn in."""

    def __init__(self, source: Path, target: Path, labels: list[tuple[float, float, str, float]]):
        super().__init__(source, target, self._label)
        self.labels, self._signs = labels, {}

    def _label(self, pixels: np.ndarray, time: float) -> np.ndarray:
        texts = [f"{name} {score:.0%}" for start, end, name, score in self.labels if start <= time < end]
        return _labelled(pixels, "\n".join(texts), self._signs)


def _labelled(pixels: np.ndarray, text: str, signs: dict[str, np.ndarray]) -> np.ndarray:
    """Pixels with white text on a black sign in the lower left corner; signs that were drawn are kept."""
    if not text:
        return pixels
    if text not in signs:
        signs.clear()
        font = ImageFont.load_default(max(pixels.shape[0] // 14, 9))
        measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        left, top, right, bottom = measure.multiline_textbbox((0, 0), text, font=font)
        margin = max(pixels.shape[0] // 60, 2)
        sign = Image.new("RGB", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin))
        ImageDraw.Draw(sign).multiline_text((margin - left, margin - top), text, "white", font)
        signs[text] = np.asarray(sign)
    sign = signs[text][: pixels.shape[0], : pixels.shape[1]]
    pixels = pixels.copy()
    pixels[pixels.shape[0] - sign.shape[0] :, : sign.shape[1]] = sign
    return pixels
