"""Models by name: a constructor, its sizes, and the names of the sizes a caller may change."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..bounds import Range, check
from ..errors import nearest
from . import baselines
from .action_head import ActionDetector
from .detection import FasterRCNN, MaskRCNN
from .embed import clip_size
from .policy import PolicyTrainer
from .reducers import REDUCERS
from .segmentation import ATMSegmenter, LinearSegmenter, UPerNetSegmenter
from .semantic import SemanticWindows
from .sizes import Sizes
from .superpatches import Superpatches
from .swin import VideoSwin
from .swin_detection import DetectionSwin
from .vit import VideoViT, count_chunks


class ModelEntry(NamedTuple):
    """How a name is built: what builds it, the sizes it takes with their defaults, frames of a clip."""

    build: Callable[..., nn.Module]
    sizes: dict[str, Any]
    num_frames: int = 16


def _sizes(*builds: Callable) -> dict[str, Any]:
    """The sizes that these take, which are their keyword arguments, with their defaults."""
    parameters = [p for build in builds for p in inspect.signature(build).parameters.values()]
    others = {"num_classes", "num_frames", "image_size", "reducers", "superpatches", "recovery"}
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in others}


def plain_vit(*, superpatches: str | None = None, **sizes) -> VideoViT:
    """A `VideoViT`; superpatches: what decides about them, "contrast" or "dcts"; None: there are none."""
    known = {k: sizes.pop(k) for k in _sizes(Superpatches) if k in sizes}
    make = superpatches and partial(Superpatches, superpatches=superpatches, **known)
    return VideoViT(superpatches=make, **sizes)


def reduced_vit(*, reducer: str = "semantic", base_depth: int, depth: int, **sizes) -> VideoViT:
    """A `VideoViT` with one kind of reducer, after `base_depth` layers; ToMe's schedule in every layer.

    sizes: the ViT's and all reducers'; those of other reducers are passed over.
    """
    if reducer not in REDUCERS:
        raise ValueError(f"reducer={reducer!r} is none of {list(REDUCERS)}")
    reducer_sizes = {k: sizes.pop(k) for k in _sizes(*REDUCERS.values()) if k in sizes}
    schedule, once = reducer_sizes.get("tome_r"), reducer_sizes["semantic_tokens"] is not None
    if schedule is not None and reducer != "tome":
        raise ValueError(f"tome_r={schedule}: is token merging's (reducer=tome), not that of {reducer!r}")
    if sizes.get("base_window") and once:  # a chunk's share of the tokens
        t, *rest = reducer_sizes["semantic_tokens"]
        chunks = count_chunks(sizes["num_frames"], sizes["patch_size"], sizes["base_window"])
        if t % chunks:
            raise ValueError(
                f"semantic_tokens={(t, *rest)}: {t} in time do not divide by {chunks} chunks (base_window)"
            )
        reducer_sizes["semantic_tokens"] = (t // chunks, *rest)
    known = _sizes(REDUCERS[reducer])
    make = partial(REDUCERS[reducer], **{k: v for k, v in reducer_sizes.items() if k in known})
    places = range(depth) if schedule is not None else [base_depth] if once else []
    return plain_vit(depth=depth, reducers=dict.fromkeys(places, make), **sizes)


def _vit_family() -> dict[str, ModelEntry]:
    models = {}
    for size, embed_dim, depth, num_heads, base_depth in (
        ("tiny", 192, 12, 3, 4),
        ("small", 384, 12, 6, 4),
        ("base", 768, 12, 12, 4),
        ("large", 1024, 24, 16, 8),
    ):
        dense = {"patch_size": (2, 16, 16), "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        if size in ("tiny", "small"):  # for them CTS's policy network would be large
            dense["superpatch_policy"] = "lcnet_050"
        dense = _sizes(VideoViT) | {"superpatches": None} | _sizes(Superpatches) | dense
        reduced = {"semantic_tokens": (8, 4, 4), "base_depth": base_depth}
        every = dense | _sizes(*REDUCERS.values()) | {"reducer": "semantic"} | reduced
        models[f"vit_{size}_patch16_224"] = ModelEntry(plain_vit, dense)
        models[f"stvit_{size}_patch16_224"] = ModelEntry(reduced_vit, every)
        for name in [name for name in REDUCERS if name != "semantic"]:
            sizes = dense | _sizes(REDUCERS[name]) | reduced
            models[f"{name}_vit_{size}_patch16_224"] = ModelEntry(partial(reduced_vit, reducer=name), sizes)
    return models


def _swin_family() -> dict[str, ModelEntry]:
    models, every = {}, _sizes(VideoSwin)
    semantic = {"semantic_tokens", "base_depth", "layer_scale", *_sizes(SemanticWindows)}
    dense = {k: v for k, v in every.items() if k not in semantic}
    units = {k: v for k, v in every.items() if k not in ("base_depth", "semantic_layers")}
    detection = {k: v for k, v in units.items() if k != "centres"}
    for size, embed_dim, depth, num_heads, base_depth in (
        ("tiny", 96, 6, [3, 6, 12, 24], 3),
        ("small", 96, 18, [3, 6, 12, 24], 11),
        ("base", 128, 18, [4, 8, 16, 32], 11),
    ):
        layers = {"embed_dim": embed_dim, "depths": [2, 2, depth, 2], "num_heads": num_heads}
        for name, suffix, patch, window, tokens, frames in (
            (f"swin_{size}", "_patch4_window7_224", (1, 4, 4), (1, 7, 7), (1, 3, 3), 1),
            (f"video_swin_{size}", "", (2, 4, 4), (8, 7, 7), (8, 3, 3), 32),
        ):
            sizes = layers | {"patch_size": patch, "window_size": window}
            models[name + suffix] = ModelEntry(VideoSwin, dense | sizes, frames)
            sizes["semantic_tokens"] = tokens
            depths = every | sizes | {"base_depth": base_depth}
            models[f"stvit_{name}"] = ModelEntry(VideoSwin, depths, frames)
            if size != "tiny":
                build = partial(VideoSwin, recovery=True)
                sizes["layer_scale"] = 1e-5
                models[f"stvit_r_{name}"] = ModelEntry(build, units | sizes, frames)
                if frames == 1:
                    models[f"stvit_r_det_{name}"] = ModelEntry(DetectionSwin, detection | sizes, frames)
    return models


# What makes a model of (backbone, num_classes), most a `WithHead`; keyword arguments are its sizes.
HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearSegmenter,
    "upernet": UPerNetSegmenter,
    "atm": ATMSegmenter,
    "policy": PolicyTrainer,
    "mask_rcnn": MaskRCNN,
    "faster_rcnn": FasterRCNN,
    "actions": ActionDetector,
}
BASELINES = (baselines.ptv_mvit_base_16x4, baselines.ptv_slowfast_r50, baselines.ptv_x3d_m)
MODELS: dict[str, ModelEntry] = (
    _vit_family()
    | _swin_family()
    | {build.__name__: ModelEntry(build, _sizes(build)) for build in BASELINES}
)


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def sizes_of(name: str, num_frames: int) -> dict[str, Any]:
    """The sizes that a name stands for, for clips of so many frames."""
    sizes = MODELS[name].sizes
    if num_frames != 1:
        return sizes
    return {k: (1, *v[1:]) if isinstance(v, tuple) else v for k, v in sizes.items()}


def changed_sizes(model: nn.Module) -> dict[str, Any]:
    """Of a model that `create_model` made, the sizes that are not those of its name."""
    built = model.built
    names = sizes_of(built["name"], built["num_frames"])
    return {k: built[k] for k, value in names.items() if built[k] != _plain(value)}


def create_model(
    name: str,
    *,
    num_classes: Annotated[int, Range(0)],
    num_frames: Annotated[int, Range(1)] | None = None,
    image_size: Annotated[int | tuple[int, int], Range(1)] = 224,
    head: str | None = None,
    **sizes,
) -> nn.Module:
    """A model with random weights that takes (B, 3, T, H, W) and gives logits (B, num_classes).

    num_classes: 0: a backbone, which gives pooled features (B, C).
    num_frames: None: 16 for a ViT, 32 for a Video Swin, 1 for an image Swin. 1 is image mode: (B, 3, H, W)
        is taken too, and default tubelets, windows and semantic tokens span one frame, as in patch_size
        (1, 16, 16) and semantic_tokens (1, 4, 4).
    head: a name in `HEADS`: what stands on the model's grids in place of its classifier. The model is a
        `WithHead` then, whose head says what comes out.
    sizes: what else to change: the fields of `Sizes` that the name or the head takes (`embed_dim`, `depth`,
        `semantic_tokens`, ...); "auto": what the name says. `semantic_tokens=None` makes an STViT its
        dense backbone.
    `model.built` holds all that the model was built with, in plain values: `create_model(**model.built)`
    makes the same model.
    Raises ValueError for an unknown model or sizes that do not fit each other; TypeError for an unknown
        size; both with the nearest known one.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, MODELS)}")
    if head is not None and head not in HEADS:
        raise ValueError(f"unknown head {head!r}{nearest(head, HEADS)}")
    build, _, frames = MODELS[name]
    num_frames = frames if num_frames is None else num_frames
    defaults = sizes_of(name, num_frames)
    of_head = _sizes(HEADS[head]) if head else {}
    for size in sizes:
        if size not in defaults | of_head:
            twins = [t for t in (f"st{name}", f"stvit_{name}") if t in MODELS and size in MODELS[t].sizes]
            hint = f" ({twins[0]} does)" if twins else nearest(size, defaults | of_head)
            raise TypeError(f"{name} takes no size {size!r}{hint}")
    sizes = {name: value for name, value in sizes.items() if value != "auto"}
    for size in ("exit_head", "exit_threshold"):  # no mistake beside `exits=()`, as `built` has them
        if size in sizes and "exits" not in sizes:
            raise ValueError(f"{size}={sizes[size]}: without exits no token leaves")
    clip = {"num_classes": num_classes, "num_frames": num_frames, "image_size": image_size}
    check(create_model, clip)
    check(Sizes, sizes)
    values = defaults | {key: value for key, value in sizes.items() if key in defaults}
    model = build(**clip | ({"num_classes": 0} if head else {}), **values)
    if head:
        of_head = of_head | {key: value for key, value in sizes.items() if key in of_head}
        model = HEADS[head](model, num_classes, **of_head)
        values = values | of_head | {"head": head}
    model.built = {"name": name} | {k: _plain(v) for k, v in (clip | values).items()}
    return model


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def multiply_adds(model: nn.Module, *, num_frames: int, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds of one view in evaluation mode: half of what torch's flop counter counts.

    image_size: in pixels, one number or (height, width).
    Runs on the meta device: shapes only, in no time and memory.
    """
    model = copy.deepcopy(model).to("meta").eval()
    clip = torch.empty(1, 3, *clip_size(num_frames, image_size), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    return counter.get_total_flops() // 2
