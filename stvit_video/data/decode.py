"""The pixels a file holds: open_video(path).read([0, 8, 16]) -> uint8 (3, 3, H, W), RGB, upright.

Frame i is the i-th frame that a decode of the whole file shows, whatever else is asked for and in
whatever order. What cannot be read raises DecodeError; no other frame takes its place. Of damaged data that
the decoder does not flag it may make other pixels after a seek than on the way (docs/reliability.md).
"""

import bisect
import contextlib
import io
import itertools
import operator
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DecodeError, InputError, nearest
from .hidden import shows_frame
from .media import IMAGE_SUFFIXES, natural

DECODERS = ("av", "decord")

# Containers where a seek ends at the key frame asked for; elsewhere it may end at the start.
SEEKABLE = frozenset(("avi", "matroska", "mov", "mpegts"))
# Frames: nearer than this, decoding on costs less than a seek, which drops what is decoded ahead.
NEAR = 8
# Lists of other files (HLS, concat): FFmpeg would show those, from anywhere, for the one asked for.
PLAYLISTS = (b"#EXTM3U", b"ffconcat version")
HIGHEST_RATE = 480  # frames/s; more (1000, 90000) is the clock of the container, not a rate


class Video(Protocol):
    """What open_video returns; a with block closes it."""

    num_frames: int
    fps: float  # frames/s, 0.0: unknown

    def read(self, indices: Sequence[int], short_side: int | None = None) -> Tensor:
        """-> uint8 (len(indices), 3, H, W), RGB.

        short_side: frames may come smaller, but with a short side of no less than this.
        """

    def close(self) -> None:
        """Give back what is held: nothing, where a file is open only while it is read."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_video(
    path: str | os.PathLike[str],
    decoder: str = "av",
    threads: int = 1,
    contents: "bytes | Frames | None" = None,
) -> Video:
    """Open a video file, a folder of frames, or an image: a video of one frame. Also one within a shard.

    decoder: what reads video files, "av" (exact) or "decord" (as it counts and seeks).
    threads: of the decoder, 0: as many as it likes. With more than one, what it makes of a damaged file may
        differ from time to time.
    contents: of a video or image file, where they are in memory already; `path` is but its name then. A
        video of frames (`FrameVideo`) is returned as it is.
    Raises DecodeError for what cannot be opened, InputError for an unknown or absent decoder.
    """
    if decoder not in DECODERS:
        raise InputError(f"unknown decoder {decoder!r}{nearest(decoder, DECODERS)}")
    if isinstance(contents, Frames):
        return contents
    path = Path(path)
    if contents is None and f".tar{os.sep}" in str(path) and not path.exists():
        from .shards import find_member  # it needs this module

        return open_video(path, decoder, threads, find_member(str(path)))
    start = beginning(path) if contents is None else contents
    if start is None:
        try:
            files = sorted(filter(_is_image, path.iterdir()), key=natural)
        except OSError as error:
            raise DecodeError(f"{path}: {_cause(error)}") from error
        return FrameFolder(path, files)
    if not start:
        raise DecodeError(f"{path}: empty file")
    if _is_image(path):
        return FrameFolder(path, [path], contents)
    if start.startswith(PLAYLISTS):
        raise DecodeError(f"{path}: a playlist of other files, not a video")
    return AvVideo(path, threads, contents) if decoder == "av" else DecordVideo(path, threads, contents)


def beginning(path: Path) -> bytes | None:
    """The first bytes of a file, None for a folder. Raises DecodeError."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return None
        if not stat.S_ISREG(mode):  # to open a pipe is to wait for its writer
            raise DecodeError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            return file.read(32)
    except (FileNotFoundError, NotADirectoryError):
        raise DecodeError(f"{path}: no such file") from None
    except OSError as error:
        raise DecodeError(f"{path}: {_cause(error)}") from error


@contextlib.contextmanager
def opened(
    path: Path, threads: int, contents: bytes | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    # "file:" as a name may hold a colon; what is in memory refers to nothing outside: no protocol
    source, options = f"file:{path}", {}
    if contents is not None:
        source, options = io.BytesIO(contents), {"protocol_whitelist": "none"}
        source.name = str(path)  # helps FFmpeg to tell the format as it does on disk
    try:
        # "ignore" as a title need not be UTF-8
        with av.open(source, options=options, metadata_errors="ignore") as container:
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            best = container.streams.best("video")
            if not streams:
                raise DecodeError(f"{path}: no video stream")
            stream = best if best in streams else streams[0]
            if stream.codec_context is None:
                raise DecodeError(f"{path}: no decoder for the video stream")
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {_cause(error)}") from error


def upright(rgb: VideoReformatter, frame: av.VideoFrame) -> np.ndarray:
    """-> uint8 (H, W, 3), RGB."""
    # Plain swscale, by the matrix and range that the file names: the very levels of decord.
    pixels = rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()  # threads would cost more here
    return np.rot90(pixels, round(frame.rotation / 90))


class Frames(Video):
    """What the kinds of video share; each adds `decode`."""

    path: Path
    fps = 0.0
    scales = False  # whether frames come smaller where `read` has a short side
    shortage: str | None = None  # what the header promises and the file does not hold: it was cut off
    # When each frame is shown and, last, when the last one ends, with the unit in s; None: not known.
    clock: tuple[list[int], Fraction] | None = None

    def decode(self, wanted: Sequence[int]) -> Generator[tuple[int, np.ndarray], None, None]:
        """Rising indices, each once -> (index, uint8 (H, W, 3)) for each, in any order.

        Of a damaged file a frame may come again, which then counts, before DecodeError is raised.
        """
        raise NotImplementedError

    def read(self, indices: Sequence[int], short_side: int | None = None) -> Tensor:
        """Indices in any order, also repeated -> uint8 (len(indices), 3, H, W), channels last.

        short_side: of no use here; `FrameVideo` can save work by it.

        Raises IndexError for an index outside 0..num_frames-1, ValueError for none at all,
        DecodeError for a frame that cannot be read or differs in size from another.
        """
        places, clip = self._in_clip(indices), None
        # closing: after an error the file is closed now, not when its traceback is dropped
        with contextlib.closing(self.decode(sorted(places))) as frames:
            for index, frame in frames:
                clip = np.empty((len(indices), *frame.shape), np.uint8) if clip is None else clip
                if frame.shape != clip.shape[1:]:
                    (h, w), (height, width) = frame.shape[:2], clip.shape[1:3]
                    raise self._error(index, f"its size is {w}x{h}, that of others {width}x{height}")
                clip[places[index]] = frame
        return torch.from_numpy(clip).permute(0, 3, 1, 2)

    def _in_clip(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """The places of each index among `indices`."""
        if not len(indices):
            raise ValueError(f"{self.path}: no frame asked for")
        places: dict[int, list[int]] = {}
        for place, index in enumerate(map(operator.index, indices)):
            if not 0 <= index < self.num_frames:
                raise IndexError(f"{self.path}: frame {index} is not in 0..{self.num_frames - 1}")
            places.setdefault(index, []).append(place)
        return places

    def _error(self, index: int, cause: str) -> DecodeError:
        return DecodeError(f"{self.path}: frame {index} of {self.num_frames}: {cause}")


class FrameFolder(Frames):
    """Image files in natural order, img_2 before img_10, at an unknown rate."""

    def __init__(self, path: Path, files: list[Path], contents: bytes | None = None):
        if not files:
            raise DecodeError(f"{path}: a folder without images")
        self.path, self.files, self.num_frames, self.contents = path, files, len(files), contents
        names = [re.fullmatch(r"(.*?)(\d+)(\.\w+)", file.name) for file in files]
        if all(names) and len({name.group(1, 3) for name in names}) == 1:
            numbers = {int(name[2]) for name in names}
            missing = set(range(min(numbers), max(numbers))) - numbers
            if missing:  # all later frames would come too early
                raise DecodeError(
                    f"{path}: frame {min(missing)} is missing, "
                    f"{len(missing)} in all between {min(numbers)} and {max(numbers)}"
                )

    def decode(self, wanted: list[int]) -> Generator[tuple[int, np.ndarray], None, None]:
        for index in wanted:
            file = self.files[index]
            if self.contents is not None:
                file = io.BytesIO(self.contents)
            elif not file.is_file():
                raise self._error(index, f"{file.name}: not a regular file")
            try:
                with Image.open(file) as image:
                    pixels = _rgb(ImageOps.exif_transpose(image))
            except Exception as error:  # of a damaged file, anything
                raise self._error(index, f"{self.files[index].name}: {_cause(error)}") from error
            yield index, pixels


def _rgb(image: Image.Image) -> np.ndarray:
    """-> uint8 (H, W, 3). Raises ValueError for pixels whose range is not known."""
    if image.mode.startswith("I;16"):  # the higher byte, as for 16 bits of each colour; PIL would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("one number of 32 bits a pixel, expected 8 or 16")
    return np.asarray(image.convert("RGB"))


class AvVideo(Frames):
    """A video file, read by PyAV; of several video streams the one that players show.

    The packets are listed without decoding them. In a regular file each shows one frame or, by its header,
    none; frames are known by their timestamps, so that reading may begin at a key frame. In any other file
    the frames are counted by decoding them all, and known by their place in that order.
    """

    def __init__(self, path: Path, threads: int, contents: bytes | None = None):
        # With av.logging.set_level these threads log through Python and may block for good: leave it off.
        self.path, self.threads, self.contents = path, threads, contents
        with self._open() as (container, stream):
            shows = shows_frame(stream.codec_context.name, stream.codec_context.extradata)
            packets = [_Listed.of(packet, shows) for packet in demux(container, stream) if packet.size]
            packets, self._cut = _without_end(packets)
            rate, unit = stream.average_rate, stream.time_base
            reorders = stream.codec_context.has_b_frames
            kind = container.format.name.partition(",")[0]
            self.shortage = _shortage(container, stream, packets)
        times = [packet.pts for packet in packets]
        shown = [packet.pts for packet in packets if not packet.discard]
        self._index: dict[int, int] = {}  # timestamp -> frame; empty: known by place
        self._packets: dict[int, _Listed] = {}  # by timestamp
        self._keys: list[tuple[int, int]] = []  # (frame, where to seek to) of the key frames
        self._places: dict[int, int] = {}  # frame -> its place in the order of decoding
        self._until: dict[int, int] = {}  # frame -> the last one shown of those decoded up to it
        if (
            shown
            and None not in times
            and len(set(shown)) == len(shown)
            and not any(packet.corrupt or packet.discard is None for packet in packets)
            # frames in front of the first key frame refer to what is not there, and do not come out
            and packets[0].key
            and times[0] == min(times)
            # AVI stores no times: they are made up, in the order of decoding
            and not (reorders and times == sorted(times))
        ):
            shown.sort()
            self._index = {pts: index for index, pts in enumerate(shown)}  # in the order shown
            self._packets = {packet.pts: packet for packet in packets}
            decoded = [self._index[packet.pts] for packet in packets if not packet.discard]
            self._places = {index: place for place, index in enumerate(decoded)}
            self._until = dict(zip(decoded, itertools.accumulate(decoded, max), strict=True))
            # A seek in Matroska goes by pts, elsewhere by dts; in MP4 by dts plus what the first
            # frame shown has between the two, as an edit list moves both.
            lead = next(p.pts - p.dts for p in packets if not p.discard) if kind == "mov" else 0
            self._keys = sorted(
                (bisect.bisect_left(shown, p.pts), p.pts if kind == "matroska" else p.dts + lead)
                for p in packets
                if p.key and kind in SEEKABLE and p.dts is not None
            )
        self._times = list(self._index) or self._count()
        self._unit = unit
        self.num_frames = len(self._times)
        self.fps = float(rate or 0)
        if not 0 < self.fps <= HIGHEST_RATE:
            known = [pts for pts in shown if pts is not None]
            span = (max(known) - min(known)) * unit if known else 0
            self.fps = float((self.num_frames - 1) / span) if span else 0.0

    def _open(self) -> contextlib.AbstractContextManager:
        return opened(self.path, self.threads, self.contents)

    def _count(self) -> list[int | None]:
        """The timestamp of each frame, by decoding all of them."""
        times: list[int | None] = []
        with self._open() as (container, stream):
            try:
                for packet in self._demux(container, stream):
                    times += [frame.pts for frame in packet.decode()]
            except av.FFmpegError as error:
                raise DecodeError(f"{self.path}: frame {len(times)}: {_cause(error)}") from error
        if not times:
            raise DecodeError(f"{self.path}: the video stream holds no frame")
        return times

    @property
    def clock(self) -> tuple[list[int], Fraction] | None:
        times = self._times
        if not self.fps or None in times or any(b <= a for a, b in itertools.pairwise(times)):
            return None
        last = self._packets.get(times[-1])
        lasts = last.duration if last and last.duration else round(1 / self.fps / self._unit)
        return [*times, times[-1] + max(lasts, 1)], self._unit

    def decode(self, wanted: list[int]) -> Generator[tuple[int, np.ndarray], None, None]:
        runs, nearer = self._runs(wanted, NEAR), self._runs(wanted, 0)
        missing = yield from self._pass(runs)
        if missing and nearer != runs:  # there may be damage in between that a seek leaves out
            missing = yield from self._pass(self._runs(sorted(missing), 0))
        # A key frame may be no place to begin at (intra refresh), a seek may end beyond it: what
        # does not come out after seeks is read again from the start of the file.
        if missing and len(nearer) > 1:
            missing = yield from self._pass([(None, sorted(missing))])
        for index, cause in sorted(missing.items()):
            raise self._error(index, cause)

    def _runs(self, wanted: list[int], near: int) -> list[tuple[int | None, list[int]]]:
        """[(where to seek to, None: decode on, the frames from there on)]; no seek over `near` frames."""
        runs: list[tuple[int | None, list[int]]] = [(None, [])]
        after = 0  # the frame that comes next when decoding on
        for index in wanted:
            key = bisect.bisect_right(self._keys, index, key=operator.itemgetter(0)) - 1
            if key >= 0 and self._keys[key][0] > after + near:
                runs.append((self._keys[key][1], []))
            runs[-1][1].append(index)
            after = index + 1
        return runs

    def _pass(
        self, runs: list[tuple[int | None, list[int]]]
    ) -> Generator[tuple[int, np.ndarray], None, dict[int, str]]:
        """Yield what comes out in one pass over the file, return the rest: index -> cause."""
        missing: dict[int, str] = {}
        with self._open() as (container, stream):
            rgb = VideoReformatter()
            for start, run in filter(operator.itemgetter(1), runs):
                pending, cause = set(run), "the decoder gives no such frame"
                until = max(self._until.get(index, index) for index in run)
                sound = _Sound(self._places, None if start is not None else 0)
                try:
                    if start is not None:
                        container.seek(start, stream=stream)
                    frames = self._frames(container, stream, after_seek=start is not None)
                    for place, frame in enumerate(frames):
                        if start is not None and place == 0 and not frame.key_frame:
                            break  # a key frame to the container only: it lacks what it refers to
                        index = self._index.get(frame.pts) if self._index else place
                        if index is None:
                            continue
                        good = sound.next(index, frame)
                        if index in pending and good:
                            yield index, upright(rgb, frame)
                        elif index in pending:
                            sound.spoilt.add(index)
                        pending.discard(index)
                        if not pending and index >= until and sound.settled(frame):
                            break
                except av.FFmpegError as error:
                    cause = _cause(error)
                missing |= dict.fromkeys(pending, cause)
                missing |= dict.fromkeys(
                    sound.spoilt.intersection(run), "corrupt, or decoded from a corrupt frame"
                )
        return missing

    def _demux(self, container, stream) -> Iterator[av.Packet]:
        """The packets, but for one that the file's end cuts in two: the decoder would stumble over it."""
        for packet in demux(container, stream):
            if self._cut is None or not packet.size or packet.pos != self._cut:
                yield packet

    def _frames(self, container, stream, after_seek: bool) -> Iterator[av.VideoFrame]:
        """Frames from here on; after a seek only as long as their packets are those first listed.

        In a damaged file the times may be others after a seek than on the way from its start.
        """
        for packet in self._demux(container, stream):
            listed = self._packets.get(packet.pts)
            same = listed is not None and (listed.place, listed.size) == (packet.pos, packet.size)
            if after_seek and packet.size and not same:
                return
            yield from packet.decode()


def demux(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Packets of `stream`, then an empty one that flushes the decoder.

    Late sound or damage may make one more stream appear midway. At the end PyAV may want to flush it
    too, and raises an IndexError as it does not know it: after `stream` has been flushed.
    """
    with contextlib.suppress(IndexError):
        yield from container.demux(stream)


class _Listed(NamedTuple):
    """What is known of a packet without decoding it."""

    pts: int | None
    dts: int | None
    key: bool
    discard: bool | None  # decoded and not shown; None: perhaps
    corrupt: bool
    place: int | None  # in the file, bytes
    size: int
    duration: int

    @classmethod
    def of(cls, packet: av.Packet, shows: Callable[[av.Packet], bool | None]) -> Self:
        shown = shows(packet)
        discard = packet.is_discard or (None if shown is None else not shown)
        flags = packet.is_keyframe, discard, packet.is_corrupt
        return cls(packet.pts, packet.dts, *flags, packet.pos, packet.size, packet.duration or 0)


def _without_end(packets: list[_Listed]) -> tuple[list[_Listed], int | None]:
    """Of a file that is cut off within its last packet: the packets before it, and its place.

    Frames that are shown after it count as not shown, as others before them are missing.
    """
    if len(packets) < 2 or not packets[-1].corrupt or packets[-1].place is None:
        return packets, None
    *packets, last = packets
    if last.pts is not None:
        after = [packet.pts is not None and packet.pts >= last.pts for packet in packets]
        pairs = zip(packets, after, strict=True)
        packets = [packet._replace(discard=True) if late else packet for packet, late in pairs]
    return packets, last.place


def _shortage(container: av.container.InputContainer, stream, packets: list[_Listed]) -> str | None:
    """Compare the header's duration with the end of the last packet.

    A file with its header in front (fast start) and its end cut off is silently short for decoders. The
    container's duration is that of its longest stream, perhaps sound, so half a second and 5% may lack.
    """
    ends = [p.pts + p.duration for p in packets if p.pts is not None and not p.discard]
    rate, unit = float(stream.average_rate or 0), float(stream.time_base or 0)
    if not (ends and rate and unit):
        return None
    if stream.duration:
        promised = stream.duration * unit
        lasts, slack = (max(ends) - (stream.start_time or 0)) * unit, 2.5 / rate
    elif container.duration:
        promised = container.duration / av.time_base
        lasts = max(ends) * unit - (container.start_time or 0) / av.time_base
        slack = max(0.5, 0.05 * promised)
    else:
        return None
    if promised - lasts <= slack:
        return None
    share = max(lasts, 0) / promised
    return f"cut off at {share:.0%}: the header says {promised:.2f} s, the frames last {lasts:.2f} s"


class _Sound:
    """Which of the frames that a decoder gives, in the order shown, are sound.

    Not sound are those that it flags corrupt or leaves out; those shown after them, up to the next key
    frame; and those shown before them but decoded later, which may refer to them: so frames already passed
    may turn out `spoilt`.

    places: frame -> its place in the order of decoding; empty: not known. Then the B-frames directly in
        front are taken for decoded later.
    first: the frame to come first, None: any.
    """

    def __init__(self, places: dict[int, int], first: int | None):
        self.places, self.first = places, first
        self.passed: list[int] = []
        self.spoilt: set[int] = set()
        self.broken = False

    def next(self, index: int, frame: av.VideoFrame) -> bool:
        """Whether this one is sound, as far as is known now."""
        bad = list(range(index if self.first is None else self.first, index))
        if frame.is_corrupt:
            bad.append(index)
        self.first = index + 1
        self.broken = frame.is_corrupt or ((self.broken or bool(bad)) and not frame.key_frame)
        if bad:
            earliest = min(self.places.get(i, -1) for i in bad)
            self.spoilt.update(i for i in self.passed if self.places.get(i, 0) > earliest)
        if not self.places and frame.pict_type != PictureType.B:
            self.passed.clear()
        else:
            self.passed.append(index)
        return not self.broken

    def settled(self, frame: av.VideoFrame) -> bool:
        """Whether nothing that follows `frame` can spoil what was passed."""
        return bool(self.places) or frame.pict_type != PictureType.B


class KeptVideo(Frames):
    """Every frame of a video, read once and kept in memory: at each size asked for, where that matters."""

    def __init__(self, path: Path, reopen: Callable[[], Video]):
        self.path, self._reopen, self._kept = path, reopen, {}
        with reopen() as video:
            self.num_frames, self.fps, self.scales = video.num_frames, video.fps, video.scales
            if not self.scales:
                self._keep(video, None)

    def read(self, indices: Sequence[int], short_side: int | None = None) -> Tensor:
        short_side = short_side if self.scales else None
        if short_side not in self._kept:
            with self._reopen() as video:
                self._keep(video, short_side)
        self._frames = self._kept[short_side]
        return super().read(indices)

    def _keep(self, video: Video, short_side: int | None) -> None:
        frames = video.read(range(video.num_frames), short_side)
        self._kept[short_side] = frames.permute(0, 2, 3, 1).numpy()

    def decode(self, wanted: list[int]) -> Generator[tuple[int, np.ndarray], None, None]:
        yield from ((index, self._frames[index]) for index in wanted)


class DecordVideo(Frames):
    """A video file, read by decord: it may count too many frames, and repeat some for others."""

    def __init__(self, path: Path, threads: int, contents: bytes | None = None):
        try:
            import decord
        except ImportError as error:
            raise InputError("decoder 'decord' is absent: pip install decord") from error
        self.path, self._decord = path, decord
        source = str(path) if contents is None else io.BytesIO(contents)
        try:
            self._reader = decord.VideoReader(source, num_threads=threads)
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            raise DecodeError(f"{path}: {_cause(error)}") from error
        self.num_frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())

    def decode(self, wanted: list[int]) -> Generator[tuple[int, np.ndarray], None, None]:
        try:
            with self._decord.bridge.use_torch():  # whatever bridge others have set
                frames = self._reader.get_batch(wanted).numpy()
        except self._decord.DECORDError as error:
            raise self._error(wanted[0], f"or one after it: {_cause(error)}") from error
        yield from zip(wanted, frames, strict=True)

    def close(self) -> None:
        self._reader = None


def _is_image(path: Path) -> bool:
    # "." begins what macOS leaves beside files on foreign disks: ._img_1.jpg
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _cause(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.partition("\n")[0]
