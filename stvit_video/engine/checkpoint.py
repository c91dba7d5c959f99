"""Checkpoints: tensors and plain values only, written whole or not at all, read only if undamaged."""

import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import FileError, read_torch, write_torch
from . import distributed

FORMAT = "stvit_video 3"
READABLE = (FORMAT, "stvit_video 2")
LAST, PREVIOUS, BEST = "last.pt", "last-previous.pt", "best.pt"
DAMAGED = "last-damaged.pt"
KEPT = "epoch-{:04}.pt"
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

    Every rank calls this, and all read the same file: the main process looks for damage, the others map the
    sound one without looking again. Raises CheckpointError, on every rank, if there are only damaged ones.
    """
    path, values, damage = _newest(folder) if distributed.is_main() else (None, None, [])
    path, damage = distributed.from_main((path, damage))
    if path is None and damage:
        raise CheckpointError("no checkpoint to continue: " + "; ".join(map(str, damage)))
    if path is not None and not distributed.is_main():
        values = load(path, verify=False)
    return values, damage[0] if damage else None


def _newest(folder: Path) -> tuple[Path | None, dict[str, Any] | None, list[CheckpointError]]:
    """The newest undamaged checkpoint, what it holds, and what is wrong with newer ones."""
    damage = []
    for path in (folder / name for name in (LAST, PREVIOUS)):
        if path.exists():
            try:
                return path, load(path), damage
            except CheckpointError as error:
                damage.append(error)
    return None, None, damage


def tidy(folder: Path, *, last_is_damaged: bool) -> None:
    """What a killed run left: half-written files go, a damaged `last.pt` steps aside.

    It must not become the previous one, which is the only good one then.
    """
    for part in folder.glob("*.pt.part"):
        part.unlink()
    if last_is_damaged:
        os.replace(folder / LAST, folder / DAMAGED)


def load(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU: one changed byte is noticed. Only plain values are unpickled.

    verify: False, for a file that another process has verified: tensors are mapped, not read.
    Raises CheckpointError.
    """
    try:
        values = read_torch(Path(path), verify=verify, mmap=not verify)
    except FileError as error:
        raise CheckpointError(str(error)) from None
    form = values.get("format") if isinstance(values, dict) else None
    if form not in READABLE:
        said = "none is given" if form is None else f"it says {form!r}"
        raise CheckpointError(f"{path}: not a checkpoint of this toolbox (format {FORMAT!r}; {said})")
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
