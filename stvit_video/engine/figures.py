"""What people would rather look at than read: learning curves and the confusion matrix."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_curves(log: Path, picture: Path) -> None:
    """`log.jsonl` -> loss by epoch, and validation accuracy by epoch."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [entry for entry in entries if entry["kind"] == "step"]
    epochs = [entry for entry in entries if entry["kind"] == "epoch"]
    scored = [entry for entry in epochs if entry.get("val_top1") is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot([e["at"] for e in steps], [e["loss"] for e in steps], color="0.8", label="step")
    left.plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs], "C0", label="epoch mean")
    left.set(title="training loss", xlabel="epoch", ylim=(0, None))
    left.legend(frameon=False)
    for key, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
        at = [e["epoch"] for e in scored]
        right.plot(at, [100 * e[key] for e in scored], marker=".", label=label)
    right.set(title="validation, one view", xlabel="epoch", ylabel="%", ylim=(0, 101))
    if scored:
        right.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_confusion(
    labels: Sequence[int], predictions: Sequence[int], class_names: Sequence[str], picture: Path
) -> None:
    """Rows: true class, columns: predicted class, each row in percent of its videos.

    Names and figures are written out where they are few enough to be read.
    """
    size = len(class_names)
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    matrix = np.zeros((size, size))
    read = (labels >= 0) & (predictions >= 0)
    np.add.at(matrix, (labels[read], predictions[read]), 1)
    videos = np.bincount(labels[labels >= 0], minlength=size)
    matrix = 100 * matrix / np.maximum(videos, 1)[:, None]
    side = min(3 + 0.45 * size, 14)
    figure, axis = plt.subplots(figsize=(side + 0.8, side), constrained_layout=True)
    image = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axis, shrink=0.8, label="% of the true class")
    axis.set(xlabel="predicted", ylabel="true")
    if size <= 40:
        axis.set_xticks(range(size), class_names, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(size), class_names)
    if size <= 20:
        for row, column in np.argwhere(matrix >= 0.5):
            value = matrix[row, column]
            colour = "white" if value > 55 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
