"""What commands share: how they end, what they read, where they write."""

import errno
import functools
import hashlib
import importlib
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

from ..data.media import IMAGE_SUFFIXES
from ..errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LISTS = (".txt", ".csv", ".json")
DISTRIBUTED = "stvit_video.engine.distributed"  # slow to import: asked once the work has imported it


def command(work: str) -> Callable[[Callable[[Sequence[str]], tuple]], Callable[..., None]]:
    """A command, of a function that reads its flags: `work` is called with what that returns.

    work: MODULE.FUNCTION of this package, imported once the flags are right.
    What its user got wrong is told in one line, also what the system says of a file, and the exit code is
    2. A failure in a group of processes is printed, and ends this process at once. Where nobody reads what
    it prints (`| head`) it ends in silence. Names of files that are not UTF-8 are printed as they are.
    """

    def decorator(flags: Callable[[Sequence[str]], tuple]) -> Callable[..., None]:
        @functools.wraps(flags)
        def run(args: Sequence[str] | None = None) -> None:
            if hasattr(sys.stdout, "reconfigure") and sys.stdout.errors == "strict":  # stderr never is
                sys.stdout.reconfigure(errors="surrogateescape")
            try:
                _recorded(_do)(work, flags, sys.argv[1:] if args is None else args)
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                _leave(2)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed once more
                _leave(128 + signal.SIGPIPE)
            except KeyboardInterrupt:
                _leave(130)
            except SystemExit as stop:
                _leave(stop.code)
            except Exception:  # a bug: raised on, but in a group of processes nobody may wait for this one
                if not _in_group():
                    raise
                traceback.print_exc()
                _leave(1)
            if _in_group():
                sys.modules[DISTRIBUTED].stop()

        return run

    return decorator


def _do(work: str, flags: Callable[[Sequence[str]], tuple], args: Sequence[str]) -> None:
    options = flags(args)
    module, _, function = work.rpartition(".")
    try:
        getattr(importlib.import_module(f"stvit_video.{module}"), function)(*options)
    except OSError as error:  # no room, no right to write, a folder in a file's place: not a bug
        if error.filename is None and error.errno not in FULL:
            raise
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        raise InputError(f"{where}{error.strerror}") from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        cause = " ".join(str(error).split())
        raise InputError(
            f"{cause} Where memory ran out: fewer data.workers, or a smaller train.batch_size, need less"
        ) from error


def _recorded(function: Callable) -> Callable:
    """Under torchrun: `function`, whose exceptions are then in torchrun's summary of the job."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record  # slow to import

    return record(function)


def _in_group() -> bool:
    """Whether other processes may wait for this one; none does before the work is imported."""
    return DISTRIBUTED in sys.modules and sys.modules[DISTRIBUTED].in_group()


def _leave(code: int) -> NoReturn:
    """Exit; in a group at once, see `distributed.leave`."""
    sys.modules[DISTRIBUTED].leave(code) if _in_group() else sys.exit(code)


def make_folder(path: Path) -> None:
    """Raises InputError, before hours of work are for nothing, where no file can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: no folder can be made there ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: no file can be written into this folder")


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
    from ..data.annotations import read_rows  # takes seconds to import, which --help need not wait for
    from ..data.shards import find_shards, index_shards

    if shards := find_shards(path):
        return [Path(sample.path) for sample in index_shards(shards)]
    if path.suffix.lower() in LISTS and path.is_file():
        return [Path(row.path) for row in read_rows(path)]
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
    files = [p for p in files if not p.name.startswith(".")]
    if not files and not any(p.suffix.lower() in IMAGE_SUFFIXES for p in path.iterdir()):
        raise InputError(f"{path}: a folder without videos ({', '.join(sorted(suffixes))}) or frames")
    return files or [path]
