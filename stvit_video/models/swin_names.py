"""Swin checkpoints of others in this project's names: state dict -> state dict, nothing else.

An image model is a video model of one frame: its patch embedding gains a time axis of 1. Buffers that are
recomputed from sizes (`is_recomputed`) are left out; every other tensor is kept.
"""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .windows import inflate_bias_table

State = dict[str, Tensor]


def is_recomputed(key: str) -> bool:
    """Index and mask buffers, which follow from the sizes."""
    return key.endswith(("relative_position_index", "attn_mask"))


def is_torchvision(keys: Iterable[str]) -> bool:
    return any(re.match(r"features\.0\.\d+\.attn\.relative_position_bias_table", key) for key in keys)


def from_torchvision(state: State) -> State:
    """`torchvision.models.video.swin3d_t/s/b` (and its image `swin_t/s/b`, version 1)."""

    def rename(key: str) -> str:
        features = re.match(r"features\.(\d+)\.(.*)", key)
        if features:
            index, rest = int(features[1]), features[2]
            place = "downsample" if index % 2 else "blocks"
            key = f"layers.{(index + 1) // 2}.{place}.{rest}"
        return key.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")

    return _with_time(_renamed(state, rename))


def is_timm(keys: Iterable[str]) -> bool:
    """timm puts the merging at the start of a stage, so that the first has none."""
    keys = set(keys)
    return "layers.3.downsample.reduction.weight" in keys and "layers.0.downsample.norm.weight" not in keys


def from_timm(state: State) -> State:
    """timm's image `swin_*`."""
    return _with_time(_renamed(state, lambda key: key.replace("head.fc.", "head.")))


def is_microsoft(keys: Iterable[str]) -> bool:
    """Microsoft's Swin and Video Swin put the merging at the end of a stage; so does STViT-R."""
    return any(re.fullmatch(r"(backbone\.)?layers\.0\.downsample\.norm\.weight", key) for key in keys)


def from_microsoft(state: State) -> State:
    """Microsoft's image Swin, and Video Swin (`backbone.*`, `cls_head.fc_cls.*`)."""

    def rename(key: str) -> str:
        key = key.removeprefix("backbone.").replace("cls_head.fc_cls.", "head.")
        return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)

    return _with_time(_renamed(state, rename))


def is_stvit_r(keys: Iterable[str]) -> bool:
    return any(re.match(r"layers\.2\.blocks\.1\.attn\.kv\.", key) for key in keys)


def from_stvit_r(state: State) -> State:
    """The authors' STViT-R-Swin: separate query and key-value weights, stem by position."""
    stem = {"0.c": "conv1", "0.bn": "norm1", "2.c": "conv2", "2.bn": "norm2"}
    state = from_microsoft(state)
    for key in [key for key in state if ".attn.q." in key]:
        kv = state.pop(key.replace(".q.", ".kv."))
        state[key.replace(".q.", ".qkv.")] = torch.cat([state.pop(key), kv])

    def rename(key: str) -> str:
        key = re.sub(r"^patch_embed\.proj\.(\d\.\w+)", lambda m: f"patch_embed.{stem[m[1]]}", key)
        return re.sub(r"layer_scale_(\d)$", r"ls\1.gamma", key)

    return _with_time(_renamed(state, rename))


def inflate(state: State, window: tuple[int, int, int], frames: int) -> State:
    """An image model's weights for video, so that a still clip gives what its image gives to the patches.

    The patch embedding is repeated over the `frames` of a tubelet and divided by them; relative bias tables
    are repeated over the distances in time of a `window` (t, h, w).
    """
    return {
        key: inflate_bias_table(value, window[0])
        if key.endswith("relative_position_bias_table")
        else value.repeat(1, 1, frames, 1, 1) / frames
        if key in ("patch_embed.proj.weight", "patch_embed.conv1.weight")
        else value
        for key, value in state.items()
    }


def _renamed(state: State, rename: Callable[[str], str]) -> State:
    return {rename(key): value for key, value in state.items() if not is_recomputed(key)}


def _with_time(state: State) -> State:
    """Two-dimensional convolutions (C, 3, h, w) -> (C, 3, 1, h, w)."""
    return {key: value.unsqueeze(2) if value.ndim == 4 else value for key, value in state.items()}
