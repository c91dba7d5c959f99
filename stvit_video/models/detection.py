"""Faster R-CNN and Mask R-CNN, torchvision's parts, on the grids of any backbone.

Sources: Ren et al., NeurIPS 2015; He et al., ICCV 2017; ViTDet for a plain ViT: Li et al., ECCV 2022.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from ..errors import InputError
from .heads import WithHead
from .swin import NORM_EPS, SEMANTIC_STAGE, SemanticStage, VideoSwin

LEVELS = ("0", "1", "2", "3")  # of the pyramid, as torchvision names them; proposals also come from a fifth
RATIOS = (0.5, 1.0, 2.0)  # heights over widths of anchors
SAMPLES = 512  # boxes of an image that the second stage learns from, at most


class FasterRCNN(WithHead):
    """Images to boxes of objects: region proposals on a feature pyramid, each then classified and refined.

    backbone: of one frame, with `grids`: of four strides, or of one (ViT), for a simple pyramid.
    num_classes: without the background.
    head_dim: channels of the pyramid and of what stands on it.
    anchors: sides of the anchors in pixels, from the finest of the five levels to the coarsest.
    proposals: boxes of an image that go on to the second stage.
    Raises ValueError, naming value and rule, where sizes do not fit.
    """

    masks = False

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        head_dim: int = 256,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        proposals: int = 1000,
    ):
        if len(anchors) != len(LEVELS) + 1:
            raise ValueError(f"anchors={tuple(anchors)} must be {len(LEVELS) + 1} sides, one a level")
        if not hasattr(backbone, "grids"):
            raise ValueError(f"{type(backbone).__name__} gives no grids, which a detector stands on")
        pyramid = (SwinPyramid if isinstance(backbone, VideoSwin) else SimplePyramid)(backbone, head_dim)
        head = nn.Module()
        head.pyramid = pyramid
        head.rpn = RegionProposalNetwork(
            AnchorGenerator(tuple((side,) for side in anchors), (RATIOS,) * len(anchors)),
            RPNHead(head_dim, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n=dict.fromkeys(("training", "testing"), proposals),
            nms_thresh=0.7,
        )
        head.roi_heads = RoIHeads(
            _pooled(7, pyramid.strides),
            TwoMLPHead(head_dim * 7**2, 4 * head_dim),
            FastRCNNPredictor(4 * head_dim, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=min(SAMPLES, proposals),
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        if self.masks:
            head.roi_heads.mask_roi_pool = _pooled(14, pyramid.strides)
            head.roi_heads.mask_head = MaskRCNNHeads(head_dim, (head_dim,) * 4, 1)
            head.roi_heads.mask_predictor = MaskRCNNPredictor(head_dim, head_dim, num_classes + 1)
        for part in (pyramid, head.rpn.head, head.roi_heads.box_predictor):
            part.register_forward_hook(_in_float32)
        super().__init__(backbone, head)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Normalised images (3, H, W), whose sizes may differ -> in training losses, else detections.

        targets, in training: boxes (n, 4) as x1, y1, x2, y2 in pixels, labels (n,) from 0 and, for masks,
            masks (n, H, W). Detections of an image: boxes (n, 4), labels (n,), scores (n,), best first and,
            for masks, masks (n, 1, 28, 28): probabilities within the box.
        """
        batch = ImageList(self._padded(images), [tuple(image.shape[-2:]) for image in images])
        if targets is not None:
            if self.masks and not all("masks" in target for target in targets):
                raise InputError(
                    "the list has no masks to learn: model.head=faster_rcnn learns boxes alone"
                )
            targets = [target | {"labels": target["labels"] + 1} for target in targets]  # 0: background
        features = self.head.pyramid(self.backbone, batch.tensors)
        proposals, losses = self.head.rpn(batch, features, targets)
        rois = {level: features[level] for level in LEVELS}
        detections, more = self.head.roi_heads(rois, proposals, batch.image_sizes, targets)
        if self.training:
            return losses | more
        return [detection | {"labels": detection["labels"] - 1} for detection in detections]

    def _padded(self, images: Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W): zeros at right and bottom, to what the backbone takes or its coarsest stride."""
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        fixed = getattr(self.backbone.patch_embed, "clip_size", None)
        if fixed is None:
            stride = self.head.pyramid.strides[-1]
            size = (math.ceil(height / stride) * stride, math.ceil(width / stride) * stride)
        else:
            size = fixed[1:]
            if height > size[0] or width > size[1]:
                raise InputError(
                    f"an image of {height}x{width} pixels, but the model takes {size[0]}x{size[1]}: "
                    f"train.longest_side={min(size)} makes all fit"
                )
        return torch.stack([F.pad(i, (0, size[1] - i.shape[-1], 0, size[0] - i.shape[-2])) for i in images])


class MaskRCNN(FasterRCNN):
    """`FasterRCNN` with a mask of each object."""

    masks = True


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Anchors and boxes take their type from these: in bfloat16 they would lie 4 pixels apart."""
    return tree_map_only(Tensor, Tensor.float, outputs)


def _pooled(size: int, strides: Sequence[float]) -> MultiScaleRoIAlign:
    """RoIAlign on the levels. Their scales are set: torchvision would guess them by the first images."""
    pool = MultiScaleRoIAlign(list(LEVELS), size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    finest, coarsest = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    pool.map_levels = initLevelMapper(finest, coarsest)
    return pool


class SwinPyramid(nn.Module):
    """FPN on the grids of Swin's four stages, each normed (Lin et al., CVPR 2017)."""

    def __init__(self, backbone: VideoSwin, dim: int):
        super().__init__()
        if type(backbone.layers[SEMANTIC_STAGE]) is SemanticStage:
            raise ValueError(
                "an STViT's last grids are not of patches: take stvit_r_*, or semantic_tokens=None"
            )
        patch = getattr(backbone.patch_embed, "patch_size", (1, 4, 4))[-1]
        self.strides = [patch * 2**i for i in range(len(LEVELS))]
        widths = [stage.blocks[0].norm1.weight.numel() for stage in backbone.layers]
        normed = hasattr(backbone, "norms")  # the last stage has its classifier's norm, else
        self.norms = nn.ModuleList([] if normed else [nn.LayerNorm(w, eps=NORM_EPS) for w in widths[:-1]])
        self.fpn = FeaturePyramidNetwork(widths, dim, LastLevelMaxPool())

    def forward(self, backbone: VideoSwin, images: Tensor) -> dict[str, Tensor]:
        grids = backbone.grids(images)
        if self.norms:
            norms = (*self.norms, backbone.norm)
            grids = [norm(grid) for norm, grid in zip(norms, grids, strict=True)]
        return self.fpn({level: _image(grid) for level, grid in zip(LEVELS, grids, strict=True)})


class SimplePyramid(nn.Module):
    """ViTDet's: maps at a fourth to twice the patch's stride, all made of the last grid."""

    def __init__(self, backbone: nn.Module, dim: int):
        super().__init__()
        if backbone.patch_embed.clip_size[0] != 1:
            raise ValueError(f"num_frames={backbone.patch_embed.clip_size[0]}: a detector takes images, 1")
        patch, width = backbone.patch_embed.patch_size[-1], backbone.fc_norm.weight.numel()
        self.strides = [patch / 4, patch / 2, patch, patch * 2]
        self.maps = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(channels, dim, 1, bias=False),
                ChannelNorm(dim),
                nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                ChannelNorm(dim),
            )
            for scale, channels in (
                (
                    (
                        nn.ConvTranspose2d(width, width // 2, 2, 2),
                        ChannelNorm(width // 2),
                        nn.GELU(),
                        nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
                    ),
                    width // 4,
                ),
                ((nn.ConvTranspose2d(width, width // 2, 2, 2),), width // 2),
                ((), width),
                ((nn.MaxPool2d(2),), width),
            )
        )
        self.coarsest = LastLevelMaxPool()

    def forward(self, backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
        (grid,) = backbone.grids(images)
        image = _image(backbone.fc_norm(grid))
        maps = [scale(image) for scale in self.maps]
        maps, names = self.coarsest(maps, maps, list(LEVELS))
        return dict(zip(names, maps, strict=True))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _image(grid: Tensor) -> Tensor:
    """Grid (B, 1, h, w, C) -> (B, C, h, w)."""
    return grid.squeeze(1).movedim(-1, 1)
