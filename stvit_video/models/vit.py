"""The plain video vision transformer, with reducers between its layers. An image is a clip of one frame."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from .embed import PatchEmbed, Size3, as_clip, clip_size, sincos_table
from .layers import Block, init_weights
from .tokens import Tokens, regions

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
    dropout: of the features before the head.
    layer_scale: initial value, in the layers from the first reducer on (all layers of a dense model).
    class_token: one more token from end to end, which stands for no patch; the head sees it alone.
    base_window: tubelets of a chunk of the clip. Layers up to the reducer's last stay within chunks, which
        are all alike to them; then the chunks' tokens are joined, with a learned vector for each chunk's
        place: a stream computes its chunks once (`chunk_tokens`, `join`). None: no chunks.
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
        dropout: float = 0.0,
        superpatches: MakeSuperpatches | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        class_token: bool = False,
        checkpointing: bool = False,
        base_window: int | None = None,
    ):
        super().__init__()
        if pos_embed not in ("learned", "sincos"):
            raise ValueError(f"pos_embed={pos_embed!r} is none of ['learned', 'sincos']")
        self.chunks = count_chunks(num_frames, patch_size, base_window)
        clip, patch_size = clip_size(num_frames // self.chunks, image_size), tuple(patch_size)
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

        self.semantic = None
        self._plan = [(None, 0, 0)]  # reducer's name, its first layer, the next after it
        for first, make in sorted((reducers or {}).items()):
            self._add_reducer(first, make(grid, embed_dim), depth)
        self.chunk_embed = None
        if base_window is not None:
            joined = [getattr(self, name) for name, *_ in self._plan[1:]]
            if len(joined) != 1 or joined[0].tokens is None:
                raise ValueError(
                    f"base_window={base_window}: chunks are joined by one reducer whose tokens lie on a "
                    "grid (semantic with model.pool other than merge, or pool), which this model has not"
                )
            self.chunk_embed = nn.Parameter(torch.zeros(1, self.chunks, 1, embed_dim))
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
        self.fc_norm, self.dropout = nn.LayerNorm(embed_dim, eps=1e-6), nn.Dropout(dropout)
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
    def grid(self) -> Size3:
        """(t, h, w), a clip's patches."""
        return self._joined_size(self.patch_embed.grid)

    @property
    def clip_tokens(self) -> Tensor | None:
        """How many tokens each clip of the last forward pass had in the first layer, int64 (B), in all of
        its chunks; None where every clip has as many."""
        counts = getattr(self.superpatches, "clip_tokens", None)
        return None if counts is None else counts.unflatten(0, (-1, self.chunks)).sum(1)

    @property
    def base_depth(self) -> int:
        """How many layers see all patches: those before the first reducer; of a dense model all."""
        return self._plan[1][1] if len(self._plan) > 1 else len(self.blocks)

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
        return self.head(self.dropout(self.pooled_features(x)))

    def pooled_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, C): the class token or the mean of the last tokens, normalised; what the
        head sees.

        Merged tokens count as often as they have patches in them.
        """
        return self.fc_norm(self.tokens(x).pooled())

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> the last tokens' grid (B, t, h, w, C); where they lie on none (reducers
        "random" and "tome", pool="merge"), that of the patches, each with its token's features."""
        tokens, (reducer, _, _) = self.tokens(x), self.segments[-1]
        size = None if reducer is None else reducer.tokens
        return tokens.to_grid() if size is None else tokens.x.unflatten(1, self._joined_size(size))

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
        it (see `exits.EarlyExits`). Raises ValueError where there is no such layer, a reducer has no
        tokens yet, or none may leave.
        """
        layers, exits, levels = [len(self.blocks)] if layers is None else list(layers), exits or {}, {}
        known, may_leave = list(self.grid_widths), self.exit_layers
        if not set(layers) <= set(known):
            raise ValueError(f"layers={layers}: there are tokens after each of the layers {known}")
        if not set(exits) <= set(may_leave):
            raise ValueError(f"exits={list(exits)}: tokens may leave after each of the layers {may_leave}")
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

    @property
    def exit_layers(self) -> list[int]:
        """The layers after which tokens may leave: those that leave before a reducer which makes new tokens
        of the whole grid would be back."""
        plan = self._plan[1:]
        makes_new = [first for name, first, _ in plan if not getattr(getattr(self, name), "merges", False)]
        return [layer for layer in self.grid_widths if layer > max(makes_new, default=0)]

    def semantic_maps(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> how much each semantic token took from each patch (B, n, T', H', W').

        n = t*h*w semantic tokens over the grid of patches; each map sums to 1. Raises ValueError for a
        model without semantic tokens.
        """
        if self.semantic is None:
            raise ValueError("no semantic maps: the model is dense or its reducer another")
        first, rest = next((first, rest) for name, first, rest in self._plan if name == "semantic")
        layers = self._layers(x) if self.chunk_embed is None else self._base_layers(x)
        tokens = next(tokens for layer, tokens in layers if layer == first)
        maps = self.semantic.maps(tokens, self.blocks[first:rest]).unflatten(0, (-1, self.chunks))
        if self.chunks == 1:
            return maps[:, 0]
        every = maps.new_zeros(*maps.shape[:3], self.chunks, *maps.shape[3:])
        for chunk in range(self.chunks):  # its tokens took nothing from other chunks
            every[:, chunk, :, chunk] = maps[:, chunk]
        return every.flatten(3, 4).flatten(1, 2)

    def superpatch_map(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> which token each patch is part of in the first layer: its number, int64
        (B, T', H', W'). Patches of one superpatch have the same; chunks share none.

        Raises ValueError for a model without superpatches.
        """
        if self.superpatches is None:
            raise ValueError("no superpatches: each patch is a token (model.superpatches)")
        _, tokens = next(self._base_layers(x))
        places = tokens.places().unflatten(0, (-1, self.chunks))
        first = torch.arange(self.chunks, device=places.device) * places.shape[2]
        return (places + first[:, None]).unflatten(2, self.patch_embed.grid).flatten(1, 2)

    def chunk_tokens(self, x: Tensor) -> Tensor:
        """Chunks of clips (B, 3, T / chunks, H, W) -> their tokens (B, n / chunks, C), for `join`; a class
        token first, where the model has one: of chunks that are joined it is the mean.

        Raises ValueError for a model without chunks (base_window=None).
        """
        if self.chunk_embed is None:
            raise ValueError("base_window=None: this model's clips have no chunks")
        *_, (_, tokens) = self._base_layers(x)
        return self._chunk_tokens(tokens)

    def join(self, chunks: Tensor) -> Tensor:
        """Tokens of a clip's chunks in order, (B, chunks, n / chunks, C) -> what `forward` gives."""
        *_, (_, last) = self._joined_layers(chunks)
        return self.head(self.fc_norm(last.pooled()))

    def _layers(self, x: Tensor, exits: Exits | None = None) -> Iterator[tuple[int, Tokens]]:
        """After the embedding, every layer and every reducer: how many layers were used, and the tokens
        that have not left at an exit there.

        A reducer that uses none comes without a number of its own: it belongs to the layer after it.
        """
        if self.chunk_embed is None:
            tokens = self.embed(x)
            yield 0, tokens
            yield from self._run(tokens, 0, self.segments, x, exits or {})
            return
        if exits:
            raise ValueError(f"exits={list(exits)}: no token leaves a model with base_window")
        for layer, tokens in self._base_layers(x):
            patches = tokens.to_grid().unflatten(0, (-1, self.chunks)).flatten(1, 2)
            yield layer, Tokens.of(patches)
        yield from self._joined_layers(self._chunk_tokens(tokens).unflatten(0, (-1, self.chunks)))

    def _base_layers(self, x: Tensor) -> Iterator[tuple[int, Tokens]]:
        """`_layers` before the reducer, of every chunk as a clip of its own."""
        x = x if self.chunk_embed is None else cut_clips(as_clip(x), self.patch_embed.clip_size[0])
        tokens = self.embed(x)
        yield 0, tokens
        yield from self._run(tokens, 0, self.segments[:1], x)

    def _chunk_tokens(self, tokens: Tokens) -> Tensor:
        """The base layers' tokens of chunks -> what the reducer makes of each (B, n, C)."""
        reducer, used, _ = self.segments[1]
        return reducer(tokens, used).sequence()

    def _joined_layers(self, chunks: Tensor) -> Iterator[tuple[int, Tokens]]:
        """`_layers` from the tokens of chunks (B, chunks, n, C) on."""
        _, (reducer, used, rest) = self.segments
        token, layer = None, self._plan[1][2]
        if self.cls_token is not None:
            token, chunks = chunks[:, :, :1].mean(1), chunks[:, :, 1:]
        x = (chunks + self.chunk_embed).flatten(1, 2)
        grid, size = (self._joined_size(n) for n in (self.patch_embed.grid, reducer.tokens))
        asked = getattr(reducer, "asked", None)
        asked = None if asked is None else asked.repeat(1, self.chunks)
        tokens = Tokens(x, grid, regions(grid, size).to(x.device), asked=asked, class_token=token)
        if used or not rest:
            yield layer, tokens
        yield from self._run(tokens, layer, [(None, [], rest)])

    def _run(
        self,
        tokens: Tokens,
        layer: int,
        segments: Sequence[tuple],
        clip: Tensor | None = None,
        exits: Exits | None = None,
    ) -> Iterator[tuple[int, Tokens]]:
        exits = exits or {}
        merged = self.superpatches is not None and self.superpatches.tokens is None
        # only where clips may be padded: to look costs a wait; in training drop path draws for the batch
        apart = (exits or merged) and not self.training
        for reducer, used, rest in segments:
            if reducer is not None:
                tokens, layer = reducer(tokens, used, clip), layer + len(used)
                if used or not rest:
                    tokens = exits[layer](tokens) if used and layer in exits else tokens
                    yield layer, tokens
            bias, groups = tokens.bias(), tokens.alike() if apart else []
            for block in rest:
                x, layer = in_groups(block, tokens.sequence(), bias, groups), layer + 1
                tokens = tokens.with_sequence(x)
                if layer in exits:
                    tokens = exits[layer](tokens)
                    bias, groups = tokens.bias(), tokens.alike() if apart else []
                yield layer, tokens

    def _joined_size(self, size: Size3) -> Size3:
        """A chunk's grid -> the clip's."""
        return (size[0] * self.chunks, *size[1:])

    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW leaves undecayed, beside one-dimensional ones (timm's protocol)."""
        ends = ("cls_token", "pos_embed", "pos_embed_class", "chunk_embed", "centres")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ends}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer decay (timm's protocol): embedding, each block, then norm and head.

        What a reducer learns, as G, joins the block that it enters: the second that the reducer uses.
        """
        blocks = [(r"^blocks\.(\d+)", None)]
        for name, first, rest in self._plan[1:]:
            blocks.append((rf"^{name}\.", (min(first + 1, max(rest - 1, first)),)))
        if self.chunk_embed is not None:  # joins the first layer after the reducer
            blocks.append((r"^chunk_embed", (min(self._plan[1][2], len(self.blocks) - 1),)))
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed|superpatches)",
            "blocks": blocks,
            "head": r"^(?:fc_norm|head)",
        }


def in_groups(block: Block, x: Tensor, bias: Tensor | None, groups: list[tuple[Tensor, int]]) -> Tensor:
    """`block(x, bias=bias)` by groups of clips, see `Tokens.alike`; (B, N, C), zero in padding."""
    if len(groups) < 2:
        return block(x, bias=bias)
    parts = [block(x[clips, :n], bias=bias[clips, ..., :n]) for clips, n in groups]
    parts = [F.pad(part, (0, 0, 0, x.shape[1] - part.shape[1])) for part in parts]
    return torch.cat(parts)[torch.cat([clips for clips, _ in groups]).argsort()]


def count_chunks(num_frames: int, patch_size: Size3, base_window: int | None) -> int:
    """How many chunks of `base_window` tubelets a clip has; None: it is one. Raises ValueError."""
    tubelets = num_frames // patch_size[0]
    if base_window is None:
        return 1
    if tubelets % base_window:
        raise ValueError(
            f"base_window={base_window}: a clip of {tubelets} tubelets does not divide into chunks of it "
            f"(num_frames={num_frames}, patch_size={tuple(patch_size)})"
        )
    return tubelets // base_window


def cut_clips(clips: Tensor, frames: int) -> Tensor:
    """Clips (B, 3, T, H, W) -> their chunks of so many frames: (B * chunks, 3, frames, H, W)."""
    if clips.shape[2] % frames:
        raise ValueError(f"input of shape {tuple(clips.shape)}: its frames are no whole chunks of {frames}")
    return clips.unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)
