"""The plain video vision transformer, dense or with semantic tokens. An image is a clip of one frame."""

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from .embed import PatchEmbed, Size3, sincos_table
from .layers import Block
from .reducers import REDUCERS, make_reducer


class VideoViT(nn.Module):
    """ViT on tubelets; from `base_depth` on, on a few semantic tokens (STViT, CVPR 2023, section 3).

    num_frames, image_size: of the clips it takes; image_size in pixels, one number or (height, width).
    patch_size: (frames, height, width) of one tubelet.
    semantic_tokens: (t, h, w) of them; None: the plain, dense backbone.
    reducer: what makes them. "semantic", or a control: "pool", "random" or "tome" (see `reducers`), which
        takes base_depth and semantic_tokens likewise.
    base_depth, semantic_layers: layers on all patches, then layers that make the semantic tokens, out of
        `depth`: none is added. The rest runs on the semantic tokens alone.
    proportional: after merging, a token is asked as often as it has patches in it (ToMe, equation 1).
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
        reducer: str = "semantic",
        base_depth: int = 4,
        semantic_layers: int = 2,
        pool: str = "max",
        centres: bool = True,
        proportional: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        if pos_embed not in ("learned", "sincos"):
            raise ValueError(f"pos_embed={pos_embed!r} is none of ['learned', 'sincos']")
        if reducer not in REDUCERS:
            raise ValueError(f"reducer={reducer!r} is none of {list(REDUCERS)}")
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
        self.patch_embed = PatchEmbed((num_frames, height, width), tuple(patch_size), embed_dim)
        grid = self.patch_embed.grid
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        else:
            self.register_buffer("pos_embed", sincos_table(grid, embed_dim), persistent=False)

        self.semantic, self.proportional = None, proportional
        self.base_depth, self.reduced_depth = depth, depth
        if semantic_tokens is not None:
            self.semantic = make_reducer(
                reducer,
                grid,
                tuple(semantic_tokens),
                embed_dim,
                semantic_layers=semantic_layers,
                pool=pool,
                centres=centres,
            )
            self.base_depth, self.reduced_depth = base_depth, base_depth + self.semantic.layers
            if base_depth < 0 or semantic_layers < 1 or self.reduced_depth > depth:
                raise ValueError(
                    f"base_depth={base_depth} and semantic_layers={semantic_layers} (at least 1) "
                    f"must fit into depth={depth}"
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
        for table in (self.pos_embed, getattr(self.semantic, "centres", None)):
            if isinstance(table, nn.Parameter):
                nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) in image mode -> logits (B, num_classes)."""
        return self.head(self.pooled_features(x))

    def pooled_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C): the mean of the last tokens, normalised; what the head sees.

        Merged tokens count as often as they have patches in them.
        """
        x, sizes = self._tokens(x)
        if sizes is None:
            return self.fc_norm(x.mean(1))
        weights = (sizes / sizes.sum(1, keepdim=True)).to(x.dtype)
        return self.fc_norm((x * weights[..., None]).sum(1))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the last layer's token grid (B, t, h, w, C); (B, n, 1, 1, C) where tokens have
        lost their places ("random", "tome")."""
        x, _ = self._tokens(x)
        return x.unflatten(1, self.patch_embed.grid if self.semantic is None else self.semantic.tokens)

    def semantic_maps(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> how much each semantic token took from each patch (B, n, T', H', W').

        n = t*h*w semantic tokens over the grid of patches; each map sums to 1. Raises ValueError for a
        model without semantic tokens.
        """
        if not hasattr(self.semantic, "maps"):
            raise ValueError("no semantic maps: the model is dense or its reducer another")
        return self.semantic.maps(self._base(x), self._reducing_layers())

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last layer's tokens (B, n, C); if they were merged, of how many patches each (B, n)."""
        x = self._base(x)
        if self.semantic is None:
            return x.flatten(1, 3), None
        x, sizes = self.semantic(x, self._reducing_layers())
        weighted = sizes is not None and self.proportional
        bias = sizes.log().to(x.dtype)[:, None, None] if weighted else None
        for block in self.blocks[self.reduced_depth :]:
            x = block(x, bias=bias)
        return x, sizes

    def _base(self, x: Tensor) -> Tensor:
        """The grid of patches (B, T', H', W', C) after `base_depth` layers."""
        x = self.patch_embed(x) + self.pos_embed
        grid = x.shape[1:4]
        x = x.flatten(1, 3)
        for block in self.blocks[: self.base_depth]:
            x = block(x)
        return x.unflatten(1, grid)

    def _reducing_layers(self) -> nn.ModuleList:
        return self.blocks[self.base_depth : self.reduced_depth]

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


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
