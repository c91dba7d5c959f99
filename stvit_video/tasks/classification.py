"""Classification: one class a video. Softmax, averaged over the views of a video."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.rows import class_ids
from ..data.transforms import Mix, TestTransform
from ..data.views import Sampling, TestViews, TrainViews
from ..errors import InputError, cause_of
from ..figures import draw_confusion
from ..reports.page import write_report_page
from . import ClassificationSettings, NoSettings, token_counts
from .base import Base, lines_of, write_table


class Classification(Base):
    """Clips (B, V, 3, T, H, W) to one of K classes. Arguments are `Base`'s.

    dump_views: keep the scores of every view, and write them to `views.npz`.
    """

    defaults = ClassificationSettings, NoSettings
    watched = ("top1", "top5")
    items = "videos"
    teacher: nn.Module | None = None  # in evaluation mode

    def __init__(self, class_names: Sequence[str], **options):
        super().__init__(class_names, **options)
        self.mix = Mix(
            self.outputs,
            erasing=self.settings.erasing,
            mixup=self.settings.mixup,
            cutmix=self.settings.cutmix,
        )

    def check(self, rows: Sequence, source: str) -> None:
        for row in rows:
            if not isinstance(row.target, int):
                cause = "has no label" if row.target is None else f"has several labels {row.target}"
                raise InputError(f"{source}: {row.path} {cause}, one class a video is to be learnt")

    def train_views(self, sampling: Sampling, data) -> TrainViews:
        on_device = data.augment_on == "device"
        return TrainViews(sampling, self.train_transform(data), data.repeats, on_device)

    def test_views(
        self, sampling: Sampling, data, *, clips: int, crops: int, crop_ratio: float
    ) -> TestViews:
        transform = TestTransform(
            data.image_size, crops=crops, crop_ratio=crop_ratio, interpolation=data.interpolation
        )
        return TestViews(sampling, transform, clips)

    def encode(self, target: int | None) -> int:
        return -1 if target is None else target

    def mirror(self, target: int) -> int:
        return target if self.twins is None else self.twins[target]

    def loss(self, model: nn.Module, batch) -> dict[str, Tensor]:
        clips, targets = self._mixed(batch)
        logits = model(clips).float()
        smoothing = self.settings.label_smoothing
        return self._taught(F.cross_entropy(logits, targets, label_smoothing=smoothing), logits, clips)

    def _taught(self, loss: Tensor, logits: Tensor, clips: Tensor) -> dict[str, Tensor]:
        """The labels' loss, with the teacher's on the same clips where there is one."""
        if self.teacher is None:
            return {"loss": loss}
        with torch.no_grad():
            scores = self.activation(self.teacher(clips).float())
        teacher, share = self.cross_entropy(logits, scores), self.settings.distill
        return {"loss": (1 - share) * loss + share * teacher, "teacher": teacher}

    cross_entropy = staticmethod(F.cross_entropy)  # of logits and probabilities (B, K)

    def _mixed(self, batch) -> tuple[Tensor, Tensor]:
        """Normalised clips (V * B, 3, T, H, W) and targets, mixed.

        Views first: mixing pairs neighbours, and clips of one video are not to be mixed with each other.
        """
        clips = self.normalise(batch.clips.transpose(0, 1)).flatten(0, 1)
        return self.mix(clips, batch.targets.transpose(0, 1).flatten(0, 1))

    @torch.no_grad()
    def view_scores(self, model: nn.Module, clips: Tensor, tokens: list[Tensor] | None = None) -> Tensor:
        """uint8 clips (B, V, 3, T, H, W) -> scores by view (B, V, K), float32, on the model's device.

        `view_batch` views go through the model at a time, whichever videos they are of.
        tokens: where views differ in their number of tokens, the numbers (n,) of each time are added.
        """
        scores = []
        for part in clips.flatten(0, 1).split(self.view_batch):
            scores.append(self.activation(model(self.normalise(part)).float()))
            if tokens is not None and getattr(model, "clip_tokens", None) is not None:
                tokens.append(model.clip_tokens)
        return torch.cat(scores).unflatten(0, clips.shape[:2])

    def activation(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def records(self, model: nn.Module, batch) -> list[dict[str, Tensor]]:
        """scores: the mean over views (K,); classes: the best one of each view (V,). tokens_of: where views
        differ in their number of tokens, as `TokenCounts.record` with views for windows."""
        tokens: list[Tensor] = []
        views = self.view_scores(model, batch.clips, tokens).cpu()
        means, classes = views.double().mean(1).float(), views.argmax(-1)
        records = [{"scores": s, "classes": c} for s, c in zip(means, classes, strict=True)]
        if self.dump_views:
            for record, scores in zip(records, views, strict=True):
                record["views"] = scores.clone()
        if tokens:
            patches, counts = math.prod(model.grid), torch.cat(tokens).cpu().unflatten(0, views.shape[:2])
            for record, numbers in zip(records, counts, strict=True):
                record["tokens_of"] = {"patches": patches, "tokens": numbers.clone(), "exits": {}}
        return records

    def figures(self, outcome) -> dict[str, Any]:
        """See `Scores.figures`; and "tokens": see `token_counts.summary`, of views."""
        tokens = token_counts.summary(outcome.records, self.class_names, "views")
        return Scores.of(outcome, self.outputs, self.on_failure).figures() | tokens

    def report(self, output: Path, outcome, report: Mapping[str, Any]) -> list[str]:
        scores = Scores.of(outcome, self.outputs, self.on_failure)
        number = "{clips}x{crops}".format(**report["views"])
        titles = {
            "top1": f"top-1 over {number} views",
            "top5": f"top-5 over {number} views",
            "mean_class_accuracy": "mean class accuracy",
            "per_clip_top1": "top-1 of single views",
        }
        if self.outputs <= 5:
            del titles["top5"]  # always right
        headlines = [(title, report[key]) for key, title in titles.items() if report[key] is not None]
        lines = [f"  {title:<24} {value:7.2%}" for title, value in headlines]
        if "tokens" in report:
            lines.append(token_counts.line(report, "tokens a view"))
        names, labels = dict(enumerate(self.class_names)), [row.target for row in outcome.rows]
        said = {"label": labels, "label_name": map(names.get, labels)}
        said |= {"prediction": scores.predictions, "prediction_name": map(names.get, scores.predictions)}
        written = [self._write_predictions(output / "predictions.csv", outcome, scores.scores, said)]
        if (scores.labels >= 0).any():
            written.append(output / "confusion.png")
            draw_confusion(scores.labels, scores.predictions, self.class_names, written[-1])
        if self.dump_views:
            written.append(write_views(output / "views.npz", outcome, scores.labels, self.class_names))
        by_class = list(zip(self.class_names, *scores.by_class(), strict=True))
        page = report, headlines, "accuracy", by_class
        written.append(self._write_page(output, outcome, scores.scores, *page))
        return lines + lines_of(written)

    def _write_page(
        self, output: Path, outcome, scores: np.ndarray, report, headlines, measure: str, by_class
    ) -> Path:
        best = top(scores, 5)
        return write_report_page(
            output / "report.html",
            report,
            headlines=headlines,
            measure=measure,
            by_class=by_class,
            rows=[(row.path, class_ids(row.target)) for row in outcome.rows],
            best=best,
            scores=np.take_along_axis(scores, best, 1),
            failures=outcome.failures,
            previews=outcome.previews,
            confusion=measure == "accuracy",
        )

    def _write_predictions(self, path: Path, outcome, scores: np.ndarray, said: Mapping[str, Any]) -> Path:
        """scores: (N, K). said: by the name of its column, what list and model say of each video."""
        best = top(scores, 5)
        columns = [f"top{i}_{kind}" for i in range(1, best.shape[1] + 1) for kind in ("name", "score")]
        rows = []
        for i, (row, *cells) in enumerate(zip(outcome.rows, *said.values(), strict=True)):
            for c in best[i]:
                readable = i not in outcome.failures
                cells += (self.class_names[c], float(scores[i, c])) if readable else (None, None)
            rows.append([row.path, *cells, cause_of(outcome.failures.get(i, ""), row.path)])
        return write_table(path, ["path", *said, *columns, "failure"], rows)


@dataclass
class Scores:
    """Of N videos: mean softmax over views (N, K), labels (N,) (-1: none), share of right views (N,).

    A video that could not be read has a row of zeros, and its cause in `failures` by index; `on_failure`
    says whether it counts as "wrong", or is left out ("exclude").
    """

    scores: np.ndarray
    labels: np.ndarray
    views_right: np.ndarray
    failures: dict[int, str]
    on_failure: str = "wrong"

    @classmethod
    def of(cls, outcome, num_classes: int, on_failure: str) -> "Scores":
        labels = np.array([-1 if row.target is None else row.target for row in outcome.rows])
        right = [
            0.0 if record is None else (record["classes"] == int(label)).double().mean().item()
            for record, label in zip(outcome.records, labels, strict=True)
        ]
        scores = mean_scores(outcome.records, num_classes)
        return cls(scores, labels, np.array(right), outcome.failures, on_failure)

    @property
    def predictions(self) -> np.ndarray:
        """(N,) class ids, the lower one on a tie; -1 where unreadable."""
        best = self.scores.argmax(1)
        best[list(self.failures)] = -1
        return best

    def figures(self) -> dict[str, float | None]:
        """Fractions from 0 to 1 over the labelled videos, None where no video counts."""
        known = self._counted()
        if not known.any():
            return dict.fromkeys(("top1", "top5", "mean_class_accuracy", "per_clip_top1"))
        labels, right = self.labels[known], (self.predictions == self.labels)[known]
        five = (self.top(5) == self.labels[:, None]).any(1)
        five[list(self.failures)] = False
        classes = np.unique(labels)
        return {
            "top1": float(right.mean()),
            "top5": float(five[known].mean()),
            "mean_class_accuracy": float(np.mean([right[labels == c].mean() for c in classes])),
            "per_clip_top1": float(self.views_right[known].mean()),
        }

    def by_class(self) -> tuple[list[int], list[float | None]]:
        """Videos that count and share of right ones of each class; None where no video counts."""
        known, classes = self._counted(), self.scores.shape[1]
        videos = np.bincount(self.labels[known], minlength=classes)
        right = np.bincount(self.labels[known & (self.predictions == self.labels)], minlength=classes)
        shares = [int(r) / int(n) if n else None for r, n in zip(right, videos, strict=True)]
        return videos.tolist(), shares

    def _counted(self) -> np.ndarray:
        """(N,) whether a video counts: it has a label, and is not left out as unreadable."""
        known = self.labels >= 0
        if self.on_failure == "exclude":
            known[list(self.failures)] = False
        return known

    def top(self, k: int) -> np.ndarray:
        return top(self.scores, k)


def mean_scores(records: Sequence, num_classes: int) -> np.ndarray:
    """(N, K) float32, zeros where a record is missing."""
    missing = torch.zeros(num_classes)
    scores = [missing if record is None else record["scores"] for record in records]
    return torch.stack(scores).numpy() if scores else np.zeros((0, num_classes), np.float32)


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """(N, K) -> (N, min(k, K)) class ids, best first, the lower one on a tie."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def write_views(path: Path, outcome, labels: np.ndarray, class_names: Sequence[str]) -> Path:
    """Scores of every view (N, V, K), float32, zeros where unreadable; with paths, labels, class names."""
    views = next((record["views"] for record in outcome.records if record is not None), torch.zeros(0, 0))
    scores = [torch.zeros_like(views) if record is None else record["views"] for record in outcome.records]
    np.savez_compressed(
        path,
        scores=torch.stack(scores).numpy(),
        labels=labels,
        paths=np.array([row.path for row in outcome.rows]),
        class_names=np.array(class_names),
    )
    return path
