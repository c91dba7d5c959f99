"""Training videos that could not be read: counted over all ranks, listed; too many stop the run."""

import csv
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader

from ..errors import InputError
from . import distributed

Failure = tuple[str, str]  # path, cause


def gather_unreadable(
    failures: Sequence[Failure], loader: DataLoader, share: float, output: Path, epoch: int
) -> list[Failure]:
    """The failures of all ranks in this epoch, each file once, in rank order; every rank calls this.

    Raises InputError on every rank as soon as they are more than `share` of the videos of a whole epoch: so
    a bad file at its beginning does not stop it, and a wrong folder does long before its end.
    """
    found: dict[str, str] = {}
    for part in distributed.gather(list(failures)):
        for path, cause in part:
            found.setdefault(path, cause)
    videos = min(len(loader.sampler) * distributed.world(), len(loader.dataset))
    if len(found) > share * videos:
        if distributed.is_main():
            note_unreadable(output, epoch, list(found.items()))
        raise InputError(
            f"{len(found)} unreadable videos are more than data.max_unreadable={share:g} of the {videos} "
            f"of an epoch, the first: {next(iter(found.values()))}"
        )
    return list(found.items())


def note_unreadable(output: Path, epoch: int, failures: Sequence[Failure]) -> None:
    """Append (epoch, path, cause) to `unreadable.csv`, and say so; main process only."""
    if not failures:
        return
    path = output / "unreadable.csv"
    with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows((epoch, *failure) for failure in failures)
    print(f"epoch {epoch}: {len(failures)} unreadable videos, see {path}")
