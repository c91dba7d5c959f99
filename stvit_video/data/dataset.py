"""Rows become batches: samples by (epoch, index), each with its own seed; samplers, loader."""

import functools
import gc
import multiprocessing.util
import os
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..errors import DecodeError, InputError
from .batch import Sample, collate, empty
from .decode import KeptVideo, Video, open_video
from .guard import GivenUp, Guard, SharedMemory
from .rows import Row
from .sampling import mixed_seed, permuted
from .views import TestViews, TrainViews


class VideoDataset(Dataset):
    """Item (epoch, index) -> Sample. All randomness of an item comes from (seed, epoch, index).

    encode: a row's target -> what the views carry and batches stack (a task's `encode`).
    substitute: in training, rows drawn at random stand in for an unreadable one until one can be read; the
        failures are told. A sample without clips is one for which more than `max_unreadable` of all rows
        failed. In scoring nothing stands in: a sample without clips is the failure.
    timeout: seconds after which a video is given up as unreadable, also within a native call; a crash of
        the decoder makes its file unreadable, too. None: videos are read in this process, unguarded.
    keep: every process that reads keeps all frames of the videos it has read; one with an unreadable
        frame is unreadable.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        views: TrainViews | TestViews,
        *,
        encode: Callable[[Any], Any] = lambda target: target,
        decoder: str = "av",
        seed: int = 0,
        substitute: bool = False,
        timeout: float | None = None,
        keep: bool = False,
        max_unreadable: float = 1.0,
    ):
        self.rows, self.views, self.encode, self.decoder = rows, views, encode, decoder
        self.seed, self.substitute, self.keep = seed, substitute, keep
        self.max_unreadable = max_unreadable
        self._guarded = self._read if timeout is None else Guard(self._read, timeout)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Sample]:
        """A batch. Where another process reads or trains, its clips lie in one shared memory, in order."""
        if self._guarded == self._read and get_worker_info() is None:
            return [self._sample(item, None) for item in items]
        memory = SharedMemory()
        samples = [self._sample(item, memory) for item in items]
        flat = memory.tensor()  # all of it at once: torch hands it on without a copy
        for i, sample in enumerate(samples):
            start = None if sample.clips is None else memory.place(sample.clips.numpy())
            if start is not None:
                size = sample.clips.numel()
                samples[i] = sample._replace(clips=flat[start : start + size].view(sample.clips.shape))
        return samples

    def _sample(self, item: tuple[int, int], memory: SharedMemory | None) -> Sample:
        epoch, index = item
        seed = mixed_seed(self.seed, epoch, index)
        failures = []
        for row in self._candidates(index, seed):
            end = memory and memory.end
            try:
                clips, targets, *extra = self._guarded(row, seed, memory)
                return Sample(index, torch.from_numpy(clips), targets, failures, *extra)
            except (DecodeError, GivenUp) as error:
                path = self.rows[row].path
                cause = str(error) if isinstance(error, DecodeError) else f"{path}: {error}"
                failures.append((path, cause))
            if memory is not None:
                memory.end = end  # what was begun is written over
            if len(failures) > self.max_unreadable * len(self):
                break
        return Sample(index, None, [], failures)

    def _candidates(self, index: int, seed: int) -> Iterator[int]:
        """The row, then in training all others: from anywhere, as bad files often lie side by side."""
        yield index
        if self.substitute:
            yield from (row for row in permuted(len(self), seed) if row != index)

    def _read(self, index: int, seed: int, memory: SharedMemory | None) -> tuple:
        """The views of a row, clips as an array. Raises DecodeError; other errors name the file, too."""
        row = self.rows[index]
        try:
            # a video is kept once, whatever a list says of it and however often
            once = replace(row, target=None)
            opened = open_kept(once, self.decoder) if self.keep else _open(row, self.decoder)
            with torch.random.fork_rng(devices=[]), opened as video:
                if cause := row.missing_frames(video.num_frames):
                    raise DecodeError(cause)
                # not torch.manual_seed: for devices that are not used it takes 2 ms to format a traceback
                torch.default_generator.manual_seed(seed)
                make = empty if memory is None else memory.empty
                clips, *rest = self.views(video, self.encode(row.target), make)
        except InputError:
            raise
        except Exception as error:  # a bug, not the file's fault: raised on, but with the file's name
            raise RuntimeError(f"{row.path}: {type(error).__name__}: {error}") from error
        return clips.contiguous().numpy(), *rest


def _open(row: Row, decoder: str) -> Video:
    # one decoder thread: what is read does not depend on the number of workers
    return open_video(row.path, decoder, threads=1, contents=row.contents())


@functools.cache
def open_kept(row: Row, decoder: str) -> Video:
    """The row's video, all its frames in memory for as long as this process lives. Raises DecodeError."""
    return KeptVideo(Path(row.path), functools.partial(_open, row, decoder))


class TrainSampler(Sampler):
    """(epoch, index) in an order that (seed, epoch) shuffles; each rank its share, in whole updates.

    An update takes `batch_size` x `accumulate` x `world` rows, the same ones however they are dealt to
    batches and ranks. The last, incomplete update of an epoch is dropped, as is usual in training; a set
    smaller than one update is repeated up to one.
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
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        shards: Sequence[range] = (),
        buffer: int = 10_000,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.shards, self.buffer = shards, buffer
        self.epoch = 0
        self.batches_done = 0  # of this epoch: a resumed run goes on behind them

    def __len__(self) -> int:
        update = self.batch_size * self.accumulate
        return max(self.length // (update * self.world), 1) * update

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))

        def shuffled(items: Sequence) -> list:
            return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

        if self.shards:
            *shards, last = shuffled(self.shards)
            # what an epoch leaves out are the last rows: in another epoch not the same ones of that shard
            first = torch.randint(len(last), (), generator=generator).item()
            order = [index for shard in (*shards, last[first:], last[:first]) for index in shard]
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
    names = [row.place and row.place.shard for row in rows]
    if None in names:
        return []
    runs = [list(run) for _, run in groupby(range(len(names)), key=names.__getitem__)]
    return [range(run[0], run[-1] + 1) for run in runs]


class TestSampler(Sampler):
    """Every index once over all ranks: rank r has r, r + world, ... Nothing is padded or repeated."""

    def __init__(self, length: int, *, rank: int = 0, world: int = 1):
        self.length, self.rank, self.world = length, rank, world
        self.leave_out(frozenset())

    def leave_out(self, done: Collection[int]) -> None:
        """The next pass is over the other indices: these were scored before."""
        left = [index for index in range(self.length) if index not in done] if done else range(self.length)
        self.indices = left[self.rank :: self.world]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


def make_loader(
    dataset: VideoDataset,
    sampler: Sampler,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    persistent: bool = True,
    prefetch: int = 2,
) -> DataLoader:
    """Batches by `workers` processes, each `prefetch` batches ahead.

    persistent: they stay from pass to pass (training); else they end with each, and free their memory.
    Raises OSError where no temporary folder can be made.
    """
    # torch warns of more workers than cores, each time; how many is the caller's choice
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    if workers:
        # else each worker makes this folder as it hands over its first batch: if the disk is full by then,
        # the batch is lost, and who waits for it waits for ever
        multiprocessing.util.get_temp_dir()
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    """One thread; and signals that are sent to all processes of a job are the main process's to answer.

    What the parent made is left to it: a garbage collection here would copy every page of it.
    """
    gc.freeze()
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
