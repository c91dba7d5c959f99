"""What a run is made of: a task, and the job that gives it a model and data. Tasks live in `tasks/`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.batch import Batch
from ..data.views import Sampling

Views = Callable[..., tuple]  # as `data.views.TrainViews`

Figures = dict[str, Any]  # numbers; or, by class, a dict of them


class Task(Protocol):
    """What is learnt and how it is scored. The loop and the scorer know no more of a task than this.

    watched: the figures that a validation logs and draws; the highest of the first picks `best.pt`.
    outputs: how many outputs the model has for it (`num_classes`).
    items: what a row of its lists is, in the plural.
    twins: what mirroring does to the classes; None: nothing (it is asked for with `data.flip: swap`).
    """

    watched: tuple[str, ...]
    outputs: int
    items: str
    twins: Sequence[int] | None

    def to(self, device: torch.device) -> "Task": ...

    def check(self, rows: Sequence, source: str) -> None:
        """Raises InputError where rows of the list `source` cannot be trained on."""

    def train_views(self, sampling: Sampling, data: Any) -> Views:
        """What a loader process makes of one video to train on. data: the settings `data.*`."""

    def test_views(
        self, sampling: Sampling, data: Any, *, clips: int, crops: int, crop_ratio: float
    ) -> Views:
        """The same to score."""

    def encode(self, target: Any) -> Any:
        """A row's target, as the views carry it and batches stack it."""

    def mirror(self, target: Any) -> Any:
        """The encoded target of a mirrored clip."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Of a training batch on the device: "loss", and what else is to be logged, all scalars."""

    def records(self, model: nn.Module, batch: Batch) -> list:
        """Of a batch on the device: one record a sample, tensors on the CPU and plain values only."""

    def figures(self, outcome: "Outcome") -> Figures:
        """What the records say, as fractions from 0 to 1; None where nothing counts."""

    def draw(self, frame: np.ndarray, record: Any) -> np.ndarray:
        """Of tasks with heads: uint8 (H, W, 3) -> the same with what the record says drawn in."""

    def plain(self, record: Any) -> dict[str, Any]:
        """Of tasks with heads: what a record says, for json. `write(stem, record)`, where there is one,
        writes further files."""

    def report(self, output: Path, outcome: "Outcome", report: Mapping[str, Any]) -> list[str]:
        """Write the task's tables, pictures and page into `output`; -> lines to print.

        report: what `report.json` holds.
        """


@dataclass
class Outcome:
    """Of a list that was scored: a record for each row, in order, None where it could not be read.

    failures: why not, by the row's index. previews: a WebP a row, None where there is none; may be empty.
    """

    rows: Sequence
    records: list
    failures: dict[int, str]
    previews: list[bytes | None] = field(default_factory=list)


@dataclass
class Job:
    """One task on one model and its data, all on one device.

    details: what belongs into checkpoints beside the run's state: class names, settings, sizes.
    """

    task: Task
    model: nn.Module
    device: torch.device
    train_loader: DataLoader
    val_loader: DataLoader | None
    details: dict[str, Any]
