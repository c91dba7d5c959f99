"""Segmentation: heads that say the class of every pixel, on the patch grids of any backbone.

Features of a clip's frames are decoded frame by frame, as of images.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from .embed import as_clip
from .heads import WithHead

IGNORED = 255  # in targets: pixels that count nowhere
Outputs = Tensor | dict[str, Tensor]


class Segmenter(WithHead):
    """A backbone, and a head that makes class logits of its grids: the base of all that segment.

    head: channels of the grids -> what makes logits (N, K, h, w) of a list of them (N, C, h, w).
    levels: after which layers or stages these grids are; or how many there are: the last of them is the
        backbone's last then, the others lie evenly before it, or are the stages before it.
    size: (height, width) of the only clips it takes; None: of any.
    A subclass with losses or scores of its own overrides `loss` and `scores`.
    Raises ValueError for a backbone without such grids.
    """

    def __init__(
        self, backbone: nn.Module, levels: int | Sequence[int], head: Callable[[list[int]], nn.Module]
    ):
        if not hasattr(backbone, "grids"):
            raise ValueError(f"{type(backbone).__name__} has no patch grids for a head to stand on")
        layers = chosen_layers(backbone, levels) if isinstance(levels, int) else list(levels)
        super().__init__(backbone, head([backbone.grid_widths[layer] for layer in layers]))
        self.layers = layers
        embed, stages = backbone.patch_embed, hasattr(backbone, "layers")
        self.size = None if stages else tuple(embed.clip_size[1:])
        patch = getattr(embed, "patch_size", (1, 4, 4))[1:]
        self.strides = tuple(side * 8 for side in patch) if stages else patch
        for module in unused_norms(backbone, self.layers):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> Outputs:
        """Clips (B, 3, T, H, W), or images (B, 3, H, W) -> logits of patches (B, K, t, h, w).

        Where `size` is None clips are padded to whole patches, which `scores` cuts off again.
        """
        x = as_clip(x)
        rows, columns = (-n % s for n, s in zip(x.shape[3:], self.strides, strict=True))
        grids = self.backbone.grids(F.pad(x, [0, columns, 0, rows]), self.layers)
        outputs = self.head([grid.flatten(0, 1).permute(0, 3, 1, 2) for grid in grids])
        if isinstance(outputs, dict):
            return {name: _clips(values, len(x)) for name, values in outputs.items()}
        return _clips(outputs, len(x))

    def scores(self, outputs: Tensor, size: tuple[int, int, int]) -> Tensor:
        """What `forward` gave for clips of `size` (T, H, W) -> float32 (B, K, T, H, W), best highest."""
        frames, rows, columns = size
        padded = [n - n % -s for n, s in zip(size[1:], self.strides, strict=True)]
        return resize(outputs.float(), (frames, *padded))[..., :rows, :columns]

    def loss(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        """What `forward` gave, masks (B, T, H, W) -> "loss": the cross entropy of all pixels that count."""
        return {"loss": self.cross_entropy(outputs, targets)}

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits of patches (B, K, t, h, w), masks (B, T, H, W) -> the mean over pixels that count."""
        return pixel_loss(self.scores(logits, tuple(targets.shape[1:])), targets)


class LinearSegmenter(Segmenter):
    """A norm and a linear layer on the last grid (Segmenter's "Linear", ICCV 2021)."""

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__(backbone, 1, lambda dims: LinearHead(dims[-1], num_classes))


class UPerNetSegmenter(Segmenter):
    """UPerNet (ECCV 2018) on four grids, with an auxiliary head in training, as mmsegmentation has it.

    head_dim: channels of its levels; the auxiliary head has half.
    """

    auxiliary = 0.4  # weight of its loss

    def __init__(self, backbone: nn.Module, num_classes: int, *, head_dim: int = 512):
        normed = hasattr(backbone, "norms")
        super().__init__(backbone, 4, lambda dims: UPerHead(dims, head_dim, num_classes, normed))

    def loss(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        main, auxiliary = (self.cross_entropy(outputs[name], targets) for name in ("logits", "auxiliary"))
        return {"loss": main + self.auxiliary * auxiliary, "auxiliary": auxiliary.detach()}


class LinearHead(nn.Module):
    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """The last of (N, C, h, w) -> logits (N, K, h, w)."""
        return self.linear(self.norm(levels[-1].permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class UPerHead(nn.Module):
    """Pyramid pooling of the last of four levels, a feature pyramid from there to the first, all joined.

    dims: channels of the levels, which have strides 4, 8, 16 and 32; levels of one size (a ViT's) are
    resized to such strides. normed: whether they come with a norm each.
    """

    pools = 1, 2, 3, 6

    def __init__(self, dims: list[int], dim: int, num_classes: int, normed: bool = False):
        super().__init__()
        norm = nn.Identity if normed else nn.LayerNorm
        self.norms = nn.ModuleList(norm(width) for width in dims)
        self.pooled = nn.ModuleList(_conv(dims[-1], dim, 1) for _ in self.pools)
        self.bottleneck = _conv(dims[-1] + len(self.pools) * dim, dim, 3)
        self.lateral = nn.ModuleList(_conv(width, dim, 1) for width in dims[:-1])
        self.smooth = nn.ModuleList(_conv(dim, dim, 3) for _ in dims[:-1])
        self.join = _conv(len(dims) * dim, dim, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(dim, num_classes, 1))
        self.auxiliary = nn.Sequential(
            _conv(dims[-2], dim // 2, 3), nn.Dropout2d(0.1), nn.Conv2d(dim // 2, num_classes, 1)
        )

    def forward(self, levels: list[Tensor]) -> Outputs:
        """Four of (N, C, h, w) -> logits (N, K, h, w) of the first one's size; in training two of them."""
        levels = [
            norm(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for norm, level in zip(self.norms, levels, strict=True)
        ]
        if len({level.shape[2:] for level in levels}) == 1:
            scales = (4, 2, 1, 0.5)
            levels = [_scale(level, scale) for level, scale in zip(levels, scales, strict=True)]
        last, size = levels[-1], levels[-1].shape[2:]
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(last, pool)), size)
            for pool, conv in zip(self.pools, self.pooled, strict=True)
        ]
        pyramid = [self.bottleneck(torch.cat([last, *pooled], 1))]
        for conv, level in zip(reversed(self.lateral), reversed(levels[:-1]), strict=True):
            pyramid.insert(0, conv(level) + _resize(pyramid[0], level.shape[2:]))
        smooth = [conv(level) for conv, level in zip(self.smooth, pyramid, strict=False)]
        size = smooth[0].shape[2:]
        logits = self.classify(self.join(torch.cat([_resize(x, size) for x in [*smooth, pyramid[-1]]], 1)))
        return {"logits": logits, "auxiliary": self.auxiliary(levels[-2])} if self.training else logits


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (B, K, ...), targets (B, ...) -> mean cross entropy of what is not ignored; 0 where all is."""
    total = F.cross_entropy(logits, targets.long(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def resize(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(B, K, t, h, w) -> (B, K, T, H, W), linear along each axis; where t is T, each frame bilinear."""
    if x.shape[2] == size[0]:
        return _clips(_resize(x.transpose(1, 2).flatten(0, 1), size[1:]), len(x))
    return F.interpolate(x, size, mode="trilinear", align_corners=False)


def chosen_layers(backbone: nn.Module, levels: int) -> list[int]:
    """The layers or stages whose grids a head takes: the last, and `levels` - 1 evenly before it.

    Of a ViT of 12 layers 3, 6, 9 and 12; one within a reducer is put off to the next that has tokens.
    Raises ValueError where there are none.
    """
    known = list(backbone.grid_widths)
    stages = hasattr(backbone, "layers")
    depth = len(backbone.layers if stages else backbone.blocks)
    step = 1 if stages else depth / levels
    wanted = [depth - round((levels - 1 - i) * step) for i in range(levels)]
    if known[-1] < depth:
        raise ValueError(f"the model has patch grids up to stage {known[-1]} only; STViT-R has all {depth}")
    layers: list[int] = []
    for first in wanted:
        free = (layer for layer in known if layer >= first and layer not in layers)
        layers.append(next(free, depth))
    if len(set(layers)) < levels:
        raise ValueError(
            f"depth={depth}: there are patch grids after the layers {known}, too few for the head"
        )
    return layers


def unused_norms(backbone: nn.Module, layers: list[int]) -> list[nn.Module]:
    """The classifier's norm, and those of stages that the head leaves out: no pixel passes through them."""
    norms = [getattr(backbone, name) for name in ("norm", "fc_norm") if hasattr(backbone, name)]
    return norms + [norm for i, norm in enumerate(getattr(backbone, "norms", ()), 1) if i not in layers]


def _clips(x: Tensor, count: int) -> Tensor:
    """Frames (B t, K, h, w) -> (B, K, t, h, w)."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _conv(width: int, dim: int, kernel: int) -> nn.Module:
    return Conv2dNormActivation(width, dim, kernel)


def _resize(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _scale(x: Tensor, factor: float) -> Tensor:
    return _resize(x, [max(round(n * factor), 1) for n in x.shape[2:]])
