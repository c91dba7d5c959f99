"""WebDataset shards: videos in tar files, found by the tar headers and read one by one from their place.

A sample is a run of members with one key: its video KEY.mp4 (or an image KEY.jpg) and, beside it, its
label: KEY.cls (an id or a class name) or KEY.json (an object with "label"); `frames` says what a video as
frames is. Every sample has a known place,
so that rows of shards are drawn, split and scored like any others. Nothing is unpacked to disk, and nothing
is read as other than label text or pixels.
"""

import glob
import io
import itertools
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from ..errors import DecodeError, ListError
from .frames import INDEX, VIDEO, FrameVideo
from .media import IMAGE_SUFFIXES, VIDEO_SUFFIXES

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LONGEST_LABEL = 1 << 20  # bytes of a .cls or .json member
META = re.compile(r"__[^/]*__($|/)")  # what the webdataset library passes over
READERS = 8  # shards listed at a time: what takes time is to wait for a disk or a network


class Place(NamedTuple):
    """Where a sample lies: the tar file, the first byte of its first header, and its number of bytes.

    head: of a sample of frames, the bytes in front of the first frame's file; 0: another kind of sample.
    """

    shard: str
    offset: int
    size: int
    head: int = 0

    def contents(self, path: str) -> bytes | FrameVideo:
        """The member that `path` (shard/member) names; the video, where it is stored as frames.

        Raises DecodeError, also where the shard is not what it was when it was listed.
        """
        return FrameVideo(path, self) if self.head else self.read(path)

    def read(self, path: str) -> bytes:
        """The bytes of a member: one seek, one read."""
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                members = file.read(self.size)
        except OSError as error:
            raise DecodeError(f"{path}: {self.shard}: {error.strerror}") from error
        try:
            with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as tar:
                for member in tar:
                    if member.isreg() and f"{self.shard}/{member.name}" == path:
                        return tar.extractfile(member).read()
        except (tarfile.TarError, ValueError, EOFError) as error:
            raise DecodeError(f"{path}: the shard is damaged there ({type(error).__name__})") from error
        raise DecodeError(f"{path}: not at its place, the shard has changed since it was listed")


class ShardSample(NamedTuple):
    """A sample: its video's name (shard/member), its label (an id, a class name, or none), its place."""

    path: str
    label: int | str | None
    place: Place


class _Member(NamedTuple):
    name: str
    key: str
    suffix: str
    text: bytes | None  # of a label
    start: int
    data: int
    end: int


def find_shards(pattern: str | os.PathLike[str]) -> list[str]:
    """The tar files that a tar file's name, a pattern (`{000..099}.tar`, `*.tar`) or a folder stands for.

    Empty where it is none of these; a folder with sub-folders is one of class folders. Raises ListError.
    """
    pattern = os.fspath(pattern)
    if os.path.isdir(pattern):
        entries = visible(pattern)
        folders = any(entry.is_dir() for entry in entries)
        return [] if folders else [entry.path for entry in entries if entry.name.endswith(".tar")]
    if pattern.endswith(COMPRESSED):
        raise ListError(f"{pattern}: found a compressed tar, expected a plain one, to be read anywhere")
    if not pattern.endswith(".tar") or os.path.exists(pattern):
        return [pattern] if pattern.endswith(".tar") else []
    try:
        names = list(braceexpand(pattern))
    except UnbalancedBracesError:
        raise ListError(f"{pattern}: found unbalanced braces, expected e.g. {{000..099}}.tar") from None
    shards = []
    for name in names:
        found = [name] if os.path.exists(name) or not glob.has_magic(name) else sorted(glob.glob(name))
        if not found:
            raise ListError(f"{name}: found no such file, expected tar files")
        shards += found
    twice = len(shards) - len(set(shards))
    if twice:
        raise ListError(f"{pattern}: found {twice} shards twice, expected each once")
    return shards


def visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, by name."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)


def find_member(path: str) -> bytes | FrameVideo:
    """What lies at shard/member, as reports name videos. Raises DecodeError where nothing does."""
    shard, within, _ = path.partition(".tar/")
    if within and os.path.isfile(f"{shard}.tar"):
        for sample in index_shards([f"{shard}.tar"]):
            if os.path.normpath(sample.path) == os.path.normpath(path):  # tar's own names begin with ./
                return sample.place.contents(sample.path)
    raise DecodeError(f"{path}: no such file")


def index_shards(shards: Sequence[str]) -> list[ShardSample]:
    """All samples, in the order of the shards and of their members. Reads headers and labels only.

    Raises ListError: naming shard and member for links, devices, names that lead out of the archive, a
    sample without or with two videos, a bad label; naming the shard where it is no tar, damaged or cut off.
    """
    quiet = len(shards) < 10 or os.environ.get("RANK", "0") != "0"
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(_index, shards)
        bar = tqdm(parts, total=len(shards), desc="listing shards", unit="shard", disable=quiet)
        return [sample for part in bar for sample in part]


def _index(shard: str) -> list[ShardSample]:
    try:
        if not stat.S_ISREG(os.stat(shard).st_mode):
            raise ListError(f"{shard}: found no regular file, expected a tar file")
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples = {}
            for key, members in itertools.groupby(_members(shard, tar), key=lambda member: member.key):
                if key in samples:
                    raise ListError(
                        f"{shard}/{key}: found members apart from others, expected all in a row"
                    )
                samples[key] = _sample(shard, key, list(members))
            # tarfile takes a damaged header for the end: the end is a block of zeros, then nothing
            file.seek(tar.offset)
            end = file.read(LONGEST_LABEL)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise ListError(
                    f"{shard}: found no end of the archive at byte {tar.offset}, expected a whole tar: "
                    "damaged, cut off or joined of several"
                )
    except ListError:
        raise
    except OSError as error:
        raise ListError(f"{shard}: found {error.strerror}, expected a readable tar file") from error
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ListError(f"{shard}: found {cause}, expected a plain, whole tar file") from error
    return list(samples.values())


def _members(shard: str, tar: tarfile.TarFile) -> Iterator[_Member]:
    """The members that belong to samples, by the library's rule for keys; hidden files do not."""
    for member in tar:
        name, where = member.name, f"{shard}/{member.name}"
        if name.startswith("/") or ".." in name.split("/"):
            raise ListError(f"{where}: found a name that leads out of the archive, expected a plain one")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            kind = "link" if member.issym() or member.islnk() else "special or sparse file"
            raise ListError(f"{where}: found a {kind}, expected plain files only")
        if tar.offset <= member.offset:  # a negative size: tarfile would go round in circles
            raise ListError(f"{where}: found a size of {member.size} bytes, expected a possible one")
        key, suffix = base_plus_ext(name)
        if key is None or META.match(name) or os.path.basename(name).startswith("."):
            continue
        suffix, text = suffix.lower(), None
        if suffix in ("cls", "json") and member.size <= LONGEST_LABEL:
            text = tar.extractfile(member).read()
        yield _Member(name, key, suffix, text, member.offset, member.offset_data, tar.offset)


def _sample(shard: str, key: str, members: list[_Member]) -> ShardSample:
    where = f"{shard}/{key}"
    fields = {member.suffix: member for member in members}
    if len(fields) < len(members):
        names = ", ".join(member.name for member in members)
        raise ListError(f"{where}: found {names}, expected each suffix once")
    suffixes = [(member, os.path.splitext(member.name)[1].lower()) for member in members]
    videos = [member for member, suffix in suffixes if suffix in VIDEO_SUFFIXES]
    # a picture beside a video is its thumbnail
    videos = videos or [member for member, suffix in suffixes if suffix in IMAGE_SUFFIXES]
    if len(videos) != 1:
        names = ", ".join(member.suffix for member in members)
        raise ListError(f"{where}: found {len(videos)} videos (in {names}), expected one")
    start, end, head = members[0].start, members[-1].end, 0
    if INDEX in fields:
        suffixes = [member.suffix for member in members]
        if suffixes[:2] != [INDEX, VIDEO]:
            names = ", ".join(suffixes)
            raise ListError(
                f"{where}: found {names} in this order, expected {INDEX} first and {VIDEO} next"
            )
        head = members[1].data - start
    return ShardSample(
        f"{shard}/{videos[0].name}", _label(where, fields), Place(shard, start, end - start, head)
    )


def _label(where: str, fields: dict[str, _Member]) -> int | str | None:
    """By KEY.cls, else by "label" of KEY.json; digits are an id, other text a class name."""
    suffix = next((suffix for suffix in ("cls", "json") if suffix in fields), None)
    if suffix is None:
        return None
    where, text = f"{where}.{suffix}", fields[suffix].text
    if text is None:
        raise ListError(f"{where}: found more than {LONGEST_LABEL} bytes, expected a label")
    try:
        value = text.decode("utf-8").strip() if suffix == "cls" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ListError(f"{where}: found {type(error).__name__}, expected text of a label") from error
    if suffix == "json":
        if not isinstance(value, dict):
            raise ListError(f"{where}: found a json {type(value).__name__}, expected an object")
        value = value.get("label")
    if value is None:
        return None
    text = str(value).strip()
    number = not isinstance(value, str) or re.fullmatch(r"[-+.0-9]*", text)
    if number and not re.fullmatch(r"[0-9]{1,9}", text):
        raise ListError(f"{where}: found label {text[:60]!r}, expected an id from 0 or a class name")
    return int(text) if number else text
