"""Multi-label classification: any number of classes a video (Charades). Sigmoid, mean average precision."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.rows import class_ids
from ..errors import InputError
from . import token_counts
from .base import check_scores, lines_of, mean, write_table
from .classification import Classification, mean_scores, write_views


class MultiLabel(Classification):
    """Clips (B, V, 3, T, H, W) to a yes or no for each of K classes, scored by mean average precision.

    The sigmoids of a video's views are averaged. A class without a positive video has no average precision
    and is left out of the mean, as in Charades' protocol.
    """

    watched = ("mAP",)

    def check(self, rows: Sequence, source: str) -> None:
        for row in rows:
            if row.target is None:
                raise InputError(f"{source}: {row.path} has no labels to learn")

    def encode(self, target: int | Sequence[int] | None) -> Tensor:
        """Class ids -> (K,) of zeros and ones."""
        chosen = torch.zeros(self.outputs)
        chosen[list(class_ids(target))] = 1
        return chosen

    def mirror(self, target: Tensor) -> Tensor:
        return target if self.twins is None else target[list(self.twins)]

    def loss(self, model: nn.Module, batch) -> dict[str, Tensor]:
        clips, targets = self._mixed(batch)
        smoothing = self.settings.label_smoothing
        targets = targets * (1 - smoothing) + smoothing / self.outputs
        logits = model(clips).float()
        return self._taught(self.cross_entropy(logits, targets), logits, clips)

    cross_entropy = staticmethod(F.binary_cross_entropy_with_logits)

    def activation(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def figures(self, outcome) -> dict[str, Any]:
        """mAP; and "tokens": see `token_counts.summary`, of views."""
        tokens = token_counts.summary(outcome.records, self.class_names, "views")
        return {"mAP": mean(self.average_precisions(outcome))} | tokens

    def average_precisions(self, outcome) -> list[float | None]:
        """Of each class, over the labelled videos; None for a class without a positive one."""
        from sklearn.metrics import average_precision_score  # takes a second to import

        counts = self._counted(outcome)
        scores, chosen = mean_scores(outcome.records, self.outputs)[counts], self._chosen(outcome)[counts]
        check_scores(scores)
        return [
            float(average_precision_score(chosen[:, c], scores[:, c])) if chosen[:, c].any() else None
            for c in range(self.outputs)
        ]

    def _counted(self, outcome) -> list[bool]:
        """Whether a video counts: it has labels, and is not left out as unreadable."""
        exclude = outcome.failures if self.on_failure == "exclude" else {}
        return [row.target is not None and i not in exclude for i, row in enumerate(outcome.rows)]

    def _chosen(self, outcome) -> np.ndarray:
        """(N, K) of zeros and ones."""
        rows = [self.encode(row.target).numpy() for row in outcome.rows]
        return np.array(rows).reshape(-1, self.outputs)

    def report(self, output: Path, outcome, report: Mapping[str, Any]) -> list[str]:
        """`predictions.csv`, `classes.csv` (average precisions), `scores.npz` (all), `report.html`."""
        precisions, lines, headlines = self.average_precisions(outcome), [], []
        counted = sum(value is not None for value in precisions)
        if counted:
            headlines = [("mAP over {clips}x{crops} views".format(**report["views"]), report["mAP"])]
            title, value = headlines[0]
            lines.append(f"  {title:<24} {value:7.2%}  ({counted} of {self.outputs} classes)")
        if "tokens" in report:
            lines.append(token_counts.line(report, "tokens a view"))
        written = [output / "predictions.csv", output / "classes.csv", output / "scores.npz"]
        chosen, scores = self._chosen(outcome), mean_scores(outcome.records, self.outputs)
        videos = chosen[self._counted(outcome)].sum(0).astype(int).tolist()
        ids = [class_ids(row.target) for row in outcome.rows]
        said = {"labels": [",".join(map(str, labels)) for labels in ids]}
        said["label_names"] = [",".join(self.class_names[c] for c in labels) for labels in ids]
        self._write_predictions(written[0], outcome, scores, said)
        by_class = list(zip(self.class_names, videos, precisions, strict=True))
        write_table(written[1], ["class", "videos", "average_precision"], by_class)
        chosen[[row.target is None for row in outcome.rows]] = -1  # not known
        np.savez_compressed(written[2], scores=scores, labels=chosen.astype(np.int8))
        if self.dump_views:
            written.append(write_views(output / "views.npz", outcome, chosen, self.class_names))
        page = report, headlines, "average precision", by_class
        written.append(self._write_page(output, outcome, scores, *page))
        return lines + lines_of(written)
