"""A list's videos into WebDataset shards: several at a time, and after a kill from where it was.

Until all shards are there they lie in FOLDER.part, so that what was broken off does not look complete. Each
line of LOG in it stands for a finished shard; the first one says what is being written.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError, cause_of
from ..files import alone, written_whole
from .annotations import MEDIA, SHARDS_NAMES
from .encode import Copy, Encoding, Members
from .frames import INDEX
from .guard import Child, GivenUp, Raised, finished
from .rows import Row

LOG, UNREADABLE, LOCK = "shards.jsonl", "unreadable.csv", "lock"
AHEAD = 4  # videos of each worker that may wait until those before them are written


@dataclass
class Written:
    """What shards hold, in all. bytes: of the tar files. unreadable: (path, cause) of what was left out."""

    shards: int = 0
    videos: int = 0
    frames: int = 0
    bytes: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __add__(self, other: "Written") -> "Written":
        return Written(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def write_shards(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    videos: int = 1000,
    size: int = 1_000_000_000,
    encode: Encoding = Copy(),  # noqa: B008 (it cannot change)
    workers: int = 1,
    timeout: float | None = None,
) -> tuple[Written, int]:
    """Write `folder`/00000.tar, 00001.tar, ... in the order of the rows.

    A shard is for up to `videos` videos, and up to `size` bytes of them as they are in the list (a larger
    one is alone). A key is the row's number and file name. class_names go beside the shards, where
    `read_rows` finds them. The same rows give the same bytes, for any number of workers and however often
    the writing was broken off: the same call goes on behind the last finished shard.

    encode: what becomes of a video, in one of `workers` child processes, with `timeout` seconds for each.
        One that cannot be read is left out, and listed in `folder`/unreadable.csv.
    -> what is in `folder`, and how many bytes of it this call has written. Raises InputError for a folder
    with something else in it or that another process is writing, if no video can be read and, before
    anything is written, for rows that have several classes or are no videos.
    """
    folder, rows = Path(folder), list(rows)
    part = folder.with_name(f"{folder.name}.part")
    sizes = _sizes(rows, encode)
    plan = _plan(sizes, videos, size)
    job = {
        "list": _digest(rows, sizes, class_names),
        "settings": {"encoding": type(encode).__name__, **asdict(encode), "videos": videos, "size": size},
    }
    try:
        if folder.exists():
            done = _done(folder, job)
            if len(done) < len(plan):
                raise InputError(f"{folder}/{len(done):05d}.tar: not there, or not as it was written")
            return sum(done, Written()), 0
        part.mkdir(parents=True, exist_ok=True)
        with alone(part / LOCK, f"{part}: another process is writing it, expected one at a time"):
            done = _done(part, job) if (part / LOG).exists() else []
            with written_whole(part / LOG) as log:
                log.write_text("".join(map(_line, (job, *map(vars, done)))), encoding="utf-8")
            left, old = plan[len(done) :], sum(shard.bytes for shard in done)
            numbers = range(left[0].start if left else len(rows), len(rows))
            bar = tqdm(total=len(rows), initial=numbers.start, desc=f"writing {folder}", unit="video")
            results = _in_order(encode, [rows[number] for number in numbers], workers, timeout)
            with bar, contextlib.closing(results), open(part / LOG, "a", encoding="utf-8") as log:
                for shard in left:
                    members = ((number, rows[number], next(results), bar.update()) for number in shard)
                    done.append(_write(part / f"{len(done):05d}.tar", members))
                    log.write(_line(vars(done[-1])))
                    log.flush()
                    os.fsync(log.fileno())
            written = sum(done, Written())
            if rows and not written.videos:
                shutil.rmtree(part)
                raise InputError(
                    f"of {len(rows)} videos none can be read, the first: {written.unreadable[0][1]}"
                )
            _write_beside(part, class_names, written.unreadable)
            part.rename(folder)
            (folder / LOCK).unlink()
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}") from error
    return written, written.bytes - old


def _sizes(rows: Sequence[Row], encode: Encoding) -> list[int]:
    """The bytes of each row's files. Raises InputError for rows that cannot be encoded so."""
    sizes, bad = [], []
    for row in rows:
        try:
            if not isinstance(row.target, int | None):
                raise ValueError(f"target {row.target}, expected one class id or none")
            sizes.append(_size(row, encode))
        except OSError as error:
            bad.append(f"{row.path}: {error.strerror}")
        except ValueError as error:
            bad.append(f"{row.path}: {error}")
    if bad:
        raise InputError(f"{len(bad)} of {len(rows)} videos cannot go into shards, the first: {bad[0]}")
    return sizes


def _size(row: Row, encode: Encoding) -> int:
    copies = isinstance(encode, Copy)
    if row.place is not None:
        if row.place.head and not copies:
            raise ValueError("stored as frames already, which can only be copied")
        return row.place.size
    try:
        status = os.stat(row.path)
        if stat.S_ISDIR(status.st_mode) and not copies:
            with os.scandir(row.path) as files:
                return sum(file.stat().st_size for file in files)
    except FileNotFoundError:
        if copies:
            raise
        return 0  # will be listed as unreadable
    if not stat.S_ISREG(status.st_mode) or not row.path.lower().endswith(MEDIA):
        raise ValueError("not a video or image file")
    return status.st_size


def _plan(sizes: Sequence[int], videos: int, size: int) -> list[range]:
    """The rows of each shard."""
    starts, filled = [], 0
    for index, length in enumerate(sizes):
        if not starts or index - starts[-1] == videos or filled + length > size:
            starts.append(index)
            filled = 0
        filled += length
    return [range(*ends) for ends in pairwise([*starts, len(sizes)])]


def _digest(rows: Sequence[Row], sizes: Sequence[int], class_names: Sequence[str] | None) -> str:
    """Stands for a list, wherever it lies."""
    lines = [(os.path.basename(row.path), row.target, row.num_frames) for row in rows]
    text = json.dumps([lines, sizes, class_names and list(class_names)])
    return hashlib.sha256(text.encode()).hexdigest()


def _done(folder: Path, job: dict[str, Any]) -> list[Written]:
    """The shards that `folder` has, of this job, up to one that is not as it was written.

    Raises InputError for a folder of another job.
    """
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    try:
        began, *shards = [json.loads(line) for line in lines if line.endswith("\n")] or [{}]
        done, was = [Written(**shard) for shard in shards], began.get("settings", {})
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{log}: damaged, expected lines as stvit-shards writes them") from None
    if began != job:
        now = job["settings"]
        changed = [f"{name}={was[name]}, not {now.get(name)}" for name in was if was[name] != now.get(name)]
        cause = changed[0] if changed else "another list" if was else f"no {LOG} in it"
        raise InputError(
            f"{folder} exists, of other shards ({cause}): shards are written into a new folder"
        )
    for number, shard in enumerate(done):
        path = folder / f"{number:05d}.tar"
        if not path.exists() or path.stat().st_size != shard.bytes:
            return done[:number]
    return done


def _write(path: Path, members: Iterable[tuple[int, Row, Members | Exception, Any]]) -> Written:
    """One shard, of (number, row, what became of it)."""
    written = Written(shards=1)
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for number, row, result, _ in members:
                if isinstance(result, Exception):
                    cause = f"{row.path}: {result}" if isinstance(result, GivenUp) else str(result)
                    written.unreadable.append((row.path, cause))
                    continue
                stem = os.path.splitext(os.path.basename(row.path))[0]
                key = f"{number:08d}_{stem.replace('.', '_')}"  # a key ends at its first dot
                label = {} if row.target is None else {"cls": str(row.target).encode()}
                frames = INDEX in result.contents  # first, for FrameVideo to find it
                for suffix, data in (
                    result.contents | label if frames else label | result.contents
                ).items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mode = len(data), 0o444
                    tar.addfile(info, io.BytesIO(data))
                written.videos += 1
                written.frames += result.frames
        file.flush()
        os.fsync(file.fileno())
        written.bytes = file.tell()
    return written


def _in_order(
    function: Encoding, rows: Sequence[Row], workers: int, timeout: float | None
) -> Generator[Members | Exception, None, None]:
    """function(row), or the DecodeError or GivenUp, of each row, in order; `workers` rows at a time."""
    begun, yielded, idle = 0, 0, []
    working: dict[Child, int] = {}
    results: dict[int, Members | Exception] = {}
    try:
        while yielded < len(rows):
            while len(working) < workers and begun < min(len(rows), yielded + AHEAD * workers):
                child = idle.pop() if idle else Child(function)
                working[child] = begun
                child.send((rows[begun],), timeout)
                begun += 1
            for child, result in finished(working):
                number = working.pop(child)
                if not child.link.closed:
                    idle.append(child)
                if isinstance(result, Raised) and not isinstance(result.error, InputError | GivenUp):
                    raise RuntimeError(f"{rows[number].path}: {result.error}")
                results[number] = result.error if isinstance(result, Raised) else result
            while yielded in results:
                yield results.pop(yielded)
                yielded += 1
    finally:
        for child in (*idle, *working):
            child.end()


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def _write_beside(
    folder: Path, class_names: Sequence[str] | None, unreadable: Sequence[tuple[str, str]]
) -> None:
    """The class names, and the videos that are left out, with why; where there are some."""
    if class_names is not None:
        names = "".join(f"{name}\n" for name in class_names)
        (folder / SHARDS_NAMES).write_text(names, encoding="utf-8")
    if unreadable:
        with open(folder / UNREADABLE, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = [(path, cause_of(failure, path)) for path, failure in unreadable]
            csv.writer(file).writerows([("path", "cause"), *lines])
