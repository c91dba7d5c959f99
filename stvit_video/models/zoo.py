"""Models by name: a constructor, its sizes, and the names of the sizes a caller may change."""

import copy
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import nearest
from . import baselines
from .swin import VideoSwin
from .vit import VideoViT


class Entry(NamedTuple):
    """How a name is built: constructor, arguments, which of them a caller may change, frames of a clip."""

    build: Callable[..., nn.Module]
    defaults: dict
    sizes: frozenset[str]
    num_frames: int = 16


_COMMON = {"num_classes", "num_frames", "image_size"}
_SEMANTIC = {"semantic_tokens", "base_depth", "semantic_layers", "pool", "centres"}
_REDUCER = {"reducer", "proportional"}
# what a control takes no part in, of the sizes of an STViT
_FOREIGN = {
    "pool": {"semantic_layers", "centres", "proportional"},
    "random": {"semantic_layers", "centres", "proportional", "pool"},
    "tome": {"semantic_layers", "centres", "pool"},
}


def _sizes(build: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(build).parameters) - _COMMON


def _vit_family() -> dict[str, Entry]:
    models = {}
    for size, embed_dim, depth, num_heads, base_depth in (
        ("tiny", 192, 12, 3, 4),
        ("small", 384, 12, 6, 4),
        ("base", 768, 12, 12, 4),
        ("large", 1024, 24, 16, 8),
    ):
        dense = {
            "patch_size": (2, 16, 16),
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
        }
        semantic = {"semantic_tokens": (8, 4, 4), "base_depth": base_depth}
        sizes = _sizes(VideoViT)
        models[f"vit_{size}_patch16_224"] = Entry(VideoViT, dense, sizes - _SEMANTIC - _REDUCER)
        models[f"stvit_{size}_patch16_224"] = Entry(VideoViT, dense | semantic, sizes)
        for reducer, foreign in _FOREIGN.items():
            control = dense | semantic | {"reducer": reducer}
            known = sizes - foreign - {"reducer"}
            models[f"{reducer}_vit_{size}_patch16_224"] = Entry(VideoViT, control, known)
    return models


def _swin_family() -> dict[str, Entry]:
    models = {}
    known = _sizes(VideoSwin) - {"recovery"}
    dense_only = known - _SEMANTIC - {"layer_scale"}
    recovering = known - {"base_depth", "semantic_layers"}
    for size, embed_dim, depth, num_heads, base_depth in (
        ("tiny", 96, 6, [3, 6, 12, 24], 3),
        ("small", 96, 18, [3, 6, 12, 24], 11),
        ("base", 128, 18, [4, 8, 16, 32], 11),
    ):
        dense = {"embed_dim": embed_dim, "depths": [2, 2, depth, 2], "num_heads": num_heads}
        image = dense | {"patch_size": (1, 4, 4), "window_size": (1, 7, 7)}
        video = dense | {"patch_size": (2, 4, 4), "window_size": (8, 7, 7)}
        for name, pretrained_name, sizes, tokens, frames in (
            (f"swin_{size}", f"swin_{size}_patch4_window7_224", image, (1, 3, 3), 1),
            (f"video_swin_{size}", f"video_swin_{size}", video, (8, 3, 3), 32),
        ):
            semantic = sizes | {"semantic_tokens": tokens}
            depths = semantic | {"base_depth": base_depth}
            models[pretrained_name] = Entry(VideoSwin, sizes, dense_only, frames)
            models[f"stvit_{name}"] = Entry(VideoSwin, depths, known, frames)
            if size != "tiny":
                units = semantic | {"recovery": True, "layer_scale": 1e-5}
                models[f"stvit_r_{name}"] = Entry(VideoSwin, units, recovering, frames)
    return models


MODELS: dict[str, Entry] = (
    _vit_family()
    | _swin_family()
    | {
        build.__name__: Entry(build, {}, _sizes(build))
        for build in (
            baselines.ptv_mvit_base_16x4,
            baselines.ptv_slowfast_r50,
            baselines.ptv_x3d_m,
        )
    }
)


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def create_model(
    name: str,
    *,
    num_classes: int,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] = 224,
    **sizes,
) -> nn.Module:
    """A model with random weights that takes (B, 3, T, H, W) and gives logits (B, num_classes).

    num_frames: None: 16 for a ViT, 32 for a Video Swin, 1 for an image Swin. 1 is image mode: (B, 3, H, W)
        is taken too, and default tubelets, windows and semantic tokens span one frame, as in patch_size
        (1, 16, 16) and semantic_tokens (1, 4, 4).
    sizes: what else to change, by the names of `VideoViT`'s or `VideoSwin`'s arguments (`embed_dim`,
        `depth`, `semantic_tokens`, ...). `semantic_tokens=None` makes an STViT its dense backbone.
    Raises ValueError for an unknown model or sizes that do not fit each other; TypeError for an unknown
        size; both with the nearest known one.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, MODELS)}")
    build, defaults, known, frames = MODELS[name]
    num_frames = frames if num_frames is None else num_frames
    _check_counts(num_classes=num_classes, num_frames=num_frames, image_size=image_size, **sizes)
    for size in sizes:
        if size not in known:
            raise TypeError(f"{name} takes no size {size!r}{nearest(size, known)}")
    if num_frames == 1:
        defaults = {k: (1, *v[1:]) if isinstance(v, tuple) else v for k, v in defaults.items()}
    return build(
        num_classes=num_classes,
        num_frames=num_frames,
        image_size=image_size,
        **defaults | sizes,
    )


_COUNTS = {  # sizes that are whole numbers from 1 up, or lists of them; base_depth from 0 up
    *("num_classes", "num_frames", "image_size", "embed_dim", "depth", "depths", "num_heads", "patch_size"),
    *("window_size", "semantic_tokens", "semantic_layers", "base_depth"),
}


def _check_counts(**sizes) -> None:
    for name, value in sizes.items():
        if name not in _COUNTS or value is None:
            continue
        least = 0 if name == "base_depth" else 1
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{name}={value!r}: must be whole numbers from {least} up")


def multiply_adds(model: nn.Module, *, num_frames: int, image_size: int) -> int:
    """Multiply-adds of one view in evaluation mode: half of what torch's flop counter counts.

    Runs on the meta device: shapes only, in no time and memory.
    """
    model = copy.deepcopy(model).to("meta").eval()
    clip = torch.empty(1, 3, num_frames, image_size, image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    return counter.get_total_flops() // 2
