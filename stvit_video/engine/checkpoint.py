"""Checkpoints: tensors and plain values only, written whole or not at all."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

FORMAT = "stvit_video 1"


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or is not one of ours: names file and cause."""


def save(path: str | Path, values: dict[str, Any]) -> None:
    """Write under a temporary name, flush to the disk, rename: a reader sees the old file or the new."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save({"format": FORMAT, **values}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU. Only tensors and plain values are unpickled.

    Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not zipfile.is_zipfile(path):  # the container that torch.save writes, its index at the end
        raise CheckpointError(f"{path}: truncated, or not a checkpoint")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({cause})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this toolbox (format {FORMAT!r})")
    return values
