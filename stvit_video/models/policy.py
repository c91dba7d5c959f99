"""The network that decides about superpatches, trained apart from the model that has them, as CTS's is."""

import torch
from torch import Tensor, nn

from ..errors import InputError
from .embed import as_clip
from .segmentation import Passed
from .superpatches import agreement_targets, group_scores, group_targets, policy_loss
from .vit import VideoViT, cut_clips


class PolicyTrainer(nn.Module):
    """The superpatches of a backbone alone; only their `PolicyNet` learns, as deep as its groups read it.

    size: (height, width) of its clips. grid: of their patches. groups: the shapes of groups by name:
        "16x16", of clips "8x2x2". layer: the backbone's last on all patches, where a teacher is compared.
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
        self.superpatches.policy.learn()
        self.frames, *size = backbone.patch_embed.clip_size
        self.size = tuple(size)
        self.grid, self.layer = backbone.grid, max(backbone.base_depth, 1)
        self.patch_size, self.shapes = backbone.patch_embed.patch_size, self.superpatches.shapes
        self.groups = ["x".join(map(str, shape[shape[0] == 1 :])) for shape in self.shapes]

    def train(self, mode: bool = True) -> "PolicyTrainer":
        """Here alone batch norms of the policy learn, too."""
        super().train(mode)
        self.superpatches.policy.train(mode)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, T, H, W) -> of each shape (B, 2, t, h, w): logits of no and yes; of a backbone with
        base_window for each of its chunks (B * chunks, 2, t, h, w).

        Raises InputError in training where batch norms of the deepest stage would see one value.
        """
        clips, policy = cut_clips(as_clip(x), self.frames), self.superpatches.policy
        images, stride = len(clips) * self.superpatches.grid[0], policy.strides[max(policy.levels)]
        if self.training and images == 1 and max(self.size) <= stride:
            raise InputError(
                f"a batch of 1 image of {self.size[0]}x{self.size[1]} pixels has one value a channel at "
                f"stride {stride} of the policy, too few for its batch norms: raise train.batch_size"
            )
        return policy(clips)

    def targets(self, masks: Tensor, unsure_at_border: bool) -> list[Tensor]:
        """Masks (B, T, H, W) -> see `group_targets`; of each chunk, as `forward`."""
        chunks = masks.unflatten(1, (-1, self.frames)).flatten(0, 1)
        return group_targets(chunks, self.shapes, self.patch_size, unsure_at_border=unsure_at_border)

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raises ValueError for a model whose patches cannot be this one's targets."""
        if not isinstance(teacher, VideoViT):
            raise ValueError(f"its model is a {type(teacher).__name__}; a ViT's patches agree or not")
        if teacher.superpatches is not None:
            raise ValueError("its model merges patches itself (model.superpatches): they always agree")
        if teacher.grid != self.grid:
            raise ValueError(f"its grid of patches is {teacher.grid}, not {self.grid} (model.patch_size)")
        if teacher.base_depth < self.layer:
            raise ValueError(
                f"it has {teacher.base_depth} layers on all patches, less than {self.layer} "
                "(model.base_depth; of a dense model its depth)"
            )

    @torch.no_grad()
    def agreement(self, teacher: VideoViT, x: Tensor, threshold: float) -> list[Tensor]:
        """Clips (B, 3, T, H, W) -> see `agreement_targets`, by the teacher's patches after `layer`."""
        (grid,) = teacher.grids(x, [self.layer])
        chunks = grid.unflatten(1, (-1, self.superpatches.grid[0])).flatten(0, 1)
        return agreement_targets(chunks, self.shapes, threshold=threshold)

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
