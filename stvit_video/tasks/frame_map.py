"""Frame mean average precision, AVA's protocol: boxes that overlap by half, each action detected once.

The official evaluation (ActivityNet, Evaluation/get_ava_performance.py) takes the 50 best detections of a
key frame. Best first, each is right if the true box of its class that overlaps it most does so by half or
more and was not detected before. The average precision of a class is the area under its precision, made
falling, over recall. Where scores are alike, what comes first stays first.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

DETECTIONS = 50  # of a key frame
OVERLAP = 0.5


class Detections(NamedTuple):
    """Of one key frame, best first: n boxes (n, 4), class ids and scores (n,)."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


def detections(boxes: np.ndarray, scores: np.ndarray, counted: Sequence[int]) -> Detections:
    """Boxes (n, 4), scores (n, K), the classes that count -> the best ones."""
    counted = np.asarray(counted, int)
    scores = scores[:, counted].reshape(-1)
    order = np.argsort(-scores, kind="stable")[:DETECTIONS]
    box, place = np.divmod(order, max(len(counted), 1))
    return Detections(boxes[box], counted[place], scores[order])


def overlaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) and (m, 4) -> intersection over union (n, m); 0 for boxes without area."""
    return box_iou(torch.from_numpy(one), torch.from_numpy(other)).nan_to_num(0).numpy()


def hits(detected: Detections, boxes: np.ndarray, actions: Sequence[Sequence[int]]) -> np.ndarray:
    """Which of one key frame's detections are right (n,). boxes (m, 4), actions: what is true of it."""
    right, taken = np.zeros(len(detected.boxes), bool), set()
    if not len(boxes):
        return right
    shared = overlaps(detected.boxes, boxes)
    doing = {c: [i for i, each in enumerate(actions) if c in each] for c in set(detected.classes.tolist())}
    for i, c in enumerate(detected.classes.tolist()):
        if not doing[c]:
            continue
        best = max(doing[c], key=lambda box: shared[i, box])
        if shared[i, best] >= OVERLAP and (best, c) not in taken:
            right[i] = True
            taken.add((best, c))
    return right


def average_precision(scores: np.ndarray, right: np.ndarray, total: int) -> float | None:
    """Scores (n,), which are right (n,), how many there are to find. None where there is none."""
    if not total:
        return None
    right = right[np.argsort(-scores, kind="stable")]
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(falling[right].sum() / total)


def average_precisions(
    frames: Iterable[tuple[Detections, np.ndarray, Sequence[Sequence[int]]]], num_classes: int
) -> tuple[list[float | None], list[int]]:
    """(detections, true boxes (m, 4), their actions) of each key frame -> by class: precision, how many."""
    classes, scores, right, totals = [], [], [], np.zeros(num_classes, int)
    for detected, boxes, actions in frames:
        classes.append(detected.classes)
        scores.append(detected.scores)
        right.append(hits(detected, boxes, actions))
        for each in actions:
            totals[list(each)] += 1
    if not classes:
        return [None] * num_classes, totals.tolist()
    classes, scores, right = (np.concatenate(parts) for parts in (classes, scores, right))
    each = [classes == c for c in range(num_classes)]
    return [
        average_precision(scores[of], right[of], int(total)) for of, total in zip(each, totals, strict=True)
    ], totals.tolist()
