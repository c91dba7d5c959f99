"""What a video becomes in a shard: the file it is, JPEG frames, or H.264 with a key frame now and then.

Each is called with a row and gives its `Members`. Raises DecodeError for a video that cannot all be read,
or cannot be encoded.
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import av
import numpy as np
import simplejpeg
import torch
from torchvision.transforms.v2.functional import resize

from ..errors import DecodeError
from .decode import Frames, open_video
from .frames import INDEX, VIDEO, FrameVideo, frame_times, pack_frames
from .media import IMAGE_SUFFIXES
from .rows import Row


class Members(NamedTuple):
    """contents: by suffix, in order; uint8 arrays, which travel between processes without a copy."""

    contents: dict[str, np.ndarray]
    frames: int  # encoded

    @classmethod
    def of(cls, contents: dict[str, bytes], frames: int = 0) -> Self:
        return cls({suffix: np.frombuffer(data, np.uint8) for suffix, data in contents.items()}, frames)


@dataclass(frozen=True)
class Copy:
    """The file, byte by byte; a sample of frames, too, can be copied."""

    def __call__(self, row: Row) -> Members:
        contents = row.contents()
        if isinstance(contents, FrameVideo):
            with contents:
                return Members.of({INDEX: contents.data, VIDEO: contents.mov()})
        try:
            data = Path(row.path).read_bytes() if contents is None else contents
        except OSError as error:
            raise DecodeError(f"{row.path}: {error.strerror}") from error
        return Members.of({os.path.splitext(row.path)[1][1:].lower(): data})


@dataclass(frozen=True)
class Jpeg:
    """Frames 0, every, 2 * every, ... as JPEG, 4:2:0, for `FrameVideo`. An image is copied.

    short_side: larger frames are made smaller to this; None: none are. quality: 1 to 100, libjpeg's.
    """

    short_side: int | None = 256
    quality: int = 85
    every: int = 1

    def __call__(self, row: Row) -> Members:
        if is_image(row.path):
            return Copy()(row)
        with _source(row) as video:
            kept = range(0, video.num_frames, self.every)
            jpegs = {
                index: simplejpeg.encode_jpeg(frame, self.quality, "RGB", "420")
                for index, frame in _frames(row, video, kept, self.short_side, 1)
            }
            members = pack_frames([jpegs[index] for index in kept], video, self.every)
            return Members.of(members, len(kept))


@dataclass(frozen=True)
class H264:
    """Every frame, with the source's timestamps and no sound, by libx264 in MP4. An image is copied.

    gop: frames from key frame to key frame, at most. crf: quality, less is better. tune: libx264's, or
        "none". Sides are made even, as 4:2:0 wants them.
    """

    short_side: int | None = 256
    gop: int = 16
    crf: int = 23
    tune: str = "fastdecode"

    def __call__(self, row: Row) -> Members:
        if is_image(row.path):
            return Copy()(row)
        options = {"crf": str(self.crf), "g": str(self.gop)}
        options |= {} if self.tune == "none" else {"tune": self.tune}
        file, stream = io.BytesIO(), None
        with _source(row) as video:
            times, unit = frame_times(video)
            with av.open(file, "w", format="mp4", container_options={"fflags": "bitexact"}) as container:
                frames = _frames(row, video, range(video.num_frames), self.short_side, 2)
                for expected, (index, pixels) in enumerate(frames):
                    if index != expected:  # a damaged video gives some later, or again
                        raise DecodeError(f"{row.path}: frame {expected} cannot be read")
                    if stream is None:
                        stream = container.add_stream(
                            "libx264", rate=round(video.fps) or 25, options=options
                        )
                        stream.height, stream.width = pixels.shape[:2]
                        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
                        stream.codec_context.time_base = unit
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.pts, frame.duration = times[index], times[index + 1] - times[index]
                    frame.time_base = unit
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
            return Members.of({"mp4": file.getvalue()}, video.num_frames)


Encoding = Copy | Jpeg | H264


def is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


@contextlib.contextmanager
def _source(row: Row) -> Iterator[Frames]:
    with open_video(row.path, threads=1, contents=row.contents()) as video:
        try:
            yield video
        except (av.FFmpegError, struct.error, ValueError) as error:
            if isinstance(error, DecodeError):
                raise
            raise DecodeError(f"{row.path}: cannot be encoded ({error})") from error  # too large, too fast


def _frames(
    row: Row, video: Frames, wanted: range, short_side: int | None, multiple: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 (H, W, 3)), contiguous, of one size, its sides multiples of `multiple`."""
    if cause := row.missing_frames(video.num_frames):
        raise DecodeError(cause)
    sizes = set()
    for index, frame in video.decode(wanted):
        height, width = frame.shape[:2]
        sizes.add((width, height))
        if len(sizes) > 1:
            raise DecodeError(
                f"{row.path}: frames of {' and '.join('{}x{}'.format(*s) for s in sizes)} pixels"
            )
        short = min(height, width)
        size = [side * min(short_side or short, short) // short for side in (height, width)]
        size = [max(side // multiple, 1) * multiple for side in size]
        if size != [height, width]:
            pixels = torch.from_numpy(np.require(frame, requirements="CW")).permute(2, 0, 1)
            frame = resize(pixels, size, antialias=True).permute(1, 2, 0).numpy()
        yield index, np.ascontiguousarray(frame)
