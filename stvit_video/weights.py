"""Weights from checkpoints of this project and of others: right, or an error.

A file becomes a state dict, its origin's adapter gives the tensors our names, and each must then fit the
model: as it is, inflated over time, or resized with the grid or the patches. Whatever is left over or left
out stops the load, except what the caller expects to be fresh.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from .adapters import ADAPTERS, CLASS_TOKEN, DETECTOR, DROPS, RECOMPUTED, Adapter, State, square
from .files import FileError, read_torch
from .hub import WeightsError, first_line, from_hub, from_timm, pixels_by_name, published_pixels
from .models.embed import Size3, resize_grid, sincos_table
from .models.heads import WithHead
from .models.sizes import Inflate
from .models.superpatches import Superpatches
from .models.windows import table_rows
from .models.zoo import MODELS, create_model
from .pixels import Pixels


@dataclass
class LoadReport:
    """What became of every tensor, by name (the model's; the file's in `dropped` and `unexpected`).

    loaded: as they are; inflated: from image to video; resized: positions and G with the grid, patches;
    fresh: left as initialised, as the caller allowed; dropped: what this architecture has no place for
    (class token, decoder); missing, unexpected, mismatched: what makes a load an error.
    pixels: the mean, std and interpolation that the weights were trained with; None: nothing says.
    """

    source: str
    origin: str
    loaded: dict[str, str] = field(default_factory=dict)
    inflated: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pixels: Pixels | None = None

    def failures(self) -> list[str]:
        """A line for each tensor that makes this load an error."""
        return self._lines("missing", "unexpected", "mismatched")

    def __str__(self) -> str:
        title = f"weights: {self.source} ({self.origin}), {len(self.loaded)} tensors as they are"
        lines = self._lines("inflated", "resized", "fresh", "dropped")
        if len(lines) > 12:
            lines = [*lines[:11], f"... and {len(lines) - 11} more"]
        notes = [f"note        {note}" for note in self.notes]
        return "\n  ".join([title, *lines, *notes, *self.failures()])

    def write(self, path: str | Path) -> None:
        """Everything, as JSON."""
        values = asdict(self) | {"pixels": self.pixels and self.pixels._asdict()}
        Path(path).write_text(json.dumps(values, indent=2) + "\n")

    def _lines(self, *kinds: str) -> list[str]:
        return [f"{kind:<11} {name} {what}" for kind in kinds for name, what in getattr(self, kind).items()]


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    inflate: Inflate = "average",
    fresh: Sequence[str] = ("head", "centres", "chunk_embed", "vectors"),
    class_names: Sequence[str] | None = None,
) -> LoadReport:
    """Load a checkpoint of any known origin into `model`; nothing is changed unless all of it is right.

    A model with a head (`WithHead`) takes a backbone's checkpoint, too: its head is fresh then. So does any
    model a checkpoint of this toolbox with another head, which is dropped.

    source: a file (.pth, .pt, .bin, .safetensors), its contents, a state dict, "timm:NAME", or
        "hf:OWNER/NAME" of the Hugging Face Hub ("hf:OWNER/NAME/FILE": one of several files there).
    inflate: of a two-dimensional patch embedding, over the frames of a tubelet: "average" (repeated and
        divided) or "centre" (the middle frame, others zero). A still clip gets the image's tokens by both.
    fresh: name prefixes, at any module boundary, that may be missing or misshapen; what fits is loaded.
    class_names: the classes of the model's head. Where the checkpoint names its own, the head's rows are
        taken by name; a head that has not all of these classes does not fit.
    Raises WeightsError with the whole list of what is missing, unexpected or misshapen.
    """
    if inflate not in ("average", "centre"):
        raise ValueError(f"inflate={inflate!r} is none of ['average', 'centre']")
    contents = _parse(*_read(source))
    contents.pixels = published_pixels(source) or contents.pixels
    if contents.pixels is None and contents.adapter.origin.startswith("timm"):
        contents.pixels = pixels_by_name(contents.name)
        if contents.pixels:
            contents.notes.append("its file has a name of timm's: mean, std and interpolation are taken so")
    dropped = _drop_other_head(contents, model)
    of_backbone = not any(name.startswith("backbone.") for name in contents.state)
    if isinstance(model, WithHead) and of_backbone:
        head = _segvits_heads(model, contents)
        absent = [name for name in model.head.state_dict() if name not in head]
        if absent and not _within("head", fresh):
            raise WeightsError(
                f"{contents.name}: a backbone, without what {type(model).__name__} has for a head "
                f"(head.{absent[0]})"
            )
        unused = ("fc_norm",) if head else ()
        report = _fit_into(model.backbone, contents, inflate, (*fresh, *unused), None)
        model.head.load_state_dict(head, strict=False)  # its other tensors stay fresh, as was checked
        report.loaded |= {f"head.{name}": _shape(tensor) for name, tensor in head.items()}
    else:
        report = _fit_into(model, contents, inflate, fresh, class_names)
    report.dropped |= dropped
    return report


def _drop_other_head(contents: "_Contents", model: nn.Module) -> dict[str, str]:
    """Leave the backbone alone of a checkpoint of this toolbox whose head is another than the model's;
    -> what is dropped."""
    theirs, ours = contents.built.get("head"), getattr(model, "built", contents.built).get("head")
    backbone = {k: t for k, t in contents.state.items() if k.startswith("backbone.")}
    if theirs == ours or not backbone:
        return {}
    dropped = {k: _shape(t) for k, t in contents.state.items() if k not in backbone}
    contents.state = {k.removeprefix("backbone."): t for k, t in backbone.items()}
    contents.heads = {k.removeprefix("backbone."): n for k, n in contents.heads.items()}
    contents.class_names, contents.by_class = None, frozenset()
    return dropped


def _segvits_heads(model: WithHead, contents: "_Contents") -> State:
    """Of SegViT or Dynamic Token Pruning, what fits the model's head and its exits, by our names."""
    targets, layers = model.head.state_dict(), getattr(getattr(model.head, "exits", None), "layers", [])
    ours = {f"auxiliary_head.{i}.": f"exits.heads.{layer}." for i, layer in enumerate(layers)}
    ours["decode_head."] = "" if "q.weight" in targets else f"exits.heads.{max(layers, default=0)}."
    state = contents.adapter.convert(contents.state) if contents.adapter.origin == "SegViT" else {}
    heads = {
        name.replace(theirs, place, 1): tensor
        for name, tensor in state.items()
        for theirs, place in ours.items()
        if name.startswith(theirs)
    }
    return {k: t for k, t in heads.items() if k in targets and targets[k].shape == t.shape}


def _fit_into(
    model: nn.Module,
    contents: "_Contents",
    inflate: Inflate,
    fresh: Sequence[str],
    class_names: Sequence[str] | None,
) -> LoadReport:
    report = LoadReport(contents.name, contents.adapter.origin, pixels=contents.pixels)
    report.notes = contents.notes
    state, targets = contents.adapter.convert(contents.state), model.state_dict()
    if CLASS_TOKEN[0] not in targets and state.keys() >= set(CLASS_TOKEN):
        state = {name: tensor for name, tensor in state.items() if name not in CLASS_TOKEN}
    report.dropped = _dropped(contents.state, state)
    state = _with_our_shapes(state, contents.shapes, _shapes(model), report)
    _fold_layer_scale(state, targets, report)
    other_classes = _choose_classes(state, contents, class_names, report)
    of_images = _of_images(state, contents.adapter.convert is dict)
    windows = _windows(model)
    parts = ("head.", "norm.", "decode_head.", "auxiliary_head.")
    lacking = tuple(part for part in parts if not any(t.startswith(part) for t in targets))
    report.mismatched = {
        f"{name}.num_heads": f"{contents.heads[name]} -> {count}"
        for name, count in _heads(model).items()
        if contents.heads.get(name, count) != count
    }
    fitted = {}
    for name, tensor in state.items():
        if name not in targets:
            idle = _is_idle_bias(name, targets) or name.startswith(lacking)
            kind = "dropped" if idle else "unexpected"
            getattr(report, kind)[name] = _shape(tensor)
            continue
        change = f"{_shape(tensor)} -> {_shape(targets[name])}"
        try:
            if name in other_classes:
                raise _Misfit("its classes are not the model's")
            window = windows.get(name)
            kind, fitted[name] = _fit(name, tensor, targets[name], window, of_images, inflate)
        except _Misfit as reason:
            kind, change = "fresh" if _within(name, fresh) else "mismatched", f"{change}: {reason}"
        getattr(report, kind)[name] = change
    for name in (name for name in targets if name not in state):
        if name.endswith("num_batches_tracked"):
            continue  # BatchNorm's counter, which it does not use
        if name == "pos_embed" and contents.adapter.fixed_positions:
            fitted[name] = sincos_table(targets[name].shape[1:4], targets[name].shape[-1])
            report.fresh[name] = f"{_shape(targets[name])}: starts from the fixed sine-cosine table"
        else:
            kind = "fresh" if _within(name, fresh) else "missing"
            getattr(report, kind)[name] = _shape(targets[name])
    if failures := report.failures():
        what = f"{report.source} ({report.origin}) does not fit this {type(model).__name__}"
        raise WeightsError("\n  ".join([f"{what}, {len(failures)} tensors:", *failures, *_advice(report)]))
    model.load_state_dict(targets | fitted)
    return report


# ---- which model


def model_of(source: str | Path | Mapping[str, Any], *, num_frames: int) -> dict[str, Any]:
    """Which model a checkpoint is for: a name and sizes, as `create_model` takes them.

    A checkpoint of this toolbox: what it was built with. A dense ViT or Swin of another project: the STViT
    with its layers, known by their width and number; a ViT's semantic tokens start as means of patches that
    are alike, which keeps most of what its layers know (docs/evidence.md).
    num_frames: of the clips to come; tubelets of an image model become as long as the name says.
    Raises WeightsError for what cannot be read, and for layers that no name of `MODELS` has.
    """
    contents = _parse(*_read(source))
    if contents.built:
        return _built_for(contents.built, num_frames)
    state = contents.adapter.convert(contents.state)
    kernel = state.get("patch_embed.proj.weight", torch.empty(0))
    places = (re.match(r"(blocks|layers\.2\.blocks)\.(\d+)\.norm1\.", name) for name in state)
    depth, layers = max(((int(place[2]) + 1, place[1]) for place in places if place), default=(0, ""))
    is_vit = layers == "blocks"
    prefix = "stvit_" if is_vit else "stvit_swin_" if num_frames == 1 else "stvit_video_swin_"
    for name, entry in MODELS.items():
        depths = entry.sizes.get("depths", [None] * 4)
        fits = entry.sizes.get("depth" if is_vit else "depths") in (depth, [*depths[:2], depth, depths[3]])
        if name.startswith(prefix) and fits and entry.sizes["embed_dim"] == len(kernel):
            break
    else:
        raise WeightsError(
            f"{contents.name}: its layers, {depth} of them, {len(kernel)} wide, are those of no model in "
            "list_models(): model.name=auto cannot tell which it is; give model.name and its sizes"
        )
    if not is_vit:
        return {"name": name}
    if "blocks.0.mlp.fc1.weight" not in state:
        raise WeightsError(
            f"{contents.name}: its layers have no mlp.fc1, as those of every model in list_models() have "
            "(EVA-02 has fc1_g and fc1_x)"
        )
    tubelet = kernel.shape[2] if kernel.ndim == 5 and kernel.shape[2] > 1 else entry.sizes["patch_size"][0]
    return {
        "name": name,
        "patch_size": (1 if num_frames == 1 else tubelet, *kernel.shape[-2:]),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / len(kernel),
        "pos_embed": "sincos" if contents.adapter.fixed_positions else "learned",
        "class_token": state.keys() >= set(CLASS_TOKEN) and "fc_norm.weight" not in contents.state,
        "pool": "merge",
        "semantic_proportional": True,
    }


def classes_of(source: str | Path | Mapping[str, Any]) -> int:
    """How many classes a checkpoint's head names; 0: it has none. Raises WeightsError."""
    contents = _parse(*_read(source))
    head = contents.adapter.convert(contents.state).get("head.weight")
    return 0 if head is None else len(head)


def _built_for(built: Mapping[str, Any], num_frames: int) -> dict[str, Any]:
    """What a model of this toolbox was built with; where clips take the place of images, sizes in time
    are its name's."""
    sizes = {k: v for k, v in built.items() if k not in ("num_classes", "num_frames", "image_size")}
    if built["num_frames"] > 1 or num_frames == 1:
        return sizes
    defaults = MODELS[built["name"]].sizes
    spans = {k: defaults[k][0] for k, v in sizes.items() if isinstance(defaults.get(k), tuple) and v}
    return sizes | {key: [span, *sizes[key][1:]] for key, span in spans.items()}


# ---- reading: a file, or what it held


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """-> contents, and how messages call them."""
    if isinstance(source, Mapping):
        return source, "state dict"
    if str(source).startswith("timm:"):
        return from_timm(str(source).removeprefix("timm:")), str(source)
    path = from_hub(str(source).removeprefix("hf:")) if str(source).startswith("hf:") else Path(source)
    try:
        values = load_file(path) if path.suffix == ".safetensors" else read_torch(path)
    except FileError as error:
        raise WeightsError(str(error)) from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or not a safetensors file ({first_line(error)})") from None
    if not isinstance(values, Mapping):
        raise WeightsError(f"{path}: holds a {type(values).__name__}, not a state dict")
    return values, str(source)


# ---- parsing: nesting, prefixes, origin

NESTINGS = ("model", "module", "state_dict", "model_state", "model_state_dict", "model_ema")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.")


@dataclass
class _Contents:
    """A state dict without prefixes, and what its file says of it.

    class_names, by_class, heads, built: of a checkpoint of this toolbox, its classes, the tensors with a
        row for each, the attention heads of its layers, which no shape shows, what it was built with.
    shapes: of its superpatches.
    pixels, notes: as in `LoadReport`.
    """

    name: str
    state: State
    adapter: Adapter
    class_names: Sequence[str] | None = None
    by_class: frozenset[str] = frozenset()
    heads: dict[str, int] = field(default_factory=dict)
    built: dict[str, Any] = field(default_factory=dict)
    shapes: Sequence[Size3] = ()
    pixels: Pixels | None = None
    notes: list[str] = field(default_factory=list)


def _parse(values: Mapping[str, Any], name: str) -> _Contents:
    if str(values.get("format", "")).startswith("stvit_video"):
        return _read_toolbox(values, name)
    for _ in range(len(NESTINGS)):  # deep enough, and an end for what holds itself
        nesting = next((key for key in NESTINGS if isinstance(values.get(key), Mapping)), None)
        if nesting is not None:
            values, name = values[nesting], f"{name}[{nesting}]"
    state = _checked(values, name)
    while prefix := next((p for p in PREFIXES if any(key.startswith(p) for key in state)), None):
        stripped = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        if len(stripped) < len(state):
            raise WeightsError(f"{name}: holds tensors of one name with and without {prefix!r}")
        state = stripped
    adapter = next(adapter for adapter in ADAPTERS if adapter.matches(state))
    return _Contents(name, state, adapter, pixels=adapter.pixels)


def _read_toolbox(values: Mapping[str, Any], name: str) -> _Contents:
    """A checkpoint of this toolbox: it must be what it says it was built with, tensor by tensor."""
    key = "model" if values.get("ema") is None else "ema"
    name = f"{name}[{key}]"
    state = _checked(values.get(key), name)
    with torch.device("meta"):
        donor, wider = (rebuild(values, name, more_classes=more) for more in (0, 1))
    has, expected, wider = (
        {k: _shape(tensor) for k, tensor in tensors.items()}
        for tensors in (state, donor.state_dict(), wider.state_dict())
    )
    flaws = [f"missing {k}" for k in expected if k not in has]
    flaws += [f"unexpected {k}" for k in has if k not in expected]
    flaws += [f"{k} {has[k]} instead of {x}" for k, x in expected.items() if has.get(k, x) != x]
    if flaws:
        raise WeightsError(f"{name}: not what its settings make: {', '.join(flaws)}")
    by_class = frozenset(k for k in expected if expected[k] != wider[k])
    classes, built = list(values["class_names"]), donor.built
    adapter = ADAPTERS[-1]._replace(fixed_positions=built.get("pos_embed") == "sincos")
    names = None if _only_numbers(classes) or len(classes) != built["num_classes"] else classes
    pixels = pixels_of_toolbox(values)
    return _Contents(name, state, adapter, names, by_class, _heads(donor), built, _shapes(donor), pixels)


def pixels_of_toolbox(values: Mapping[str, Any]) -> Pixels | None:
    """Those of a checkpoint of this toolbox, by its settings."""
    try:
        data = values["config"]["data"]
        numbers = [tuple(map(float, data[key])) for key in ("mean", "std")]
        return Pixels(*numbers, data.get("interpolation", "bilinear"))
    except (LookupError, TypeError, ValueError):  # older than these settings, or never settled
        return None


def rebuild(values: Mapping[str, Any], name: str, *, more_classes: int = 0) -> nn.Module:
    """The model that a checkpoint of this toolbox holds, with random weights.

    name: of the checkpoint, for errors. more_classes: beyond those that it has.
    Raises WeightsError where the checkpoint does not say what its model was built with.
    """
    try:
        built: dict[str, Any] = {"num_classes": len(values["class_names"])}
        if "built" in values:
            built |= values["built"]
        else:  # older ones: what their settings say
            model, data = values["config"]["model"], values["config"]["data"]
            built |= {key: data[key] for key in ("num_frames", "image_size")} | {"name": model["name"]}
            built |= {k: v for k, v in model.items() if k in MODELS[model["name"]].sizes and v != "auto"}
        return create_model(**built | {"num_classes": built["num_classes"] + more_classes})
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise WeightsError(f"{name}: not a complete checkpoint of this toolbox ({error!r})") from None


def _checked(values: Mapping[str, Any], name: str) -> State:
    """A state dict: names to dense, finite tensors, and nothing else. Raises WeightsError."""
    if not isinstance(values, Mapping):
        raise WeightsError(f"{name}: is a {type(values).__name__}: not a state dict")
    if not values:
        raise WeightsError(f"{name}: no tensors in it")
    for key, value in values.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            raise WeightsError(f"{name}: {key!r} is a {type(value).__name__}: not a state dict")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            raise WeightsError(f"{name}: {key} is no ordinary tensor")
        if not value.isfinite().all():
            raise WeightsError(f"{name}: {key} holds values that are not finite")
    return dict(values)


def _dropped(before: State, after: State) -> dict[str, str]:
    gone = {name: tensor for name, tensor in before.items() if name not in after}
    dropped = {
        name: _shape(tensor) for name, tensor in gone.items() if DROPS.match(name) or DETECTOR.match(name)
    }
    dropped |= {name: "recomputed from sizes" for name in gone if RECOMPUTED.search(name)}
    table, left = before.get("pos_embed"), after.get("pos_embed")
    if table is not None and table.ndim == left.ndim == 3 and left.shape[1] < table.shape[1]:
        first, end = after.keys() >= set(CLASS_TOKEN), table.shape[1] - left.shape[1]
        if first < end:
            place = f"pos_embed[:, {int(first) or ''}:{end}]"
            dropped[place] = f"(1, {end - first}, {table.shape[2]})"
    return dropped


# ---- fitting: one tensor into its place


class _Misfit(Exception):
    """Why a tensor does not fit."""


def _windows(model: nn.Module) -> dict[str, Size3]:
    """The windows (t, h, w) of the model's bias tables, by the tables' names."""
    return {
        f"{name}.relative_position_bias_table": module.window
        for name, module in model.named_modules()
        if hasattr(module, "relative_position_bias_table")
    }


def _heads(model: nn.Module) -> dict[str, int]:
    """The attention heads of each layer, which no tensor's shape shows."""
    heads = {name: getattr(module, "num_heads", None) for name, module in model.named_modules()}
    return {name: count for name, count in heads.items() if isinstance(count, int)}


def _shapes(model: nn.Module) -> Sequence[Size3]:
    """The groups of its superpatches, in the order of what is learnt for each."""
    return next((module.shapes for module in model.modules() if isinstance(module, Superpatches)), ())


def _with_our_shapes(
    state: State, theirs: Sequence[Size3], ours: Sequence[Size3], report: LoadReport
) -> State:
    """What was learnt for a group of superpatches goes to ours of this shape, if there is one."""
    if not theirs or not ours or theirs == ours:
        return state
    renamed = {}
    for name, tensor in state.items():
        learnt = re.fullmatch(r"(.*superpatches\.(?:vectors|policy\.heads)\.)(\d+)(.*)", name)
        shape = theirs[int(learnt[2])] if learnt else None
        if shape is None or shape in ours:
            renamed[f"{learnt[1]}{ours.index(shape)}{learnt[3]}" if learnt else name] = tensor
        else:
            report.dropped[name] = f"{_shape(tensor)}: of groups of {shape}, which the model has not"
    return renamed


def _of_images(state: State, ours: bool) -> bool:
    """Whether the patch embedding is an image model's: flat, or (`ours`: of this toolbox) of one frame."""
    kernel = state.get("patch_embed.proj.weight", state.get("patch_embed.conv1.weight"))
    return kernel is None or kernel.ndim == 4 or (ours and kernel.ndim == 5 and kernel.shape[2] == 1)


def _fit(
    name: str, tensor: Tensor, target: Tensor, window: Size3 | None, of_images: bool, inflate: Inflate
) -> tuple[str, Tensor]:
    """-> what was done ("loaded", "inflated", "resized"), and the tensor in the target's shape.

    window: (t, h, w), of a bias table.
    """
    if tensor.is_floating_point() != target.is_floating_point():
        raise _Misfit(f"{tensor.dtype} is not {target.dtype}")
    if tensor.shape == target.shape:
        return "loaded", tensor
    if name.startswith("patch_embed.") and target.ndim == 5:
        kernel = tensor.unsqueeze(2) if tensor.ndim == 4 else tensor
        if kernel.shape == target.shape:
            return "loaded", kernel
        square_patches = kernel.shape[3] == kernel.shape[4] and target.shape[3] == target.shape[4]
        if name.endswith("proj.weight") and kernel.shape[:2] == target.shape[:2] and square_patches:
            kernel = _of_patches(kernel, target.shape[3:])
            if kernel.shape == target.shape:
                return "resized", kernel
        if of_images and kernel.shape == (*target.shape[:2], 1, *target.shape[3:]):
            return "inflated", _inflated(kernel, target.shape[2], inflate)
    if window is not None and tensor.shape == (table_rows((1, *window[1:])), *target.shape[1:]):
        return "inflated", tensor.repeat(2 * window[0] - 1, 1)  # the same over every distance in time
    if name == "pos_embed" or name.endswith("semantic.centres"):
        grid = _as_grid(tensor, target.shape, of_images)
        if grid is not None and grid.shape == target.shape:
            return "loaded", grid
        if grid is not None and grid.shape[-1] == target.shape[-1]:
            return "resized", resize_grid(grid, target.shape[1:4])
    raise _Misfit("misshapen")


def _of_patches(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """(C, 3, t, h, w) -> (C, 3, t, *size): a patch and the same patch resized get about the same token (to
    rounding, where patches grow). FlexiViT (CVPR 2023), section 3.4; by timm."""
    flat = resample_patch_embed(kernel.transpose(1, 2).flatten(0, 1), list(size))
    return flat.unflatten(0, (len(kernel), -1)).transpose(1, 2)


def _inflated(kernel: Tensor, frames: int, inflate: Inflate) -> Tensor:
    """(C, 3, 1, h, w) -> (C, 3, frames, h, w)."""
    if inflate == "average":
        return kernel.repeat(1, 1, frames, 1, 1) / frames
    out = kernel.new_zeros(*kernel.shape[:2], frames, *kernel.shape[3:])
    out[:, :, frames // 2] = kernel[:, :, 0]
    return out


def _as_grid(table: Tensor, target: torch.Size, of_images: bool) -> Tensor | None:
    """A position table as (1, t, h, w, C), or None: flat, it is a square image's or of the target's grid.

    A flat table of video patches has no other clue to its grid than being as long as the target's.
    """
    if table.ndim == 5:
        return table if table.shape[0] == 1 and table.numel() else None
    if table.ndim != 3 or table.shape[0] != 1 or not table.numel():
        return None
    grid = (1, *target[2:4]) if of_images else target[1:4]
    if of_images and square(table) is not None:
        return square(table)
    return table.unflatten(1, grid) if table.shape[1] == math.prod(grid) else None


def _fold_layer_scale(state: State, targets: State, report: LoadReport) -> None:
    """Layer scale that the model has not goes into the projection before it, which changes no output."""
    for name in [n for n in state if re.search(r"\.ls[12]\.gamma$", n) and n not in targets]:
        block, _, branch = name.removesuffix(".gamma").rpartition(".")
        last = f"{block}.{'attn.proj' if branch == 'ls1' else 'mlp.fc2'}"
        weight, bias = (state.get(f"{last}.{kind}") for kind in ("weight", "bias"))
        gamma = state[name]
        if weight is None or bias is None or not gamma.shape == bias.shape == weight.shape[:1] != ():
            continue  # the scale stays, and is unexpected
        del state[name]
        state[f"{last}.weight"] = gamma.float()[:, None] * weight.float()
        state[f"{last}.bias"] = gamma.float() * bias.float()
        report.dropped[name] = f"{_shape(gamma)}: multiplied into {last}"


def _is_idle_bias(name: str, targets: State) -> bool:
    """A window's bias table, of a layer that the model has as a semantic one, without a window."""
    attention, _, table = name.rpartition(".")
    is_swin = attention.startswith("layers.")  # BEiT's tables stand in `blocks`, and matter
    return is_swin and table == "relative_position_bias_table" and f"{attention}.qkv.weight" in targets


def _choose_classes(
    state: State, contents: _Contents, class_names: Sequence[str] | None, report: LoadReport
) -> frozenset[str]:
    """The head's rows by class name; -> the tensors that cannot be chosen so."""
    if class_names is None or contents.class_names is None or _only_numbers(class_names):
        return frozenset()
    ours, theirs = list(class_names), list(contents.class_names)
    if ours == theirs:
        return frozenset()
    strangers = [name for name in ours if name not in theirs]
    if strangers:
        report.notes.append(
            f"{len(strangers)} of the {len(ours)} classes are not among the checkpoint's {len(theirs)}, "
            f"the first: {strangers[0]!r}"
        )
        return contents.by_class
    order = [theirs.index(name) for name in ours]
    by_row = {name for name in contents.by_class if len(state[name]) == len(theirs)}  # no background
    for name in by_row:
        state[name] = state[name][order]
    if by_row:
        report.notes.append(f"{', '.join(sorted(by_row))}: rows chosen by class name")
    return contents.by_class - by_row


def _only_numbers(names: Sequence[str]) -> bool:
    """Whether class names are mere ids: 0, 1, ..."""
    return list(names) == [str(i) for i in range(len(names))]


def _within(name: str, prefixes: Sequence[str]) -> bool:
    return any(f".{prefix}." in f".{name}." for prefix in prefixes)


def _advice(report: LoadReport) -> list[str]:
    """What most likely helps."""
    advice = list(report.notes)
    if any(name.endswith(("ls1.gamma", "ls2.gamma")) for name in report.missing):
        advice.append("the checkpoint has no layer scale: model.layer_scale=null")
    if "norms.0.weight" in report.missing:
        advice.append(
            "a classifier's checkpoint has no norms for every stage: they can be trained (fresh: norms)"
        )
    if any(name.endswith("semantic.centres") for name in report.unexpected):
        advice.append(
            "the checkpoint has a vector G per semantic token: model.centres=true and no model.pool=merge"
        )
    if "pos_embed" in report.unexpected:
        advice.append("the checkpoint's positions are learned: model.pos_embed=learned")
    if any(_within(name, ["head"]) for name in (*report.missing, *report.mismatched)):
        advice.append("a head that was not loaded can be trained (fresh), but not scored")
    return advice


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
