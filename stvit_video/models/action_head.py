"""Who does what: a head that pools a video backbone's last grid over each person's box."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import roi_align

from .heads import WithHead
from .swin import SEMANTIC_STAGE, SemanticStage, VideoSwin
from .vit import VideoViT

RESOLUTION = 7  # samples of a box along each side, of which the strongest counts


class ActionDetector(WithHead):
    """Logits of K actions for each box: mean over time, RoIAlign, max over the box, dropout, linear layer.

    As SlowFast's and VideoMAE's models for AVA. The grid is that of the backbone's last layer, with its
    norm: of patches, also behind semantic tokens of a ViT (each patch has its token's features); of a Video
    Swin that does not recover its patches it is that of the semantic tokens.

    dropout: share of a box's features that training drops.
    size: (height, width) of the only clips it takes; None: of any.
    Raises ValueError for a backbone without such a grid.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, dropout: float = 0.0):
        if type(backbone) not in (VideoViT, VideoSwin):
            raise ValueError(f"head=actions: {type(backbone).__name__} has no grid over space and time")
        self._is_vit = isinstance(backbone, VideoViT)
        self.size = backbone.patch_embed.clip_size[1:] if self._is_vit else None
        norm = backbone.fc_norm if self._is_vit else backbone.norm
        head = nn.Sequential(nn.Dropout(dropout), nn.Linear(norm.weight.numel(), num_classes))
        super().__init__(backbone, head)
        nn.init.trunc_normal_(head[1].weight, std=0.02)
        nn.init.zeros_(head[1].bias)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the backbone's last grid (B, t, h, w, C), normed."""
        if self._is_vit:
            (grid,) = self.backbone.grids(x)
            return self.backbone.fc_norm(grid)
        return self.backbone.norm(self.backbone.forward_features(x))

    def forward(self, x: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Clips (B, 3, T, H, W), B times boxes (n, 4), x1 y1 x2 y2 in pixels -> logits (sum of n, K)."""
        grid = self.features(x).mean(1).permute(0, 3, 1, 2)  # (B, C, h, w)
        height, width = self._strides(x.shape[-2:])
        strides = grid.new_tensor([width, height]).repeat(2)
        boxes = [part.to(grid) / strides for part in boxes]
        pooled = roi_align(grid, boxes, RESOLUTION, aligned=True).amax((2, 3))
        return self.head(pooled)

    def _strides(self, size: Sequence[int]) -> list[float]:
        """Height and width of a cell of the grid in pixels, of frames of `size` before they are padded."""
        patch = getattr(self.backbone.patch_embed, "patch_size", (1, 4, 4))[1:]
        if self._is_vit:
            return list(patch)
        stage, strides = self.backbone.layers[SEMANTIC_STAGE], [8 * side for side in patch]
        if type(stage) is not SemanticStage:
            return strides
        patches = [-(-n * 2 // stride) for n, stride in zip(size, strides, strict=True)]
        window, tokens = stage.semantic._clamped((1, *patches))
        return [s * n / k for s, n, k in zip(strides, window[1:], tokens[1:], strict=True)]
