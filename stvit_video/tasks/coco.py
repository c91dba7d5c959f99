"""COCO's average precision, of boxes and of masks, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.objects import Objects

if TYPE_CHECKING:  # a machine that only computes may not have it
    from pycocotools.coco import COCO

# COCO's figures: IoU (None: mean of 0.5 to 0.95), and size of the objects.
FIGURES = {
    "AP": (None, "all"),
    "AP50": (0.5, "all"),
    "AP75": (0.75, "all"),
    "AP_small": (None, "small"),
    "AP_medium": (None, "medium"),
    "AP_large": (None, "large"),
}
DETECTIONS = 100  # of an image that count


def results(
    targets: Sequence[Objects], records: Sequence, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Records of images, None where there is none -> detections as COCO's results file has them."""
    detections = []
    for target, record in zip(targets, records, strict=True):
        for i, label in enumerate([] if record is None else record["labels"]):
            detection = {
                "image_id": target.image,
                "category_id": category_ids[label],
                "bbox": list(record["boxes"][i]),
                "score": record["scores"][i],
            }
            if "masks" in record:
                detection["segmentation"] = {"size": list(target.size), "counts": record["masks"][i]}
            detections.append(detection)
    return detections


def truth(targets: Sequence[Objects], category_ids: Sequence[int]) -> "COCO":
    """What the list says, in pycocotools' form."""
    from pycocotools.coco import COCO

    annotations = []
    for target in targets:
        for i, label in enumerate(target.classes):
            annotation = {
                "id": len(annotations) + 1,  # 0 would be taken for unmatched
                "image_id": target.image,
                "category_id": category_ids[label],
                "bbox": list(target.boxes[i]),
                "area": target.areas[i],
                "iscrowd": int(target.crowds[i]),
            }
            if target.masks is not None:
                annotation["segmentation"] = {"size": list(target.size), "counts": target.masks[i]}
            annotations.append(annotation)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": t.image, "height": t.size[0], "width": t.size[1]} for t in targets],
        "annotations": annotations,
        "categories": [{"id": number} for number in category_ids],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def average_precisions(coco: "COCO", detections: list[dict], kind: str) -> tuple[dict, list[float | None]]:
    """kind: "bbox" or "segm" -> `FIGURES` by name, and AP by category in the order of their ids; None where
    there is nothing to find."""
    from pycocotools.cocoeval import COCOeval

    other = {"bbox": "segmentation", "segm": "bbox"}[kind]  # beside a box, it would be a mask's area too
    detections = [{k: v for k, v in detection.items() if k != other} for detection in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        scored = COCOeval(coco, coco.loadRes(detections) if detections else truth([], []), kind)
        scored.params.imgIds = coco.getImgIds()
        scored.params.maxDets = [DETECTIONS]
        scored.evaluate()
        scored.accumulate()
    precision, params = scored.eval["precision"], scored.params  # (IoU, recall, category, size, detections)
    figures = {}
    for name, (iou, size) in FIGURES.items():
        chosen = precision[..., params.areaRngLbl.index(size), 0]
        figures[name] = _mean(chosen if iou is None else chosen[np.isclose(params.iouThrs, iou)])
    return figures, [_mean(precision[:, :, i, 0, 0]) for i in range(len(params.catIds))]


def _mean(precision: np.ndarray) -> float | None:
    """-1: no object of that category and size."""
    return float(precision[precision > -1].mean()) if (precision > -1).any() else None


def overlaps(boxes: Sequence, others: Sequence) -> np.ndarray:
    """IoU (n, m) of boxes (x, y, width, height)."""
    from pycocotools import mask as rle

    ours, theirs = (np.asarray(part, dtype=float).reshape(-1, 4) for part in (boxes, others))
    return np.asarray(rle.iou(ours, theirs, [0] * len(theirs))).reshape(len(ours), len(theirs))
