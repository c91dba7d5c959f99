"""RandAugment's operations on uint8 frames, by torchvision's formulas; each clip has its own magnitude."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2
from torchvision.transforms.v2.functional._geometry import _get_inverse_affine_matrix as _matrix

from .batch import Batch

Frames = Tensor  # uint8 (N, T, 3, S, S): T frames of N clips
Operation = Callable[[Frames], Frames]


class Draw(NamedTuple):
    """What is random about a training clip, drawn before a pixel is touched.

    box: top, left, height and width of the crop, in pixels of the frames; it is resized to `size` squared,
        by `interpolation`.
    operations: RandAugment's, name and magnitude of each, in order.
    """

    box: tuple[int, int, int, int]
    size: int
    operations: tuple[tuple[str, float], ...] = ()
    flip: bool = False
    interpolation: str = "bilinear"


def cut(frame: Tensor, draw: Draw) -> Tensor:
    """uint8 (..., 3, H, W) -> the crop's box of it, a view."""
    top, left, height, width = draw.box
    return frame[..., top : top + height, left : left + width]


def augment(clip: Tensor, draw: Draw, out: Tensor) -> None:
    """T frames uint8 (T, 3, h, w), cut already, into `out` (3, T, S, S).

    Frame by frame, as what one operation leaves is still in the cache for the next.
    """
    operations = [OPERATIONS[name]([m], draw.size, out.device) for name, m in draw.operations]
    for place, frame in enumerate(_resized(clip, draw)):
        pixels = frame.contiguous()[None, None]
        for operation in operations:
            pixels = operation(pixels)
        out[:, place] = (pixels.flip(-1) if draw.flip else pixels)[0, 0]


def _resized(clip: Tensor, draw: Draw) -> Tensor:
    """(T, 3, h, w) -> (T, 3, S, S)."""
    return v2.resize(clip, [draw.size] * 2, InterpolationMode(draw.interpolation), antialias=True)


def finish(batch: Batch) -> Batch:
    """Resized, augmented and of one shape, where that was left to the device: clips (B, V, 3, T, S, S).

    On an accelerator all clips that drew an operation go through it together.
    """
    if batch.draws is None:
        return batch
    draws = [draw for views in batch.draws for draw in views]
    clips = split(batch.clips, draws)
    if batch.clips.device.type == "cpu":
        size = draws[0].size
        out = torch.empty(len(draws), 3, len(clips[0]), size, size, dtype=torch.uint8)
        for clip, draw, pixels in zip(clips, draws, out, strict=True):
            augment(clip, draw, pixels)
    else:
        out = together(clips, draws).transpose(1, 2)
    return replace(batch, clips=out.unflatten(0, (len(batch.draws), -1)), draws=None)


def split(cuts: Tensor, draws: Sequence[Draw]) -> list[Tensor]:
    """Flat uint8 -> what was cut for each draw: (T, 3, h, w) of its box, in memory channels last."""
    sizes = [3 * draw.box[2] * draw.box[3] for draw in draws]
    frames = cuts.numel() // sum(sizes)
    parts = cuts.split([frames * size for size in sizes])
    return [
        part.view(frames, *draw.box[2:], 3).movedim(-1, 1) for part, draw in zip(parts, draws, strict=True)
    ]


def together(clips: Sequence[Tensor], draws: Sequence[Draw]) -> Frames:
    """As `augment`, each operation at once for all clips that drew it in the same round."""
    size, device = draws[0].size, clips[0].device
    out = torch.empty(len(clips), len(clips[0]), 3, size, size, dtype=torch.uint8, device=device)
    for clip, draw, pixels in zip(clips, draws, out, strict=True):
        pixels.copy_(_resized(clip, draw))
    for drawn in zip(*(draw.operations for draw in draws), strict=True):
        for name in {name for name, _ in drawn} - {"Identity"}:
            rows = [row for row, (other, _) in enumerate(drawn) if other == name]
            where = _on(device, rows)
            out[where] = OPERATIONS[name]([drawn[row][1] for row in rows], size, device)(out[where])
    mirrored = [row for row, draw in enumerate(draws) if draw.flip]
    if mirrored:
        where = _on(device, mirrored)
        out[where] = out[where].flip(-1)
    return out


def _on(device: torch.device, values: Sequence) -> Tensor:
    """Numbers as a tensor on the device, which is not waited for."""
    values = torch.tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _each(values: Sequence, device: torch.device) -> Tensor | float:
    """A number for each clip, to be combined with frames; plain, which is faster, where there is one."""
    return values[0] if len(values) == 1 else _on(device, values).view(-1, 1, 1, 1, 1)


def _uint8(values: Tensor) -> Frames:
    return values.clamp_(0, 255).to(torch.uint8)


def _blend(frames: Frames, other: Tensor, ratio: Tensor | float) -> Frames:
    """ratio * frames + (1 - ratio) * other."""
    if isinstance(ratio, Tensor):
        return _uint8(torch.addcmul(frames * ratio, other, 1 - ratio))
    return _uint8(frames.mul(ratio).add_(other, alpha=1 - ratio))


def _grey(frames: Frames) -> Tensor:
    red, green, blue = frames.unbind(-3)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(-3)


def _brightness(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    ratio = _each([1 + m for m in magnitudes], device)
    return lambda frames: _uint8(frames.mul(ratio))


def _color(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    ratio = _each([1 + m for m in magnitudes], device)
    return lambda frames: _blend(frames, _grey(frames), ratio)


def _contrast(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    ratio = _each([1 + m for m in magnitudes], device)
    return lambda frames: _blend(frames, _grey(frames).mean((-3, -2, -1), keepdim=True), ratio)


def _sharpness(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    ratio = _each([-m for m in magnitudes], device)

    def operation(frames: Frames) -> Frames:
        if size <= 2:
            return frames
        levels = frames.short()  # the neighbours once and the pixel five times, over 13: exact in integers
        rows = levels[..., :-2, :] + levels[..., 1:-1, :] + levels[..., 2:, :]
        blurred = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        blurred = blurred.add_(levels[..., 1:-1, 1:-1], alpha=4).mul(1 / 13).round_()
        out = frames.float()
        inner = out[..., 1:-1, 1:-1]
        if isinstance(ratio, Tensor):
            inner.addcmul_(blurred.sub_(inner), ratio)
        else:
            inner.add_(blurred.sub_(inner), alpha=ratio)
        return _uint8(out)

    return operation


def _posterize(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    mask = _each([256 - (1 << 8 - int(m)) for m in magnitudes], device)
    return lambda frames: (frames & mask).to(torch.uint8)


def _solarize(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    # the first level that is inverted, as torchvision compares: in float32
    first = _each([math.ceil(np.float32(255 * m)) for m in magnitudes], device)
    return lambda frames: frames ^ frames.ge(first).view(torch.uint8).mul_(255)


def _auto_contrast(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    def operation(frames: Frames) -> Frames:
        low, high = frames.amin((-2, -1), keepdim=True), frames.amax((-2, -1), keepdim=True)
        flat, low = low == high, low.float()
        scale = (high.float() - low).mul_(1 / 255).masked_fill_(flat, 1)
        return _uint8(frames.sub(low.masked_fill_(flat, 0)).div_(scale))

    return operation


def _equalize(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    return _equalize_planes if device.type == "cpu" else v2.equalize


def _equalize_planes(frames: Frames) -> Frames:
    """torchvision's, in a third of its time: by one table for each plane."""
    out = torch.empty(frames.shape, dtype=torch.uint8)
    for plane, equal in zip(frames.flatten(0, 2), out.flatten(0, 2), strict=True):
        counts = torch.bincount(plane.flatten(), minlength=256).numpy()
        step = (plane.numel() - counts[counts.nonzero()[0][-1]]) // 255
        if step:
            below = counts.cumsum() - counts
            table = ((below + step // 2) // step).clip(0, 255).astype(np.uint8)
            table[0] = 0
            np.take(table, plane.numpy(), out=equal.numpy(), mode="clip")
        else:
            equal.copy_(plane)
    return out


def _translate(magnitudes: Sequence[float], size: int, device: torch.device, axis: int) -> Operation:
    def operation(frames: Frames) -> Frames:
        out = torch.zeros_like(frames)
        for before, after, magnitude in zip(frames, out, magnitudes, strict=True):
            shift = int(magnitude)
            length = max(size - abs(shift), 0)
            kept = before.narrow(axis, max(-shift, 0) if length else 0, length)
            after.narrow(axis, max(shift, 0) if length else 0, length).copy_(kept)
        return out

    return operation


def _affine(matrices: Sequence[Sequence[float]], size: int, device: torch.device) -> Operation:
    """Bilinear, black outside. matrices: pixels from the centre of the new frame -> of the old one."""
    places = torch.linspace((1 - size) / 2, (size - 1) / 2, size, device=device)
    y, x = torch.meshgrid(places, places, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], -1).view(1, -1, 3).expand(len(matrices), -1, -1)
    turned = _on(device, matrices).view(-1, 2, 3).mT / (size / 2)
    grid = places.bmm(turned).view(-1, 1, size, size, 2)

    def operation(frames: Frames) -> Frames:
        where = grid.expand(-1, frames.shape[1], -1, -1, -1).flatten(0, 1)
        moved = grid_sample(frames.flatten(0, 1).float(), where, align_corners=False)
        return moved.round_().to(torch.uint8).view_as(frames)

    return operation


def _shear(magnitudes: Sequence[float], size: int, device: torch.device, axis: int) -> Operation:
    corner, degrees = [-size / 2] * 2, [math.degrees(math.atan(m)) for m in magnitudes]
    shears = [[degree, 0.0] if axis == -1 else [0.0, degree] for degree in degrees]
    return _affine([_matrix(corner, 0.0, [0, 0], 1.0, shear) for shear in shears], size, device)


def _rotate(magnitudes: Sequence[float], size: int, device: torch.device) -> Operation:
    turns = [_matrix([0, 0], -(degrees % 360), [0, 0], 1.0, [0, 0]) for degrees in magnitudes]
    return _affine(turns, size, device)


# By torchvision's names. Each: magnitudes (of N clips), size, device -> Frames -> Frames.
OPERATIONS: dict[str, Callable[..., Operation]] = {
    "Identity": lambda magnitudes, size, device: lambda frames: frames,
    "ShearX": partial(_shear, axis=-1),
    "ShearY": partial(_shear, axis=-2),
    "TranslateX": partial(_translate, axis=-1),
    "TranslateY": partial(_translate, axis=-2),
    "Rotate": _rotate,
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
}
