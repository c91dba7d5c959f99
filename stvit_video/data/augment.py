"""RandAugment on uint8 frames, as timm's `rand-m7-n4-mstd0.5-inc1`; each clip has its own magnitudes.

"RandAugment" (NeurIPS 2020) in timm's form, which the field's recipes name: its fifteen operations, each
left out half of the time, noise on the magnitude; before the crop, and the same in all frames. Colours are
changed by torchvision's formulas, which are PIL's within two levels.
"""

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

Clips = Tensor  # uint8 (N, T, 3, H, W): T frames of N clips
Operation = Callable[[Clips], Clips]
Size2 = tuple[int, int]  # height, width
GREY = 128  # what comes in from outside of a frame that is moved
MAX_MAGNITUDE = 10
APPLIED, NOISE = 0.5, 0.5  # share of the operations that are; standard deviation of the magnitude


class Draw(NamedTuple):
    """What is random about a training clip, drawn before a pixel is touched.

    box: top, left, height and width of the crop, in pixels of the frames; it is resized to `size` squared,
        by `interpolation`.
    frame: height and width of the frames.
    operations: RandAugment's, in order: the name of each and what it takes (`argument`).
    """

    box: tuple[int, int, int, int]
    size: int
    frame: Size2
    operations: tuple[tuple[str, float], ...] = ()
    flip: bool = False
    interpolation: str = "bilinear"

    @property
    def kept(self) -> Size2:
        """Height and width of what `cut` leaves: operations need the whole frame."""
        return self.frame if self.operations else self.box[2:]


def draw_operations(count: int, magnitude: float, frame: Size2) -> tuple[tuple[str, float], ...]:
    """RandAugment's for one clip, `count` at most, by torch's global generator.

    magnitude: from 0 to 10, before the noise. frame: height and width of what they are for.
    """
    drawn = []
    for _ in range(count):
        name = list(OPERATIONS)[torch.randint(len(OPERATIONS), ()).item()]
        if torch.rand(()).item() < APPLIED:
            level = min(max(magnitude + NOISE * torch.randn(()).item(), 0.0), MAX_MAGNITUDE)
            sign = -1 if torch.rand(()).item() < 0.5 else 1
            drawn.append((name, argument(name, level, sign, frame)))
    return tuple(drawn)


def argument(name: str, level: float, sign: int, frame: Size2) -> float:
    """What an operation takes at a level from 0 to 10: degrees, slope, pixels, bits left, the first value
    inverted, what is added, or the factor of an enhancement. 0 for those that take nothing."""
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return max(0.1, 1 + sign * 0.9 * level / MAX_MAGNITUDE)
    if name in ("TranslateX", "TranslateY"):
        return round(sign * 0.45 * level / MAX_MAGNITUDE * frame[name == "TranslateX"])
    most = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3}
    if name in most:
        return sign * most[name] * level / MAX_MAGNITUDE
    return {
        "Posterize": 4 - int(level / MAX_MAGNITUDE * 4),
        "Solarize": 256 - int(level / MAX_MAGNITUDE * 256),
        "SolarizeAdd": int(level / MAX_MAGNITUDE * 110),
    }.get(name, 0)


def cut(frame: Tensor, draw: Draw) -> Tensor:
    """uint8 (..., 3, H, W) -> what is needed of it: the crop's box, a view, or all for RandAugment."""
    return frame if draw.operations else _crop(frame, draw)


def augment(clip: Tensor, draw: Draw, out: Tensor) -> None:
    """T frames uint8 (T, 3, h, w), cut already, into `out` (3, T, S, S).

    Frame by frame, as what one operation leaves is still in the cache for the next.
    """
    operations = [OPERATIONS[name]([m], clip.shape[-2:], out.device) for name, m in draw.operations]
    if operations:
        frames, clip = clip, torch.empty(clip.shape, dtype=torch.uint8)
        for frame, pixels in zip(frames, clip, strict=True):
            frame = frame.contiguous()[None, None]
            for operation in operations:
                frame = operation(frame)
            pixels.copy_(frame[0, 0])
    clip = _resized(clip, draw)
    out.copy_((clip.flip(-1) if draw.flip else clip).transpose(0, 1))


def _crop(frame: Tensor, draw: Draw) -> Tensor:
    top, left, height, width = draw.box
    return frame[..., top : top + height, left : left + width]


def _resized(clip: Tensor, draw: Draw) -> Tensor:
    """(T, 3, h, w), cut, but not yet cropped where it was augmented -> (T, 3, S, S)."""
    clip = _crop(clip, draw) if draw.operations else clip
    return v2.resize(clip, [draw.size] * 2, InterpolationMode(draw.interpolation), antialias=True)


def finish(batch: Batch) -> Batch:
    """Augmented, resized and of one shape, where that was left to the device: clips (B, V, 3, T, S, S).

    On an accelerator all clips of one size that drew an operation go through it together.
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
    """Flat uint8 -> what was cut for each draw: (T, 3, h, w), in memory channels last."""
    sizes = [3 * math.prod(draw.kept) for draw in draws]
    frames = cuts.numel() // sum(sizes)
    parts = cuts.split([frames * size for size in sizes])
    return [
        part.view(frames, *draw.kept, 3).movedim(-1, 1) for part, draw in zip(parts, draws, strict=True)
    ]


def together(clips: Sequence[Tensor], draws: Sequence[Draw]) -> Clips:
    """As `augment`, each operation at once for all clips of one size that drew it in the same round."""
    size, device, clips = draws[0].size, clips[0].device, list(clips)
    for turn in range(max(len(draw.operations) for draw in draws)):
        groups: dict[tuple[str, Size2], list[int]] = {}
        for row, draw in enumerate(draws):
            if turn < len(draw.operations):
                groups.setdefault((draw.operations[turn][0], draw.frame), []).append(row)
        for (name, frame), rows in groups.items():
            taken = [draws[row].operations[turn][1] for row in rows]
            done = OPERATIONS[name](taken, frame, device)(torch.stack([clips[row] for row in rows]))
            for row, clip in zip(rows, done, strict=True):
                clips[row] = clip
    out = torch.empty(len(clips), len(clips[0]), 3, size, size, dtype=torch.uint8, device=device)
    for clip, draw, pixels in zip(clips, draws, out, strict=True):
        pixels.copy_(_resized(clip, draw))
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


def _uint8(values: Tensor) -> Clips:
    return values.clamp_(0, 255).to(torch.uint8)


def _blend(frames: Clips, other: Tensor, ratio: Tensor | float) -> Clips:
    """ratio * frames + (1 - ratio) * other."""
    if isinstance(ratio, Tensor):
        return _uint8(torch.addcmul(frames * ratio, other, 1 - ratio))
    return _uint8(frames.mul(ratio).add_(other, alpha=1 - ratio))


def _grey(frames: Clips) -> Tensor:
    red, green, blue = frames.unbind(-3)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(-3)


def _brightness(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    ratio = _each(values, device)
    return lambda frames: _uint8(frames.mul(ratio))


def _color(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    ratio = _each(values, device)
    return lambda frames: _blend(frames, _grey(frames), ratio)


def _contrast(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    ratio = _each(values, device)
    return lambda frames: _blend(frames, _grey(frames).mean((-3, -2, -1), keepdim=True), ratio)


def _sharpness(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    ratio = _each([1 - value for value in values], device)

    def operation(frames: Clips) -> Clips:
        if min(size) <= 2:
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


def _posterize(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    mask = _each([256 - (1 << 8 - bits) for bits in values], device)
    return lambda frames: (frames & mask).to(torch.uint8)


def _solarize(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    first = _on(device, values).short().view(-1, 1, 1, 1, 1)  # 256 is no uint8
    return lambda frames: frames ^ frames.ge(first).view(torch.uint8).mul_(255)


def _solarize_add(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    more = _each(values, device)

    def operation(frames: Clips) -> Clips:
        brighter = (frames.short() + more).clamp_(max=255).to(torch.uint8)
        return torch.where(frames < 128, brighter, frames)

    return operation


def _invert(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    return lambda frames: 255 - frames


def _auto_contrast(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    def operation(frames: Clips) -> Clips:
        low, high = frames.amin((-2, -1), keepdim=True), frames.amax((-2, -1), keepdim=True)
        flat, low = low == high, low.float()
        scale = (high.float() - low).mul_(1 / 255).masked_fill_(flat, 1)
        return _uint8(frames.sub(low.masked_fill_(flat, 0)).div_(scale))

    return operation


def _equalize(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    return _equalize_planes if device.type == "cpu" else v2.equalize


def _equalize_planes(frames: Clips) -> Clips:
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


def _translate(values: Sequence[float], size: Size2, device: torch.device, axis: int) -> Operation:
    def operation(frames: Clips) -> Clips:
        out = torch.full_like(frames, GREY)
        for before, after, shift in zip(frames, out, values, strict=True):
            length = max(size[axis] - abs(shift), 0)
            kept = before.narrow(axis, max(-shift, 0) if length else 0, length)
            after.narrow(axis, max(shift, 0) if length else 0, length).copy_(kept)
        return out

    return operation


def _affine(matrices: Sequence[Sequence[float]], size: Size2, device: torch.device) -> Operation:
    """Bilinear, grey outside. matrices: pixels from the centre of the new frame -> of the old one."""
    y, x = (torch.linspace((1 - n) / 2, (n - 1) / 2, n, device=device) for n in size)
    y, x = torch.meshgrid(y, x, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], -1).view(1, -1, 3).expand(len(matrices), -1, -1)
    halves = _on(device, [size[1] / 2, size[0] / 2])
    turned = _on(device, matrices).view(-1, 2, 3).mT / halves
    grid = places.bmm(turned).view(-1, 1, *size, 2)

    def operation(frames: Clips) -> Clips:
        where = grid.expand(-1, frames.shape[1], -1, -1, -1).flatten(0, 1)
        moved = grid_sample(frames.flatten(0, 1).float().sub_(GREY), where, align_corners=False)
        return moved.add_(GREY).round_().to(torch.uint8).view_as(frames)

    return operation


def _shear(values: Sequence[float], size: Size2, device: torch.device, axis: int) -> Operation:
    corner, degrees = [-size[1] / 2, -size[0] / 2], [math.degrees(math.atan(slope)) for slope in values]
    shears = [[degree, 0.0] if axis == -1 else [0.0, degree] for degree in degrees]
    return _affine([_matrix(corner, 0.0, [0, 0], 1.0, shear) for shear in shears], size, device)


def _rotate(values: Sequence[float], size: Size2, device: torch.device) -> Operation:
    turns = [_matrix([0, 0], -(degrees % 360), [0, 0], 1.0, [0, 0]) for degrees in values]
    return _affine(turns, size, device)


# Each: what it takes (of N clips), size of the frames, device -> Clips -> Clips.
OPERATIONS: dict[str, Callable[..., Operation]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": partial(_shear, axis=-1),
    "ShearY": partial(_shear, axis=-2),
    "TranslateX": partial(_translate, axis=-1),
    "TranslateY": partial(_translate, axis=-2),
}
