"""What can be read while a run goes on: a progress bar, `log.jsonl` and TensorBoard events."""

import json
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import distributed


def progress(items=None, **options) -> tqdm:
    """A progress bar of the main process; where nobody watches (a log file), a line now and then."""
    options |= {"disable": not distributed.is_main(), "dynamic_ncols": True}
    return tqdm(items, mininterval=0.2 if sys.stderr.isatty() else 30, **options)


def read_log(path: Path) -> list[dict]:
    """The entries of `log.jsonl`, up to a line that a killed run left unfinished."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


class RunLog:
    """Entries of a kind ("step" or "epoch") with figures; written by the main process only.

    A resumed run drops the entries of the epochs that it runs anew.
    """

    def __init__(self, output: Path, *, epochs_done: int):
        self.path = output / "log.jsonl"
        self.events = None
        if distributed.is_main():
            kept = []
            if epochs_done and self.path.exists():
                kept = [entry for entry in read_log(self.path) if entry["at"] <= epochs_done]
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
            self.events = SummaryWriter(output / "tensorboard")

    def write(self, kind: str, *, step: int, at: float, **figures: float | None) -> None:
        """`step`: updates so far; `at`: epochs so far, as a fraction."""
        if self.events is None:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "at": at, **figures}) + "\n")
        for name, value in figures.items():
            if value is not None:
                self.events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
