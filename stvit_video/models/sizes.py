"""Every size that a model may take, with its meaning and bounds."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..bounds import Range
from .reducers import REDUCERS

Auto = Literal["auto"]
Count = Annotated[int, Range(1)]
Three = Annotated[tuple[int, int, int], Range(1)]


@dataclass
class Sizes:
    """Sizes of a model; `auto` is what its name says."""

    patch_size: Three | Auto = "auto"
    """Frames, height and width of a tubelet, e.g. [2, 16, 16]."""
    embed_dim: Count | Auto = "auto"
    """Width of the tokens (Swin: of the first stage; it doubles from stage to stage)."""
    depth: Count | Auto = "auto"
    """Number of layers."""
    depths: Annotated[list[int], Range(1)] | Auto = "auto"
    """Swin: number of layers of each of the four stages."""
    num_heads: Annotated[int | list[int], Range(1)] | Auto = "auto"
    """Attention heads; divides the width. Swin: of each of the four stages."""
    window_size: Three | Auto = "auto"
    """Swin: tubelets of a window (time, height, width)."""
    mlp_ratio: Annotated[float, Range(0.01)] | Auto = "auto"
    """Width of a layer's hidden layer over embed_dim."""
    pos_embed: Literal["learned", "sincos"] | Auto = "auto"
    """Position table: learned, or VideoMAE's fixed sine-cosine."""
    semantic_tokens: Three | None | Auto = "auto"
    """How many semantic tokens (time, height, width; Swin: of each window); null: the dense backbone."""
    reducer: Literal[*REDUCERS] | Auto = "auto"
    """What makes them (ViT): attention, or a control: pooling alone, random patches, token merging."""
    base_depth: Annotated[int, Range(0)] | Auto = "auto"
    """Layers on all patches, before the semantic ones (Swin: of stage 3)."""
    semantic_layers: Count | Auto = "auto"
    """Layers that make the semantic tokens."""
    pool: Literal["max", "avg"] | Auto = "auto"
    """How the semantic tokens start."""
    centres: bool | Auto = "auto"
    """Learn G, a vector per semantic token, added before the second semantic layer."""
    tome_r: Count | None | Auto = "auto"
    """Token merging: by so many in every layer, the paper's schedule; null: once, to semantic_tokens."""
    proportional: bool | Auto = "auto"
    """Token merging: a merged token is asked as often as it has patches in it."""
    drop_path: Annotated[float, Range(0, 0.999)] | Auto = "auto"
    """Stochastic depth: rate of the last layer, rising linearly from 0."""
    layer_scale: float | None | Auto = "auto"
    """Initial layer scale from base_depth on (Swin: in stage 3 only); null: none."""
    checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass: less memory, a third more time."""
    head_dropout: Annotated[float, Range(0, 0.999)] | Auto = "auto"
    """Head for actions: share of a box's features that training drops."""
