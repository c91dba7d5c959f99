"""Scoring: every video once, softmax averaged over its views; and what comes of it, on disk."""

import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.annotations import Row
from . import distributed
from .figures import draw_confusion
from .logs import progress


@dataclass
class Scores:
    """Of N videos: mean softmax over views (N, K), labels (N,) (-1: none), views that were right (N,).

    A video that could not be read has a row of zeros, and its cause in `failures` by index; `on_failure`
    says whether it counts as "wrong", or is left out ("exclude").
    """

    scores: np.ndarray
    labels: np.ndarray
    views_right: np.ndarray
    failures: dict[int, str]
    on_failure: str = "wrong"

    @property
    def predictions(self) -> np.ndarray:
        """(N,) class ids, the lower one on a tie; -1 where unreadable."""
        best = self.scores.argmax(1)
        best[list(self.failures)] = -1
        return best

    def metrics(self) -> dict[str, float | None]:
        """Fractions from 0 to 1 over the labelled videos, None where no video counts."""
        known = self.labels >= 0
        if self.on_failure == "exclude":
            known[list(self.failures)] = False
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

    def top(self, k: int) -> np.ndarray:
        """(N, min(k, K)) class ids, best first, the lower one on a tie."""
        return np.argsort(-self.scores, axis=1, kind="stable")[:, :k]


def use_bf16(setting: bool | None, device: torch.device) -> bool:
    """`train.bf16`: null means on CUDA only."""
    return device.type == "cuda" if setting is None else setting


@torch.no_grad()
def view_scores(
    model: nn.Module, normalise: nn.Module, clips: Tensor, *, view_batch: int, bf16: bool = False
) -> Tensor:
    """uint8 clips (B, V, 3, T, H, W) -> softmax by view (B, V, K), float32, on the model's device.

    `view_batch` views go through the model at a time, whichever videos they are of.
    """
    device = normalise.mean.device
    chunks = []
    for views in clips.flatten(0, 1).split(view_batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            chunks.append(model(normalise(views.to(device, non_blocking=True))).float().softmax(-1))
    return torch.cat(chunks).unflatten(0, clips.shape[:2])


def evaluate(
    model: nn.Module,
    normalise: nn.Module,
    loader: DataLoader,
    *,
    num_classes: int,
    view_batch: int,
    bf16: bool = False,
    on_failure: str = "wrong",
    title: str = "scoring",
    after_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Score this rank's share of the loader's videos, and gather all: the same Scores on every rank.

    Raises RuntimeError if some video was scored twice or never.
    """
    training = model.training
    model.eval()
    share, failures = {}, {}
    for batch in progress(loader, desc=title, unit="batch", leave=False):
        failures |= dict(zip(batch.failed, (cause for _, cause in batch.failures), strict=True))
        if batch.clips is None:
            continue
        views = view_scores(model, normalise, batch.clips, view_batch=view_batch, bf16=bf16).cpu()
        right = (views.argmax(-1) == batch.targets).double().mean(1)
        scores = views.double().mean(1).float()
        for index, row, share_right in zip(
            batch.indices.tolist(), scores.numpy(), right.tolist(), strict=True
        ):
            share[index] = (row, share_right)
        after_batch()
    model.train(training)
    shares = distributed.gather((share, failures))
    return _merge(shares, loader.dataset.rows, num_classes, on_failure)


def _merge(shares: list, rows: Sequence[Row], num_classes: int, on_failure: str = "wrong") -> Scores:
    seen = [index for share, failures in shares for index in (*share, *failures)]
    if sorted(seen) != list(range(len(rows))):
        raise RuntimeError(f"{len(rows)} videos, but {len(seen)} scored ({len(set(seen))} of them once)")
    merged = Scores(
        scores=np.zeros((len(rows), num_classes), np.float32),
        labels=np.array([-1 if row.label is None else row.label for row in rows]),
        views_right=np.zeros(len(rows)),
        failures={},
        on_failure=on_failure,
    )
    for share, failures in shares:
        merged.failures |= failures
        for index, (row, right) in share.items():
            merged.scores[index], merged.views_right[index] = row, right
    return merged


def write_report(
    output: Path,
    scores: Scores,
    rows: Sequence[Row],
    class_names: Sequence[str],
    *,
    views: dict[str, int],
    checkpoint: str,
    started: float,
) -> dict:
    """`report.json`, `predictions.csv` and `confusion.png` in `output`; returns the report."""
    report = scores.metrics() | {
        "num_videos": len(rows),
        "num_failed": len(scores.failures),
        "num_scored": len(rows) - len(scores.failures),
        "on_failure": scores.on_failure,
        "views": views,
        "checkpoint": checkpoint,
        "seconds": round(time.perf_counter() - started, 2),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _write_predictions(output / "predictions.csv", scores, rows, class_names)
    if (scores.labels >= 0).any():
        picture = output / "confusion.png"
        draw_confusion(scores.labels, scores.predictions, class_names, picture)
    return report


def _write_predictions(path: Path, scores: Scores, rows, class_names) -> None:
    top = scores.top(5)
    header = ["path", "label", "label_name", "prediction", "prediction_name"]
    for place in range(1, top.shape[1] + 1):
        header += [f"top{place}_name", f"top{place}_score"]
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "failure"])
        for i, (row, best) in enumerate(zip(rows, scores.predictions, strict=True)):
            names = ["" if c is None or c < 0 else class_names[c] for c in (row.label, best)]
            line = [row.path, "" if row.label is None else row.label, names[0], best, names[1]]
            for c in top[i]:
                line += ["", ""] if best < 0 else [class_names[c], f"{scores.scores[i, c]:.6f}"]
            writer.writerow([*line, scores.failures.get(i, "")])
