"""The plain video vision transformer, dense or with semantic tokens. An image is a clip of one frame."""

from collections.abc import Iterable

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from .embed import PatchEmbed, Size3, sincos_table
from .layers import Block
from .semantic import SemanticTokens


class VideoViT(nn.Module):
    """ViT on tubelets; from `base_depth` on, on a few semantic tokens (STViT, CVPR 2023, section 3).

    num_frames, image_size: of the clips it takes; image_size in pixels, one number or (height, width).
    patch_size: (frames, height, width) of one tubelet.
    semantic_tokens: (t, h, w) of them; None: the plain, dense backbone.
    base_depth, semantic_layers: layers on all patches, then layers that make the semantic tokens, out of
        `depth`: none is added. The rest runs on the semantic tokens alone.
    centres: learn G, which needs semantic_layers >= 2.
    pos_embed: "learned", or "sincos" (VideoMAE's fixed table).
    layer_scale: initial value, in the layers from `base_depth` on (all layers of a dense model).
    Raises ValueError, naming value and rule, where sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_frames: int,
        image_size: int | tuple[int, int],
        patch_size: Size3,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        pos_embed: str = "learned",
        semantic_tokens: Size3 | None = None,
        base_depth: int = 4,
        semantic_layers: int = 2,
        pool: str = "max",
        centres: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        if pos_embed not in ("learned", "sincos"):
            raise ValueError(f"pos_embed={pos_embed!r} is none of ['learned', 'sincos']")
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        self.patch_embed = PatchEmbed((num_frames, height, width), tuple(patch_size), embed_dim)
        grid = self.patch_embed.grid
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        else:
            self.register_buffer("pos_embed", sincos_table(grid, embed_dim), persistent=False)

        self.semantic = None
        self.base_depth, self.semantic_end = depth, depth
        if semantic_tokens is not None:
            self.base_depth, self.semantic_end = base_depth, base_depth + semantic_layers
            if base_depth < 0 or semantic_layers < 1 or self.semantic_end > depth:
                raise ValueError(
                    f"base_depth={base_depth} and semantic_layers={semantic_layers} (at least 1) "
                    f"must fit into depth={depth}"
                )
            self.semantic = SemanticTokens(
                grid,
                tuple(semantic_tokens),
                embed_dim,
                pool=pool,
                centres=centres and semantic_layers > 1,
            )
        scaled_from = 0 if self.semantic is None else base_depth
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                layer_scale=layer_scale if i >= scaled_from else None,
                checkpointing=checkpointing,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path, depth))
        )
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(_init_linear)
        for table in (self.pos_embed, self.semantic and self.semantic.centres):
            if isinstance(table, nn.Parameter):
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) in image mode -> logits (B, num_classes)."""
        return self.head(self.pooled_features(x))

    def pooled_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C): the mean of the last tokens, normalised; what the head sees."""
        return self.fc_norm(self.forward_features(x).flatten(1, 3).mean(1))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the last layer's token grid (B, t, h, w, C)."""
        x = self._base(x)
        if self.semantic is not None:
            x = self.semantic(x, self._semantic_layers())
        return _through(self.blocks[self.semantic_end :], x)

    def semantic_maps(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> how much each semantic token took from each patch (B, n, T', H', W').

        n = t*h*w semantic tokens over the grid of patches; each map sums to 1.
        """
        if self.semantic is None:
            raise ValueError("a dense model (semantic_tokens=None) has no semantic maps")
        return self.semantic.maps(self._base(x), self._semantic_layers())

    def _base(self, x: Tensor) -> Tensor:
        return _through(self.blocks[: self.base_depth], self.patch_embed(x) + self.pos_embed)

    def _semantic_layers(self) -> nn.ModuleList:
        return self.blocks[self.base_depth : self.semantic_end]

    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW leaves undecayed, beside one-dimensional ones (timm's protocol)."""
        return {"pos_embed", "semantic.centres"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer decay (timm's protocol): embedding, each block, then norm and head.

        G joins the block that it enters.
        """
        blocks = [(r"^blocks\.(\d+)", None)]
        if self.semantic is not None:
            blocks.append((r"^semantic\.centres", (self.base_depth + 1,)))
        return {
            "stem": r"^(?:pos_embed|patch_embed)",
            "blocks": blocks,
            "head": r"^(?:fc_norm|head)",
        }


def _through(blocks: Iterable[Block], x: Tensor) -> Tensor:
    """A grid through ordinary self-attention layers: flattened here, and nowhere else."""
    grid = x.shape[1:4]
    x = x.flatten(1, 3)
    for block in blocks:
        x = block(x)
    return x.unflatten(1, grid)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
