"""The plain video vision transformer, with reducers between its layers. An image is a clip of one frame."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from .embed import PatchEmbed, Size3, clip_size, sincos_table
from .layers import Block, init_weights
from .tokens import Tokens

MakeReducer = Callable[[Size3, int], nn.Module]  # (grid of patches, width) -> a reducer
Exits = Mapping[int, Callable[[Tokens], Tokens]]  # by layer, what lets tokens leave after it
MakeSuperpatches = Callable[[Size3, Size3, int], nn.Module]  # (clip size, patch size, width)


class VideoViT(nn.Module):
    """ViT on tubelets; with reducers, layers run on fewer tokens from some depth on (STViT, CVPR 2023).

    num_classes: 0: a backbone, which gives pooled features.
    num_frames, image_size: of the clips it takes; image_size in pixels, one number or (height, width).
    patch_size: (frames, height, width) of one tubelet.
    reducers: by the number of layers before each, what makes it of (grid, width): see `reducers`. A reducer
        uses layers out of `depth`: none is added. The first that makes semantic tokens is `semantic`.
    superpatches: what makes, of (clip size, patch size, width), what merges patches before the first layer:
        see `superpatches`.
    pos_embed: "learned", or "sincos" (VideoMAE's fixed table).
    layer_scale: initial value, in the layers from the first reducer on (all layers of a dense model).
    class_token: one more token from end to end, which stands for no patch; the head sees it alone.
    Raises ValueError, naming value and rule, where sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        num_frames: int,
        image_size: int | Sequence[int],
        patch_size: Size3,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        pos_embed: str = "learned",
        reducers: Mapping[int, MakeReducer] | None = None,
        superpatches: MakeSuperpatches | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        class_token: bool = False,
        checkpointing: bool = False,
    ):
        super().__init__()
        if pos_embed not in ("learned", "sincos"):
            raise ValueError(f"pos_embed={pos_embed!r} is none of ['learned', 'sincos']")
        clip, patch_size = clip_size(num_frames, image_size), tuple(patch_size)
        self.patch_embed = PatchEmbed(clip, patch_size, embed_dim)
        self.superpatches = None if superpatches is None else superpatches(clip, patch_size, embed_dim)
        grid = self.patch_embed.grid
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, *grid, embed_dim))
        else:
            self.register_buffer("pos_embed", sincos_table(grid, embed_dim), persistent=False)
        for name in ("cls_token", "pos_embed_class"):  # timm's name, MAE-ST's
            table = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
            self.register_parameter(name, table)

        self.semantic, self._plan = (
            None,
            [(None, 0, 0)],
        )  # reducer's name, its first layer, the next after it
        for first, make in sorted((reducers or {}).items()):
            self._add_reducer(first, make(grid, embed_dim), depth)
        scaled_from = min(reducers or [0])
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
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        init_weights(self)

    def _add_reducer(self, first: int, reducer: nn.Module, depth: int) -> None:
        """Register it, with its layers: the next ones from `first` on."""
        free, rest = self._plan[-1][2], first + reducer.layers
        if not free <= first <= rest <= depth:
            raise ValueError(
                f"base_depth={first} and semantic_layers={reducer.layers}, of a reducer, must fit into "
                f"depth={depth}, from layer {free} on"
            )
        name = "semantic" if hasattr(reducer, "maps") and self.semantic is None else f"reducer_{first}"
        setattr(self, name, reducer)
        self._plan.append((name, first, rest))

    @property
    def segments(self) -> list[tuple[nn.Module | None, list[Block], list[Block]]]:
        """The way of the tokens: a reducer, the layers it uses, the layers after it; the first has none."""
        blocks = list(self.blocks)
        ends = [first for _, first, _ in self._plan[1:]] + [len(blocks)]
        return [
            (name and getattr(self, name), blocks[first:rest], blocks[rest:end])
            for (name, first, rest), end in zip(self._plan, ends, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W), or (B, 3, H, W) in image mode -> logits (B, num_classes), or pooled features."""
        return self.head(self.pooled_features(x))

    def pooled_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C): the class token or the mean of the last tokens, normalised; what the
        head sees.

        Merged tokens count as often as they have patches in them.
        """
        return self.fc_norm(self.tokens(x).pooled())

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the last tokens' grid (B, t, h, w, C); where they lie on none ("random",
        "tome"), that of the patches, each with its token's features."""
        tokens, (reducer, _, _) = self.tokens(x), self.segments[-1]
        size = None if reducer is None else reducer.tokens
        return tokens.to_grid() if size is None else tokens.x.unflatten(1, size)

    def embed(self, x: Tensor) -> Tokens:
        """(B, 3, T, H, W) -> the first layer's tokens: patches, or superpatches."""
        if self.superpatches is None:
            tokens = Tokens.of(self.patch_embed(x) + self.pos_embed)
        else:
            tokens = self.superpatches(x, self.patch_embed, self.pos_embed)
        if self.cls_token is None:
            return tokens
        token = (self.cls_token + self.pos_embed_class).to(tokens.x.dtype)
        return tokens._replace(class_token=token.expand(x.shape[0], -1, -1))

    def tokens(self, x: Tensor) -> Tokens:
        """(B, 3, T, H, W) -> the last layer's tokens."""
        return self.levels(x)[0]

    def grids(self, x: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """(B, 3, T, H, W) -> the grids of patches (B, t, h, w, C) after these layers, not normalised.

        Every patch has its token's features. layers, raises: as `levels`.
        """
        return [tokens.to_grid() for tokens in self.levels(x, layers)]

    def levels(
        self, x: Tensor, layers: Sequence[int] | None = None, exits: Exits | None = None
    ) -> list[Tokens]:
        """(B, 3, T, H, W) -> the tokens after these layers.

        layers: from 1 to depth, by default the last alone. exits: what, by layer, lets tokens leave after
        it (see `exits.EarlyExits`). Raises ValueError where there is no such layer, or a reducer has no
        tokens yet.
        """
        layers, exits, levels = [len(self.blocks)] if layers is None else list(layers), exits or {}, {}
        known = list(self.grid_widths)
        for name, asked in (("layers", layers), ("exits", list(exits))):
            if not set(asked) <= set(known):
                raise ValueError(f"{name}={asked}: there are tokens after each of the layers {known}")
        last = max((*layers, *exits), default=0)
        for layer, tokens in self._layers(x, exits):
            if layer in layers:
                levels[layer] = tokens
            if layer >= last < len(self.blocks):
                break
        return [levels[layer] for layer in layers]

    @property
    def grid_widths(self) -> dict[int, int]:
        """The layers that `grids` knows, and how many channels it has after each."""
        inner = {i for _, first, rest in self._plan for i in range(first + 1, rest)}
        width = self.patch_embed.proj.out_channels
        return {i: width for i in range(1, len(self.blocks) + 1) if i not in inner}

    def semantic_maps(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> how much each semantic token took from each patch (B, n, T', H', W').

        n = t*h*w semantic tokens over the grid of patches; each map sums to 1. Raises ValueError for a
        model without semantic tokens.
        """
        if self.semantic is None:
            raise ValueError("no semantic maps: the model is dense or its reducer another")
        first, rest = next((first, rest) for name, first, rest in self._plan if name == "semantic")
        tokens = next(tokens for layer, tokens in self._layers(x) if layer == first)
        return self.semantic.maps(tokens, self.blocks[first:rest])

    def _layers(self, x: Tensor, exits: Exits | None = None) -> Iterator[tuple[int, Tokens]]:
        """After the embedding, every layer and every reducer: how many layers were used, and the tokens
        that have not left at an exit there.

        A reducer that uses none comes without a number of its own: it belongs to the layer after it.
        """
        exits = exits or {}
        tokens, layer = self.embed(x), 0
        yield layer, tokens
        for reducer, used, rest in self.segments:
            if reducer is not None:
                tokens, layer = reducer(tokens, used, x), layer + len(used)
                if used or not rest:
                    tokens = exits[layer](tokens) if used and layer in exits else tokens
                    yield layer, tokens
            bias = tokens.bias()
            for block in rest:
                tokens, layer = tokens.with_sequence(block(tokens.sequence(), bias=bias)), layer + 1
                if layer in exits:
                    tokens = exits[layer](tokens)
                    bias = tokens.bias()
                yield layer, tokens

    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW leaves undecayed, beside one-dimensional ones (timm's protocol)."""
        ends = ("cls_token", "pos_embed", "pos_embed_class", "centres")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ends}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer decay (timm's protocol): embedding, each block, then norm and head.

        What a reducer learns, as G, joins the block that it enters: the second that the reducer uses.
        """
        blocks = [(r"^blocks\.(\d+)", None)]
        for name, first, rest in self._plan[1:]:
            blocks.append((rf"^{name}\.", (min(first + 1, max(rest - 1, first)),)))
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed|superpatches)",
            "blocks": blocks,
            "head": r"^(?:fc_norm|head)",
        }
