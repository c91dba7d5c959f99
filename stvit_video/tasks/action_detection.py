"""Action detection: what each person does at a key frame (AVA). Sigmoid, frame mean average precision."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..data import ava
from ..data.key_frames import KeyFrame, KeyFrameViews, Resized
from ..data.views import Sampling
from ..errors import DecodeError, InputError
from ..figures import draw_boxes
from . import ActionScoring, NoSettings
from .base import Base, check_scores, lines_of, mean, write_table
from .frame_map import Detections, average_precision, average_precisions, detections, hits

PICTURED = 3  # key frames of each kind


class ActionDetection(Base):
    """Clips (B, V, 3, T, H, W) around key frames and boxes in them to a yes or no for each of K actions.

    Training: true boxes; random resized crops (`data.scale`, `data.ratio`) and flips, with which they move.
    Scoring: one view with all of the frame, true boxes or proposals, and AVA's frame mAP: see `frame_map`.
    A class without a true box has no average precision and is left out of the mean.

    Arguments are `Base`'s. class_names: by id, which is AVA's less one.
    on_failure: in a key frame that cannot be read nothing is detected, or it is left out.
    """

    defaults = NoSettings, ActionScoring
    watched = ("mAP",)
    items = "key frames"

    @cached_property
    def proposals(self) -> dict[ava.At, tuple[np.ndarray, np.ndarray]] | None:
        path, least = self.scoring.proposals, self.scoring.proposal_score
        return None if path is None else ava.read_people(path, least)

    @cached_property
    def excluded(self) -> set[ava.At]:
        return set() if self.scoring.excluded is None else ava.read_excluded(self.scoring.excluded)

    @cached_property
    def counted(self) -> list[int]:
        """The classes that count."""
        path = self.scoring.scored_classes
        if path is None:
            return list(range(self.outputs))
        ids = [i - 1 for i in ava.read_label_map(path)]
        if max(ids) >= self.outputs:
            raise InputError(
                f"eval.scored_classes={path}: has id {max(ids) + 1}, but there are {self.outputs} classes"
            )
        return sorted(ids)

    def check(self, rows: Sequence, source: str) -> None:
        for row in rows:
            if not isinstance(row.target, KeyFrame):
                raise InputError(
                    f"{source}: {row.path} is no key frame with boxes: the list must be an AVA csv"
                )
        # files that settings name are read before there are other processes
        _ = self.proposals, self.excluded, self.counted

    def train_views(self, sampling: Sampling, data: Any) -> KeyFrameViews:
        if data.augment_on == "device":
            raise InputError("data.augment_on=device: boxes move with the pixels, in the worker")
        transform, start = self.train_transform(data), data.first_second
        return KeyFrameViews(sampling, transform, self._truth, start, data.repeats)

    def test_views(
        self, sampling: Sampling, data: Any, *, clips: int, crops: int, crop_ratio: float
    ) -> KeyFrameViews:
        if clips * crops != 1:
            raise InputError(f"eval.clips={clips}, eval.crops={crops}: a key frame has one view, 1 and 1")
        size = [data.image_size] * 2
        if self.scoring.keep_shape:
            size = [round(data.image_size / crop_ratio)]
        return KeyFrameViews(sampling, Resized(size), self._people, data.first_second)

    def encode(self, target: KeyFrame | None) -> KeyFrame:
        if target is None:
            raise InputError("a video without key frames cannot be scored: the list must be an AVA csv")
        return target

    def _truth(self, key: KeyFrame) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Boxes (n, 4) and their actions (n, K) of zeros and ones."""
        chosen = torch.zeros(len(key.boxes), self.outputs)
        for row, actions in zip(chosen, key.actions, strict=True):
            row[list(actions)] = 1
        return np.array(key.boxes).reshape(-1, 4), {"actions": chosen}

    def _people(self, key: KeyFrame) -> tuple[np.ndarray, dict[str, Tensor]]:
        """The boxes to score, and the same once more, as shares of the frame."""
        boxes = np.array(key.boxes).reshape(-1, 4)
        if self.proposals is not None:
            boxes, _ = self.proposals.get(key.at, (np.zeros((0, 4)), None))
        return boxes, {"shares": torch.from_numpy(boxes)}

    def mirror(self, target: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.twins is None:
            return target
        return target | {"actions": target["actions"][:, list(self.twins)]}

    def loss(self, model: nn.Module, batch) -> dict[str, Tensor]:
        boxes, actions = (
            [view for views in batch.targets[key] for view in views] for key in ("boxes", "actions")
        )
        logits, wanted = model(self.normalise(batch.clips.flatten(0, 1)), boxes).float(), torch.cat(actions)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return {"loss": loss / max(wanted.numel(), 1)}  # a batch may have no box

    @torch.no_grad()
    def records(self, model: nn.Module, batch) -> list[dict[str, Any]]:
        """boxes: shares of the frame (n, 4) float64; scores: (n, K); frame: which the key frame is."""
        if self.scoring.keep_shape and model.size is not None:
            raise InputError(f"eval.keep_shape=true: the model takes frames of {model.size} pixels alone")
        boxes, shares, frames = (
            [views[0] for views in batch.targets[k]] for k in ("boxes", "shares", "frame")
        )
        scores = []
        step = self.view_batch if isinstance(batch.clips, Tensor) else 1  # of one shape, or of several
        for start in range(0, len(boxes), step):
            part = batch.clips[start : start + step]
            clips = part.flatten(0, 1) if isinstance(part, Tensor) else part[0]
            of_part = boxes[start : start + step]
            logits = model(self.normalise(clips), of_part).float().sigmoid().cpu()
            scores += logits.split([len(each) for each in of_part])
        return [
            {"boxes": at.cpu(), "scores": score.clone(), "frame": int(frame)}
            for at, score, frame in zip(shares, scores, frames, strict=True)
        ]

    def figures(self, outcome) -> dict[str, float | None]:
        return {"mAP": mean(self.by_class(outcome)[0])}

    def by_class(self, outcome) -> tuple[list[float | None], list[int]]:
        """Average precision and number of true boxes of each class; None where it does not count."""
        frames = ((detected, *self._true(row.target)) for _, row, detected in self._counting(outcome))
        return average_precisions(frames, self.outputs)

    def _counting(self, outcome) -> Iterator[tuple[int, Any, Detections]]:
        """Index, row and detections of each key frame that counts."""
        for i, (row, record) in enumerate(zip(outcome.rows, outcome.records, strict=True)):
            left_out = record is None and self.on_failure == "exclude"
            if row.target.at not in self.excluded and not left_out:
                yield i, row, self.detections(record)

    def detections(self, record: dict | None) -> Detections:
        """Of one key frame, best first; none where it could not be read."""
        if record is None:
            return Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
        boxes, scores = record["boxes"].numpy(), record["scores"].numpy()
        check_scores(scores)
        return detections(boxes, scores, self.counted)

    def _true(self, key: KeyFrame) -> tuple[np.ndarray, list[list[int]]]:
        """Boxes (n, 4), and of their actions those that count."""
        counted = set(self.counted)
        return np.array(key.boxes).reshape(-1, 4), [
            [c for c in each if c in counted] for each in key.actions
        ]

    def report(self, output: Path, outcome, report: Mapping[str, Any]) -> list[str]:
        """`predictions.csv` in AVA's format, `classes.csv`, `key_frames.png`."""
        precisions, boxes = self.by_class(outcome)
        counting = sum(value is not None for value in precisions)
        title = "frame mAP@0.5, " + ("true boxes" if self.proposals is None else "proposals")
        value = "n/a" if report["mAP"] is None else f"{report['mAP']:7.2%}"
        lines = [f"  {title:<26} {value}  ({counting} of {self.outputs} classes)"]
        written = [output / "predictions.csv", output / "classes.csv"]
        with open(written[0], "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            for _, row, detected in self._counting(outcome):
                csv.writer(file).writerows(self.lines(row.target, detected))
        columns = zip(range(1, self.outputs + 1), self.class_names, boxes, precisions, strict=True)
        write_table(written[1], ["id", "class", "boxes", "average_precision"], columns)
        if self._draw_key_frames(output / "key_frames.png", outcome):
            written.append(output / "key_frames.png")
        return lines + lines_of(written)

    def lines(self, key: KeyFrame, detected: Detections) -> Iterator[list]:
        """Lines `video,second,x1,y1,x2,y2,action,score`, best first."""
        for box, action, score in zip(*detected, strict=True):
            yield ava.line_of(key, box, int(action), float(score))

    def plain(self, record: dict) -> dict[str, Any]:
        """frame: its index; of each box its place, in shares of the frame, and its actions' scores."""
        names = [self.class_names[c] for c in self.counted]
        boxes = [
            {
                "box": [round(x, 5) for x in box],
                "actions": {name: round(scores[c], 5) for name, c in zip(names, self.counted, strict=True)},
            }
            for box, scores in zip(record["boxes"].tolist(), record["scores"].tolist(), strict=True)
        ]
        return {"frame": record["frame"], "boxes": boxes}

    def draw(self, frame: np.ndarray, record: dict) -> np.ndarray:
        """uint8 (H, W, 3) -> the same, with each box and its actions: those above a half, or the best."""
        texts = []
        for scores in record["scores"]:
            best = sorted(self.counted, key=lambda c: -scores[c])
            shown = [c for c in best[:4] if scores[c] >= 0.5] or best[:1]
            texts.append("\n".join(f"{self.class_names[c]} {scores[c]:.0%}" for c in shown))
        return draw_boxes(frame, record["boxes"].numpy(), texts)

    def _draw_key_frames(self, picture: Path, outcome) -> bool:
        """The first, best and worst key frames, a line each; what was detected left, the truth right."""
        scored = []
        for i, row, detected in self._counting(outcome):
            boxes, actions = self._true(row.target)
            right = hits(detected, boxes, actions)
            value = average_precision(detected.scores, right, sum(map(len, actions)))
            if value is not None and outcome.records[i] is not None:
                sure = float(detected.scores[right].mean()) if right.any() else 0.0
                scored.append((value, sure, i))
        best = sorted(scored, reverse=True)
        lines = [scored[:PICTURED], best[:PICTURED], best[: -PICTURED - 1 : -1]]
        drawn = [[self._drawn(outcome, i) for *_, i in line] for line in lines]
        drawn = [[pair for pair in line if pair is not None] for line in drawn]
        if not any(drawn):
            return False
        Image.fromarray(_grid([[part for pair in line for part in pair] for line in drawn])).save(picture)
        return True

    def _drawn(self, outcome, index: int) -> tuple[np.ndarray, np.ndarray] | None:
        row, record = outcome.rows[index], outcome.records[index]
        try:
            frame = row.frame(record["frame"])
        except DecodeError:
            return None
        boxes, actions = self._true(row.target)
        texts = ["\n".join(self.class_names[c] for c in each) for each in actions]
        return self.draw(frame, record), draw_boxes(frame, boxes, texts)


def _grid(lines: list[list[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Pictures uint8 (H, W, 3) of any sizes, in lines, on white."""
    lines = [line for line in lines if line]
    heights = [max(part.shape[0] for part in line) + gap for line in lines]
    width = max(sum(part.shape[1] + gap for part in line) for line in lines)
    page = np.full((sum(heights), width, 3), 255, np.uint8)
    top = 0
    for line, height in zip(lines, heights, strict=True):
        left = 0
        for part in line:
            page[top : top + part.shape[0], left : left + part.shape[1]] = part
            left += part.shape[1] + gap
        top += height
    return page
