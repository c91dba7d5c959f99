"""The commands check and shards: lists of videos, looked through and packed."""

import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import build
from ..config import ConfigError, make_parser, parse, resolve
from ..data.check import FileCheck, Finding, check_files, check_labels, summary
from ..data.write_shards import write_shards
from ..engine.logs import progress
from .common import command, make_folder


@command
def check(args: Sequence[str]) -> None:
    """Check the lists of a config: files missing, unreadable, short or twice there, and wrong labels.

    Exit code 0: all is well; 1: problems, each a line of the csv; 2: settings or a list that make no sense.
    """
    parser = make_parser(check.__doc__)
    parser.add_argument("--thorough", action="store_true", help="Decode every frame, not only the first.")
    parser.add_argument("--csv", metavar="FILE", help="Where findings go; default: OUTPUT/check.csv.")
    config, flags = parse(parser, args)
    data = resolve(config).data
    splits, class_names, unknown = build.read_lists(resolve(config))
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
        writer.writerows(findings)
    print(summary(splits, findings))
    for finding in findings[:10]:
        print(f"{finding.kind}: {finding.cause}")
    if findings:
        print(f"{len(findings)} findings, all in {path}")
        sys.exit(1)
    print("all is well" if flags.thorough else "nothing found; --thorough decodes every frame")


@command
def shards(args: Sequence[str]) -> None:
    """Write a list's videos into WebDataset shards, with the class names beside them.

    Training videos are shuffled (by the seed), as lists are often sorted by class; others keep their order.
    """
    parser = make_parser(shards.__doc__)
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="Which list.")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="Where to; must not exist.")
    parser.add_argument("--videos", type=int, default=1000, help="Videos of a shard, at most.")
    parser.add_argument("--megabytes", type=int, default=1000, help="Megabytes of a shard, at most.")
    config, flags = parse(parser, args)
    if min(flags.videos, flags.megabytes) < 1:
        raise ConfigError(f"--videos {flags.videos} --megabytes {flags.megabytes}: must be 1 or more")
    names = None
    if flags.split != "train" and config.data.train is not None:
        names = build.read_split(config, "train")[0].class_names
    rows, _ = build.read_split(config, flags.split, names)
    names, rows = rows.class_names, list(rows)
    if flags.split == "train":
        random.Random(config.seed).shuffle(rows)
    written = write_shards(
        rows, flags.to, class_names=names, videos=flags.videos, size=flags.megabytes * 1_000_000
    )
    size = sum(shard.stat().st_size for shard in written)
    print(
        f"{len(rows)} videos in {len(written)} shards, {size / 1e6:.1f} MB: --data.{flags.split} {flags.to}"
    )
