"""Checkpoints: tensors and plain values only, written whole or not at all, read only if undamaged."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import InputError

FORMAT = "stvit_video 1"
LAST, PREVIOUS, BEST = "last.pt", "last-previous.pt", "best.pt"
DAMAGED = "last-damaged.pt"
NAMES = (LAST, PREVIOUS, BEST)


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or is not one of ours: names file and cause."""


def save(path: str | Path, values: dict[str, Any]) -> None:
    """Write under a temporary name, flush to the disk, rename: a reader sees the old file or the new.

    Raises CheckpointError where it cannot be written; the old file is still there then.
    """
    path = Path(path)
    os.replace(_write(path, values), path)
    _flush_folder(path.parent)


def save_last(folder: Path, values: dict[str, Any]) -> None:
    """`last.pt`; the one so far becomes `last-previous.pt`.

    Killed between the two renames, the former `last.pt` goes by the name of the previous one: whenever it
    happens, one of both is complete. Raises CheckpointError like `save`.
    """
    part = _write(folder / LAST, values)
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(part, folder / LAST)
    _flush_folder(folder)


def load_last(folder: Path) -> tuple[dict[str, Any] | None, CheckpointError | None]:
    """The newest undamaged checkpoint (None: there is none at all), and what is wrong with a newer one.

    Raises CheckpointError if there are only damaged ones.
    """
    found = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    damage = []
    for path in found:
        try:
            return load(path), damage[0] if damage else None
        except CheckpointError as error:
            damage.append(error)
    if damage:
        raise CheckpointError("no checkpoint to continue: " + "; ".join(map(str, damage)))
    return None, None


def tidy(folder: Path, *, last_is_damaged: bool) -> None:
    """What a killed run left: half-written files go, a damaged `last.pt` steps aside.

    It must not become the previous one, which is the only good one then.
    """
    for part in folder.glob("*.pt.part"):
        part.unlink()
    if last_is_damaged:
        os.replace(folder / LAST, folder / DAMAGED)


def load(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU: one changed byte is noticed. Only plain values are unpickled.

    Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if not _is_sealed(path):
            raise CheckpointError(f"{path}: damaged, or not a checkpoint of this toolbox (wrong checksum)")
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: not readable ({cause})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this toolbox (format {FORMAT!r})")
    return values


# torch writes a zip file with checksums that it does not look at, and that do not cover the headers. So the
# SHA-256 of the whole file is put behind it as the zip file's comment: in place of the two last bytes,
# a comment's length of 0, come the length 64 and 64 hexadecimal digits. torch.load does not mind.
_NO_COMMENT = (0).to_bytes(2, "little")
_COMMENT = (64).to_bytes(2, "little")


class _Hashed:
    """A file to write to that knows the hash of what was written."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, values: dict[str, Any]) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            hashed = _Hashed(file)
            torch.save({"format": FORMAT, **values}, hashed)
            file.seek(-len(_NO_COMMENT), os.SEEK_END)
            file.write(_COMMENT + hashed.hash.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error.__context__ or error  # torch's writer stumbles after the file's own error
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be written ({cause.strerror})") from None
    return part


def _is_sealed(path: Path) -> bool:
    digest = hashlib.sha256()
    left = path.stat().st_size - len(_COMMENT) - 2 * digest.digest_size
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(_NO_COMMENT)
        return file.read() == _COMMENT + digest.hexdigest().encode()


def _flush_folder(folder: Path) -> None:
    """Renames too are on the disk only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
