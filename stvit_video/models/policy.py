"""The network that decides about superpatches, trained apart from the model that has them, as CTS's is."""

import torch
from torch import Tensor, nn

from .embed import as_clip
from .segmentation import Passed
from .superpatches import group_scores, group_targets, policy_loss


class PolicyTrainer(nn.Module):
    """The superpatches of a backbone alone; only their `PolicyNet` learns.

    size: (height, width) of its clips. groups: the shapes of groups by name: "16x16", of clips "8x2x2".
    Raises ValueError for a backbone without superpatches="dcts".
    """

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__()
        self.superpatches = getattr(backbone, "superpatches", None)
        if getattr(self.superpatches, "policy", None) is None:
            raise ValueError(
                "head=policy: the network of model.superpatches=dcts, which this model has not"
            )
        self.superpatches.requires_grad_(False)
        self.superpatches.policy.requires_grad_(True)
        self.size = tuple(backbone.patch_embed.clip_size[1:])
        self.patch_size, self.shapes = backbone.patch_embed.patch_size, self.superpatches.shapes
        self.groups = ["x".join(map(str, shape[shape[0] == 1 :])) for shape in self.shapes]

    def train(self, mode: bool = True) -> "PolicyTrainer":
        """Here alone batch norms of the policy learn, too."""
        super().train(mode)
        self.superpatches.policy.train(mode)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, T, H, W) -> of each shape (B, 2, t, h, w): logits of no and yes."""
        return self.superpatches.policy(as_clip(x))

    def targets(self, masks: Tensor, unsure_at_border: bool) -> list[Tensor]:
        """Masks (B, T, H, W) -> see `group_targets`."""
        return group_targets(masks, self.shapes, self.patch_size, unsure_at_border=unsure_at_border)

    def loss(self, logits: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
        return {"loss": policy_loss(logits, targets)}

    def chosen(self, logits: list[Tensor]) -> list[Tensor]:
        """Which groups could each be one token, alone: of each shape (B, t, h, w) bool."""
        scores = group_scores(logits)
        return [
            (score > self.superpatches.threshold).view_as(values[:, 0])
            for score, values in zip(scores, logits, strict=True)
        ]

    def tokens(self, logits: list[Tensor]) -> Passed:
        """What becomes of the patches, the largest groups first."""
        place = self.superpatches.choose(group_scores(logits))
        count, nobody = self.superpatches.count(place), torch.zeros_like(place, dtype=torch.bool)
        return Passed(logits, self.superpatches.grid, place, count, [], nobody)
