"""Segmentation: the class of every pixel of an image, or of every frame of a video. Mean IoU."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..data.mask_views import MaskReader, MaskTestViews, MaskTrainViews, Truth, resize
from ..data.masks import IGNORED, Masks
from ..data.views import Sampling
from ..errors import InputError, cause_of
from ..figures import BORDER, draw_scenes, draw_tokens, overlay, palette, show_tokens
from . import SegmentationScoring, SegmentationSettings, token_counts
from .base import Base, check_scores, lines_of, mean, write_table
from .token_counts import TokenCounts


class Segmentation(Base):
    """Clips (B, V, 3, T, H, W) to one of K classes a pixel; the whole frame, or windows of it.

    Its model is a `Segmenter`. Arguments are `Base`'s. A file that cannot be read has no pixels that could
    count as wrong: it is left out of the figures (whatever `on_failure` says), and counted beside them.
    dump_views: keep the predicted masks, and write them to the folder `masks`; of what has no truth they
        are kept in any case.
    """

    defaults = SegmentationSettings, SegmentationScoring
    watched = ("mIoU", "accuracy")
    items = "images"
    learnt = "the class of each pixel is to be learnt"

    def __init__(self, class_names: Sequence[str], **options):
        super().__init__(class_names, **options | {"on_failure": "exclude"})

    def check(self, rows: Sequence, source: str) -> None:
        for row in rows:
            if not isinstance(row.target, Masks):
                cause = "has no mask" if row.target is None else f"has label {row.target} and no mask"
                raise InputError(f"{source}: {row.path} {cause}, {self.learnt}")
        if rows and not 2 <= self.outputs <= IGNORED:
            raise InputError(
                f"{source}: {self.outputs} classes: must be 2 to {IGNORED}, which masks do not say: set "
                "data.num_classes or data.class_names"
            )

    def train_views(self, sampling: Sampling, data) -> MaskTrainViews:
        if data.augment_on == "device" or data.rand_augment is not None:
            raise InputError(
                f"data.augment_on={data.augment_on}, data.rand_augment={data.rand_augment}: segmentation "
                "has pixels of its own (train.zoom, train.distort), changed by workers"
            )
        return MaskTrainViews(
            sampling,
            self._reader(data),
            data.image_size,
            short_side=data.short_side,
            zoom=self.settings.zoom,
            max_share=self.settings.max_share,
            mirror=None if data.flip == "none" else self.mirror,
            distort=self.settings.distort,
            fill=tuple(self.normalise.mean.flatten().round().int().tolist()),
            repeats=data.repeats,
        )

    def test_views(
        self, sampling: Sampling, data, *, clips: int, crops: int, crop_ratio: float
    ) -> MaskTestViews:
        """Every frame with all its pixels, however many views of a video other tasks are asked for."""
        return MaskTestViews(sampling, self._reader(data), data.short_side, self.zoomed)

    @property
    def zoomed(self) -> bool:
        return set(self.scoring.zooms) != {1.0}

    def _reader(self, data) -> MaskReader:
        return MaskReader(self.outputs, data.ignore_label)

    def mirror(self, target: Tensor) -> Tensor:
        if self.twins is None:
            return target
        table = torch.arange(IGNORED + 1, dtype=torch.uint8)
        table[: self.outputs] = torch.tensor(self.twins, dtype=torch.uint8)
        return table[target.long()]

    def loss(self, model: nn.Module, batch) -> dict[str, Tensor]:
        segmenter = getattr(model, "module", model)  # within DistributedDataParallel
        clips = self.normalise(batch.clips.flatten(0, 1))
        return segmenter.loss(model(clips), batch.targets.flatten(0, 1))

    @torch.no_grad()
    def records(self, model: nn.Module, batch) -> list[dict[str, Any]]:
        """counts: int64 (3, K), pixels of each class that are predicted right, predicted, there.

        masks: predictions as PNG by the frame's index, where they are kept: all of them, or, with their
        truth, that of the middle frame, where the sample has a preview.
        tokens_of: see `TokenCounts.record`, of models that merge patches or let tokens leave.
        """
        samples = zip(batch.clips, batch.targets, batch.previews, strict=True)
        return [self._record(model, clips, truths, preview) for clips, truths, preview in samples]

    def _record(
        self, model: nn.Module, clips: Tensor, truths: Sequence[Truth], preview: bytes | None
    ) -> dict[str, Any]:
        masks: dict[int, tuple[Tensor, Tensor]] = {}  # prediction and truth of each frame, once
        shown = preview is not None or not any((truth.masks != IGNORED).any() for truth in truths)
        tokens = TokenCounts(keep_map=shown and clips.shape[0] == clips.shape[2] == 1)
        for clip, truth in zip(clips, truths, strict=True):
            predicted = self.predict(model, clip, truth.masks.shape, tokens, truth.short_side)
            predicted = predicted.to(torch.uint8).cpu()
            for frame, pair in zip(truth.frames, zip(predicted, truth.masks, strict=True), strict=True):
                masks.setdefault(frame, pair)
        counts = torch.stack([count(*pair, self.outputs) for pair in masks.values()]).sum(0)
        record, middle = {"counts": counts}, sorted(masks)[len(masks) // 2]
        if of_tokens := tokens.record():
            record["tokens_of"] = of_tokens
        if keep_all := self.dump_views or not counts.any():
            record["masks"] = {frame: as_png(mask) for frame, (mask, _) in sorted(masks.items())}
        if preview is not None and counts.any():
            mask, truth = map(as_png, masks[middle])
            record |= {"truth": {middle: truth}} | ({} if keep_all else {"masks": {middle: mask}})
        return record

    def predict(
        self,
        model: nn.Module,
        clip: Tensor,
        size: Sequence[int],
        tokens: TokenCounts | None = None,
        short_side: int | None = None,
    ) -> Tensor:
        """uint8 (3, T, H', W') -> the class of each pixel (T, H, W) of a `size`.

        tokens: counts those of all windows. short_side: what zooms are of; None: the clip's.
        """
        mirrored, zooms = self.scoring.mirrored, self.scoring.zooms
        tokens = tokens or TokenCounts()
        total = 0
        for zoom in zooms:
            frames = clip.transpose(0, 1)
            scaled = resize(frames, short_side or min(frames.shape[2:]), zoom).transpose(0, 1)
            for flip in (False, True)[: 1 + mirrored]:
                pixels = self.normalise(scaled.flip(-1) if flip else scaled)
                logits = resize_scores(self._windows(model, pixels, tokens), size)
                tokens.keep_map = False
                if flip:
                    logits = logits.flip(-1) if self.twins is None else logits.flip(-1)[list(self.twins)]
                total = total + (logits.softmax(0) if len(zooms) * (1 + mirrored) > 1 else logits)
        check_scores(total.amax(0))
        return total.argmax(0)

    def _windows(self, model: nn.Module, clip: Tensor, tokens: TokenCounts) -> Tensor:
        """Normalised (3, T, H, W) -> scores (K, T, H, W): of the whole, or the mean of the windows."""
        if model.size is None:
            return model.scores(model(clip[None]), tuple(clip.shape[1:]))[0]
        (height, width), size = model.size, clip.shape[2:]
        clip = F.pad(clip, [0, max(width - size[1], 0), 0, max(height - size[0], 0)])
        places = [
            (top, left)
            for top in starts(clip.shape[2], height, self.scoring.window_stride)
            for left in starts(clip.shape[3], width, self.scoring.window_stride)
        ]
        total = clip.new_zeros(self.outputs, *clip.shape[1:])
        counts = clip.new_zeros(clip.shape[2:])
        for first in range(0, len(places), self.view_batch):
            part = places[first : first + self.view_batch]
            windows = torch.stack([clip[..., y : y + height, x : x + width] for y, x in part])
            outputs = model(windows)
            tokens.add(outputs, part, (height, width), size)
            scores = model.scores(outputs, (clip.shape[1], height, width))
            for (y, x), window in zip(part, scores, strict=True):
                total[..., y : y + height, x : x + width] += window
                counts[y : y + height, x : x + width] += 1
        return (total / counts)[..., : size[0], : size[1]]

    # ---- figures and report

    def figures(self, outcome) -> dict[str, Any]:
        """mIoU, accuracy of pixels, mean class accuracy; and "classes", the IoU of each by name. Of models
        that merge patches or let tokens leave "tokens" and "exits": see `token_counts.summary`.

        Classes that are neither there nor predicted are left out of the means, as in mmsegmentation.
        """
        counts = self.counts(outcome.records)
        tokens = token_counts.summary(outcome.records, self.class_names)
        if not counts.any():
            return dict.fromkeys(("mIoU", "accuracy", "mean_class_accuracy", "classes")) | tokens
        right, _, there = counts
        ious, accuracies = shares(counts)
        return {
            "mIoU": mean(ious),
            "accuracy": int(right.sum()) / int(there.sum()),
            "mean_class_accuracy": mean(accuracies),
            "classes": dict(zip(self.class_names, ious, strict=True)),
        } | tokens

    def counts(self, records: Sequence[Mapping | None]) -> np.ndarray:
        """The sum over all records: int64 (3, K)."""
        kept = [record["counts"].numpy() for record in records if record is not None]
        return np.sum(kept, axis=0) if kept else np.zeros((3, self.outputs), np.int64)

    def report(self, output: Path, outcome, report: Mapping[str, Any]) -> list[str]:
        """`classes.csv`, `predictions.csv` (a line an image), and `worst.png` where masks were kept; with
        counts of tokens `tokens.png` of the same images."""
        titles = {
            "mIoU": "mIoU",
            "accuracy": "pixel accuracy",
            "mean_class_accuracy": "mean class accuracy",
        }
        lines = [
            f"  {title:<24} {report[key]:7.2%}" for key, title in titles.items() if report[key] is not None
        ]
        if "tokens" in report:
            lines.append(token_counts.line(report))
        written = [output / "classes.csv", output / "predictions.csv"]
        counts = self.counts(outcome.records)
        columns = zip(self.class_names, counts[2].tolist(), *shares(counts), strict=True)
        write_table(written[0], ["class", "pixels", "iou", "accuracy"], columns)
        images = []
        for i, (row, record) in enumerate(zip(outcome.rows, outcome.records, strict=True)):
            counts = self.counts([record])
            pixels, (ious, _) = int(counts[2].sum()), shares(counts)
            accuracy = int(counts[0].sum()) / pixels if pixels else None
            failure = cause_of(outcome.failures.get(i, ""), row.path)
            images.append((row.path, pixels, accuracy, mean(ious), failure))
        write_table(written[1], ["path", "pixels", "accuracy", "mIoU", "failure"], images)
        shown = [i for i, record in enumerate(outcome.records) if record is not None and "truth" in record]
        if worst := sorted(shown, key=lambda i: images[i][3])[:WORST]:
            written.append(output / "worst.png")
            scenes = [_scene(outcome.rows[i], outcome.records[i], images[i][3]) for i in worst]
            draw_scenes(scenes, self.class_names, written[-1])
            pictures = [
                (title, frame, said, outcome.records[i]["tokens_of"]["map"].numpy())
                for i, (title, frame, _, said) in zip(worst, scenes, strict=True)
                if "map" in outcome.records[i].get("tokens_of", {})
            ]
            if pictures:
                written.append(output / "tokens.png")
                leave = [f"left after layer {layer}" for layer in report.get("exits", ())]
                draw_tokens(pictures, leave, written[-1])
        if self.dump_views:
            written.append(output / "masks")
            self._write_masks(written[-1], outcome)
        return lines + lines_of(written)

    def _write_masks(self, folder: Path, outcome) -> None:
        """NUMBER_NAME_mask.png of each row, by its place in the list."""
        folder.mkdir(exist_ok=True)
        for i, (row, record) in enumerate(zip(outcome.rows, outcome.records, strict=True)):
            if record is not None:
                self.write(folder / f"{i:06d}_{Path(row.path).stem}", record)

    # ---- what a prediction is shown and written as

    def draw(self, frame: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
        """uint8 (H, W, 3) and the record of it -> the same under its classes' colours; where it has
        superpatches, with dark lines between its tokens."""
        drawn = overlay(frame, read_png(next(iter(record["masks"].values()))))
        tokens = record.get("tokens_of", {})
        if "map" not in tokens or tokens["tokens"].min() == tokens["patches"]:
            return drawn
        return show_tokens(drawn, BORDER * (tokens["map"].numpy() == BORDER))

    def plain(self, record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """For json: "classes", the share of the pixels that each has, by name, the largest first."""
        masks = np.stack([read_png(mask) for mask in record["masks"].values()])
        pixels = np.bincount(masks.ravel(), minlength=self.outputs)
        order = np.argsort(-pixels, kind="stable")
        shown = {self.class_names[c]: round(int(pixels[c]) / masks.size, 6) for c in order if pixels[c]}
        return {"classes": shown}

    def write(self, stem: Path, record: Mapping[str, Any]) -> None:
        """STEM_mask.png: class ids that show their colours; of several frames STEM_mask_00000.png, ...

        Where there is a map of tokens, STEM_tokens.png."""
        tokens = record.get("tokens_of", {}).get("map")
        if tokens is not None:
            stem.with_name(f"{stem.name}_tokens.png").write_bytes(as_png(tokens))
        for frame, mask in record["masks"].items():
            place = f"_{frame:05d}" if len(record["masks"]) > 1 else ""
            stem.with_name(f"{stem.name}_mask{place}.png").write_bytes(mask)


WORST = 8  # images in worst.png


def starts(length: int, window: int, stride: int | None) -> list[int]:
    """Where windows begin that cover `length` pixels, the last at their end. stride None: 2/3 of one;
    more than one is one, which leaves no gaps."""
    stride, last = min(stride or max(window * 2 // 3, 1), window), max(length - window, 0)
    return [*range(0, last, stride), last]


def count(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Class ids of one shape -> int64 (3, K): pixels right, predicted and there; no ignored ones."""
    counted = truth != IGNORED
    prediction, truth = prediction[counted], truth[counted].long()
    parts = truth[prediction == truth], prediction, truth
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


def shares(counts: np.ndarray) -> tuple[list[float | None], list[float | None]]:
    """(3, K) as of `count` -> IoU and accuracy of each class; None where there is nothing to divide by."""
    right, predicted, there = counts
    joined = predicted + there - right
    return tuple(
        [int(r) / int(n) if n else None for r, n in zip(right, total, strict=True)]
        for total in (joined, there)
    )


def resize_scores(scores: Tensor, size: Sequence[int]) -> Tensor:
    """(K, T, H', W') -> (K, T, H, W), bilinear."""
    if scores.shape[2:] == tuple(size[1:]):
        return scores
    return F.interpolate(scores, tuple(size[1:]), mode="bilinear", align_corners=False)


def as_png(mask: Tensor) -> bytes:
    """uint8 (H, W) -> a PNG of these ids, which shows their colours."""
    image, file = Image.fromarray(mask.numpy()), io.BytesIO()
    image.putpalette(palette().tobytes())
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _scene(row, record: Mapping[str, Any], value: float) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """Title, frame, truth and prediction, of the frame whose truth the record keeps."""
    ((place, truth),) = record["truth"].items()
    title = f"{'/'.join(Path(row.path).parts[-2:])}: mIoU {value:.1%}"
    return title, row.frame(place), read_png(truth), read_png(record["masks"][place])


def read_png(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)
