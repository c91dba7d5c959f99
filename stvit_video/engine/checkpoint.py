"""Checkpoints: tensors and plain values only, written whole or not at all, read only if undamaged."""

import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import FileError, read_torch, write_torch

FORMAT = "stvit_video 2"
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
    try:
        values = read_torch(Path(path))
    except FileError as error:
        raise CheckpointError(str(error)) from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        told = "none is given" if found is None else f"it says {found!r}"
        raise CheckpointError(f"{path}: not a checkpoint of this toolbox (format {FORMAT!r}; {told})")
    return values


def _write(path: Path, values: dict[str, Any]) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        write_torch(part, {"format": FORMAT, **values})
    except FileError as error:
        raise CheckpointError(str(error).replace(str(part), str(path))) from None
    return part


def _flush_folder(folder: Path) -> None:
    """Renames too are on the disk only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
