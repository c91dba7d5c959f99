"""Rows become batches: samples by (epoch, index), each with its own seed; collate, samplers, loader."""

import functools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError
from .annotations import Row
from .decode import DecodeError, KeptVideo, Video, open_video
from .guard import GivenUp, Guard
from .transforms import empty
from .views import TestViews, TrainViews

SUBSTITUTES = 10  # rows tried for one sample: where all fail, the cause is a wrong path


class Sample(NamedTuple):
    """One video's views: clips uint8 (V, 3, T, H, W), labels (V,); and what could not be read."""

    index: int
    clips: Tensor | None
    labels: Tensor | None
    failures: list[tuple[str, str]]  # (path, cause)


@dataclass
class Batch:
    """B videos: indices (B,), clips uint8 (B, V, 3, T, H, W), labels (B, V), and unreadable files."""

    indices: Tensor
    clips: Tensor | None
    labels: Tensor | None
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def pin_memory(self):
        if self.clips is not None:
            self.clips, self.labels = self.clips.pin_memory(), self.labels.pin_memory()
        return self


class VideoDataset(Dataset):
    """Item (epoch, index) -> Sample. All randomness of an item comes from (seed, epoch, index).

    substitute: in training, the next row stands in for an unreadable one, and the failure is told. In
        scoring nothing stands in: a sample without clips is the failure.
    timeout: seconds after which a video is given up as unreadable, also within a native call; a crash of
        the decoder makes its file unreadable, too. None: videos are read in this process, unguarded.
    keep: every process that reads keeps all frames of the videos it has read; one with an unreadable
        frame is unreadable.
    A row without a label has label -1.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        views: TrainViews | TestViews,
        *,
        decoder: str = "av",
        seed: int = 0,
        substitute: bool = False,
        timeout: float | None = None,
        keep: bool = False,
    ):
        self.rows, self.views, self.decoder = rows, views, decoder
        self.seed, self.substitute, self.keep = seed, substitute, keep
        self._guarded = self._read if timeout is None else Guard(self._read, timeout)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, index = item
        seed = mixed_seed(self.seed, epoch, index)
        failures = []
        for row in self._candidates(index):
            path = self.rows[row].path
            try:
                clips, labels = self._guarded(row, seed)
                return Sample(index, torch.from_numpy(clips), torch.from_numpy(labels), failures)
            except DecodeError as error:
                failures.append((path, str(error)))
            except GivenUp as error:
                failures.append((path, f"{path}: {error}"))
        return Sample(index, None, None, failures)

    def _candidates(self, index: int) -> list[int]:
        """The row, and the rows that stand in for it: the next one, then ever farther ones.

        Unreadable files often lie side by side (a class folder that is missing).
        """
        if not self.substitute:
            return [index]
        steps = [*(2**i - 1 for i in range(SUBSTITUTES)), *range(SUBSTITUTES)]
        rows = dict.fromkeys((index + step) % len(self) for step in steps)
        return list(rows)[:SUBSTITUTES]

    def _read(self, index: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips and labels of one row. Raises DecodeError; any other error, too, names the file."""
        row = self.rows[index]
        try:
            with (
                torch.random.fork_rng(devices=[]),
                (open_kept if self.keep else _open)(row, self.decoder) as video,
            ):
                if row.num_frames is not None and video.num_frames < row.num_frames:
                    raise DecodeError(
                        f"{row.path}: the list says {row.num_frames} frames, there are {video.num_frames}"
                    )
                torch.manual_seed(seed)
                clips, labels = self.views(video, -1 if row.label is None else row.label)
        except InputError:
            raise
        except Exception as error:  # a bug, not the file's fault: raised on, but with the file's name
            raise RuntimeError(f"{row.path}: {type(error).__name__}: {error}") from error
        return clips.contiguous().numpy(), labels.numpy()


def _open(row: Row, decoder: str) -> Video:
    # one decoder thread: what is read does not depend on the number of workers
    return open_video(row.path, decoder, threads=1, contents=row.contents())


@functools.cache
def open_kept(row: Row, decoder: str) -> Video:
    """The row's video, all its frames in memory for as long as this process lives. Raises DecodeError."""
    with _open(row, decoder) as video:
        return KeptVideo(video, Path(row.path))


def collate(samples: list[Sample]) -> Batch:
    read = [s for s in samples if s.clips is not None]
    clips = [s.clips for s in read]
    return Batch(
        indices=torch.tensor([s.index for s in read], dtype=torch.long),
        clips=torch.stack(clips, out=empty((len(clips), *clips[0].shape))) if read else None,
        labels=torch.stack([s.labels for s in read]) if read else None,
        failures=[failure for s in samples for failure in s.failures],
        failed=[s.index for s in samples if s.clips is None],
    )


class TrainSampler(Sampler):
    """(epoch, index) in an order that (seed, epoch) shuffles; each rank its share, in whole batches.

    The last, incomplete round of batches over all ranks is dropped, as is usual in training; a set smaller
    than one round is repeated up to one.
    shards: the rows of each tar file, where rows lie in some. They are then shuffled in two steps, so that
        a disk or network is read file by file: the files are put in a random order and dealt to the ranks
        in one piece each, which is shuffled `buffer` rows at a time.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shards: Sequence[range] = (),
        buffer: int = 10_000,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world = rank, world
        self.shards, self.buffer = shards, buffer
        self.epoch = 0
        self.batches_done = 0  # of this epoch: a resumed run goes on behind them

    def __len__(self) -> int:
        return max(self.length // (self.batch_size * self.world), 1) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))

        def shuffled(items: Sequence) -> list:
            return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

        if self.shards:
            order = [index for shard in shuffled(self.shards) for index in shard]
        else:
            order = shuffled(range(self.length))
        order = [order[i % self.length] for i in range(len(self) * self.world)]
        if self.shards:
            share = order[self.rank * len(self) : (self.rank + 1) * len(self)]
            pieces = (share[i : i + self.buffer] for i in range(0, len(share), self.buffer))
            share = [index for piece in pieces for index in shuffled(piece)]
        else:
            share = order[self.rank :: self.world]
        share = share[self.batches_done * self.batch_size :]
        return ((self.epoch, index) for index in share)


def shards_of(rows: Sequence[Row]) -> list[range]:
    """The rows of each shard, in order; none where some row is a file of its own."""
    if any(row.place is None for row in rows):
        return []
    runs = groupby(range(len(rows)), key=lambda i: rows[i].place.shard)
    return [range(run[0], run[-1] + 1) for run in (list(run) for _, run in runs)]


class TestSampler(Sampler):
    """Every index once over all ranks: rank r has r, r + world, ... Nothing is padded or repeated."""

    def __init__(self, length: int, *, rank: int = 0, world: int = 1):
        self.indices = range(length)[rank::world]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


def make_loader(
    dataset: VideoDataset, sampler: Sampler, *, batch_size: int, workers: int, pin_memory: bool
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
    )


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed of several numbers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _start_worker(worker: int) -> None:
    """One thread; and signals that are sent to all processes of a job are the main process's to answer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """End by the parent's SIGTERM, which ends the job, and by nobody else's: the parent needs its data."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
