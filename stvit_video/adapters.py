"""Other projects' names -> ours: one pure function from state dict to state dict for each origin.

What an adapter does not know keeps its name, and is unexpected then; what no model here has a place for
(`DROPS`) is left out.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pixels import IMAGENET, Pixels

State = dict[str, Tensor]
BICUBIC = IMAGENET._replace(interpolation="bicubic")  # of images, where the recipe is timm's
SLOWFAST = Pixels((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))


class Adapter(NamedTuple):
    """origin: for the report; fixed_positions: its checkpoints hold no position table, it is VideoMAE's.

    pixels: what all models of this origin were trained on; None: they differ.
    """

    origin: str
    matches: Callable[[State], bool]
    convert: Callable[[State], State]
    fixed_positions: bool = False
    pixels: Pixels | None = None


# What other projects' checkpoints hold, and the models here have no place for; of the tokens the class
# token is kept where a model has one.
CLASS_TOKEN = ("cls_token", "pos_embed_class")
TOKENS = ("cls_token", "dist_token", "reg_token", "register_tokens")
DROPS = re.compile(
    rf"({'|'.join(TOKENS)}|mask_token|pos_embed_class)$"
    r"|(head_dist|encoder_to_decoder)\.|decoder(_\w+)?(\.|$)"
)
DETECTOR = re.compile(r"(neck|rpn_head|roi_head)\.")  # what a detector has beside its backbone
RECOMPUTED = re.compile(r"\.(relative_position_index|attn_mask)$")  # buffers that follow from the sizes


def from_timm(state: State) -> State:
    """timm's ViT, DeiT and DINOv2, and whoever speaks its names: (1, N, C) positions, layer scale.

    The norm before a class token becomes the norm after pooling, which is what it is in a model pooled by
    timm itself. The class token's row of the positions becomes `pos_embed_class`, zero where it has none;
    register tokens and their positions are dropped.
    """
    state = _common(state)
    table = state["pos_embed"]
    tokens = {name: state[name] for name in TOKENS if name in state}
    misshapen = {name for name, t in tokens.items() if t.ndim != 3 or t.shape[::2] != table.shape[::2]}
    rows = state["pos_embed"] = _patch_rows(table, tokens, any(".ls1." in name for name in state))
    if "cls_token" in tokens and not misshapen:
        has = rows.shape[1] < table.shape[1]
        state["pos_embed_class"] = table[:, :1] if has else torch.zeros_like(tokens["cls_token"])
    return _without_drops(state) | {name: state[name] for name in misshapen}


def from_videomae(state: State) -> State:
    """VideoMAE and V2, pre-trained encoder or fine-tuned: biases of q and v alone (k has none)."""
    state = _without_drops(_common(state))
    for name in [name for name in state if name.endswith(".q_bias")]:
        block = name.removesuffix("q_bias")
        q, v, joined = state[name], state.get(f"{block}v_bias"), f"{block}qkv.bias"
        if v is not None and q.ndim == 1 and q.shape == v.shape and joined not in state:
            del state[name], state[f"{block}v_bias"]
            state[joined] = torch.cat([q, torch.zeros_like(q), v])
    return state


HUGGING_FACE = {
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "attention.output.dense.": "attn.proj.",
    "attention.attention.": "attn.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "layernorm.": "norm.",
    "classifier.": "head.",
}


def from_hugging_face(state: State) -> State:
    """VideoMAE in transformers' layout: q, k and v apart, their biases spelled in two ways."""

    def rename(name: str) -> str:
        name = re.sub(r"^(encoder\.)?layer\.(\d+)\.", r"blocks.\2.", name.removeprefix("videomae."))
        for theirs, ours in HUGGING_FACE.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{ours}", name, count=1)
        name = re.sub(r"attn\.([qkv])_bias$", lambda m: f"attn.{m[1]}.bias", name)
        return re.sub(r"attn\.(q|k|v)(uery|ey|alue)\.", r"attn.\1.", name)

    return _without_drops(_joined(_common(_renamed(state, rename))))


def from_mae_st(state: State) -> State:
    """MAE-ST: q, k and v apart, and one position table for space and one for time."""
    state = _joined(_common(state))
    space, time = (state.get(f"pos_embed_{axes}") for axes in ("spatial", "temporal"))
    if "pos_embed" not in state and all(
        t is not None and t.ndim == 3 and t.shape[0] == 1 and t.shape[1] for t in (space, time)
    ):
        grid = square(space)
        if grid is not None and grid.shape[-1] == time.shape[-1]:
            state["pos_embed"] = grid + time.unflatten(1, (-1, 1, 1))
            del state["pos_embed_spatial"], state["pos_embed_temporal"]
    return _without_drops(state)


def from_torchvision_swin(state: State) -> State:
    """torchvision's `swin3d_t/s/b` and image `swin_t/s/b`: stages and mergings are numbered in one list."""

    def rename(name: str) -> str:
        if features := re.match(r"features\.(\d+)\.(.*)", name):
            index = int(features[1])
            place = "downsample" if index % 2 else "blocks"
            name = f"layers.{(index + 1) // 2}.{place}.{features[2]}"
        return name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")

    return _renamed(state, rename)


def from_timm_swin(state: State) -> State:
    """timm's image Swin."""
    return _renamed(state, lambda name: name.replace("head.fc.", "head."))


def from_microsoft_swin(state: State) -> State:
    """Microsoft's Swin and Video Swin: the merging stands at the end of the stage before it."""

    def rename(name: str) -> str:
        name = name.replace("cls_head.fc_cls.", "head.")
        return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)

    return _renamed(state, rename)


def from_stvit_r(state: State) -> State:
    """The authors' STViT-R-Swin, classifier or detector: keys and values apart from queries, a stem
    numbered by position; with USE_GLOBAL, G as `semantic_token2`, flat over the tokens' grid.
    """
    stem = {"0.c": "conv1", "0.bn": "norm1", "2.c": "conv2", "2.bn": "norm2"}
    state = {k: v for k, v in from_microsoft_swin(state).items() if not DETECTOR.match(k)}
    for q in [name for name in state if ".attn.q." in name]:
        kv = q.replace(".q.", ".kv.")
        joined = q.replace(".q.", ".qkv.")
        fits = kv in state and state[kv].ndim == state[q].ndim > 0 and joined not in state
        if fits and state[kv].shape[1:] == state[q].shape[1:]:
            state[joined] = torch.cat([state.pop(q), state.pop(kv)])

    def rename(name: str) -> str:
        name = re.sub(
            r"^patch_embed\.proj\.([02]\.(?:c|bn))\.", lambda m: f"patch_embed.{stem[m[1]]}.", name
        )
        name = re.sub(r"^norm([0-3])\.", r"norms.\1.", name)  # of the backbone for detection
        name = re.sub(r"\.semantic_token2$", ".semantic.centres", name)
        return re.sub(r"layer_scale_(\d)$", r"ls\1.gamma", name)

    return _renamed(state, rename)


SEGVIT = {
    "ln1.": "norm1.",
    "ln2.": "norm2.",
    "attn.attn.in_proj_": "attn.qkv.",
    "attn.attn.out_proj.": "attn.proj.",
    "ffn.layers.0.0.": "mlp.fc1.",
    "ffn.layers.1.": "mlp.fc2.",
}


def from_segvit(state: State) -> State:
    """SegViT and Dynamic Token Pruning: mmsegmentation's ViT, and ATM heads, whose names begin with
    `decode_head.` or `auxiliary_head.N.` as theirs do."""

    def rename(name: str) -> str:
        if re.match(r"(decode_head|auxiliary_head\.\d+)\.", name):
            name = re.sub(
                r"(input_proj|proj_norm|decoder)_(\d)\.", lambda m: f"{m[1]}.{int(m[2]) - 1}.", name
            )
            name = re.sub(r"\.(input_proj|proj_norm)\.(?!\d)", r".\1.0.", name)
            return re.sub(r"\.decoder\.(\d\.)?layers\.", lambda m: f".decoder.{m[1] or '0.'}", name)
        name = re.sub(r"^layers\.", "blocks.", name).replace("patch_embed.projection.", "patch_embed.proj.")
        name = re.sub(r"^ln1\.", "norm.", name)
        for theirs, ours in SEGVIT.items():
            name = name.replace(f".{theirs}", f".{ours}") if name.startswith("blocks.") else name
        return name

    return from_timm(_renamed(state, rename))


def from_efficientnet(state: State) -> State:
    """timm's, as the network that decides about superpatches; without what follows its last stage."""
    ends = ("conv_head.", "bn2.", "norm_head.", "classifier.")
    return {f"superpatches.policy.backbone.{k}": t for k, t in state.items() if not k.startswith(ends)}


def square(table: Tensor) -> Tensor | None:
    """A flat table (1, N, C) as the grid (1, 1, n, n, C) of a square image; None if N is 0 or no square."""
    side = math.isqrt(table.shape[1])
    return table.unflatten(1, (1, side, side)) if side**2 == table.shape[1] > 0 else None


def _renamed(state: State, rename: Callable[[str], str]) -> State:
    """With new names; one that several would have is given to none, so that they are unexpected."""
    names = {name: rename(name) for name in state if not RECOMPUTED.search(name)}
    times = Counter(names.values())
    return {new if times[new] == 1 else name: state[name] for name, new in names.items()}


def _without_drops(state: State) -> State:
    return {name: t for name, t in state.items() if name in CLASS_TOKEN or not DROPS.match(name)}


def _common(state: State) -> State:
    """Names that many share: layer scale as gamma_1 and gamma_2, and `norm` where there is no fc_norm."""
    state = _renamed(state, lambda name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name))
    if not any(name.startswith("fc_norm.") for name in state):
        state = _renamed(state, lambda name: re.sub(r"^norm\.", "fc_norm.", name))
    return state


def _joined(state: State) -> State:
    """`attn.q`, `attn.k`, `attn.v` of each block as one `attn.qkv`; where no k has a bias, it is zero."""
    state = dict(state)
    biased = any(name.endswith("attn.k.bias") for name in state)
    for q in [name for name in state if name.endswith("attn.q.weight")]:
        block = q.removesuffix("q.weight")
        weights, biases = ([f"{block}{part}.{kind}" for part in "qkv"] for kind in ("weight", "bias"))
        if _alike(state, weights) and f"{block}qkv.weight" not in state:
            state[f"{block}qkv.weight"] = torch.cat([state.pop(name) for name in weights])
        if biases[0] in state and not biased:
            state.setdefault(biases[1], torch.zeros_like(state[biases[0]]))
        if _alike(state, biases) and f"{block}qkv.bias" not in state:
            state[f"{block}qkv.bias"] = torch.cat([state.pop(name) for name in biases])
    return state


def _alike(state: State, names: Sequence[str]) -> bool:
    """Whether these are all there, of one shape."""
    shapes = {state[name].shape if name in state else torch.Size() for name in names}
    return len(shapes) == 1 and shapes != {torch.Size()}


def _patch_rows(table: Tensor, tokens: State, layer_scale: bool) -> Tensor:
    """A position table (1, N, C) without the rows of class, distillation and register tokens.

    Some models give no position to registers, or (those with registers or layer scale) to no token at all.
    Which it is shows in the number of patches being square; where none is, every token is taken to have it.
    """
    lengths = {name: t.shape[1] for name, t in tokens.items() if t.ndim == 3}
    every, classes = sum(lengths.values()), lengths.get("cls_token", 0) + lengths.get("dist_token", 0)
    counts = [every, classes, 0] if every > classes or layer_scale else [every, classes]
    return table[:, next((n for n in counts if square(table[:, n:]) is not None), every) :]


def _named(pattern: str) -> Callable[[State], bool]:
    """Whether one of the tensors has such a name."""
    return lambda state: any(re.search(pattern, name) for name in state)


ADAPTERS = [
    Adapter(
        "VideoMAE, Hugging Face layout",
        _named(r"\.attention\.attention\."),
        from_hugging_face,
        fixed_positions=True,
        pixels=IMAGENET,
    ),
    Adapter("VideoMAE", _named(r"\.attn\.q_bias$"), from_videomae, True, IMAGENET),
    Adapter("STViT-R", _named(r"\.blocks\.1\.attn\.kv\."), from_stvit_r, pixels=BICUBIC),
    Adapter(
        "torchvision Swin",
        _named(r"^features\.0\.\d+\.attn\.relative"),
        from_torchvision_swin,
        pixels=IMAGENET,
    ),
    Adapter(
        "timm Swin",
        lambda state: "layers.0.blocks.0.norm1.weight" in state and "head.fc.weight" in state,
        from_timm_swin,
        pixels=BICUBIC,
    ),
    Adapter("Microsoft Swin", _named(r"^layers\.0\.downsample\."), from_microsoft_swin, pixels=IMAGENET),
    Adapter("MAE-ST", _named("^pos_embed_spatial$"), from_mae_st, pixels=SLOWFAST),
    Adapter("SegViT", _named(r"^layers\.0\.ln1\."), from_segvit),
    Adapter("timm EfficientNet", _named(r"^conv_stem\."), from_efficientnet),
    Adapter("timm ViT", lambda s: "pos_embed" in s and s["pos_embed"].ndim == 3, from_timm),
    Adapter("this toolbox", lambda state: True, dict),
]
