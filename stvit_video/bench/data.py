"""How fast videos become clips: the loaders of training and scoring; one video beside its bare decode."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from timeit import timeit

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import build
from ..config import Config
from ..data import augment, demo
from ..data.batch import Sample, collate
from ..data.dataset import VideoDataset
from ..data.decode import Video, open_video
from ..data.rows import Row
from ..engine.logs import progress
from ..figures import draw_loading

STAGES = ("read", "transform", "collate")
BATCH = 2  # videos: samples/s do not depend on it, memory does
COUNTED = 8  # batches of a worker, or of this process, that a round counts
SPLIT = 4  # samples whose stages a round times
CPU = torch.device("cpu")


def bench_data(
    config: Config, *, videos: Sequence = (), workers=(0, 1, 2), rounds: int = 5, output: Path | None = None
) -> list[dict]:
    """Rows for "train" (random clips) and "test" (all views) and each number of workers.

    videos: files; none: the config's lists where `data.train` is set, else a video rendered for this.
    rounds: each measures everything once; figures are medians. output: folder for data.png.
    Columns: what, workers, samples/s (a sample is a video with all its clips; lowest and highest round),
    samples/s per core, and of one process without workers ms of a sample in each of STAGES and in all.
    """
    rates, stages = {}, {"train": [], "test": []}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with _sources(config, videos) as sources:
        for number in progress(range(rounds), desc="loading", unit="round"):
            for what, rows in sources.items():
                dataset = _loader(config, what, rows, 0).dataset
                stages[what] += [time_stages(dataset, number, i % len(rows)) for i in range(SPLIT)]
                for count in workers:
                    rate = measure_loading(config, what, rows, workers=count, epoch=number)
                    rates.setdefault((what, count), []).append(rate)
    table = []
    for (what, count), values in rates.items():
        row = {"what": what, "workers": count, "samples/s": median(values)}
        row |= {"lowest": min(values), "highest": max(values)}
        row["samples/s per core"] = median(values) / min(max(count, 1), cores)
        row |= {f"{key} ms": median(times[key] for times in stages[what]) for key in (*STAGES, "all")}
        table.append(row)
    if output is not None:
        draw_loading(table, Path(output, "data.png"))
    return table


def bench_views(config: Config, *, videos: Sequence = (), rounds: int = 5) -> list[dict]:
    """What loading each video costs in this process, beside one bare decode of it.

    Columns: video, what, ms (median of the rounds), "of a full decode" (median of the rounds' ratios).
    """
    table = []
    config = replace(config, data=replace(config.data, timeout=None))  # a guard reads in a child process
    with _sources(config, videos) as sources:
        test, train = (_loader(config, what, sources[what], 0).dataset for what in ("test", "train"))
        for index, row in enumerate(sources["test"]):
            kinds = {
                "full decode": lambda path=row.path: decode_all(path),
                f"{test.views.clips * test.views.transform.crops} views": lambda i=index: test[0, i],
                f"{train.views.repeats} training clips": lambda i=index: train[0, i],
            }
            times = [[timeit(call, number=1) for call in kinds.values()] for _ in range(rounds + 1)][1:]
            for kind, seconds in zip(kinds, zip(*times, strict=True), strict=True):
                ratio = median(value / bare for value, (bare, *_) in zip(seconds, times, strict=True))
                entry = {"video": Path(row.path).name, "what": kind, "ms": 1000 * median(seconds)}
                table.append(entry | {"of a full decode": ratio})
    return table


def bench_feeding(
    config: Config, lists: Sequence[str], *, rounds: int = 5, samples: int = 16
) -> list[dict]:
    """What training samples cost a loader's process and its guard's child, in CPU time, from each list.

    Columns: list, data.augment_on, samples a core-second (median, lowest and highest round), MB that a
    sample uploads, and ms of a sample that are left to the device, on this CPU.
    """
    costs: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    kinds = [(path, where) for path in lists for where in ("worker", "device")]
    datasets = {}
    for path, where in kinds:
        case = replace(config, data=replace(config.data, train=path, augment_on=where))
        rows, _ = build.read_split(case, "train")
        datasets[path, where] = _loader(case, "train", rows, 0).dataset
    for number in progress(range(rounds + 1), desc="feeding", unit="round"):
        for kind, dataset in datasets.items():
            items = [(number * samples + i, i % len(dataset)) for i in range(samples)]  # other draws each
            begun = _cpu_seconds(dataset)
            batch = collate(dataset.__getitems__(items))
            read = _cpu_seconds(dataset)
            size = batch.clips.numel()
            augment.finish(batch)
            costs.setdefault(kind, []).append((read - begun, _cpu_seconds(dataset) - read, size))
    table = []
    for (path, where), rounds_ in costs.items():
        worker, device, sizes = zip(*rounds_[1:], strict=True)  # the first starts the guard's child
        rates = [samples / seconds for seconds in worker]
        row = {"list": path, "augment_on": where, "samples/core s": median(rates)}
        row |= {"lowest": min(rates), "highest": max(rates), "MB": median(sizes) / samples / 1e6}
        table.append(row | {"device ms": 1000 * median(device) / samples})
    return table


def _cpu_seconds(dataset: VideoDataset) -> float:
    """Of this process and the guard's child, where there is one."""
    child = getattr(dataset._guarded, "_child", None)
    used = Path(f"/proc/{child.pid}/schedstat").read_text().split()[0] if child else 0
    return process_time() + int(used) / 1e9


def measure_loading(config: Config, what: str, rows: Sequence[Row], *, workers: int, epoch: int) -> float:
    """Samples/s of the "train" or "test" loader, but for its first batches, with work left at its end."""
    counted, ahead = COUNTED * max(workers, 1), 2 * workers + 1
    repeated = [rows[i % len(rows)] for i in range(BATCH * (counted + 2 * ahead))]
    loader = _loader(config, what, repeated, workers)
    loader.sampler.epoch = epoch
    batches = iter(loader)
    for _ in range(ahead):
        next(batches)
    start = perf_counter()
    samples = sum(len(next(batches).indices) for _ in range(counted))
    return samples / (perf_counter() - start)


def time_stages(dataset: VideoDataset, epoch: int, index: int) -> dict[str, float]:
    """ms of each of STAGES and of "all" for one sample, in this process.

    read: the file is opened, its frames decoded and converted to RGB. transform: the rest of the views.
    """
    row = dataset.rows[index]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(epoch)
        start = perf_counter()
        with open_video(row.path, dataset.decoder, threads=1, contents=row.contents()) as video:
            opened, timed = perf_counter(), _TimedVideo(video)
            clips, targets, *extra = dataset.views(timed, row.target)
        made = perf_counter()
        collate([Sample(index, clips, targets, [], *extra)])
        end = perf_counter()
    read = opened - start + timed.seconds
    seconds = (read, made - start - read, end - made, end - start)
    return {stage: 1000 * value for stage, value in zip((*STAGES, "all"), seconds, strict=True)}


class _TimedVideo(Video):
    """A video that knows how long its `read` took."""

    def __init__(self, video: Video):
        self.video, self.num_frames, self.fps, self.seconds = video, video.num_frames, video.fps, 0.0

    def read(self, indices: Sequence[int], short_side: int | None = None) -> Tensor:
        start = perf_counter()
        frames = self.video.read(indices, short_side)
        self.seconds += perf_counter() - start
        return frames


def decode_all(path: str | Path) -> int:
    """Decode every frame by plain PyAV in one thread; -> their number."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def render_video(path: Path) -> Path:
    """10 s of 320x240 pixels at 30 frames/s: clips of the demo set, enlarged, one after the other."""
    rng = np.random.default_rng(0)
    frames = np.concatenate([demo.render(name, "star", rng) for name in 2 * demo.CLASSES])[:300]
    demo.write_mp4(path, frames.repeat(5, 1).repeat(5, 2), fps=30)
    return path


@contextmanager
def _sources(config: Config, videos: Sequence) -> Iterator[dict[str, Sequence[Row]]]:
    """The rows to train on and to score; within it torch has one thread, as in the workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if not videos and config.data.train is not None:
                train, names = build.read_split(config, "train")
                held_out = config.data.test or config.data.val
                test = build.read_split(config, "test", names)[0] if held_out else train
            else:
                files = videos or [render_video(Path(folder, "rendered.mp4"))]
                train = test = [Row(str(file), 0) for file in files]
            yield {"train": train, "test": test}
    finally:
        torch.set_num_threads(threads)


def _loader(config: Config, what: str, rows: Sequence[Row], workers: int) -> DataLoader:
    """The loader of training or scoring; BATCH videos a batch."""
    # files have no class names, and to mirror costs the same with another label
    flip = "all" if config.data.flip == "swap" else config.data.flip
    config = replace(
        config,
        data=replace(config.data, workers=workers, flip=flip),
        train=replace(config.train, batch_size=BATCH),
        eval=replace(config.eval, batch_size=BATCH),
    )
    task, views = build.build_task(config, ["0"]), {"clips": config.eval.clips, "crops": config.eval.crops}
    if what == "train":
        return build.build_train_loader(config, task, rows, CPU)
    return build.build_test_loader(config, task, rows, CPU, **views)
