"""Batches on their way to the device: one travels while the one before it is computed on."""

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..data import augment
from ..data.batch import Batch


class Uploads:
    """The batches of a loader on the device, in order.

    On CUDA a batch is uploaded on a stream of its own, so that the copy overlaps with arithmetic; it comes
    from pinned memory as the loader made it. What is left of augmentation is done when it is asked for.
    waited: seconds in which the loader was waited for.
    """

    def __init__(self, loader: Iterable[Batch], device: torch.device):
        self.batches, self.device, self.waited = iter(loader), device, 0.0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Batch | None = None

    def prefetch(self) -> None:
        """Ask the loader for the next batch and begin its upload, unless that was done."""
        if self._next is not None:
            return
        asked = time.perf_counter()
        batch = next(self.batches, None)
        self.waited += time.perf_counter() - asked
        if batch is not None:
            with torch.cuda.stream(self.stream):
                self._next = batch.to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.prefetch()
        batch, self._next = self._next, None
        if batch is None:
            raise StopIteration
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self.stream)
            for tensor in tree_leaves((batch.clips, batch.targets)):  # targets may be nested
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)
        return augment.finish(batch)
