"""torch's files on disk: sealed when written, and read only if undamaged and harmless.

torch writes a zip file with checksums that it does not look at, and that do not cover the headers. So the
SHA-256 of the whole file is put behind it as the zip file's comment: in place of the two last bytes, its
length of 0, come the length 64 and 64 hexadecimal digits. torch.load does not mind.
"""

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

NO_COMMENT = (0).to_bytes(2, "little")
COMMENT = (64).to_bytes(2, "little")
END = b"PK\5\6"  # of the zip file's last record, which has 22 bytes and the comment


class FileError(InputError):
    """A file that cannot be read or written: names it and the cause."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write the file or folder that `path` is to be: it gets there when all of it is written.

    with written_whole(path) as part: ...   # part is `path`.part; what an earlier attempt left is removed
    """
    part = path.with_name(path.name + ".part")
    _remove(part)
    try:
        yield part
        if part.is_dir():
            _remove(path)
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


@contextlib.contextmanager
def alone(path: Path, cause: str) -> Iterator[None]:
    """Hold a lock on the file `path`; it ends with this process, also where that is killed.

    A record lock: loader processes, which may outlive their parent by seconds, do not inherit it. Where the
    file system has no locks nothing is held.
    Raises FileError, with this cause, where another living process holds it.
    """
    with open(path, "w") as file:
        try:
            import fcntl  # not on Windows

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FileError(cause) from None
        except (ImportError, OSError):
            pass
        yield


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def write_torch(path: Path, values: Any) -> None:
    """torch.save, sealed, and flushed to the disk. Raises FileError."""
    try:
        with _Hashed(io.FileIO(path, "wb")) as file:
            torch.save(values, file)
            seal = COMMENT + file.hash.hexdigest().encode()
            file.seek(-len(NO_COMMENT), os.SEEK_END)
            file.write(seal)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # the file's own error, which torch's writer stumbles over, or which comes when the file is closed
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise FileError(f"{path}: cannot be written ({cause.strerror})") from None


def read_torch(path: Path, *, verify: bool = True, mmap: bool = False) -> Any:
    """What torch.save wrote, on the CPU: tensors and plain values only, and argparse's settings, which MAE
    and VideoMAE save beside their weights.

    verify: compare seal or checksums first; a file of `write_torch` is refused if any byte has changed.
    mmap: read tensors from the file as they are used, into memory that processes share (not in the format
        that torch wrote until 2020).
    Raises FileError.
    """
    try:
        if not path.is_file():
            raise FileError(f"{path}: {'a folder, not a' if path.is_dir() else 'no such'} file")
        if path.stat().st_size == 0:
            raise FileError(f"{path}: the file is empty")
        if verify and (broken := _damage(path)):
            raise FileError(f"{path}: damaged, or not a checkpoint ({broken})")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileError:
        raise
    except Exception as error:  # damage can surface anywhere within zip, pickle and storages
        if code := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise FileError(
                f"{path}: holds {code[1]} beside tensors, and to unpickle that could run any code: "
                "refused. If you trust where it comes from, convert it once: torch.save(torch.load(FILE, "
                'map_location="cpu", weights_only=False)["model"], NEW_FILE)'
            ) from None
        cause = str(error).strip().partition("\n")[0]
        cause = type(error).__name__ if not cause or cause.isdigit() else cause
        if isinstance(error, pickle.UnpicklingError):
            cause = "no pickle of tensors"
        raise FileError(f"{path}: damaged, or not a checkpoint ({cause})") from None


def _damage(path: Path) -> str | None:
    """What the seal, or without one the zip file's checksums, say against it."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4" and not zipfile.is_zipfile(path):
            return None  # torch's format until 2020, which has no checksums
        file.seek(max(size - 22, 0))
        end = file.read()
        if end.startswith(END) and end.endswith(NO_COMMENT):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            return broken and f"the checksum of {broken} is wrong"
        file.seek(0)
        left = size - len(COMMENT) - 2 * digest.digest_size
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(NO_COMMENT)
        sealed = file.read() == COMMENT + digest.hexdigest().encode()
    return None if sealed else "truncated, or its checksum is wrong"


class _Hashed(io.BufferedWriter):
    """A file that knows the hash of what was written to it."""

    def __init__(self, file: io.FileIO):
        super().__init__(file)
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return super().write(data)
