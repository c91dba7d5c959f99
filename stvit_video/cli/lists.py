"""What the commands check and shards do: lists of videos, looked through and packed."""

import csv
import dataclasses
import random
import re
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import build
from ..config import Config, ConfigError
from ..data.check import FileCheck, Finding, check_files, check_labels, clean, summary
from ..data.encode import H264, Copy, Encoding, Jpeg
from ..data.rows import Row
from ..data.write_shards import UNREADABLE, write_shards
from ..engine.logs import progress
from ..errors import cause_of
from .common import make_folder

# Flags that say how videos are encoded, and their bounds.
ENCODING = {
    "short_side": (8, 8192),
    "quality": (1, 100),
    "every": (1, 1000),
    "gop": (1, 1000),
    "crf": (0, 51),
    "tune": (None, None),
}


def check(config: Config, flags: Namespace) -> None:
    """The lists' findings, printed and as csv; exits with 1 where there are some."""
    data = config.data
    splits, class_names, unknown = build.read_lists(config)
    if flags.write_clean:
        _check_clean(flags.write_clean, splits)
    path = Path(flags.csv or Path(config.output, "check.csv"))
    make_folder(path.parent)
    findings = [Finding(split, "", "mislabelled", str(error)) for split, error in unknown.items()]
    findings += check_labels(splits, class_names)
    files = {row.path for rows in splits.values() for row in rows}
    with progress(total=len(files), desc="checking", unit="file") as bar:
        findings += check_files(
            splits,
            FileCheck(data.decoder, flags.thorough),
            workers=max(data.workers, 1),
            timeout=data.timeout,
            tick=bar.update,
        )
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(Finding._fields)
        writer.writerows(f._replace(cause=cause_of(f.cause, f.path)) for f in findings)
    print(summary(splits, findings))
    for finding in findings[:10]:
        print(f"{finding.kind}: {finding.cause}")
    if flags.write_clean:
        ((split, rows),) = splits.items()
        lines, names = clean(rows, findings), f"{flags.write_clean}.classes"
        for file, content in ((flags.write_clean, lines), (names, class_names)):
            Path(file).write_text("".join(f"{line}\n" for line in content), "utf-8", "surrogateescape")
        print(
            f"{len(lines)} of {len(rows)} videos: --data.{split} {shlex.quote(flags.write_clean)} "
            f"--data.class_names {shlex.quote(names)} --data.root null"
        )
    if findings:
        print(f"{len(findings)} findings, all in {path}")
        sys.exit(1)
    print("all is well" if flags.thorough else "nothing found; --thorough decodes every frame")


def _check_clean(path: str, splits: Mapping[str, Sequence[Row]]) -> None:
    """Raises ConfigError where there is no one list to write, one would be written over, or its lines,
    `path label`, cannot hold what the rows say."""
    if len(splits) > 1:
        raise ConfigError(f"--write-clean {path}: one list at a time, not {', '.join(splits)}")
    if any(row.place is not None for rows in splits.values() for row in rows):
        raise ConfigError(f"--write-clean {path}: videos in shards are no files that a list can name")
    for row in (row for rows in splits.values() for row in rows):
        if type(row.target) not in (int, tuple, type(None)):
            raise ConfigError(
                f"--write-clean {path}: lines of path and label cannot hold the "
                f"{type(row.target).__name__} of {row.path!r}"
            )
        if re.search("[\n\r\udc80-\udcff]", row.path):
            raise ConfigError(
                f"--write-clean {path}: {row.path!r} has a line break in it, or is not UTF-8: no list can "
                "name it"
            )
    if Path(path).exists():
        raise ConfigError(f"--write-clean {path}: is there already")
    make_folder(Path(path).parent)


def shards(config: Config, flags: Namespace) -> None:
    """A list as shards; exits with 1 where videos could not be read."""
    if min(flags.videos, flags.megabytes) < 1:
        raise ConfigError(f"--videos {flags.videos} --megabytes {flags.megabytes}: must be 1 or more")
    encode = _encoding(flags)
    names = None
    if flags.split != "train" and config.data.train is not None:
        names = build.read_split(config, "train")[0].class_names
    rows, _ = build.read_split(config, flags.split, names)
    names, rows = rows.class_names, list(rows)
    if flags.split == "train":
        random.Random(config.seed).shuffle(rows)
    start = time.monotonic()
    written, size = write_shards(
        rows,
        flags.to,
        class_names=names,
        videos=flags.videos,
        size=flags.megabytes * 1_000_000,
        encode=encode,
        workers=max(config.data.workers, 1),
        timeout=config.data.timeout,
    )
    frames = f", {written.frames} frames" if written.frames else ""
    print(
        f"{written.videos} videos in {written.shards} shards{frames}, {written.bytes} bytes, "
        f"{size / 1e6 / (time.monotonic() - start):.1f} MB/s: --data.{flags.split} {shlex.quote(flags.to)}"
    )
    if written.unreadable:
        print(f"{len(written.unreadable)} videos could not be read: {flags.to}/{UNREADABLE}")
        sys.exit(1)


def _encoding(flags: Namespace) -> Encoding:
    """Raises ConfigError for flags that are out of bounds, or mean nothing to this encoding."""
    if flags.frames and flags.recode:
        raise ConfigError("--frames and --recode: only one of them")
    kind = Jpeg if flags.frames else H264 if flags.recode else Copy
    names = {field.name for field in dataclasses.fields(kind)}
    for name, (low, high) in ENCODING.items():
        flag, value = name.replace("_", "-"), getattr(flags, name)
        if flag in flags.asked and name not in names:
            needed = {"short_side": "--frames or --recode", "quality": "--frames", "every": "--frames"}
            raise ConfigError(f"--{flag} {value}: only with {needed.get(name, '--recode')}")
        if isinstance(value, int) and not low <= value <= high:
            raise ConfigError(f"--{flag} {value}: must be from {low} to {high}")
    return kind(**{name: getattr(flags, name) for name in names})
