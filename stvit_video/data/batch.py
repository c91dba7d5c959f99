"""Samples and batches, for a data set, a loader and a training loop: needs torch and numpy only."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Sample(NamedTuple):
    """V views of one video: clips uint8 (V, 3, T, H, W), a target a view; and what could not be read.

    draws: a Draw a view, where clips are to be augmented on the device; clips are cut, and flat, till then.
    preview: the video as a small WebP, where the views make one.
    """

    index: int
    clips: Tensor | None  # None: not read
    targets: list
    failures: list[tuple[str, str]]  # (path, cause)
    draws: list | None = None
    preview: bytes | None = None


@dataclass
class Batch:
    """B samples.

    indices: (B,) of those that were read. clips: uint8 (B, V, 3, T, H, W), a list of B where shapes differ.
    targets: as `stack` makes them, with (B, V) in front; where they are not alike B lists of V.
    failures: (path, cause) of unreadable files; failed: indices of samples without clips.
    draws: B lists of V, until the device has augmented the clips: till then they are cut, flat (bytes,).
    previews: B of them, as the samples have them.
    """

    indices: Tensor
    clips: Tensor | list[Tensor] | None
    targets: Any
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    draws: list[list] | None = None
    previews: list[bytes | None] = field(default_factory=list)

    def pin_memory(self) -> Self:
        return self._moved(Tensor.pin_memory)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Clips and targets on `device`; their layout in memory stays."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, clips=_each_tensor(move, self.clips), targets=_each_tensor(move, self.targets))


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of the samples that were read; the failures of all."""
    read = [sample for sample in samples if sample.clips is not None]
    clips, draws = [sample.clips for sample in read], [sample.draws for sample in read]
    if read and draws[0] is not None:
        clips = _joined(clips)
    elif len({clip.shape for clip in clips}) == 1:
        clips = _joined(clips).view(len(clips), *clips[0].shape)
    return Batch(
        indices=torch.tensor([sample.index for sample in read], dtype=torch.long),
        clips=clips if read else None,
        targets=_stack_targets([sample.targets for sample in read]) if read else None,
        failures=[failure for sample in samples for failure in sample.failures],
        failed=[sample.index for sample in samples if sample.clips is None],
        draws=draws if read and draws[0] is not None else None,
        previews=[sample.preview for sample in read],
    )


def stack(values: Sequence) -> Any:
    """N values -> one: numbers (N,), tensors of one shape (N, ...), dicts key by key; others a list.

    Tensors with a meaning beside their numbers (torchvision's boxes have a format) are always listed.
    """
    first, kinds = values[0], {type(value) for value in values}
    if kinds <= {int} or kinds <= {float}:
        return torch.tensor(values)
    if kinds <= {dict} and all(value.keys() == first.keys() for value in values):
        return {key: stack([value[key] for value in values]) for key in first}
    tensors = len(kinds) == 1 and isinstance(first, Tensor) and not vars(first)
    if tensors and len({(value.shape, value.dtype) for value in values}) == 1:
        return torch.stack(list(values)).as_subclass(type(first))
    return list(values)


def empty(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """By numpy: it asks for large pages, which torch does not and which take a third of the time."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(*shape)


def _joined(clips: list[Tensor]) -> Tensor:
    """uint8, flat; copied only where they do not lie in one memory, one behind the other."""
    sizes = [clip.numel() for clip in clips]
    start, memory = clips[0].storage_offset(), clips[0].untyped_storage().data_ptr()
    behind = itertools.accumulate(sizes[:-1], initial=start)
    if all(
        clip.is_contiguous()
        and (clip.untyped_storage().data_ptr(), clip.storage_offset()) == (memory, place)
        for clip, place in zip(clips, behind, strict=True)
    ):
        return clips[0].as_strided([sum(sizes)], [1])
    return torch.cat([clip.flatten() for clip in clips], out=_buffer([sum(sizes)]))


def _buffer(shape: Sequence[int]) -> Tensor:
    """uint8; in a loader's worker in memory that the main process shares, which saves a copy."""
    if get_worker_info() is None:
        return empty(shape)
    memory = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)


def _stack_targets(targets: list[list]) -> Any:
    """B lists of V targets, stacked over both."""
    if len({len(views) for views in targets}) > 1:
        return targets
    stacked = stack([target for views in targets for target in views])
    return _unflatten(stacked, len(targets), len(targets[0]))


def _unflatten(values: Any, samples: int, views: int) -> Any:
    if isinstance(values, dict):
        return {key: _unflatten(value, samples, views) for key, value in values.items()}
    if isinstance(values, Tensor):
        return values.as_subclass(Tensor).unflatten(0, (samples, views)).as_subclass(type(values))
    return [values[i * views : (i + 1) * views] for i in range(samples)]


def _each_tensor(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """`function` of each tensor in dicts, lists and tuples; a subclass keeps its type and attributes."""
    if isinstance(values, Tensor):
        changed = function(values)
        if type(changed) is not type(values):
            changed = changed.as_subclass(type(values))
            vars(changed).update(vars(values))
        return changed
    if isinstance(values, dict):
        return {key: _each_tensor(function, value) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_each_tensor(function, value) for value in values)
    return values
