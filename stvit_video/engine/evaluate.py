"""Scoring: every sample of a list once, on any number of ranks; what comes of it is the task's to say."""

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..files import FileError, read_torch, write_torch, written_whole
from . import distributed
from .device import autocast
from .job import Outcome, Task
from .logs import progress
from .uploads import Uploads


class Shares:
    """What each rank has scored so far, on disk until the report stands, so that a failure costs minutes.

    key: what is scored and how: the same scoring, started again, does not score those samples again.
    minutes: between writings.
    """

    def __init__(self, folder: Path, key: Any, *, minutes: float = 5.0):
        self.folder, self.minutes, self.written = folder, minutes, time.monotonic()
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.name = f"share-{distributed.rank()}-of-{distributed.world()}-{time.time_ns()}.pt"

    def read(self) -> dict[int, Any]:
        """The records of all whole shares with this key, by index; what had failed is tried again."""
        records = {}
        for path in sorted(self.folder.glob("share-*.pt")):
            try:
                values = read_torch(path)
            except FileError:  # half-written when its rank was killed
                continue
            if values.get("key") == self.key:
                records |= values["records"]
        return records

    def write(self, records: dict[int, Any], *, now: bool = False) -> None:
        """Where it is time. A full disk is a warning: the scoring itself needs none."""
        if not now and time.monotonic() - self.written < 60 * self.minutes:
            return
        self.written = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self.folder / self.name) as part:
                write_torch(part, {"key": self.key, "records": records})
        except (OSError, FileError) as error:
            print(f"warning: what was scored so far is not kept: {error}", file=sys.stderr)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # whoever put something else there keeps it
            for path in self.folder.glob("share-*.pt"):
                path.unlink()
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

    -> the Outcome there, None on other ranks. Scores that are not finite are failures, too.
    Raises RuntimeError if some sample came twice or never.
    shares: where to keep what a rank has done; what earlier, broken-off scorings did is not done again.
    """
    earlier = shares.read() if shares is not None and distributed.is_main() else {}
    loader.sampler.leave_out(distributed.from_main(set(earlier)))
    if earlier:
        print(f"{len(earlier)} videos were scored before, by a scoring that was broken off")
    training = model.training
    model.eval()
    records, failures = {}, {}  # by index: (record, preview); cause
    with progress(total=len(loader), desc=title, unit="batch", leave=False) as bar:
        uploads = Uploads(loader, device)
        for batch in uploads:
            uploads.prefetch()
            failures |= dict(zip(batch.failed, (cause for _, cause in batch.failures), strict=True))
            if batch.clips is not None:
                with autocast(device, precision):
                    scored = task.records(model, batch)
                pairs = zip(scored, batch.previews, strict=True)
                records |= dict(zip(batch.indices.tolist(), pairs, strict=True))
            bar.update()
            after_batch()
            if shares is not None:
                shares.write(records)
    model.train(training)
    if shares is not None and distributed.world() > 1:  # a rank that is waited for may yet fail
        shares.write(records, now=True)
    every = distributed.to_main([(records, failures)])
    if not distributed.is_main():
        return None
    outcome = merge([(earlier, {}), *every], loader.dataset.rows)
    for i, (record, _) in [(i, pair) for i, pair in enumerate(outcome.records) if pair is not None]:
        if not _finite(record):  # whose best class is no answer
            outcome.records[i] = None
            outcome.failures[i] = f"{outcome.rows[i].path}: scores that are not finite, in {precision}"
    pairs = [(None, None) if pair is None else pair for pair in outcome.records]
    return replace(outcome, records=[pair[0] for pair in pairs], previews=[pair[1] for pair in pairs])


def _finite(record: Any) -> bool:
    scores = record.get("scores") if isinstance(record, dict) else None
    return not isinstance(scores, torch.Tensor) or bool(scores.isfinite().all())


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
    lines = task.report(output, outcome, report)
    return [*lines, f"{'report.json:':<16} {output / 'report.json'}"]
