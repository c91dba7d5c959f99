"""What `stvit-predict --timeline` writes of each video; killed at any moment, it goes on where it was."""

import contextlib
import csv
import hashlib
import html
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.guard import GivenUp, Guard
from ..data.stream import LabelledCopy, pictures_at, seconds_of
from ..errors import DecodeError, InputError
from ..figures import draw_timeline
from ..files import written_whole
from ..recognizer import Recognizer
from ..timeline import Moment, Segment, segments
from .common import output_names
from .drawing import write_copy

PICTURES = 12  # below the scores
HEADER = ("from", "to", "class", "score")  # of NAME.csv
SUFFIXES = (".csv", ".npz", ".png", ".vtt", ".json")


def write_timelines(
    recognize: Recognizer, paths: Sequence[Path], folder: Path, settings: dict, draw: bool
) -> int:
    """Of each video NAME.csv, .npz, .png, .vtt, .json and, to `draw`, .mp4; -> how many had errors.

    settings: checkpoint, every, window, enter, leave.
    """
    with open(settings["checkpoint"], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings |= {"checkpoint_sha256": digest, "precision": str(recognize.precision)}
    paths, failed = list(dict.fromkeys(path.absolute() for path in paths)), 0
    for path, name in zip(paths, output_names(paths), strict=True):
        try:
            error = Files(recognize, path, folder / name, settings).write(draw)
        except DecodeError as unreadable:
            error = str(unreadable)
        except OSError as problem:
            raise InputError(
                f"{problem.filename or folder}: cannot be written ({problem.strerror})"
            ) from None
        if error is not None:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    return failed


class Files:
    """What is written of one video; `NAME.moments` holds what is known until all of it is."""

    def __init__(self, recognize: Recognizer, path: Path, base: Path, settings: dict):
        try:
            state = path.stat()
        except OSError as error:
            raise DecodeError(f"{path}: {error.strerror}") from None
        self.recognize, self.path, self.base, self.settings = recognize, path, base, settings
        video = {"path": str(path), "bytes": state.st_size, "modified_ns": state.st_mtime_ns}
        self.source = {"video": video, "settings": settings}
        scores = ("scores", "<f4", (len(recognize.class_names),))
        self.record = np.dtype([("start", "<f8"), ("end", "<f8"), scores])

    def write(self, draw: bool) -> str | None:
        """-> why the video could not be read to its end; None: it was.

        Raises DecodeError; InputError where other files are in the place of these.
        """
        self._check_place()
        with _locked(self._file(".moments")):  # it also says that what is here is a timeline's
            error = None
            if not self._complete():
                self._file(".json").unlink(missing_ok=True)
                self._file(".mp4").unlink(missing_ok=True)
                error = self._score()
                if error is None or self._known().size:
                    self._write_all(error)
            if draw and self._file(".json").exists() and not self._file(".mp4").exists():
                self._draw()
            if error is None or not self._known().size:
                self._file(".moments").unlink(missing_ok=True)
        return error

    def _file(self, suffix: str) -> Path:
        return self.base.with_name(self.base.name + suffix)

    def _complete(self) -> bool:
        """Whether all files are there, of this video and settings."""
        if not self._file(".json").exists():
            return False
        try:
            written = json.loads(self._file(".json").read_text())
        except ValueError:  # empty, after the machine went down
            return False
        same = {key: written.get(key) for key in self.source} == self.source
        return same and written["error"] is None and all(self._file(s).exists() for s in SUFFIXES)

    def _check_place(self) -> None:
        """Raises InputError where files here are another video's timeline, or no timeline's."""
        json_file, moments = self._file(".json"), self._file(".moments")
        marks = [path for path in (json_file, moments) if path.exists()]
        for mark in marks:
            lines = mark.read_bytes()
            head = lines if mark is json_file else lines.partition(b"\n")[0]
            try:
                path = json.loads(head)["video"]["path"] if head else str(self.path)
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{mark}: not of a timeline; to write one needs another folder") from None
            if path != str(self.path):
                raise InputError(
                    f"{self.base.parent}: {self.base.name} is the timeline of {path} there; "
                    f"that of {self.path} needs another folder"
                )
        for path in (self._file(suffix) for suffix in (*SUFFIXES, ".mp4")):
            if path.exists() and (not marks or path.samefile(self.path)):
                raise InputError(f"{path}: not of a timeline; to write one needs another folder")

    def _score(self) -> str | None:
        """Bring `NAME.moments` to the end of the video; -> why that was not possible."""
        known, header = self._known(), self._header()
        with open(self._file(".moments"), "r+b", buffering=0) as file:
            if not known.size:
                file.truncate(0)
                file.write(header)
            file.truncate(len(header) + known.nbytes)  # half a moment, written when it was killed
            file.seek(0, 2)
            options = {key: self.settings[key] for key in ("every", "window")}
            moments = self.recognize.timeline(self.path, skip=known.size, **options)
            try:
                with closing(moments), self._bar(known) as bar:
                    for moment in moments:
                        file.write(np.array(moment[:3], self.record).tobytes())
                        bar.update(moment.end - bar.n)
            except DecodeError as error:
                return str(error)
        return None

    def _header(self) -> bytes:
        return json.dumps(self.source).encode() + b"\n"

    def _known(self) -> np.ndarray:
        """The moments that were scored, (n,) with start, end, scores; none of another video or settings."""
        header, content = self._header(), self._file(".moments").read_bytes()
        content = content.removeprefix(header) if content.startswith(header) else b""
        return np.frombuffer(content, self.record, len(content) // self.record.itemsize)

    def _bar(self, known: np.ndarray) -> tqdm:
        """Seconds of video, with the time that is left."""
        try:
            seconds = Guard(seconds_of, self.recognize.timeout or 60)(self.path)
        except (DecodeError, GivenUp):
            seconds = 0.0
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of video, {remaining} left"
        return tqdm(
            desc=self.path.name,
            total=seconds or None,
            initial=known["end"][-1] if known.size else 0,
            unit="s",
            bar_format=form if seconds else None,
            disable=None,  # where nobody looks
        )

    def _segments(self) -> list[Segment]:
        names = self.recognize.class_names
        with np.load(self._file(".npz")) as file:
            columns = [file[key] for key in ("start", "end", "scores")]
        moments = (Moment(float(s), float(e), scores, names) for s, e, scores in zip(*columns, strict=True))
        thresholds = {key: self.settings[key] for key in ("enter", "leave")}
        return segments(moments, names, overlap=self.recognize.config.task == "multilabel", **thresholds)

    def _write_all(self, error: str | None) -> None:
        """Each file at once; the one that says that all are there comes last."""
        known, names = self._known(), self.recognize.class_names
        with written_whole(self._file(".npz")) as part, open(part, "wb") as file:
            columns = {key: known[key] for key in ("start", "end", "scores")}
            np.savez_compressed(file, class_names=np.array(names), **columns)
        lasting = self._segments()
        rows = [(round(s.start, 3), round(s.end, 3), s.name, round(s.score, 4)) for s in lasting]
        with (
            written_whole(self._file(".csv")) as part,
            open(part, "w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows([HEADER, *rows])
        with written_whole(self._file(".vtt")) as part:
            part.write_text(subtitles(lasting), encoding="utf-8")
        with written_whole(self._file(".png")) as part:
            draw_timeline(known, names, lasting, self._pictures(known), part)
        report = self.source | {
            "moments": known.size,
            "scores": self._file(".npz").name,
            "segments": [dict(zip(HEADER, row, strict=True)) for row in rows],
            "error": error,
        }
        with written_whole(self._file(".json")) as part:
            part.write_text(json.dumps(report, indent=1))

    def _pictures(self, known: np.ndarray) -> list[np.ndarray | None]:
        end = float(known["end"][-1]) if known.size else 0.0
        times = [(i + 0.5) * end / PICTURES for i in range(PICTURES)]
        guard = Guard(pictures_at, self.recognize.timeout or 60)
        pictures = []
        for time in times:
            try:
                pictures.append(guard(self.path, time))
            except DecodeError:
                pictures.append(None)
            except GivenUp:  # to try again would take as long
                break
        return pictures + [None] * (PICTURES - len(pictures))

    def _draw(self) -> None:
        with written_whole(self._file(".mp4")) as part:
            copy = LabelledCopy(self.path, part, [tuple(segment) for segment in self._segments()])
            write_copy(copy, f"{self.base.name}.mp4", self.recognize.timeout)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While this process alone writes; raises InputError where another one does.

    Not `files.alone`: this file is read while it is held, and to close it there would end a record lock.
    """
    import fcntl  # not on every system

    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is writing this timeline") from None
        except OSError:  # a file system without locks
            pass
        yield


def subtitles(lasting: Sequence[Segment]) -> str:
    """Segments -> WebVTT."""
    cues = ["WEBVTT\n"]
    for segment in lasting:
        text = html.escape(" ".join(segment.name.split()), quote=False)
        cues.append(f"{_clock(segment.start)} --> {_clock(segment.end)}\n{text} ({segment.score:.0%})\n")
    return "\n".join(cues)


def _clock(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}.{rest % 1000:03d}"
