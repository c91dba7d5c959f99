"""Policy: which groups of patches are of one class, and can be one token; from segmentation's lists."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.mask_views import Truth
from ..data.masks import IGNORED
from ..figures import draw_tokens, show_tokens
from . import PolicySettings, WindowScoring, token_counts
from .base import lines_of
from .segmentation import WORST, Segmentation, as_png, read_png, starts
from .token_counts import TokenCounts


class Policy(Segmentation):
    """The policy network of `model.superpatches=dcts` (CTS, CVPR 2023), for groups of any size.

    Its model is a `PolicyTrainer`. Lists, pixels and arguments are `Segmentation`'s; larger images are seen
    in windows.
    """

    defaults = PolicySettings, WindowScoring
    watched = ("f1", "precision", "recall")
    zoomed = False
    alike = "of one class"
    learnt = "which patches are of one class is to be learnt; without masks, train.teacher says which agree"

    def loss(self, model: nn.Module, batch) -> dict[str, Tensor]:
        trainer = getattr(model, "module", model)  # within DistributedDataParallel
        targets = trainer.targets(batch.targets.flatten(0, 1), self.settings.border_unsure)
        return trainer.loss(model(self.normalise(batch.clips.flatten(0, 1))), targets)

    def _record(
        self, model: nn.Module, clips: Tensor, truths: Sequence[Truth], preview: bytes | None
    ) -> dict[str, Any]:
        """groups: names of the shapes; counts: int64 (shapes, 4), see `count_groups`, over all windows;
        tokens_of: see `TokenCounts.record`; truth: the mask as PNG, of what is shown."""
        known = any((truth.masks != IGNORED).any() for truth in truths)
        tokens = TokenCounts(
            keep_map=(preview is not None or not known) and len(clips) == clips.shape[2] == 1
        )
        counts = sum(
            self._count(model, clip, truth, tokens) for clip, truth in zip(clips, truths, strict=True)
        )
        record = {"groups": model.groups, "counts": counts, "tokens_of": tokens.record()}
        if "map" in record["tokens_of"] and known:
            record["truth"] = as_png(truths[0].masks[0])
        return record

    def _count(self, model: nn.Module, clip: Tensor, truth: Truth, tokens: TokenCounts) -> Tensor:
        (height, width), size = model.size, clip.shape[2:]
        pixels, masks = self.normalise(clip), truth.masks.to(clip.device)
        masks = F.interpolate(masks[None], size, mode="nearest-exact")[0]
        short = [0, max(width - size[1], 0), 0, max(height - size[0], 0)]
        pixels, masks = F.pad(pixels, short), F.pad(masks, short, value=IGNORED)
        stride, counts = self.scoring.window_stride, 0
        for y in starts(pixels.shape[2], height, stride):
            for x in starts(pixels.shape[3], width, stride):
                window = (..., slice(y, y + height), slice(x, x + width))
                logits = model(pixels[window][None])
                targets = model.targets(masks[window][None], self.settings.border_unsure)
                passed = model.tokens(logits)
                tokens.add(passed, [(y, x)] * len(passed.place), (height, width), size)  # of each chunk
                pairs = zip(model.chosen(logits), targets, strict=True)
                counts = counts + torch.stack([count_groups(*pair) for pair in pairs]).cpu()
        return counts

    def figures(self, outcome) -> dict[str, Any]:
        """f1, precision and recall: means over the shapes of groups; "groups": of each shape these, the
        share of groups that are of one class, and of those that are said to be. And "tokens"."""
        records = [record for record in outcome.records if record is not None]
        if not records:
            return dict.fromkeys((*self.watched, "groups"))
        counts = np.sum([record["counts"].numpy() for record in records], axis=0)
        groups = {name: rates(row) for name, row in zip(records[0]["groups"], counts.tolist(), strict=True)}
        means = {key: float(np.mean([group[key] for group in groups.values()])) for key in self.watched}
        return means | {"groups": groups} | token_counts.summary(records, self.class_names)

    def report(self, output: Path, outcome, report: Mapping[str, Any]) -> list[str]:
        """`tokens.png`, the first images beside their truth."""
        lines = [
            f"  {name:<8} precision {group['precision']:7.2%}, recall {group['recall']:7.2%}; "
            f"{group['share']:.1%} {self.alike}, {group['said']:.1%} said to be"
            for name, group in (report["groups"] or {}).items()
        ]
        if "tokens" in report:
            lines.append(token_counts.line(report))
        shown = [
            (row, record)
            for row, record in zip(outcome.rows, outcome.records, strict=True)
            if record is not None and "truth" in record
        ]
        if not shown:
            return lines
        pictures = [
            (Path(row.path).name, row.frame(0), read_png(r["truth"]), r["tokens_of"]["map"].numpy())
            for row, r in shown[:WORST]
        ]
        draw_tokens(pictures, [], output / "tokens.png")
        return lines + lines_of([output / "tokens.png"])

    def draw(self, frame: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
        """uint8 (H, W, 3) -> the same with the borders of its tokens."""
        return show_tokens(frame, record["tokens_of"]["map"].numpy())

    def plain(self, record: Mapping[str, Any]) -> dict[str, int]:
        """How many patches and tokens all windows have."""
        tokens = record["tokens_of"]["tokens"]
        return {"patches": record["tokens_of"]["patches"] * len(tokens), "tokens": int(tokens.sum())}

    def write(self, stem: Path, record: Mapping[str, Any]) -> None:
        """Nothing beside what is drawn."""


def count_groups(said: Tensor, target: Tensor) -> Tensor:
    """What is said of groups (bool) and what is true (1, 0, `IGNORED`) -> int64 (4): how many are of one
    class and said to be, are said to be, are, and all of them."""
    known, true = target != IGNORED, target == 1
    return torch.stack([(said & true).sum(), (said & known).sum(), true.sum(), known.sum()])


def rates(counts: Sequence[int]) -> dict[str, float]:
    """Of `count_groups` -> precision (1 where nothing is said), recall (1 where there is nothing), f1; the
    share of groups that are of one class, and of those that are said to be."""
    right, said, true, every = counts
    return {
        "precision": right / said if said else 1.0,
        "recall": right / true if true else 1.0,
        "f1": 2 * right / (said + true) if said + true else 1.0,
        "share": true / max(every, 1),
        "said": said / max(every, 1),
    }
