"""What `stvit-predict --actions` writes of each video: who does what, as AVA's csv and a drawn video."""

import csv
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import build
from ..config import Config
from ..data import ava
from ..data.dataset import TestSampler, VideoDataset, make_loader
from ..data.guard import GivenUp, Guard
from ..data.key_frames import KeyFrame, KeyFrameViews
from ..data.rows import Row
from ..data.stream import DrawnCopy, seconds_of
from ..data.views import Sampling
from ..engine.device import pick_device, pick_precision
from ..engine.evaluate import score
from ..errors import DecodeError, InputError
from ..files import read_torch, written_whole
from ..tasks import TASKS
from .common import output_names
from .drawing import write_copy

COCO_PERSON, COCO_CLASSES = 1, 91  # of COCO, as torchvision's detectors count


def write_actions(paths: Sequence[Path], folder: Path, options: Any) -> int:
    """Of each video NAME.csv and NAME.mp4; -> how many had errors.

    options: checkpoint, device, timeout, workers, every, and proposals or detector. Seconds count from the
    start of each video file; people have a score of at least the checkpoint's `eval.proposal_score`.
    """
    config, class_names, model = build.load_model(options.checkpoint)
    device = pick_device(options.device or "auto")
    workers = min(options.workers, os.cpu_count() or 1)
    data = replace(config.data, first_second=0.0, workers=workers, timeout=options.timeout, keep=False)
    scoring = replace(config.eval, proposals=options.proposals, excluded=None)
    config = replace(config, data=data, eval=scoring)
    task = build.build_task(config, class_names).to(device)
    if TASKS[config.task].heads != ("actions",):
        raise InputError(f"{options.checkpoint}: was trained for task={config.task}: not for actions")
    if options.detector:
        finder, task.proposals = read_detector(Path(options.detector)).to(device).eval(), {}
    people, failed = task.proposals, 0
    for path, name in zip(paths, output_names(paths), strict=True):
        csv_file, mp4_file = (folder / f"{name}{suffix}" for suffix in (".csv", ".mp4"))
        if path.resolve() in (csv_file.resolve(), mp4_file.resolve()):
            raise InputError(f"{path}: is to be recognised; --actions needs another folder")
        try:
            if options.detector:
                rows = _moments(path, options.every, options.timeout)
                people.clear()  # there may be a video of the same name in another folder
                people |= find_people(finder, rows, config, device)
            rows = [Row(str(path), KeyFrame(*at)) for at in sorted(people) if at[0] == path.stem]
            if not rows:
                raise DecodeError(f"{path}: nobody in it, by {options.proposals or options.detector}")
            records = _scored(config, task, model.to(device), rows, device)
            with written_whole(csv_file) as part, open(part, "w", newline="", encoding="utf-8") as file:
                for row, record in records:
                    csv.writer(file).writerows(task.lines(row.target, task.detections(record)))
            with written_whole(mp4_file) as part:
                _write_drawn(path, part, task, records, options.timeout)
            print(f"{path}: {len(records)} key frames, {csv_file}, {mp4_file}")
        except DecodeError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    return failed


def read_detector(path: Path) -> torch.nn.Module:
    """torchvision's Faster R-CNN (ResNet-50, FPN) with these weights: its state dict for COCO.

    Raises InputError.
    """
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=COCO_CLASSES)
    state = read_torch(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: no state dict of torchvision's fasterrcnn_resnet50_fpn ({cause})"
        ) from None
    return model


@torch.no_grad()
def find_people(
    finder: torch.nn.Module, rows: Sequence[Row], config: Config, device: torch.device
) -> dict[ava.At, tuple[np.ndarray, np.ndarray]]:
    """By key frame, where there are some: boxes (n, 4) as shares of the frame, scores (n,), best first.

    finder: as torchvision's detectors: images (3, H, W) from 0 to 1 -> dicts of boxes, labels and scores.
    """
    people, data = {}, config.data
    views = KeyFrameViews(Sampling("dense", 1), _as_they_are, _nobody)
    dataset = VideoDataset(rows, views, decoder=data.decoder, timeout=data.timeout)
    options = {"batch_size": 1, "workers": data.workers, "pin_memory": False, "persistent": False}
    for batch in make_loader(dataset, TestSampler(len(rows)), **options):
        for _, cause in batch.failures:
            raise DecodeError(cause)
        image = batch.clips[0, 0, :, 0].to(device).float() / 255
        (output,) = finder([image])
        kept = (output["labels"] == COCO_PERSON) & (output["scores"] >= config.eval.proposal_score)
        if kept.any():
            sides = output["boxes"].new_tensor([*image.shape[:0:-1]] * 2)
            boxes = (output["boxes"][kept] / sides).clamp(0, 1).double().cpu().numpy()
            people[rows[int(batch.indices)].target.at] = boxes, output["scores"][kept].cpu().numpy()
    return people


def _as_they_are(frames: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
    return frames, target


def _nobody(key: KeyFrame) -> tuple[np.ndarray, dict]:
    return np.zeros((0, 4)), {}


def _moments(path: Path, every: float, timeout: float) -> list[Row]:
    """A key frame without boxes each so many seconds, from the first such second on."""
    try:
        end = Guard(seconds_of, timeout)(path)
    except GivenUp as error:
        raise DecodeError(f"{path}: {error}") from None
    count = int((end - 1e-3) / every)
    if not count:
        raise DecodeError(f"{path}: lasts {end:.2f} s, less than --every {every:g}")
    return [Row(str(path), KeyFrame(path.stem, i * every)) for i in range(1, count + 1)]


def _scored(config: Config, task, model, rows: list[Row], device) -> list[tuple[Row, dict]]:
    """The key frames and what was detected in each; of those that cannot be read, the cause is printed."""
    loader = build.build_test_loader(config, task, rows, device, clips=1, crops=1)
    precision = pick_precision(config.train.precision, device)
    outcome = score(model, task, loader, device, precision=precision, title=Path(rows[0].path).name)
    for cause in outcome.failures.values():
        print(f"error: {cause}", file=sys.stderr)
    if len(outcome.failures) == len(rows):
        raise DecodeError(f"{rows[0].path}: none of its {len(rows)} key frames can be read")
    pairs = zip(rows, outcome.records, strict=True)
    return [(row, record) for row, record in pairs if record is not None]


@dataclass
class Drawn:
    """(pixels, time) -> the pixels with what the nearest key frame has, if it is within `reach` seconds."""

    task: Any
    records: list[tuple[Row, dict]]
    reach: float

    def __call__(self, pixels: np.ndarray, time: float) -> np.ndarray:
        row, record = min(self.records, key=lambda pair: abs(pair[0].target.second - time))
        if abs(row.target.second - time) > self.reach:
            record = {"boxes": record["boxes"][:0], "scores": record["scores"][:0]}
        return self.task.draw(pixels, record)


def _write_drawn(path: Path, target: Path, task, records: list, timeout: float) -> None:
    times = sorted(row.target.second for row, _ in records)
    reach = min((b - a for a, b in itertools.pairwise(times)), default=1.0) / 2
    write_copy(DrawnCopy(path, target, Drawn(task, records, reach)), target.name, timeout)
