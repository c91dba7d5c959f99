"""A model in one file that recognises videos without its checkpoint: ONNX, or torch.export's `.pt2`.

In: uint8 clips (B, 3, T, S, S), as `TestViews` cuts them. Out: float32 probabilities (B, K). Normalisation
and softmax (or sigmoid) are in the file; its metadata has class names and what chooses frames and pixels.
"""

import contextlib
import copy
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .config import Config, from_dict
from .engine.job import Task
from .errors import InputError

ExportPrecision = Literal["fp32", "bf16", "int8"]
Classifier = Callable[[Tensor], Tensor]  # uint8 clips (B, 3, T, S, S) -> probabilities (B, K)
EXPORT_SUFFIXES = (".onnx", ".pt2")
MARK = "stvit_video export 1"
TRACED = 2  # clips of the batch that is traced: sizes 0 and 1 are special to torch.export
METADATA = {
    "data": ("num_frames", "stride", "target_fps", "sampling", "image_size", "interpolation"),
    "eval": ("crop_ratio", "clips", "crops", "view_batch"),
}


class ExportError(InputError):
    """A model that cannot be exported, or an exported file that cannot be read: names it and the cause."""


class Deployed(nn.Module):
    """All between pixels and scores: uint8 clips (B, 3, T, S, S) -> probabilities (B, K), float32."""

    def __init__(self, model: nn.Module, task: Task, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to("cpu", dtype), dtype
        self.activation = task.activation
        self.register_buffer("mean", task.normalise.mean.cpu())
        self.register_buffer("std", task.normalise.std.cpu())

    def forward(self, clips: Tensor) -> Tensor:
        x = (clips.float() - self.mean) / self.std
        return self.activation(self.model(x.to(self.dtype)).float())


def metadata(config: Config, class_names: Sequence[str], precision: ExportPrecision) -> dict[str, Any]:
    """What `read` needs beside the model, in plain values."""
    values = {key: getattr(getattr(config, group), key) for group in METADATA for key in METADATA[group]}
    named = {"format": MARK, "model": config.model.name, "task": config.task, "precision": precision}
    return named | {"class_names": list(class_names)} | values


def write(
    path: Path,
    model: nn.Module,
    task: Task,
    config: Config,
    *,
    precision: ExportPrecision = "fp32",
    kind: str | None = None,
) -> None:
    """Export `model` to `path`, in the format of its suffix, or of `kind` (".onnx", ".pt2").

    precision: "bf16": weights in bfloat16; .pt2 computes in it, ONNX in float32, as onnxruntime has no
        bfloat16 products on the CPU. "int8", ONNX only: matrix products of int8 weights and of inputs
        that are rounded to 8 bits as they come (dynamic quantisation).
    Raises ExportError where torch cannot export it.
    """
    kind = kind or path.suffix
    if precision == "int8" and kind != ".onnx":
        raise ExportError(f"--precision int8: of .onnx files only (onnxruntime quantises), not of {kind}")
    superpatches = getattr(model, "superpatches", None)
    if superpatches is not None and superpatches.tokens is None:
        raise ExportError(
            f"{config.model.name} with model.superpatch_threshold={superpatches.threshold:g} cannot be "
            "exported: its clips differ in their number of tokens, those of a file's batch must not; "
            "train with a budget, model.superpatch_tokens"
        )
    if kind == ".onnx":
        _need("onnx", "onnxscript", *(["onnxruntime"] if precision == "int8" else []))
    details = metadata(config, task.class_names, precision)
    half = precision == "bf16" and kind == ".pt2"
    deployed = Deployed(model, task, torch.bfloat16 if half else torch.float32).eval()
    try:
        with _quiet():
            program = _trace(deployed, config.data.num_frames, config.data.image_size)
            if kind == ".pt2":
                buffer = io.BytesIO()
                torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(details)})
                path.write_bytes(buffer.getbuffer())
            else:
                _write_onnx(path, program, details)
    except Exception as error:  # of an exporter's many kinds
        raise ExportError(f"{config.model.name} cannot be exported to {kind}: {_line(error)}") from error


def _trace(deployed: Deployed, num_frames: int, size: int) -> torch.export.ExportedProgram:
    clips = torch.zeros(TRACED, 3, num_frames, size, size, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(deployed, (clips,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def read(path: str | Path, device: torch.device) -> tuple[Config, list[str], Classifier]:
    """An exported file's settings, class names, and what turns clips on any device into scores on `device`.

    Raises ExportError.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path}: no such file")
    scores, details = (_read_pt2 if zipfile.is_zipfile(path) else _read_onnx)(path, device)
    if details.get("format") != MARK:
        raise ExportError(f"{path}: not written by stvit-export (its metadata has no format {MARK!r})")
    details.setdefault("interpolation", "bilinear")  # files of version 0.4.0 do not say
    values = {group: {key: details[key] for key in keys} for group, keys in METADATA.items()}
    values |= {"task": details["task"], "model": {"name": details["model"]}}
    return from_dict(values, str(path)), details["class_names"], scores


class Difference(NamedTuple):
    """largest: of any probability; agreeing: clips with the same best class, of `clips`."""

    largest: float
    agreeing: int
    clips: int


@torch.no_grad()
def compare(expected: Classifier, actual: Classifier, clips: Tensor) -> Difference:
    """Both models' scores of uint8 clips (N, 3, T, S, S): the first clip alone, then three at a time."""
    parts = [part for part in (clips[:1], *clips[1:].split(TRACED + 1)) if len(part)]
    ours, theirs = (torch.cat([scores(part).cpu() for part in parts]) for scores in (expected, actual))
    same = ours.argmax(1) == theirs.argmax(1)
    return Difference((ours - theirs).abs().max().item(), int(same.sum()), len(clips))


# ---- torch.export


def _read_pt2(path: Path, device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    extra = {"metadata.json": ""}
    try:
        with _quiet(), open(path, "rb") as file:
            program = torch.export.load(file, extra_files=extra)
            if device.type != "cpu":
                program = torch.export.passes.move_to_device_pass(program, device)
    except Exception as error:  # damage can surface anywhere
        raise ExportError(f"{path}: not a readable .pt2 file ({_line(error)})") from None
    model = program.module()
    return lambda clips: model(clips.to(device)), json.loads(extra["metadata.json"] or "{}")


# ---- ONNX


def _write_onnx(path: Path, program: torch.export.ExportedProgram, details: dict[str, Any]) -> None:
    import onnx

    program = program.run_decompositions(DECOMPOSITIONS)
    names = {"input_names": ["clips"], "output_names": ["scores"]}
    model = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    del model.graph.value_info[:]  # torch's sizes contradict those that quantisation infers
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    if details["precision"] == "bf16":
        _store_bfloat16(model.graph)
    if details["precision"] == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        products = {"op_types_to_quantize": ["MatMul"], "per_channel": True}
        quantize_dynamic(model, path, weight_type=QuantType.QInt8, **products)
        model = onnx.load(path)
    # last: the quantiser adds a property of its own, which is no JSON
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in details.items()})
    onnx.save(model, path)


def _store_bfloat16(graph) -> None:
    """Weights of float32 in half the space, each cast back where it is used."""
    from onnx import TensorProto, helper, numpy_helper

    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1:
            values = torch.from_numpy(numpy_helper.to_array(weight).copy()).bfloat16()
            cast = helper.make_node("Cast", [f"{weight.name}.bf16"], [weight.name], to=TensorProto.FLOAT)
            graph.node.insert(0, cast)
            weight.name, weight.data_type = cast.input[0], TensorProto.BFLOAT16
            weight.raw_data = values.view(torch.int16).numpy().tobytes()


def _read_onnx(path: Path, device: torch.device) -> tuple[Classifier, dict[str, Any]]:
    _need("onnxruntime")
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise ExportError(f"device={device}: not one of this onnxruntime's; device=cpu, or a .pt2 file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    index = {"device_id": device.index or 0} if device.type == "cuda" else {}
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, index)])
    except Exception as error:  # onnxruntime has an exception for each of its codes
        raise ExportError(f"{path}: not a readable ONNX file ({_line(error)})") from None
    properties = session.get_modelmeta().custom_metadata_map

    def scores(clips: Tensor) -> Tensor:
        (values,) = session.run(None, {"clips": clips.cpu().numpy()})
        return torch.from_numpy(values).to(device)

    if properties.get("format") != json.dumps(MARK):
        return scores, {}
    return scores, {key: json.loads(value) for key, value in properties.items()}


def _cells(size: int, cells: int) -> Tensor:
    """Places along an axis that adaptive pooling puts into each cell: (cells, most), the last repeated."""
    i = torch.arange(cells)
    first, end = i * size // cells, -(-(i + 1) * size // cells)
    most = max(-(-(j + 1) * size // cells) - j * size // cells for j in range(cells))
    return (first[:, None] + torch.arange(most)).minimum(end[:, None] - 1)


def _adaptive_max_pool3d(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """torch's own, which ONNX has not: (B, C, T, H, W) -> values and places (B, C, t, h, w)."""
    _, rows, columns = x.shape[2:]
    t, h, w = (_cells(size, cells) for size, cells in zip(x.shape[2:], output_size, strict=True))
    t, h, w = t[:, None, None, :, None, None], h[:, None, None, :, None], w[:, None, None, :]
    places = ((t * rows + h) * columns + w).flatten(3).flatten(0, 2)  # (cells, patches of a cell)
    values, best = x.flatten(2)[..., places].max(-1)
    places = places.expand(*best.shape, -1).gather(-1, best[..., None])[..., 0]
    return values.unflatten(2, output_size), places.unflatten(2, output_size)


def _adaptive_avg_pool3d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """torch's own, which ONNX has not: an axis at a time, as cells are boxes."""
    for axis, cells in enumerate(output_size, start=2):
        size = x.shape[axis]
        spans = [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        x = torch.stack([x.narrow(axis, first, end - first).mean(axis) for first, end in spans], axis)
    return x


def _stable_argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    """A plain sort, which becomes ONNX's TopK: of equal values it takes the first first."""
    return torch.ops.aten.sort.default(x, dim, descending)[1]


def _view(x: Tensor, size: Sequence[int]) -> Tensor:
    """Of a copy: what was traced, fused attention, has another layout than ONNX's plain attention."""
    return torch.ops.aten._unsafe_view(x.clone(memory_format=torch.contiguous_format), size)


DECOMPOSITIONS = {
    torch.ops.aten.view.default: _view,
    torch.ops.aten.argsort.stable: _stable_argsort,
    torch.ops.aten.adaptive_max_pool3d.default: _adaptive_max_pool3d,
    torch.ops.aten._adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
    torch.ops.aten.adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
}


def _need(*libraries: str) -> None:
    for library in libraries:
        if find_spec(library) is None:
            raise ExportError(f"{library} is not installed: pip install stvit_video[export]")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own insides, which nobody who exports can change."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
