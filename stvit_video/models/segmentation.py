"""Segmentation: heads that say the class of every pixel, on the patch grids of any backbone.

Features of a clip's frames are decoded frame by frame, as of images.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation as ConvNormRelu

from ..errors import InputError
from .atm import ATMHead, MaskLogits, atm_losses, resize
from .embed import Size3, as_clip
from .exits import EarlyExits, Exit
from .heads import WithHead
from .tokens import Tokens

IGNORED = 255  # in targets: pixels that count nowhere
Logits = Tensor | dict[str, Tensor] | list[MaskLogits]


class Passed(NamedTuple):
    """What a `Segmenter` gives where tokens are counted: patches are merged, or tokens leave.

    logits: what it gives otherwise. grid: (t, h, w), of the P patches.
    place: (B, P), the token that stands for each patch in the first layer; tokens: (B), how many they are.
    exits: what was said at each, and who left there. left: (B, P) bool, patches that left at any.
    """

    logits: Logits
    grid: Size3
    place: Tensor
    tokens: Tensor
    exits: list[Exit]
    left: Tensor


Outputs = Logits | Passed


class Segmenter(WithHead):
    """A backbone, and a head that makes class logits of its grids: the base of all that segment.

    head: channels of the grids -> what makes logits (N, K, h, w) of a list of them (N, C, h, w).
    levels: after which layers or stages these grids are; or how many there are: the last of them is the
        backbone's last then, the others lie evenly before it, or are the stages before it.
    exits: of a ViT, what makes `EarlyExits` for tokens of a width; None: no token leaves.
    size: (height, width) of the only clips it takes; None: of any.
    A subclass with outputs, losses or scores of its own overrides `decode`, `loss` and `scores`.
    Raises ValueError for a backbone without such grids, and for exits after layers that are none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        levels: int | Sequence[int],
        head: Callable[[list[int]], nn.Module],
        exits: Callable[[int], EarlyExits] | None = None,
    ):
        if not hasattr(backbone, "grids"):
            raise ValueError(f"{type(backbone).__name__} has no patch grids for a head to stand on")
        layers = chosen_layers(backbone, levels)
        super().__init__(backbone, head([backbone.grid_widths[layer] for layer in layers]))
        self.layers = layers
        embed, stages = backbone.patch_embed, hasattr(backbone, "layers")
        self.size = None if stages else tuple(embed.clip_size[1:])
        self.tubelet, *patch = getattr(embed, "patch_size", None) or (embed.frames, 4, 4)
        patch = tuple(patch)
        self.strides = tuple(side * 8 for side in patch) if stages else patch
        if exits is not None:
            self.head.exits = exits(backbone.grid_widths[layers[-1]])
            check_exits(backbone, self.head.exits)
        for module in unused_norms(backbone, self.layers):
            module.requires_grad_(False)

    @property
    def exits(self) -> EarlyExits | None:
        return getattr(self.head, "exits", None)

    def forward(self, x: Tensor) -> Outputs:
        """Clips (B, 3, T, H, W), or images (B, 3, H, W) -> logits of patches (B, K, t, h, w); `Passed`
        where tokens are counted.

        Where `size` is None clips are padded to whole patches, which `scores` cuts off again.
        """
        x = as_clip(x)
        rows, columns = (-n % s for n, s in zip(x.shape[3:], self.strides, strict=True))
        x = F.pad(x, [0, columns, 0, rows])
        (first, *levels), exits = self._levels(x)
        left = levels[-1].places() < 0
        logits = self.decode(levels, exits, left)
        if not (self.exits or getattr(self.backbone, "superpatches", None)):
            return logits
        if exits and exits[0].layer == min(self.backbone.grid_widths):  # who left is gone from `first`
            start = exits[0].place, exits[0].tokens
        elif self.backbone.chunks > 1:  # whose levels are the patches of all chunks
            place = self.backbone.superpatch_map(x).flatten(1)
            start = place, torch.zeros_like(place).scatter(1, place, 1).sum(1)
        else:
            start = first.places(), first.count()
        return Passed(logits, first.grid, *start, exits, left)

    def _levels(self, clip: Tensor) -> tuple[list[Tokens], list[Exit]]:
        """The tokens after the first layer and those that the head takes, and the exits."""
        if not hasattr(self.backbone, "levels"):
            levels = [Tokens.of(grid) for grid in self.backbone.grids(clip, self.layers)]
            return [levels[0], *levels], []
        layers = [min(self.backbone.grid_widths), *self.layers]
        if self.exits is None:
            return self.backbone.levels(clip, layers), []
        return self.exits(self.backbone, clip, layers)

    def decode(self, levels: list[Tokens], exits: list[Exit], left: Tensor) -> Logits:
        """Tokens -> logits of patches (B, K, t, h, w); of those that have `left` (B, P) the last exit's."""
        grids = [tokens.to_grid() for tokens in levels]
        outputs = self.head([grid.flatten(0, 1).permute(0, 3, 1, 2) for grid in grids])
        if isinstance(outputs, dict):
            return {name: _clips(values, len(grids[0])) for name, values in outputs.items()}
        logits = _clips(outputs, len(grids[0]))
        if not exits:
            return logits
        return torch.where(left.unflatten(1, levels[-1].grid)[:, None], on_grid(exits[-1], logits), logits)

    def scores(self, outputs: Outputs, size: tuple[int, int, int]) -> Tensor:
        """What `forward` gave for clips of `size` (T, H, W) -> float32 (B, K, T, H, W), best highest."""
        logits = outputs.logits if isinstance(outputs, Passed) else outputs
        return self.resized(logits.float(), size)

    def resized(self, patches: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Values of patches (B, K, t, h, w) -> of clips of `size` (T, H, W), without their padding."""
        frames, rows, columns = size
        padded = [n - n % -s for n, s in zip(size, (self.tubelet, *self.strides), strict=True)]
        return resize(patches, tuple(padded))[..., :frames, :rows, :columns]

    def loss(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        """What `forward` gave, masks (B, T, H, W) -> "loss": the cross entropy of all pixels that count;
        with exits, the sum with each exit's, which is there by its layer ("exit_6").
        """
        if not isinstance(outputs, Passed):
            return {"loss": self.cross_entropy(outputs, targets)}
        losses = self.loss(outputs.logits, targets)
        for exit in outputs.exits:
            loss = self.exit_loss(exit, outputs.grid, targets)
            losses |= {"loss": losses["loss"] + loss, f"exit_{exit.layer}": loss.detach()}
        return losses

    def exit_loss(self, exit: Exit, grid: Size3, targets: Tensor) -> Tensor:
        return self.cross_entropy(exit.masks.unflatten(2, grid), targets)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits of patches (B, K, t, h, w), masks (B, T, H, W) -> the mean over pixels that count."""
        return pixel_loss(self.resized(logits.float(), tuple(targets.shape[1:])), targets)


class LinearSegmenter(Segmenter):
    """A norm and a linear layer on the last grid (Segmenter's "Linear", ICCV 2021).

    exits: after which layers of a ViT tokens leave whose confidence exceeds `exit_threshold`; each exit is
    a norm and a linear layer, too.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        exits: Sequence[int] = (),
        exit_threshold: float = 0.95,
    ):
        make = partial(EarlyExits, num_classes=num_classes, layers=exits, threshold=exit_threshold)
        super().__init__(
            backbone, 1, lambda dims: LinearHead(dims[-1], num_classes), make if exits else None
        )


class UPerNetSegmenter(Segmenter):
    """UPerNet (ECCV 2018) on four grids, with an auxiliary head in training, as mmsegmentation has it.

    head_dim: channels of its levels; the auxiliary head has half.
    """

    auxiliary = 0.4  # weight of its loss

    def __init__(self, backbone: nn.Module, num_classes: int, *, head_dim: int = 512):
        normed = hasattr(backbone, "norms")
        super().__init__(backbone, 4, lambda dims: UPerHead(dims, head_dim, num_classes, normed))

    def loss(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        if isinstance(outputs, Passed):
            return super().loss(outputs, targets)
        main, auxiliary = (self.cross_entropy(outputs[name], targets) for name in ("logits", "auxiliary"))
        return {"loss": main + self.auxiliary * auxiliary, "auxiliary": auxiliary.detach()}


class ATMSegmenter(Segmenter):
    """Attention to mask (SegViT, NeurIPS 2022) on the tokens of several layers.

    head_dim, head_heads, head_layers: width of the head, its attention heads, its layers a level.
    head_levels: how many levels, evenly; or after which layers, e.g. [6, 8, 12].
    exits, exit_threshold: as `LinearSegmenter`'s. exit_head: "linear", or "atm": of one level, with the
        head's sizes. With an "atm" exit after the last layer, that is the head: Dynamic Token Pruning,
        whose patches keep the masks that they left with, weighed by the last exit's class probabilities.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        head_dim: int = 512,
        head_heads: int = 16,
        head_layers: int = 3,
        head_levels: int | Sequence[int] = 3,
        exits: Sequence[int] = (),
        exit_head: Literal["linear", "atm"] = "linear",
        exit_threshold: float = 0.95,
    ):
        sizes = {"dim": head_dim, "num_heads": head_heads, "num_layers": head_layers}
        self.prunes = (
            exit_head == "atm" and bool(exits) and max(exits) == len(getattr(backbone, "blocks", ()))
        )

        def head(dims: list[int]) -> nn.Module:
            if self.prunes:
                return nn.Module()  # the last exit
            if len(dims) > 1 and not hasattr(backbone, "levels"):
                raise ValueError(
                    f"head_levels={head_levels}: {type(backbone).__name__} has one for this head"
                )
            return ATMHead(dims[-1], num_levels=len(dims), num_classes=num_classes, **sizes)

        make = partial(
            EarlyExits,
            num_classes=num_classes,
            layers=exits,
            head=exit_head,
            threshold=exit_threshold,
            final_factor=self.prunes,
            **sizes,
        )
        levels = 1 if self.prunes else head_levels
        super().__init__(backbone, levels, head, make if exits else None)

    def decode(self, levels: list[Tokens], exits: list[Exit], left: Tensor) -> list[MaskLogits]:
        """Tokens -> `MaskLogits` of each level on the grid (B, K, t, h, w), the deepest level first.

        Of patches that have `left` (B, P), what stands is the mask: the losses see no hole.
        """
        said = [exits[-1]] if self.prunes else self.head(levels)
        masks = [one.masks for one in said]
        if exits and not self.prunes:
            stands = exits[-1].scores.detach().logit(eps=1e-6).to(masks[0].dtype)
            masks = [torch.where(left[:, None], stands, mask) for mask in masks]
        return [
            MaskLogits(one.classes, mask.unflatten(2, levels[-1].grid))
            for one, mask in zip(said, masks, strict=True)
        ]

    def scores(self, outputs: Outputs, size: tuple[int, int, int]) -> Tensor:
        """Float32 (B, K, T, H, W) of 0 to 1. What was said of patches that left, stands."""
        if not isinstance(outputs, Passed):
            classes, masks = outputs[-1]
            masks = self.resized(masks.float(), size)
            return MaskLogits(classes, masks.flatten(2)).scores().unflatten(2, size)
        stands = outputs.exits and outputs.exits[-1].scores.unflatten(2, outputs.grid)
        if self.prunes:
            return self.resized(stands, size)
        scores = self.scores(outputs.logits, size)
        if not outputs.left.any():
            return scores
        left = outputs.left.unflatten(1, outputs.grid)[:, None].float()
        return scores * (1 - self.resized(left, size)) + self.resized(stands * left, size)

    def loss(self, outputs: Outputs, targets: Tensor) -> dict[str, Tensor]:
        """SegViT's losses: "loss", which is their sum, and each by its name."""
        if isinstance(outputs, Passed):
            exits = outputs.exits[:-1] if self.prunes else outputs.exits
            return super().loss(outputs._replace(exits=exits), targets)
        grid = outputs[-1].masks.shape[2:]
        flat = [MaskLogits(classes, masks.flatten(2)) for classes, masks in outputs]
        losses = self._atm_losses(flat, grid, targets)
        return {"loss": sum(losses.values())} | {name: loss.detach() for name, loss in losses.items()}

    def exit_loss(self, exit: Exit, grid: Size3, targets: Tensor) -> Tensor:
        if exit.classes is None:
            return super().exit_loss(exit, grid, targets)
        return sum(self._atm_losses([MaskLogits(exit.classes, exit.masks)], grid, targets).values())

    def _atm_losses(self, outputs: list[MaskLogits], grid: Size3, targets: Tensor) -> dict[str, Tensor]:
        """Normalised by the masks of all processes, as SegViT's are. Clips were padded: ignored there."""
        strides = zip(reversed(targets.shape[1:]), (*reversed(self.strides), self.tubelet), strict=True)
        targets = F.pad(targets, [n for length, s in strides for n in (0, -length % s)], value=IGNORED)
        present = sum((image.unique() != IGNORED).sum() for image in targets)
        return atm_losses(outputs, targets, grid, num_masks=mean_over_processes(present), ignore=IGNORED)


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
        self.pooled = nn.ModuleList(ConvNormRelu(dims[-1], dim, 1) for _ in self.pools)
        self.bottleneck = ConvNormRelu(dims[-1] + len(self.pools) * dim, dim, 3)
        self.lateral = nn.ModuleList(ConvNormRelu(width, dim, 1) for width in dims[:-1])
        self.smooth = nn.ModuleList(ConvNormRelu(dim, dim, 3) for _ in dims[:-1])
        self.join = ConvNormRelu(len(dims) * dim, dim, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(dim, num_classes, 1))
        self.auxiliary = nn.Sequential(
            ConvNormRelu(dims[-2], dim // 2, 3), nn.Dropout2d(0.1), nn.Conv2d(dim // 2, num_classes, 1)
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
        if self.training and len(last) == 1:
            raise InputError(
                "a batch of 1 image has one value a channel where head=upernet pools all of it, too few "
                "for batch norms: raise train.batch_size"
            )
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(last, pool)), size)
            for pool, conv in zip(self.pools, self.pooled, strict=True)
        ]
        pyramid = [self.bottleneck(torch.cat([last, *pooled], 1))]
        for conv, level in zip(reversed(self.lateral), reversed(levels[:-1]), strict=True):
            pyramid.insert(0, conv(level) + _resize(pyramid[0], level.shape[2:]))
        smooth = [conv(level) for conv, level in zip(self.smooth, pyramid[:-1], strict=True)]
        size = smooth[0].shape[2:]
        logits = self.classify(self.join(torch.cat([_resize(x, size) for x in [*smooth, pyramid[-1]]], 1)))
        return {"logits": logits, "auxiliary": self.auxiliary(levels[-2])} if self.training else logits


def pixel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (B, K, ...), targets (B, ...) -> mean cross entropy of what is not ignored; 0 where all is."""
    total = F.cross_entropy(logits, targets.long(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def on_grid(exit: Exit, logits: Tensor) -> Tensor:
    """An exit's masks as logits of patches (B, K, t, h, w), of the type of these."""
    return exit.masks.unflatten(2, logits.shape[2:]).to(logits.dtype)


def mean_over_processes(count: Tensor) -> float:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return float(count)
    count = count.float()
    torch.distributed.all_reduce(count)
    return float(count) / torch.distributed.get_world_size()


def check_exits(backbone: nn.Module, exits: EarlyExits) -> None:
    """Raises ValueError for a backbone that no token can leave, and for exits at its wrong places."""
    if not hasattr(backbone, "levels") or backbone.chunk_embed is not None:
        raise ValueError(f"exits={exits.layers}: tokens leave a ViT only, without base_window")
    known = [n for n in backbone.exit_layers if n < len(backbone.blocks) or exits.final_factor]
    if not set(exits.layers) <= set(known):
        raise ValueError(
            f"exits={exits.layers}: tokens may leave after each of the layers {known} (after the last one "
            "with head=atm and exit_head=atm; before a reducer if it merges tokens)"
        )


def chosen_layers(backbone: nn.Module, levels: int | Sequence[int]) -> list[int]:
    """The layers or stages whose grids a head takes: the last, and `levels` - 1 evenly before it.

    Of a ViT of 12 layers 3, 6, 9 and 12; one within a reducer is put off to the next that has tokens.
    A list says them itself. Raises ValueError where there are none.
    """
    known = list(backbone.grid_widths)
    if not isinstance(levels, int):
        if not set(levels) <= set(known) or known[-1] not in levels:
            raise ValueError(
                f"head_levels={list(levels)}: must be among the layers {known}, with the last of them"
            )
        return sorted(levels)
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


def _resize(x: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _scale(x: Tensor, factor: float) -> Tensor:
    return _resize(x, [max(round(n * factor), 1) for n in x.shape[2:]])
