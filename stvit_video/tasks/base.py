"""What tasks have in common: how they are made, and the tables and lines of their reports."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..data.transforms import Normalise, TrainTransform
from ..errors import InputError
from . import NoSettings


class Base:
    """The parts of an `engine.job.Task` that most tasks have alike.

    class_names: by id. normalise: from uint8 to what the model takes.
    settings, scoring: of its `TaskEntry`; None: `defaults`.
    view_batch: views that go through the model at a time when scoring.
    on_failure: what cannot be read counts as "wrong", or is left out ("exclude").
    twins: class id -> class id of its mirror image; None: mirroring changes no class.
    dump_views: keep and write more of each record; the task says what.
    """

    defaults: tuple[type, type] = (NoSettings, NoSettings)  # of settings and scoring

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        normalise: Normalise,
        settings: Any = None,
        scoring: Any = None,
        view_batch: int = 16,
        on_failure: str = "wrong",
        twins: Sequence[int] | None = None,
        dump_views: bool = False,
    ):
        self.class_names, self.outputs = list(class_names), len(class_names)
        self.normalise, self.view_batch, self.on_failure = normalise, view_batch, on_failure
        self.twins, self.dump_views = twins, dump_views
        self.settings, self.scoring = settings or self.defaults[0](), scoring or self.defaults[1]()

    def to(self, device: torch.device) -> Self:
        self.normalise.to(device)
        if getattr(self, "teacher", None) is not None:
            self.teacher.to(device)
        return self

    def encode(self, target: Any) -> Any:
        return target

    def mirror(self, target: Any) -> Any:
        return target

    def train_transform(self, data: Any) -> TrainTransform:
        """Random resized crops and flips, as the settings `data.*` say."""
        return TrainTransform(
            data.image_size,
            scale=data.scale,
            ratio=data.ratio,
            rand_augment=data.rand_augment,
            interpolation=data.interpolation,
            flip=data.flip != "none",
            mirror=self.mirror,
        )


def check_scores(scores: Tensor | np.ndarray) -> None:
    """Raises InputError for a model's scores that are no numbers: whose best class is no answer."""
    if not torch.as_tensor(scores).isfinite().all():
        raise InputError("the model's scores are no numbers: it diverged, or train.precision is too low")


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """A csv file: None is an empty cell, fractions have six digits."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row])
    return path


def lines_of(written: Iterable[Path]) -> list[str]:
    """What a command prints of the files of a report."""
    return [f"{path.name + ':':<16} {path}" for path in written]
