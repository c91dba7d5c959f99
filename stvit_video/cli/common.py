"""What commands share: how they end, what they read, where they write."""

import hashlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from ..data.media import IMAGE_SUFFIXES
from ..data.shards import find_shards, index_shards
from ..engine import distributed
from ..errors import InputError

LISTS = (".txt", ".csv", ".json")


def command(function):
    """A command that tells what its user got wrong in one line and exits with code 2.

    A failure in a group of processes is printed, and ends this process at once. Names of files that are
    not UTF-8 are printed as they are.
    """

    def run(args: Sequence[str] | None = None) -> None:
        if hasattr(sys.stdout, "reconfigure") and sys.stdout.errors == "strict":  # stderr never is
            sys.stdout.reconfigure(errors="surrogateescape")
        try:
            distributed.recorded(function)(sys.argv[1:] if args is None else args)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            distributed.leave(2)
        except KeyboardInterrupt:
            distributed.leave(130)
        except SystemExit as stop:
            distributed.leave(stop.code)
        except Exception:  # a bug: raised on, but in a group of processes nobody may wait for this one
            if not distributed.in_group():
                raise
            traceback.print_exc()
            distributed.leave(1)
        distributed.stop()

    run.__doc__ = function.__doc__
    run.__name__ = function.__name__
    return run


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: no folder can be made there ({error.strerror})") from None


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for the files made of each path, no two alike, also where case does not count.

    The path's stem; where several have it, with the folder before it; where that does not tell them apart,
    with digits of the absolute path's hash behind it.
    """
    paths = [path.absolute() for path in paths]
    names = [path.stem for path in paths]
    for form in (
        lambda path: f"{path.parent.name}_{path.stem}",
        lambda path: f"{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:10]}",
    ):
        often = Counter(name.casefold() for name in names)
        names = [
            name if often[name.casefold()] == 1 else form(path)
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def videos_of(path: Path, suffixes: Collection[str]) -> list[Path]:
    """A file, the videos of a list, those in shards, files with these suffixes in a folder, or else a
    folder of frames. Raises InputError for a folder of neither."""
    if shards := find_shards(path):
        return [Path(sample.path) for sample in index_shards(shards)]
    if path.suffix.lower() in LISTS and path.is_file():
        from ..data.annotations import read_rows  # takes seconds to import, which --help need not wait for

        return [Path(row.path) for row in read_rows(path)]
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
    files = [p for p in files if not p.name.startswith(".")]
    if not files and not any(p.suffix.lower() in IMAGE_SUFFIXES for p in path.iterdir()):
        raise InputError(f"{path}: a folder without videos ({', '.join(sorted(suffixes))}) or frames")
    return files or [path]
