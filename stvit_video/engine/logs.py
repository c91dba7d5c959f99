"""What can be read while a run goes on: a progress bar, `log.jsonl` and TensorBoard events."""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..files import written_whole
from . import distributed

ENTRY_KINDS = "step", "epoch"


def progress(items=None, **options) -> tqdm:
    """A progress bar of the main process; where nobody watches (a log file), a line now and then."""
    options |= {"disable": not distributed.is_main(), "dynamic_ncols": True, "mininterval": 0.2}
    if not sys.stderr.isatty():
        form = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
        options |= {"mininterval": 30, "bar_format": form, "leave": True}
    return tqdm(items, **options)


def read_log(path: Path) -> list[dict]:
    """The entries of `log.jsonl`, up to a line that is none: a killed run or machine left it unfinished."""
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["kind"] not in ENTRY_KINDS or not isinstance(entry[entry["kind"]], int):
                break
        except (ValueError, TypeError, LookupError, RecursionError):
            break
        entries.append(entry)
    return entries


def append_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Rows at the end of a csv file, under a header if they are the first."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header, *rows] if new else rows)


def cut_rows(path: Path, column: str, last: int) -> None:
    """Drop a csv file's rows whose number in `column` is none or above `last`, and an unfinished line."""
    if not path.exists():
        return
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()  # a name may have line breaks of any kind in it
    rows = []
    with contextlib.suppress(csv.Error):  # a quote that never ends
        for row in csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")):
            rows.append(row)
    header, *rows = rows or [[]]
    at = header.index(column) if column in header else len(header)
    kept = [row for row in rows if at < len(row) and row[at].isdecimal() and int(row[at]) <= last]
    if not kept:
        path.unlink()
        return
    with written_whole(path) as part:
        append_rows(part, header, kept)


class RunLog:
    """`log.jsonl`, with entries of a kind ("step" or "epoch"), and lists of trouble in csv files.

    Written by the main process only. A resumed run drops what is beyond its `epoch` epochs and `update`
    updates, which it runs anew.
    """

    def __init__(self, output: Path, *, epoch: int, update: int):
        self.folder, self.path = output, output / "log.jsonl"
        self.events = None
        if distributed.is_main():
            kept = []
            if update and self.path.exists():
                done = {"step": update, "epoch": epoch}  # an entry counts by the key of its kind's name
                kept = [e for e in read_log(self.path) if e[e["kind"]] <= done[e["kind"]]]
            with written_whole(self.path) as part:
                part.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            cut_rows(output / "unreadable.csv", "epoch", epoch)
            cut_rows(output / "nonfinite.csv", "update", update)
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.events = SummaryWriter(output / "tensorboard", purge_step=update + 1)

    def write(self, kind: str, *, step: int, at: float, **figures: float | None) -> None:
        """`step`: updates so far; `at`: epochs so far, as a fraction."""
        if self.events is None:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "at": at, **figures}) + "\n")
        for name, value in figures.items():
            if value is not None:
                self.events.add_scalar(f"{kind}/{name}", value, step)

    def append(self, name: str, header: Sequence[str], rows: Sequence[Sequence]) -> None:
        """Rows of a csv file beside the log; `header` has the column "epoch" or "update" to cut it by."""
        if self.events is not None and rows:
            append_rows(self.folder / name, header, rows)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
