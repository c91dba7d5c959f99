"""What is wrong with the files and labels of lists, before a run trips over it."""

import collections
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DecodeError
from .decode import open_video
from .frames import FrameVideo
from .guard import GivenUp, guarded_map
from .rows import Row, class_ids

PROBLEMS = ("missing", "unreadable", "short", "mislabelled", "duplicate")
HEAD_BYTES = 1 << 16  # bytes that tell contents apart, with the size
MEMORY = 1 << 28  # bytes of frames decoded at a time


class Finding(NamedTuple):
    """Something wrong with a row of a list; kind is one of PROBLEMS."""

    split: str
    path: str
    kind: str
    cause: str


@dataclass(frozen=True)
class FileCheck:
    """Reads one row in a child process: -> (what is wrong or None, what its content is known by or None).

    thorough: decode every frame; else open it and decode the first one.
    """

    decoder: str
    thorough: bool

    def __call__(self, row: Row) -> tuple[tuple[str, str] | None, str | None]:
        if row.place is None and not os.path.lexists(row.path):
            return ("missing", f"{row.path}: no such file"), None
        try:
            contents = row.contents()
            with open_video(row.path, self.decoder, threads=1, contents=contents) as video:
                identity = _identity(Path(row.path), contents)
                if cause := row.missing_frames(video.num_frames):
                    return ("short", cause), identity
                first = video.read([0])
                step = max(16, MEMORY // first.numel())
                for start in range(1, video.num_frames, step) if self.thorough else ():
                    video.read(range(start, min(start + step, video.num_frames)))
                if self.thorough and isinstance(video, FrameVideo):
                    video.mov()  # what is no frame has a checksum, too
                if video.shortage:
                    return ("short", f"{row.path}: {video.shortage}"), identity
        except DecodeError as error:
            return ("unreadable", str(error)), None
        return None, identity


def check_files(
    splits: dict[str, Sequence[Row]],
    check: FileCheck,
    *,
    workers: int,
    timeout: float | None,
    tick: Callable[[], object],
) -> list[Finding]:
    """What is wrong with the files, each looked at once, in the first split that has it; `tick` counts.

    Of a content that two splits have, the file of the later one is reported.
    """
    rows: dict[str, tuple[str, Row]] = {}
    for split, listed in splits.items():
        for row in listed:
            rows.setdefault(row.path, (split, row))
    findings, identities = [], {}
    every = [row for _, row in rows.values()]
    for row, result in guarded_map(check, every, workers=workers, timeout=timeout):
        tick()
        lost = isinstance(result, GivenUp)
        wrong, identity = (("unreadable", f"{row.path}: {result}"), None) if lost else result
        identities[row.path] = identity
        if wrong is not None:
            findings.append(Finding(rows[row.path][0], row.path, *wrong))
    first: dict[str, str] = {}
    for path, (split, _) in rows.items():
        if identities[path] is None:
            continue
        twin = first.setdefault(identities[path], path)
        on_disk = os.path.exists(twin) and os.path.exists(path)  # and not in a shard
        if rows[twin][0] != split and not (on_disk and os.path.samefile(twin, path)):
            cause = f"{path}: the same content as {twin} of {rows[twin][0]}"
            findings.append(Finding(split, path, "duplicate", cause))
    return findings


def check_labels(splits: dict[str, Sequence[Row]], class_names: Sequence[str]) -> Iterator[Finding]:
    """Labels out of range, classes without videos, and rows that stand in a list, or in two, twice."""
    first: dict[Any, tuple[str, Any]] = {}
    for split, rows in splits.items():
        seen = set()
        for row in rows:
            ids = class_ids(row.target)
            seen.update(ids)
            for label in ids:
                if not 0 <= label < len(class_names):
                    cause = f"{row.path}: label {label} is not below {len(class_names)}"
                    yield Finding(split, row.path, "mislabelled", cause)
            key = _key(row)
            if key in first:
                earlier, target = first[key]
                label = "" if target == row.target else f", with label {target}, here {row.target}"
                cause = f"{row.path}: stands in {earlier} already{label}"
                yield Finding(split, row.path, "duplicate", cause)
            first.setdefault(key, (split, row.target))
        for label in sorted(set(range(len(class_names))) - seen) if seen else ():
            cause = f"class {label}, {class_names[label]!r}, has no videos in {split}"
            yield Finding(split, "", "mislabelled", cause)


def _key(row: Row) -> Any:
    """What may stand in a list once: a file, or a moment of it."""
    return os.path.realpath(row.path), getattr(row.target, "at", None)


def clean(rows: Sequence[Row], findings: Iterable[Finding]) -> list[str]:
    """Lines `path label` (`path num_frames label`) of the rows with nothing against them.

    Of a row that stands there twice the first is kept; neither, where their labels differ.
    """
    first: dict[Any, Row] = {}
    bad = {finding.path for finding in findings if finding.kind != "duplicate"}
    for row in rows:
        earlier = first.setdefault(_key(row), row)
        if earlier.target != row.target:
            bad.add(earlier.path)
    lines = []
    for row in first.values():
        if row.path not in bad:
            label = ",".join(map(str, class_ids(row.target))) or '""'
            fields = [os.path.abspath(row.path), row.num_frames, None if row.target is None else label]
            lines.append(" ".join(str(field) for field in fields if field is not None))
    return lines


def summary(splits: dict[str, Sequence[Row]], findings: Iterable[Finding]) -> str:
    """A table: a line a split, a column a kind."""
    counts = collections.Counter((finding.split, finding.kind) for finding in findings)
    lines = ["split    videos" + "".join(f"{kind:>13}" for kind in PROBLEMS)]
    for split, rows in splits.items():
        numbers = "".join(f"{counts[split, kind]:>13}" for kind in PROBLEMS)
        lines.append(f"{split:<7}{len(rows):>8}{numbers}")
    return "\n".join(lines)


def _identity(path: Path, contents: bytes | FrameVideo | None) -> str | None:
    """Size and hash of the first bytes of a file, or hash of the index of frames; None for a folder."""
    if contents is None and path.is_dir():
        return None
    if isinstance(contents, FrameVideo):
        return f"frames {hashlib.blake2b(contents.data, digest_size=16).hexdigest()}"
    with open(path, "rb") if contents is None else io.BytesIO(contents) as file:
        head = hashlib.blake2b(file.read(HEAD_BYTES), digest_size=16).hexdigest()
        return f"{file.seek(0, os.SEEK_END)} {head}"
