"""Policy without labels: where a dense model's patches agree, from any videos or images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .classification import Classification
from .policy import Policy, count_groups
from .token_counts import TokenCounts


class Agreement(Policy):
    """The policy network of `model.superpatches=dcts`, as a teacher's features are: `agreement_targets`.

    Lists and clips are `Classification`'s; labels, if there are some, are not looked at.
    """

    items, alike, labelled = "videos", "whose patches agree", False
    teacher: nn.Module | None = None  # in evaluation mode
    train_views, test_views = Classification.train_views, Classification.test_views

    def check(self, rows: Sequence, source: str) -> None:
        """Any row will do."""

    def encode(self, target: Any) -> int:
        return -1

    def mirror(self, target: int) -> int:
        return target

    def loss(self, model: nn.Module, batch) -> dict[str, Tensor]:
        trainer = getattr(model, "module", model)  # within DistributedDataParallel
        clips = self.normalise(batch.clips.flatten(0, 1))
        targets = trainer.agreement(self.teacher, clips, self.settings.agreement)
        return trainer.loss(model(clips), targets)

    @torch.no_grad()
    def records(self, model: nn.Module, batch) -> list[dict[str, Any]]:
        """groups, counts and tokens_of, as `Policy`'s, over all views."""
        return [self._record_views(model, clips) for clips in batch.clips]

    def _record_views(self, model: nn.Module, clips: Tensor) -> dict[str, Any]:
        tokens, counts = TokenCounts(), 0
        for part in clips.split(self.view_batch):
            pixels = self.normalise(part)
            logits = model(pixels)
            targets = model.agreement(self.teacher, pixels, self.settings.agreement)
            pairs = zip(model.chosen(logits), targets, strict=True)
            counts = counts + torch.stack([count_groups(*pair) for pair in pairs]).cpu()
            said = model.tokens(logits)
            tokens.add(said, [(0, 0)] * len(said.tokens), model.size, model.size)
        return {"groups": model.groups, "counts": counts, "tokens_of": tokens.record()}
