"""Scoring: every sample of a list once, on any number of ranks; what comes of it is the task's to say."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..files import FileError, read_torch, write_torch
from . import distributed
from .device import autocast
from .job import Outcome, Task
from .logs import progress
from .uploads import Uploads


class Shares:
    """What each rank has scored, on disk until the report stands: whoever dies costs its own share alone.

    key: what was scored and how; the same command, started again, takes up the shares of its key.
    """

    def __init__(self, folder: Path, key: Any):
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def read(self) -> list[tuple[dict, dict]]:
        """(records, failures) by index, of every whole share with this key."""
        shares = []
        for path in sorted(self.folder.glob("share-*.pt")):
            try:
                values = read_torch(path)
            except FileError:  # half-written when its rank was killed
                continue
            if values.get("key") == self.key:
                shares.append((values["records"], values["failures"]))
        return shares

    def write(self, records: dict, failures: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"share-{distributed.rank()}-of-{distributed.world()}-{time.time_ns()}.pt"
        write_torch(self.folder / name, {"key": self.key, "records": records, "failures": failures})

    def discard(self) -> None:
        for path in self.folder.glob("share-*.pt"):
            path.unlink()
        if self.folder.exists():
            self.folder.rmdir()


@torch.no_grad()
def score(
    model: nn.Module,
    task: Task,
    loader: DataLoader,
    device: torch.device,
    *,
    precision: str = "fp32",
    title: str = "scoring",
    after_batch: Callable[[], None] = lambda: None,
    shares: Shares | None = None,
) -> Outcome | None:
    """Score this rank's share of the loader's samples, and bring all to the main process.

    -> the Outcome there, None on other ranks. Raises RuntimeError if some sample came twice or never.
    shares: where to keep what a rank has done; what earlier, broken-off scorings did is not done again.
    """
    earlier = shares.read() if shares is not None and distributed.is_main() else []
    done = {index for share in earlier for part in share for index in part}
    loader.sampler.leave_out(distributed.from_main(done))
    training = model.training
    model.eval()
    records, failures = {}, {}
    with progress(total=len(loader), desc=title, unit="batch", leave=False) as bar:
        for batch in Uploads(loader, device):
            failures |= dict(zip(batch.failed, (cause for _, cause in batch.failures), strict=True))
            if batch.clips is not None:
                with autocast(device, precision):
                    scored = task.records(model, batch)
                records |= dict(zip(batch.indices.tolist(), scored, strict=True))
            bar.update()
            after_batch()
    model.train(training)
    if shares is not None:
        shares.write(records, failures)
    every = distributed.to_main([(records, failures)])
    return merge([*earlier, *every], loader.dataset.rows) if distributed.is_main() else None


def merge(shares: list[tuple[dict, dict]], rows) -> Outcome:
    """(records, failures) by index of each share -> the outcome in the order of the rows."""
    seen = [index for share in shares for part in share for index in part]
    if sorted(seen) != list(range(len(rows))):
        raise RuntimeError(f"{len(rows)} videos, but {len(seen)} scored ({len(set(seen))} of them once)")
    records: list = [None] * len(rows)
    for share, _ in shares:
        for index, record in share.items():
            records[index] = record
    return Outcome(rows, records, {i: cause for _, failed in shares for i, cause in failed.items()})


def write_report(
    output: Path,
    task: Task,
    outcome: Outcome,
    *,
    views: Mapping[str, int],
    details: Mapping[str, Any],
) -> list[str]:
    """`report.json` and the task's own files in `output`; -> lines to print.

    details: what else belongs into the report (checkpoint, seconds, ...).
    """
    rows, failed = len(outcome.rows), len(outcome.failures)
    report = task.figures(outcome) | {
        "num_videos": rows,
        "num_failed": failed,
        "num_scored": rows - failed,
        "views": dict(views),
        **details,
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = task.report(output, outcome, views)
    return [*lines, f"{'report.json:':<16} {output / 'report.json'}"]
