"""Frames as they come, from a file, a folder that grows, or a camera, in chunks for a model to look at."""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

from ..errors import DecodeError
from .decode import FrameFolder
from .media import IMAGE_SUFFIXES, natural
from .stream import ANSWER, UNIFORM_WINDOW, VideoStream, open_stream
from .transforms import TestTransform
from .views import Sampling

WAITING = 2  # chunks of a live source that wait for a slow model; older ones are dropped
IDLE = 10.0  # seconds without a new image after which a folder has ended
LOOK = 0.05  # seconds between looks at a folder
UNKNOWN_RATE = 25.0  # frames/s of a folder, where the sampling needs some
PATIENCE = 10.0  # seconds for a camera or an address to answer
DEVICES = {"/dev/video": "v4l2"}  # how a name begins, and FFmpeg's word for what is there


class Chunk(NamedTuple):
    """Consecutive frames that a model takes, shown from `start` to `end` (seconds): uint8 (3, F, S, S).

    arrived: when the last of them came (time.monotonic). dropped: frames directly before it that the
    sampling took and nobody saw.
    """

    start: float
    end: float
    pixels: np.ndarray
    arrived: float
    dropped: int


class Picture(NamedTuple):
    """A frame of a source, shown at `time` for so long (seconds): uint8 (H, W, 3)."""

    time: float
    lasts: float
    pixels: np.ndarray


class LiveReader:
    """The chunks of a source, a list at each call: those that are there, perhaps none yet; None: its end.

    source: a video file, which is read as fast as it is asked for; a folder, whose images come as others
        write them; or an address that FFmpeg opens (rtsp://, http://, udp://, /dev/video0). The last comes
        at its own pace: what nobody asked for in time is dropped, the oldest first.
    frames: of a chunk, each as many frames of the source after the other as the sampling says.
    transform: with one crop.
    Calls raise DecodeError where the source cannot be read, behind the last whole chunk.
    """

    def __init__(
        self, source: str | os.PathLike[str], sampling: Sampling, transform: TestTransform, frames: int
    ):
        self.source, self.sampling, self.transform, self.frames = str(source), sampling, transform, frames
        self.live = is_address(self.source)
        self._chunks: Iterator[Chunk | None] | None = None  # made in the process that reads
        self._error: DecodeError | None = None

    def __call__(self, _: object = None) -> list[Chunk] | None:
        if self._error is not None:
            raise self._error
        self._chunks = self._chunks or (self._queued() if self.live else self._read())
        until = time.monotonic() + ANSWER
        try:
            for chunk in self._chunks:
                if chunk is not None:
                    return [chunk]
                if time.monotonic() > until:
                    return []
        except DecodeError as error:
            self._error = error
            return []
        return None

    def _queued(self) -> Iterator[Chunk | None]:
        """`_read` by a thread of its own, so that the source is never kept waiting."""
        waiting: queue.Queue[tuple[int, Chunk | Exception | None]] = queue.Queue(WAITING)
        threading.Thread(target=self._fill, args=(waiting,), daemon=True).start()
        after = 0
        while True:
            try:
                number, item = waiting.get(timeout=LOOK)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
            yield item._replace(dropped=self.frames * (number - after))
            after = number + 1

    def _fill(self, waiting: queue.Queue) -> None:
        """Puts (number, chunk), in place of the oldest where there is no room; last an error, or None."""
        number, end = 0, None
        try:
            for chunk in filter(None, self._read()):
                while waiting.full():
                    with contextlib.suppress(queue.Empty):
                        waiting.get_nowait()
                waiting.put((number, chunk))
                number += 1
        except Exception as error:  # whatever it is: who reads would wait for ever
            end = error
        waiting.put((number, end))

    def _read(self) -> Iterator[Chunk | None]:
        """Chunks as they are whole; None after every other frame."""
        with _opened(self.source) as (fps, pictures):
            step = self._step(fps)
            seen, taken, kept, start = 0, 0, [], 0.0
            for picture in pictures:
                if picture is not None:
                    seen, frame = seen + 1, None
                    while seen > round(taken * step):  # again where the source is slower than the sampling
                        taken += 1
                        start = start if kept else picture.time
                        frame = self._cut(picture.pixels) if frame is None else frame
                        kept.append(frame)
                        if len(kept) == self.frames:
                            end, now = picture.time + picture.lasts, time.monotonic()
                            yield Chunk(start, end, np.stack(kept, 1), now, 0)
                            kept = []
                yield None

    def _step(self, fps: float) -> float:
        """Of a source of `fps` frames/s (0.0: not known), frames from one that is taken to the next."""
        sampling = self.sampling
        if sampling.kind == "uniform":
            return max(UNIFORM_WINDOW * (fps or UNKNOWN_RATE) / sampling.num_frames, 1.0)
        return sampling.stride * (fps / sampling.target_fps if fps and sampling.target_fps else 1.0)

    def _cut(self, pixels: np.ndarray) -> np.ndarray:
        (crop,) = self.transform(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None])
        return crop[0].numpy()


def is_address(source: str) -> bool:
    return "://" in source or source.startswith(tuple(DEVICES))


@contextlib.contextmanager
def _opened(source: str) -> Iterator[tuple[float, Iterator[Picture | None]]]:
    """-> frames/s (0.0: not known), and the pictures of a source. Raises DecodeError."""
    if is_address(source):
        form = next((kind for name, kind in DEVICES.items() if source.startswith(name)), None)
        options = {"rtsp_transport": "tcp"} if source.startswith("rtsp://") else {}
        try:
            with av.open(source, format=form, options=options, timeout=PATIENCE) as container:
                if not container.streams.video:
                    raise DecodeError(f"{source}: no video stream")
                stream = VideoStream(source, container, container.streams.video[0])
                yield stream.fps, _pictures(stream)
        except av.ExitError as error:
            raise DecodeError(f"{source}: no answer in {PATIENCE:g} s") from error
        except (av.FFmpegError, OSError) as error:
            raise DecodeError(f"{source}: {error.strerror or error}") from error
    elif Path(source).is_dir():
        yield 0.0, _growing(Path(source))
    else:
        with open_stream(source) as stream:
            yield stream.fps, _pictures(stream)


def _pictures(stream: VideoStream) -> Iterator[Picture]:
    for shown in stream:
        yield Picture(shown.time, shown.lasts, stream.pixels(shown.frame))


def _growing(folder: Path) -> Iterator[Picture | None]:
    """Images of a folder in natural order, as they come; their time is when they came. None: no new one.

    An image that cannot be read is one that is being written; `IDLE` seconds after it came it is a
    DecodeError, and so is a folder that has gone, at once.
    """
    begun, seen, last, unread = time.monotonic(), set(), time.monotonic(), None
    while time.monotonic() - last < IDLE:
        try:
            files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        except OSError as error:
            raise DecodeError(f"{folder}: {error.strerror}") from error
        new = sorted((f for f in files if f.name not in seen and not f.name.startswith(".")), key=natural)
        if not new:
            unread = None
            time.sleep(LOOK)
            yield None
        for file in new:
            try:
                (_, pixels), *_ = FrameFolder(folder, [file]).decode([0])
            except DecodeError as error:
                last, unread = last if unread else time.monotonic(), error
                time.sleep(LOOK)
                yield None
                break
            seen.add(file.name)
            last, unread = time.monotonic(), None
            yield Picture(last - begun, 0.0, np.array(pixels))  # PIL's own may not be written to
    if unread is not None:
        raise unread
    if not seen:
        raise DecodeError(f"{folder}: no image came in {IDLE:g} s")
