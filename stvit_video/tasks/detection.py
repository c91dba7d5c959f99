"""Detection: the objects in an image, each with its class, its box and, by Mask R-CNN, its mask."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms import v2
from torchvision.tv_tensors import TVTensor

from ..data.objects import Objects, decode_mask, encode_masks
from ..data.views import Sampling, WholeView
from ..errors import DecodeError, InputError
from . import DetectionSettings, NoSettings, coco
from .base import Base, lines_of

LONGEST_SIDE = 5 / 3  # of an image's sides, over data.image_size: as 1333 over 800
SHOWN = 0.5  # score of objects that are drawn
EXAMPLES, ROW_HEIGHT = 3, 240  # first, best and worst images, so many of each; pixels
PALETTE = ((230, 60, 60), (60, 140, 240), (60, 190, 90), (250, 170, 30), (170, 90, 220), (20, 190, 190))


class Instance(NamedTuple):
    """An object that was detected: box (x, y, width, height) in pixels, mask bool (H, W) or None."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None


@dataclass(frozen=True)
class Scaled:
    """An image in one of several sizes, and its `Objects` as tensors.

    short_sides: one is drawn, fewer pixels where the other side would exceed `longest`.
    learnt: the target is what is to be learnt (boxes, labels, masks), else the size that the image had.
    flip: mirror half of the images. twins: class id -> class id of its mirror image; None: the same.
    """

    short_sides: Sequence[int]
    longest: int
    learnt: bool = False
    flip: bool = False
    twins: Sequence[int] | None = None

    def __call__(self, frames: Tensor, target: Objects | None) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 (1, 3, H, W) -> (1, 3, H', W'); the target in its pixels. Raises DecodeError."""
        size = tuple(frames.shape[-2:])
        if target is not None and size != tuple(target.size):
            listed, has = (f"{width}x{height}" for height, width in (target.size, size))
            raise DecodeError(f"image {target.image}: {has} pixels, the list says {listed}")
        short_side = self.short_sides[torch.randint(len(self.short_sides), ()).item()]
        scale = min(short_side / min(size), self.longest / max(size))
        size = [max(round(side * scale), 1) for side in size]
        if not self.learnt:
            return v2.functional.resize(frames, size), {"size": torch.tensor(frames.shape[-2:])}
        sample = v2.functional.resize(frames, size), _resized(target.tensors(), size)
        if self.flip and torch.rand(()).item() < 0.5:
            sample = mirrored(*sample, self.twins)
        return sample[0], _kept(sample[1])


def _resized(target: dict[str, Tensor], size: list[int]) -> dict[str, Tensor]:
    return tree_map_only(TVTensor, lambda part: v2.functional.resize(part, size), target)


def mirrored(
    frames: Tensor, target: dict[str, Tensor], twins: Sequence[int] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Frames and target left to right; labels become their twins'."""
    target = tree_map_only(TVTensor, v2.functional.horizontal_flip, target)
    if twins is not None:
        target |= {"labels": torch.tensor(twins)[target["labels"]]}
    return v2.functional.horizontal_flip(frames), target


def _kept(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors of the objects that are at least a pixel wide and high within the image."""
    boxes = v2.functional.clamp_bounding_boxes(target["boxes"])
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).as_subclass(Tensor).all(1)
    return {key: part.as_subclass(Tensor)[kept] for key, part in (target | {"boxes": boxes}).items()}


class Detection(Base):
    """Images to objects of K classes, scored by COCO's average precision. Arguments are `Base`'s.

    A record holds, best first, labels, scores, boxes (x, y, width, height) in the image's pixels and, by a
    model with masks, masks as COCO's compressed run lengths; and the image's size.
    """

    defaults = DetectionSettings, NoSettings
    watched = ("AP", "AP50", "mask_AP")
    items = "images"

    def check(self, rows: Sequence, source: str) -> None:
        for row in rows:
            if not isinstance(row.target, Objects):
                raise InputError(
                    f"{source}: {row.path} has no boxes; task=detection wants COCO json or VOC xml"
                )

    def train_views(self, sampling: Sampling, data) -> WholeView:
        if data.num_frames != 1:
            raise InputError(f"data.num_frames={data.num_frames}: a detector takes images, 1")
        if data.augment_on == "device" or data.rand_augment is not None or data.repeats != 1:
            raise InputError(
                f"data.augment_on={data.augment_on}, data.rand_augment={data.rand_augment}, data.repeats="
                f"{data.repeats}: detection scales and mirrors images, in the worker, and no more"
            )
        sides = tuple(self.settings.short_sides) or (data.image_size,)
        scaled = Scaled(sides, self._longest(data), True, data.flip != "none", self.twins)
        return WholeView(sampling, scaled, random=True)

    def test_views(
        self, sampling: Sampling, data, *, clips: int, crops: int, crop_ratio: float
    ) -> WholeView:
        return WholeView(sampling, Scaled((data.image_size,), self._longest(data)))

    def _longest(self, data) -> int:
        return self.settings.longest_side or int(LONGEST_SIDE * data.image_size)

    def _images(self, batch) -> list[Tensor]:
        """Normalised, (3, H, W)."""
        return [self.normalise(clips[0])[:, 0] for clips in batch.clips]

    def loss(self, model: nn.Module, batch) -> dict[str, Tensor]:
        targets = [
            {key: values[i][0] for key, values in batch.targets.items()} for i in range(len(batch.clips))
        ]
        losses = model(self._images(batch), targets)
        return {"loss": sum(losses.values())} | losses

    @torch.no_grad()
    def records(self, model: nn.Module, batch) -> list[dict[str, list]]:
        """Each image by itself: what it is padded with would depend on those beside it."""
        records = []
        for image, size in zip(self._images(batch), batch.targets["size"], strict=True):
            size = size[0].tolist()
            detected = {key: value.float().cpu() for key, value in model([image])[0].items()}
            height, width = (new / old for new, old in zip(size, image.shape[-2:], strict=True))
            boxes = detected["boxes"] * torch.tensor([width, height, width, height])
            record = {
                "labels": detected["labels"].int().tolist(),
                "scores": detected["scores"].tolist(),
                "boxes": torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist(),
                "size": size,
            }
            if "masks" in detected:
                # one by one: a hundred of a photograph are gigabytes
                pairs = zip(detected["masks"], boxes, strict=True)
                record["masks"] = [_pasted(mask, box, tuple(size)) for mask, box in pairs]
            records.append(record)
        return records

    def figures(self, outcome) -> dict[str, Any]:
        """COCO's, of boxes and, where there are some, of masks (mask_AP, ...); and `by_class`."""
        kept = [i for i in _labelled(outcome) if self.on_failure == "wrong" or i not in outcome.failures]
        targets, records = [outcome.rows[i].target for i in kept], [outcome.records[i] for i in kept]
        ids = self._category_ids(outcome.rows)
        truth, results = coco.truth(targets, ids), coco.results(targets, records, ids)
        figures, by_box = coco.average_precisions(truth, results, "bbox")
        by_class = [{"AP": value} for value in by_box]
        if any(target.masks for target in targets) and any("masks" in r for r in records if r is not None):
            by_mask, values = coco.average_precisions(truth, results, "segm")
            figures |= {f"mask_{key}": value for key, value in by_mask.items()}
            by_class = [one | {"mask_AP": value} for one, value in zip(by_class, values, strict=True)]
        order = np.argsort(np.argsort(ids)).tolist()  # pycocotools sorts the categories
        return figures | {
            "by_class": {name: by_class[i] for name, i in zip(self.class_names, order, strict=True)}
        }

    def report(self, output: Path, outcome, report: Mapping[str, Any]) -> list[str]:
        """`predictions.json` in COCO's format; `objects.png`, the first, best and worst images."""
        kept = _labelled(outcome)
        rows, records = [outcome.rows[i] for i in kept], [outcome.records[i] for i in kept]
        results = coco.results([r.target for r in rows], records, self._category_ids(outcome.rows))
        written = [output / "predictions.json", output / "objects.png"]
        written[0].write_text(json.dumps(results))
        titles = {"AP": "AP of boxes", "AP50": "AP50", "AP75": "AP75"}
        titles |= {f"mask_{key}": title.replace("boxes", "masks") for key, title in titles.items()}
        lines = [
            f"  {title:<24} {report[key]:7.2%}"
            for key, title in titles.items()
            if report.get(key) is not None
        ]
        if not self._draw_images(written[1], rows, records):
            del written[1]
        return lines + lines_of(written)

    def instances(self, record: Mapping[str, Any]) -> list[Instance]:
        """The objects of a record, best first."""
        masks = record.get("masks") or [None] * len(record["labels"])
        return [
            Instance(
                self.class_names[label],
                score,
                tuple(box),
                None if counts is None else decode_mask(counts, record["size"]).astype(bool),
            )
            for label, score, box, counts in zip(
                record["labels"], record["scores"], record["boxes"], masks, strict=True
            )
        ]

    def plain(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """For json: the objects with name, score, box and, if any, mask (COCO's run lengths)."""
        masks = record.get("masks")
        objects = zip(record["labels"], record["scores"], record["boxes"], strict=True)
        return {
            "objects": [
                {
                    "name": self.class_names[label],
                    "score": round(score, 6),
                    "box": [round(x, 2) for x in box],
                }
                | ({} if masks is None else {"mask": {"size": list(record["size"]), "counts": masks[i]}})
                for i, (label, score, box) in enumerate(objects)
            ]
        }

    def draw(self, frame: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
        """uint8 (H, W, 3) -> the same with the objects of a score of 0.5 or more drawn in."""
        sure = [one for one in self.instances(record) if one.score >= SHOWN]
        return draw_instances(frame, sure, self.class_names)

    def _category_ids(self, rows: Sequence) -> list[int]:
        """The list's, by class id."""
        return getattr(rows, "category_ids", None) or list(range(1, self.outputs + 1))

    def _draw_images(self, path: Path, rows: Sequence, records: Sequence) -> bool:
        """Truth on the left, detections on the right; -> whether there was an image to draw."""
        readable = [i for i, record in enumerate(records) if record is not None]
        order = sorted(readable, key=lambda i: -_agreement(rows[i].target, records[i]))
        kinds = {"first": readable[:EXAMPLES], "best": order[:EXAMPLES], "worst": order[-EXAMPLES:]}
        pairs = []
        for kind, i in ((kind, i) for kind, places in kinds.items() for i in places):
            frame = rows[i].frame(0)
            pair = [self._enlarged(frame, record) for record in (_as_record(rows[i].target), records[i])]
            picture = Image.fromarray(np.concatenate(pair, 1))
            picture = picture.resize((round(picture.width * ROW_HEIGHT / picture.height), ROW_HEIGHT))
            pairs.append((f"{kind}: {Path(rows[i].path).name} (left: the list, right: the model)", picture))
        if not pairs:
            return False
        step = ROW_HEIGHT + 20
        sheet = Image.new("RGB", (max(pair.width for _, pair in pairs), len(pairs) * step), "white")
        for place, (title, pair) in enumerate(pairs):
            ImageDraw.Draw(sheet).text((4, place * step + 4), title, "black")
            sheet.paste(pair, (0, place * step + 20))
        sheet.save(path)
        return True

    def _enlarged(self, frame: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
        """The sure objects drawn into the frame, a small one times a whole number: names would hide it."""
        times = max(ROW_HEIGHT // frame.shape[0], 1)
        sure = [
            one._replace(
                box=[times * x for x in one.box],
                mask=None if one.mask is None else one.mask.repeat(times, 0).repeat(times, 1),
            )
            for one in self.instances(record)
            if one.score >= SHOWN
        ]
        return draw_instances(frame.repeat(times, 0).repeat(times, 1), sure, self.class_names)


def _pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> str:
    """Probabilities (1, m, m) within a box (4) -> COCO's run lengths in an image of `size` (H, W)."""
    return encode_masks((paste_masks_in_image(mask[None], box[None], size)[0] > 0.5).numpy())[0]


def _labelled(outcome) -> list[int]:
    """The images of which the list says what is in them."""
    return [i for i, row in enumerate(outcome.rows) if row.target is not None]


def _as_record(target: Objects) -> dict[str, Any]:
    """The truth as if it were detected."""
    masks = {} if target.masks is None else {"masks": target.masks}
    sure = [1.0] * len(target.classes)
    return {"labels": target.classes, "scores": sure, "boxes": target.boxes, "size": target.size} | masks


def _agreement(target: Objects, record: Mapping[str, Any]) -> float:
    """How many sure detections and objects pair off, at IoU 0.5 and of one class: 2 pairs / all of both."""
    sure = [i for i, score in enumerate(record["scores"]) if score >= SHOWN]
    listed = [i for i, crowd in enumerate(target.crowds) if not crowd]
    free, pairs = set(listed), 0
    overlaps = coco.overlaps([record["boxes"][i] for i in sure], target.boxes)
    for row, i in zip(overlaps, sure, strict=True):
        best = max(free, key=lambda j: row[j] * (target.classes[j] == record["labels"][i]), default=None)
        if best is not None and row[best] >= 0.5 and target.classes[best] == record["labels"][i]:
            free.remove(best)
            pairs += 1
    return 2 * pairs / (len(sure) + len(listed)) if sure or listed else 1.0


def draw_instances(frame: np.ndarray, instances: Sequence[Instance], names: Sequence[str]) -> np.ndarray:
    """uint8 (H, W, 3) -> the same with masks, boxes, names and scores drawn in, a colour a class."""
    pixels = frame.copy()
    for one in instances:
        if one.mask is not None:
            colour = np.array(PALETTE[names.index(one.name) % len(PALETTE)])
            pixels[one.mask] = (0.5 * pixels[one.mask] + 0.5 * colour).astype(np.uint8)
    picture = Image.fromarray(pixels)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(frame.shape[0] // 40, 9))
    for one in instances:
        colour = PALETTE[names.index(one.name) % len(PALETTE)]
        x, y, width, height = one.box
        pen.rectangle((x, y, x + width, y + height), outline=colour, width=max(frame.shape[0] // 300, 1))
        text = one.name if one.score == 1 else f"{one.name} {one.score:.0%}"
        place = pen.textbbox((x + 1, max(y - font.size - 3, 0)), text, font=font)
        pen.rectangle((place[0] - 1, place[1] - 1, place[2] + 1, place[3] + 1), fill=colour)
        pen.text(place[:2], text, "white", font, anchor="lt")
    return np.asarray(picture)
