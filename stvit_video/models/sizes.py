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
    class_token: bool | Auto = "auto"
    """One more token (ViT), which the head sees instead of the mean: AugReg, DeiT, DINO."""
    superpatches: Literal["contrast", "dcts"] | None | Auto = "auto"
    """Groups of patches as one token from the first layer on (ViT); by contrast or a policy network."""
    superpatch_tokens: Count | None | Auto = "auto"
    """So many tokens of every clip; null: as many as the threshold leaves."""
    superpatch_threshold: Annotated[float, Range(0, 1)] | None | Auto = "auto"
    """Merged: less contrast than this (0.03), or more probability (0.5)."""
    superpatch_shapes: Annotated[list[tuple[int, int, int]], Range(1)] | None | Auto = "auto"
    """Which groups there may be (time, height, width, in patches); null: a table by the clip's size."""
    superpatch_vectors: bool | Auto = "auto"
    """Learn a vector for each shape, from zero on; CTS has none."""
    superpatch_policy: str | Auto = "auto"
    """The policy's network, by timm's name."""
    superpatch_std: tuple[float, float, float] | None | Auto = "auto"
    """By what pixels were divided, for contrast in units of 0 to 1; null: ImageNet's."""
    semantic_tokens: Three | None | Auto = "auto"
    """How many semantic tokens (time, height, width; Swin: of each window); null: the dense backbone."""
    reducer: Literal[*REDUCERS] | Auto = "auto"
    """What makes them (ViT): attention, or a control: pooling alone, random patches, token merging."""
    base_depth: Annotated[int, Range(0)] | Auto = "auto"
    """Layers on all patches, before the semantic ones (Swin: of stage 3)."""
    base_window: Count | None | Auto = "auto"
    """Tubelets of a chunk that base and semantic layers stay within (ViT), for streams; null: no chunks."""
    semantic_layers: Count | Auto = "auto"
    """Layers that make the semantic tokens."""
    pool: Literal["max", "avg", "grid"] | Auto = "auto"
    """How the semantic tokens start: pooled, or grid: as the patch in the middle of each one's region."""
    centres: bool | Auto = "auto"
    """Learn G, a vector per semantic token, added before the second semantic layer."""
    tome_r: Count | None | Auto = "auto"
    """Token merging: by so many in every layer, the paper's schedule; null: once, to semantic_tokens."""
    semantic_proportional: bool | Auto = "auto"
    """Layers after the semantic ones ask a token as often as it stands for patches (ViT)."""
    proportional: bool | Auto = "auto"
    """Token merging: a merged token is asked as often as it has patches in it."""
    dropout: Annotated[float, Range(0, 0.999)] | Auto = "auto"
    """Share of the features before the head that is dropped in training."""
    drop_path: Annotated[float, Range(0, 0.999)] | Auto = "auto"
    """Stochastic depth: rate of the last layer, rising linearly from 0."""
    layer_scale: float | None | Auto = "auto"
    """Initial layer scale from base_depth on (Swin: in stage 3 only); null: none."""
    checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass: less memory, a third more time."""
    head_dim: Count | Auto = "auto"
    """Channels of the head that stands on the model, where it has some."""
