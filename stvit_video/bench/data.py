"""How fast videos become clips: the loaders of training and scoring, and one video beside its bare decode."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .. import build
from ..config import Config
from ..data.annotations import Row
from ..data.batch import Sample, collate
from ..data.dataset import VideoDataset
from ..data.decode import Video, open_video
from ..data.demo import write_mp4
from ..data.sampling import mixed_seed
from ..figures import draw_loading
from ..engine.logs import progress

STAGES = ("read", "transform", "collate")
BATCH = 2  # videos: samples/s do not depend on it, memory does
COUNTED = 8  # batches of a worker, or of this process, that a round counts
SPLIT = 4  # samples whose stages a round times


def bench_data(
    config: Config,
    *,
    videos: Sequence[str | Path] = (),
    workers: Sequence[int] = (0, 1, 2),
    rounds: int = 5,
    output: Path | None = None,
) -> list[dict]:
    """Rows for "train" (random clips) and "test" (all views) and each number of workers.

    videos: files; none: the config's lists where `data.train` is set, else a video rendered for this.
    rounds: each measures everything once, in turn; figures are medians over them.
    output: folder for data.png, None: no picture.
    Columns: what, workers, samples/s (a sample is a video with all its clips; also its lowest and highest
    round), samples/s per core, ms of a sample in each of STAGES and in all, in one process without workers.
    """
    rates, stages = {}, {"train": [], "test": []}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with _sources(config, videos) as sources:
        for number in progress(range(rounds), desc="loading", unit="round"):
            for what, rows in sources.items():
                dataset = _loader(config, what, rows, 0).dataset
                items = ((number, i % len(rows)) for i in range(SPLIT))
                stages[what] += [time_stages(dataset, item) for item in items]
                for count in workers:
                    rate = measure_loading(config, what, rows, workers=count, epoch=number)
                    rates.setdefault((what, count), []).append(rate)
    table = [
        {
            "what": what,
            "workers": count,
            "samples/s": median(values),
            "lowest": min(values),
            "highest": max(values),
            "samples/s per core": median(values) / min(max(count, 1), cores),
            **{f"{key} ms": median(entry[key] for entry in stages[what]) for key in (*STAGES, "all")},
        }
        for (what, count), values in rates.items()
    ]
    if output is not None:
        draw_loading(table, Path(output, "data.png"))
    return table


def bench_views(config: Config, *, videos: Sequence[str | Path] = (), rounds: int = 5) -> list[dict]:
    """What loading each video costs in this process, one thread, beside one bare decode of it.

    Columns: video, what, ms (median of the rounds), "of a full decode" (median of the rounds' ratios).
    """
    table = []
    with _sources(config, videos) as sources:
        test, train = (_loader(config, what, sources[what], 0).dataset for what in ("test", "train"))
        for index, row in enumerate(sources["test"]):
            kinds = {
                "full decode": lambda path=row.path: decode_all(path),
                f"{test.views.clips * test.views.transform.crops} views": lambda i=index: test[0, i],
                f"{train.views.repeats} training clips": lambda i=index: train[0, i],
            }
            times = [[_ms(call) for call in kinds.values()] for _ in range(rounds + 1)][1:]  # one warms up
            for kind, values in zip(kinds, zip(*times, strict=True), strict=True):
                ratio = median(value / bare for value, (bare, *_) in zip(values, times, strict=True))
                entry = {"video": Path(row.path).name, "what": kind, "ms": median(values)}
                table.append(entry | {"of a full decode": ratio})
    return table


def measure_loading(
    config: Config, what: str, rows: Sequence[Row], *, workers: int, epoch: int = 0
) -> float:
    """Samples/s of the "train" or "test" loader, without the first batches and with no end in sight."""
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


def time_stages(dataset: VideoDataset, item: tuple[int, int]) -> dict[str, float]:
    """(epoch, index) -> ms of each of STAGES and of "all", for that sample alone, in this process.

    read: the file is opened, its frames decoded and converted to RGB. transform: the rest of the views.
    """
    row = dataset.rows[item[1]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(dataset.seed, *item))
        start = perf_counter()
        with open_video(row.path, dataset.decoder, threads=1, contents=row.contents()) as video:
            opened, timed = perf_counter(), _TimedVideo(video)
            clips, targets = dataset.views(timed, -1 if row.target is None else row.target)
        made = perf_counter()
        collate([Sample(item[1], clips, targets, [])])
        end = perf_counter()
    read = opened - start + timed.seconds
    seconds = (read, made - start - read, end - made, end - start)
    return {stage: 1000 * value for stage, value in zip((*STAGES, "all"), seconds, strict=True)}


class _TimedVideo(Video):
    """A video that knows how long its `read` took."""

    def __init__(self, video: Video):
        self.video, self.num_frames, self.fps, self.seconds = video, video.num_frames, video.fps, 0.0

    def read(self, indices: Sequence[int]) -> Tensor:
        start = perf_counter()
        frames = self.video.read(indices)
        self.seconds += perf_counter() - start
        return frames


def decode_all(path: str | Path) -> int:
    """Decode every frame by plain PyAV in one thread; -> their number."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def render_video(path: Path, frames: int = 300) -> Path:
    """340x256 pixels at 30 frames/s: a texture with detail of several sizes under a moving camera, and noise."""
    rng = np.random.default_rng(0)
    coarse = (rng.normal(0, 22, (512 // cell, 704 // cell, 3)) for cell in (64, 16, 4))
    texture = 128 + sum(grid.repeat(512 // len(grid), 0).repeat(512 // len(grid), 1) for grid in coarse)
    images = np.empty((frames, 256, 340, 3), np.uint8)
    for i, image in enumerate(images):
        y, x = int(128 + 100 * np.sin(i / 60)), int(170 + 140 * np.cos(i / 75))
        view = texture[y : y + 256, x : x + 340]
        image[:] = np.clip(view + rng.normal(0, 2, view.shape), 0, 255)
    write_mp4(path, images, fps=30)
    return path


@contextmanager
def _sources(config: Config, videos: Sequence[str | Path]) -> Iterator[dict[str, Sequence[Row]]]:
    """The rows to train on and to score: `videos`, the config's lists, or a video rendered for this.

    Within it torch has one thread, as in the workers.
    """
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
    device, task = torch.device("cpu"), build.build_task(config, ["0"])
    if what == "train":
        return build.build_train_loader(config, task, rows, device)
    views = {"clips": config.eval.clips, "crops": config.eval.crops}
    return build.build_test_loader(config, task, rows, device, **views)


def _ms(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return 1000 * (perf_counter() - start)
