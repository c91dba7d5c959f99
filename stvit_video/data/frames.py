"""A video as JPEG frames in a shard, so that a read takes just the bytes of the frames it asks for.

Its sample has these members, in this order:

KEY.frames  an index: what the source was, and where each kept frame lies in the next member
KEY.mov     the frames, back to back, as Motion JPEG in QuickTime, which FFmpeg, VLC and decord play
KEY.cls     the label

The index is little-endian: MAGIC; width and height; frames of the source; `every`; the source's frames/s as
two numbers; the CRC-32 of KEY.mov; then FRAME for each kept frame; then the CRC-32 of all that.
"""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import av
import numpy as np
import simplejpeg
import torch
from torch import Tensor

from ..errors import DecodeError
from .decode import Frames

if TYPE_CHECKING:
    from .shards import Place

MAGIC = b"STVITJPG"
HEAD = struct.Struct("<8s7I")
CRC = struct.Struct("<I")
FRAME = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])  # offset: from the start of KEY.mov
INDEX, VIDEO = "frames", "mov"  # the suffixes


class Index(NamedTuple):
    """KEY.frames.

    num_frames, rate: of the source; rate 0: not known. every: frames 0, every, 2 * every, ... are kept.
    crc: of KEY.mov. frames: an array of FRAME.
    """

    width: int
    height: int
    num_frames: int
    every: int
    rate: Fraction
    crc: int
    frames: np.ndarray

    def to_bytes(self) -> bytes:
        *numbers, rate, crc, frames = self
        data = HEAD.pack(MAGIC, *numbers, *rate.as_integer_ratio(), crc) + frames.tobytes()
        return data + CRC.pack(zlib.crc32(data))

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Raises ValueError for anything but what `to_bytes` gave."""
        data, crc = data[: -CRC.size], data[-CRC.size :]
        if len(data) < HEAD.size or CRC.pack(zlib.crc32(data)) != crc or not data.startswith(MAGIC):
            raise ValueError("the checksum of its index is wrong")
        _, width, height, num_frames, every, over, under, crc = HEAD.unpack_from(data)
        frames = np.frombuffer(data, FRAME, offset=HEAD.size)
        if not (every and under and num_frames and len(frames) == -(-num_frames // every)):
            raise ValueError("its index makes no sense")
        return cls(width, height, num_frames, every, Fraction(over, under), crc, frames)


class FrameVideo(Frames):
    """The video of a sample of frames; num_frames and fps are those of its source.

    Of every second frame (`every` 2), an odd frame is the one before it. Each frame's checksum is compared.
    Raises DecodeError, also where the shard is not what it was when it was listed.
    """

    scales = True

    def __init__(self, path: str, place: "Place"):
        self.path, self.name, self.place = Path(path), path, place
        try:
            self._file = open(place.shard, "rb", buffering=0)  # noqa: SIM115 (`close` closes it)
        except OSError as error:
            raise DecodeError(f"{path}: {place.shard}: {error.strerror}") from error
        try:
            self._open(self._bytes(place.offset, place.head))
        except BaseException:
            self.close()
            raise
        self.num_frames, self.fps = self.index.num_frames, float(self.index.rate)

    def _open(self, head: bytes) -> None:
        """head: of the sample, up to the first byte of KEY.mov."""
        try:
            with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
                first, second = tar.next(), tar.next()
            if second is None:
                raise ValueError("a header of the tar")
            self.data = head[first.offset_data :][: first.size]
            self.index = Index.of(self.data)
            if max(self.index.frames["offset"].max(), self.index.frames["size"].max()) > second.size:
                raise ValueError("its index makes no sense")
        except (tarfile.TarError, ValueError) as error:
            raise self._damaged(str(error)) from error
        if f"{self.place.shard}/{second.name}" != self.name:
            raise DecodeError(f"{self.path}: not at its place, the shard has changed since it was listed")
        self._start, self._size = self.place.offset + self.place.head, second.size

    def read(self, indices: Sequence[int], short_side: int | None = None) -> Tensor:
        """As `Frames.read`. short_side: decoded at 1/2, 1/4 or 1/8 of the size where that is enough."""
        kept: dict[int, list[int]] = {}
        for index, places in self._in_clip(indices).items():
            kept.setdefault(index // self.index.every, []).extend(places)
        clip, smallest = None, short_side or max(self.index[:2])
        for number, jpeg in self._jpegs(sorted(kept)):
            try:
                if clip is None:
                    size = simplejpeg.decode_jpeg_header(jpeg, smallest, smallest, 2)[:2]
                    clip = np.empty((len(indices), *size, 3), np.uint8)
                place, *others = kept[number]
                simplejpeg.decode_jpeg(
                    jpeg, "RGB", min_height=smallest, min_width=smallest, min_factor=2, buffer=clip[place]
                )
            except ValueError as error:
                raise self._error(number * self.index.every, str(error)) from error
            if others:
                clip[others] = clip[place]
        return torch.from_numpy(clip).permute(0, 3, 1, 2)

    def decode(self, wanted: Sequence[int]) -> Generator[tuple[int, np.ndarray], None, None]:
        for index in wanted:
            yield index, self.read([index])[0].permute(1, 2, 0).numpy()

    def mov(self) -> bytes:
        """KEY.mov, its checksum compared."""
        data = self._bytes(self._start, self._size)
        if zlib.crc32(data) != self.index.crc:
            raise self._damaged(f"the checksum of its .{VIDEO} is wrong")
        return data

    def close(self) -> None:
        self._file.close()

    def _jpegs(self, numbers: list[int]) -> Iterator[tuple[int, memoryview]]:
        """Rising numbers of kept frames -> (number, JPEG) of each; those that touch in one read."""
        frames = self.index.frames[numbers]
        ends = frames["offset"] + frames["size"]
        first = 0
        for last in range(len(numbers)):
            if last + 1 < len(numbers) and ends[last] == frames["offset"][last + 1]:
                continue
            start = int(frames["offset"][first])
            run = memoryview(self._bytes(self._start + start, int(ends[last]) - start))
            for number, (offset, size, crc) in zip(
                numbers[first : last + 1], frames[first : last + 1].tolist(), strict=True
            ):
                jpeg = run[offset - start :][:size]
                if zlib.crc32(jpeg) != crc:
                    index = number * self.index.every
                    raise self._error(
                        index, "the shard is damaged there (the checksum of the frame is wrong)"
                    )
                yield number, jpeg
            first = last + 1

    def _bytes(self, offset: int, size: int) -> bytes:
        data = b""
        try:
            while len(data) < size:  # 2 GB at a time, by Linux
                part = os.pread(self._file.fileno(), size - len(data), offset + len(data))
                if not part:
                    raise self._damaged(f"it ends at byte {offset + len(data)}")
                data = data + part if data else part
        except OSError as error:
            raise DecodeError(f"{self.path}: {self.place.shard}: {error.strerror}") from error
        return data

    def _damaged(self, cause: str) -> DecodeError:
        return DecodeError(f"{self.path}: the shard is damaged there ({cause})")


def pack_frames(jpegs: Sequence[bytes], video: Frames, every: int) -> dict[str, bytes]:
    """The JPEGs of frames 0, every, 2 * every, ... of `video` -> KEY.frames and KEY.mov by their suffixes.

    In KEY.mov each frame lasts until the next kept one is shown: rate and duration are the source's.
    """
    height, width = simplejpeg.decode_jpeg_header(jpegs[0])[:2]
    times, unit = frame_times(video)
    times = [*times[:-1:every], times[-1]]
    file = io.BytesIO()
    with av.open(file, "w", format="mov", container_options={"fflags": "bitexact"}) as container:
        stream = container.add_mux_stream("mjpeg", rate=round(video.fps) or 1, width=width, height=height)
        stream.time_base = unit
        for jpeg, (time, until) in zip(jpegs, pairwise(times), strict=True):
            packet = av.Packet(jpeg)
            packet.pts = packet.dts = time
            packet.duration, packet.time_base, packet.stream = until - time, unit, stream
            packet.is_keyframe = True
            container.mux(packet)
    mov, sizes = file.getvalue(), [len(jpeg) for jpeg in jpegs]
    ends = mov.index(jpegs[0]) + np.cumsum(sizes)
    frames = np.empty(len(jpegs), FRAME)
    frames["offset"], frames["size"], frames["crc"] = ends - sizes, sizes, [zlib.crc32(j) for j in jpegs]
    for (offset, size, _), jpeg in zip(frames.tolist(), jpegs, strict=True):
        assert mov[offset : offset + size] == jpeg, "FFmpeg did not put the frames back to back"
    index = Index(width, height, video.num_frames, every, _rate(video), zlib.crc32(mov), frames)
    return {INDEX: index.to_bytes(), VIDEO: mov}


def frame_times(video: Frames) -> tuple[list[int], Fraction]:
    """When each frame of a video is shown and, last, when the last one ends; and the unit, in s.

    Where frames come evenly, by the precision of their clock, in units of one frame; 25/s where unknown.
    """
    rate = _rate(video) or Fraction(25)
    if video.clock is not None:
        times, unit = video.clock
        start = times[0]
        if any(abs((time - start) * unit * rate - i) > unit * rate for i, time in enumerate(times)):
            return [time - start for time in times], unit
    return list(range(video.num_frames + 1)), 1 / rate


def _rate(video: Frames) -> Fraction:
    return Fraction(video.fps).limit_denominator(100_000)
