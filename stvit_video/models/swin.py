"""Swin and Video Swin: dense, STViT on windows, and STViT-R. An image is a clip of one frame.

Parameter names are timm's (`layers.i.blocks.j.attn.qkv`, `layers.i.downsample.reduction`, ...).
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from . import windows
from .embed import ConvStem, PaddedPatchEmbed, Size3, clip_size
from .layers import Attention, Block, init_weights
from .semantic import SemanticWindows

NORM_EPS = 1e-5
SEMANTIC_STAGE = 2  # the third, at stride 16
UNIT = 6  # blocks of an STViT-R unit: a Swin block, four on semantic tokens, recovery


class WindowAttention(Attention):
    """Attention among the tokens of each window, with a learned bias for every distance between two.

    clamped: an axis no larger than the window is one window, unshifted; False: as any other, padded.
    """

    clamped = True

    def __init__(self, dim: int, num_heads: int, *, window: Size3, shift: Size3):
        super().__init__(dim, num_heads)
        self.window, self.shift = window, shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros(windows.table_rows(window), num_heads))

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """Grid (B, T, H, W, C) -> the same shape. A window asks itself: nothing else can be handed in."""
        size = x.shape[1:4]
        window, shift = self.window, self.shift
        if self.clamped:
            window, shift = windows.clamp_window(window, shift, size)
        bias = windows.relative_bias(self.relative_position_bias_table, self.window, window)
        x = windows.pad(x, window)
        if not any(shift):
            x = self._in_windows(x, window, bias)
        else:  # many small calls are what GPUs and exporters are slow at, copies of the mask what CPUs are
            rolled = x.is_cuda or torch.compiler.is_exporting()
            x = (self._rolled if rolled else self._in_slabs)(x, window, shift, bias)
        return x[:, : size[0], : size[1], : size[2]]

    def _in_slabs(self, x: Tensor, window: Size3, shift: Size3, bias: Tensor) -> Tensor:
        """Shifted windows, those that share a mask at a time."""
        out = torch.empty_like(x)
        for slab, mask in windows.slabs(tuple(x.shape[1:4]), window, shift, x.device):
            masked = bias if mask is None else bias + mask
            windows.put(out, slab, self._in_windows(windows.take(x, slab), window, masked))
        return out

    def _rolled(self, x: Tensor, window: Size3, shift: Size3, bias: Tensor) -> Tensor:
        """Shifted windows in one attention: the grid is rolled, and each window has its mask.

        A clip's windows stand beside its heads, so that the masks are not repeated for every clip.
        """
        size, mask = x.shape[1:4], windows.roll_mask(tuple(x.shape[1:4]), window, shift, x.device)
        parts = windows.partition(x.roll([-s for s in shift], (1, 2, 3)), window)
        count = len(mask)
        q, k, v = (part.unflatten(0, (-1, count)).flatten(1, 2) for part in self.project(parts))
        masked = (mask[:, None] + bias).flatten(0, 1)[None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=masked)
        attended = attended.unflatten(1, (count, -1)).flatten(0, 1).transpose(1, 2).flatten(2)
        return windows.merge(self.proj(attended), window, size).roll(shift, (1, 2, 3))

    def _in_windows(self, x: Tensor, window: Size3, bias: Tensor) -> Tensor:
        attended = super().forward(windows.partition(x, window), bias=bias)
        return windows.merge(attended, window, x.shape[1:4])


class PatchMerging(nn.Module):
    """Half the height and width, twice the channels; odd sizes are padded with zeros at the end."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=NORM_EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T, H/2, W/2, 2C)."""
        x = windows.pad(x, (1, 2, 2))
        return self.reduction(self.norm(rearrange(x, "b t (h p) (w q) c -> b t h w (q p c)", p=2, q=2)))


class Stage(nn.Module):
    """Patch merging (not in the first stage), then blocks, the first `base_depth` on all patches."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]):
        super().__init__()
        self.downsample, self.blocks, self.base_depth = downsample, nn.ModuleList(blocks), len(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> the stage's last grid."""
        return self.base(x)

    def base(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) -> the patches after the first `base_depth` blocks."""
        x = self.downsample(x)
        for block in self.blocks[: self.base_depth]:
            x = block(x)
        return x


class SemanticStage(Stage):
    """`base_depth` blocks on the patches, the rest on semantic tokens; gives the grid of the latter."""

    def __init__(self, downsample, blocks, semantic: SemanticWindows, base_depth: int):
        super().__init__(downsample, blocks)
        self.semantic, self.base_depth = semantic, base_depth

    def forward(self, x: Tensor) -> Tensor:
        return self.semantic(self.base(x), self.blocks[self.base_depth :])


class RecoverStage(SemanticStage):
    """STViT-R: units that condense the patches and recover them, so that the stage gives its patch grid."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for first in range(0, len(self.blocks), UNIT):
            swin, *layers, last = self.blocks[first : first + UNIT]
            x = swin(x)
            x = self.semantic.recover(x, self.semantic(x, layers, centres=first == 0), last)
        return x


class VideoSwin(nn.Module):
    """Swin on tubelets; stage 3 on a few semantic tokens a window from `base_depth` on (STViT), or with
    units that condense and recover the patches (STViT-R).

    num_classes: 0: a backbone, which gives pooled features.
    Takes clips of any size; num_frames and image_size say for which G is made (pixels: one number or
    (height, width)).
    patch_size: (frames, height, width) of one tubelet; window_size: in tubelets, for every stage.
    embed_dim: channels of stage 1; they double from stage to stage. depths, num_heads: of the four stages.
    semantic_tokens: (t, h, w) of them a window; None: the plain, dense backbone.
    base_depth, semantic_layers: stage 3's layers on all patches, then those that make the semantic tokens,
        which the rest of stage 3 and stage 4 run on. STViT-R has units of six layers instead: see `UNIT`.
    centres: learn G, which needs semantic_layers >= 2.
    recovery: STViT-R, with its convolutional stem and without the pooled residual in its first semantic
        layer, as released.
    dropout: of the features before the head.
    layer_scale: initial value, in the layers on semantic tokens and in recovery.
    Raises ValueError, naming value and rule, where sizes do not fit each other.
    """

    semantic_windows = SemanticWindows

    def __init__(
        self,
        *,
        num_classes: int,
        num_frames: int,
        image_size: int | tuple[int, int],
        patch_size: Size3,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Size3,
        mlp_ratio: float = 4.0,
        semantic_tokens: Size3 | None = None,
        base_depth: int = 3,
        semantic_layers: int = 2,
        pool: str = "max",
        centres: bool = False,
        recovery: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        for key, values, count in (
            ("depths", depths, 4),
            ("num_heads", num_heads, 4),
            ("patch_size", patch_size, 3),
            ("window_size", window_size, 3),
        ):
            if not isinstance(values, Sequence) or len(values) != count:
                raise ValueError(f"{key}={values} must be {count} numbers")
        patch, window = tuple(patch_size), tuple(window_size)
        depth = depths[SEMANTIC_STAGE]
        self.patch_embed = (ConvStem if recovery else PaddedPatchEmbed)(patch, embed_dim)
        semantic, base_depth = None, 1 if recovery else base_depth
        if semantic_tokens is not None:
            if recovery and depth % UNIT:
                raise ValueError(f"depths={list(depths)}: stage 3 of STViT-R has units of {UNIT} layers")
            if not recovery and base_depth + semantic_layers > depth:
                raise ValueError(
                    f"base_depth={base_depth} and semantic_layers={semantic_layers} must fit into "
                    f"stage 3's depth, {depth} (depths)"
                )
            strides = (patch[0], *(p * 2**SEMANTIC_STAGE for p in patch[1:]))
            clip = clip_size(num_frames, image_size)
            semantic = self.semantic_windows(
                tuple(-(-n // s) for n, s in zip(clip, strides, strict=True)),
                window,
                tuple(semantic_tokens),
                embed_dim * 2**SEMANTIC_STAGE,
                semantic_layers=semantic_layers,
                pool=pool,
                centres=centres and semantic_layers > 1,
            )

        def kind(stage: int, index: int) -> dict[str, Any]:
            """What a block is beside its sizes: one on windows of patches, or one on semantic tokens."""
            unit = index % UNIT if recovery else index
            if semantic is not None and stage == SEMANTIC_STAGE and unit >= base_depth:
                return {"layer_scale": layer_scale, "residual": not (recovery and unit == 1)}
            shift = tuple(n // 2 for n in window) if index % 2 else (0, 0, 0)
            return {"attention": partial(WindowAttention, window=window, shift=shift)}

        same = {"mlp_ratio": mlp_ratio, "norm_eps": NORM_EPS, "checkpointing": checkpointing}
        rates = iter(calculate_drop_path_rates(drop_path, sum(depths)))
        self.layers = nn.ModuleList()
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**i
            blocks = [Block(dim, heads, drop_path=next(rates), **same, **kind(i, j)) for j in range(depth)]
            downsample = PatchMerging(dim // 2) if i else nn.Identity()
            if semantic is None or i != SEMANTIC_STAGE:
                stage = Stage(downsample, blocks)
            else:
                make = RecoverStage if recovery else SemanticStage
                stage = make(downsample, blocks, semantic, base_depth)
            self.layers.append(stage)
        self.norm, self.dropout = nn.LayerNorm(dim, eps=NORM_EPS), nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        init_weights(self)

    @property
    def semantic(self) -> SemanticWindows | None:
        """What makes the semantic tokens; None in a dense model."""
        return getattr(self.layers[SEMANTIC_STAGE], "semantic", None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) for one frame -> logits (B, num_classes), or pooled features."""
        return self.head(self.dropout(self.pooled_features(x)))

    def pooled_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C): the mean of the last tokens, each normalised; what the head sees."""
        return self.norm(self.forward_features(x)).mean((1, 2, 3))

    def forward_features(self, x: Tensor, stages: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """(B, 3, T, H, W) -> the last layer's token grid (B, t, h, w, C); of `stages`, their `grids`."""
        return list(self._grids(x))[-1] if stages is None else self.grids(x, stages)

    def grids(self, x: Tensor, stages: Sequence[int] = (1, 2, 3, 4)) -> list[Tensor]:
        """(B, 3, T, H, W) -> the patch grids (B, t, h, w, C) that these stages end with, not normalised.

        At strides 4, 8, 16 and 32. Raises ValueError where there is none: in stages 3 and 4 of an STViT
        without recovery.
        """
        if not set(stages) <= self.grid_widths.keys():
            last = max(self.grid_widths)
            raise ValueError(f"stages={tuple(stages)}: this model has patch grids in stages 1 to {last}")
        grids = list(itertools.islice(self._grids(x), max(stages, default=0)))
        return [grids[stage - 1] for stage in stages]

    @property
    def grid_widths(self) -> dict[int, int]:
        """The stages that `grids` knows, and how many channels it has after each."""
        stages = 2 if type(self.layers[SEMANTIC_STAGE]) is SemanticStage else 4
        return {i + 1: self.layers[i].blocks[0].norm1.weight.numel() for i in range(stages)}

    def semantic_maps(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> how much each semantic token took from each patch (B, n, T', H', W').

        n semantic tokens of all windows over stage 3's grid; each map sums to 1. STViT-R: its first unit.
        """
        if self.semantic is None:
            raise ValueError("a dense model (semantic_tokens=None) has no semantic maps")
        stage = self.layers[SEMANTIC_STAGE]
        *_, x = itertools.islice(self._grids(x), SEMANTIC_STAGE)
        return self.semantic.maps(stage.base(x), stage.blocks[stage.base_depth :])

    def _grids(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
            yield x

    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW leaves undecayed, beside one-dimensional ones (timm's protocol)."""
        ends = ("relative_position_bias_table", "semantic.centres")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer decay (timm's protocol): embedding, each block, then norm and head.

        Merging joins the block after it, G the block that it enters.
        """
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (0,))]
        if self.semantic is not None:
            entered = self.layers[SEMANTIC_STAGE].base_depth + 1
            blocks.append((r"^layers\.(\d+)\.semantic", (entered,)))
        return {"stem": r"^patch_embed", "blocks": blocks, "head": r"^(?:norm|head)"}
