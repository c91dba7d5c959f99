"""A checkpoint with a head, and images or videos -> the task's records of them."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .build import build_task, build_test_views, load_model
from .data.batch import Sample, collate
from .data.decode import Video, open_video
from .data.guard import GivenUp, Guard, read_ahead
from .data.stream import FrameReader
from .engine import checkpoint as checkpoints
from .engine.device import autocast, pick_device, pick_precision
from .errors import DecodeError, InputError
from .export import EXPORT_SUFFIXES
from .tasks import TASKS
from .tasks.detection import Instance


def has_head(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is a `Predictor`'s; else a `Recognizer`'s, as files of stvit-export are.

    Raises CheckpointError.
    """
    if Path(checkpoint).suffix in EXPORT_SUFFIXES:
        return False
    config = checkpoints.load(checkpoint).get("config", {})
    return TASKS.get(config.get("task"), TASKS["classification"]).has_head


class Predictor:
    """What a task of images says of images, and of the frames of videos.

    >>> predict = Predictor("best.pt")
    >>> record = predict("street.jpg")
    >>> predict.task.draw(pixels, record), predict.task.plain(record)

    checkpoint: says which model, size, normalisation and class names.
    device: "cpu", "cuda", ...; by default CUDA where there is one.
    timeout: seconds after which a file is given up, read in a child process; None: images are read here.
    Raises InputError for a checkpoint of another kind.
    """

    def __init__(self, checkpoint: str | Path, *, device: str | None = None, timeout: float | None = None):
        self.path, self.device, self.timeout = Path(checkpoint), pick_device(device or "auto"), timeout
        self.config, self.class_names, self.model = load_model(checkpoint)
        self.precision = pick_precision(self.config.train.precision, self.device)
        untaught = replace(self.config, train=replace(self.config.train, teacher=None))
        self.task = build_task(untaught, self.class_names).to(self.device)
        if not TASKS[self.config.task].has_head or self.config.data.num_frames != 1:
            raise InputError(f"{self.path}: was trained for task={self.config.task}, not for single images")
        self.model.to(self.device)
        self.views = build_test_views(self.config, self.task, 1, 1)
        self._pixels = pixels_of if timeout is None else Guard(pixels_of, timeout)

    def __call__(self, image: str | Path | np.ndarray) -> Any:
        """The task's record of an image: a file, or uint8 (H, W, 3). Raises DecodeError."""
        return self._record(image if isinstance(image, np.ndarray) else self.pixels(image))

    def pixels(self, path: str | Path) -> np.ndarray:
        """An image file as uint8 (H, W, 3). Raises DecodeError."""
        try:
            return self._pixels(path)
        except GivenUp as error:
            raise DecodeError(f"{path}: {error}") from None

    def frames(self, path: str | Path) -> Iterator[tuple[float, float, np.ndarray, Any]]:
        """Time, how long it lasts (seconds), uint8 (H, W, 3) and record of each frame of a video, in order.

        Memory does not depend on the length. Raises DecodeError, of a damaged file after the frames before.
        """
        with contextlib.closing(read_ahead(FrameReader(path), path, self.timeout)) as chunks:
            for chunk in chunks:
                for time, lasts, pixels in chunk:
                    yield time, lasts, pixels, self._record(pixels)

    @torch.no_grad()
    def _record(self, pixels: np.ndarray) -> Any:
        clips, targets, *_ = self.views(_Still(pixels), self.task.encode(None))
        batch = collate([Sample(0, clips, targets, [])]).to(self.device)
        with autocast(self.device, self.precision):
            return self.task.records(self.model, batch)[0]


class Detector(Predictor):
    """Finds objects.

    >>> detect = Detector("best.pt").detect
    >>> detect("street.jpg")[0]
    Instance(name='car', score=0.98, box=(12.0, 80.5, 64.2, 31.0), mask=array(...))
    """

    def detect(self, image: str | Path | np.ndarray) -> list[Instance]:
        """Of a file, or of uint8 (H, W, 3); best first. Raises DecodeError."""
        return self.task.instances(self(image))


def pixels_of(path: str | Path) -> np.ndarray:
    """The first frame of a file: uint8 (H, W, 3). Raises DecodeError."""
    with open_video(path, threads=1) as video:
        return video.read([0])[0].permute(1, 2, 0).contiguous().numpy()


class _Still(Video):
    """A frame that is in memory already, as a video."""

    num_frames, fps = 1, 0.0

    def __init__(self, pixels: np.ndarray):
        self._pixels = torch.tensor(pixels).permute(2, 0, 1)

    def read(self, indices, short_side: int | None = None) -> torch.Tensor:
        return torch.stack([self._pixels] * len(indices))
