"""How fast videos become clips: the loaders of training and scoring, and one video beside its bare decode.

`bench_data` times the loaders for each number of workers, and where the time of a sample goes;
`bench_views` gives what loading one file costs against one bare decode of it by the same decoder. The code
that is measured knows nothing of this: its stages are timed by what wraps them.
"""

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torch.utils.data import DataLoader

from .. import build
from ..config import Config
from ..data import decode
from ..data.annotations import Row
from ..data.dataset import Sample, VideoDataset, collate, mixed_seed
from ..data.decode import Video, open_video
from ..data.views import TestViews, TrainViews
from ..engine.figures import draw_loading
from ..engine.logs import progress

STAGES = ("open", "decode", "convert", "transform", "collate")
BATCH = 2  # videos: samples/s do not depend on it, memory does
COUNTED = 8  # batches of a worker, or of this process, that a round counts
SPLIT = 4  # videos whose stages a round times
DRAWS = 4  # calls that a round takes the mean of
CPU = torch.device("cpu")


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
    round), samples/s per core (of those that the workers can have; without workers, of one), ms of a sample
    in each of STAGES and in all, measured in one process without workers.
    """
    with _sources(config, videos) as sources, progress(total=rounds * 2 * (1 + len(workers))) as bar:
        rates: dict[tuple[str, int], list[float]] = {}
        stages: dict[str, list[dict[str, float]]] = {}
        for number in range(rounds):
            for what, rows in sources.items():
                bar.set_description(f"{what}: stages")
                dataset = _loader(config, what, rows, 0).dataset
                items = [(number, index) for index in range(len(rows))]
                found = [time_stages(dataset, items[i % len(items)]) for i in range(SPLIT)]
                stages.setdefault(what, []).extend(found)
                bar.update()
                for count in workers:
                    bar.set_description(f"{what}: {count} workers")
                    rates.setdefault((what, count), []).append(
                        measure_loading(config, what, rows, workers=count, epoch=number)
                    )
                    bar.update()
    table = []
    for (what, count), found in rates.items():
        cores = min(max(count, 1), _cores())
        split = {f"{stage} ms": _median(stages[what], stage) for stage in (*STAGES, "all")}
        table.append({
            "what": what,
            "workers": count,
            "samples/s": median(found),
            "lowest": min(found),
            "highest": max(found),
            "samples/s per core": median(found) / cores,
            **split,
        })  # fmt: skip
    if output is not None:
        draw_loading(table, Path(output, "data.png"))
    return table


def bench_views(config: Config, *, videos: Sequence[str | Path] = (), rounds: int = 5) -> list[dict]:
    """Rows of `measure_views` of each video (none: one rendered for this), under a column "video"."""
    with _sources(config, videos) as sources:
        test, train = (_loader(config, what, sources[what], 0).dataset.views for what in ("test", "train"))
        return [
            {"video": Path(row.path).name, **figures}
            for row in {row.path: row for row in sources["test"]}.values()
            for figures in measure_views(row.path, test, train, rounds=rounds)
        ]


def measure_loading(
    config: Config, what: str, rows: Sequence[Row], *, workers: int, epoch: int = 0
) -> float:
    """Samples/s of the "train" or "test" loader in steady state.

    The first batches, which the workers begin with, are not counted; nor is there an end: work for
    after the last counted batch goes on all the time.
    """
    counted = COUNTED * max(workers, 1)
    ahead = 2 * workers + 1  # what a loader has under way beside
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
    """(epoch, index) -> ms of each of STAGES, and of "all", for that sample alone, in this process.

    open: the file is opened and its packets listed (also: its bytes read from a shard).
    convert: to RGB by PyAV; other decoders do it within "decode".
    decode: the rest of `Video.read`. transform: the rest of the views. collate: of a batch of one.
    """
    row, threads = dataset.rows[item[1]], torch.get_num_threads()
    with (
        patch.object(decode, "VideoReformatter", _TimedReformatter),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(mixed_seed(dataset.seed, *item))
        torch.set_num_threads(1)  # as the workers have
        try:
            _TimedReformatter.seconds = 0.0
            start = perf_counter()
            with open_video(row.path, dataset.decoder, threads=1, contents=row.contents()) as video:
                opened, timed = perf_counter(), _TimedVideo(video)
                clips, labels = dataset.views(timed, -1 if row.label is None else row.label)
                made = perf_counter()
            collate([Sample(item[1], clips, labels, [])])
            end = perf_counter()
        finally:
            torch.set_num_threads(threads)
    convert = _TimedReformatter.seconds
    seconds = {
        "open": opened - start,
        "decode": timed.seconds - convert,
        "convert": convert,
        "transform": made - opened - timed.seconds,
        "collate": end - made,
        "all": end - start,
    }
    return {stage: 1000 * value for stage, value in seconds.items()}


def measure_views(path: str | Path, test: TestViews, train: TrainViews, *, rounds: int = 5) -> list[dict]:
    """What loading a file costs in this process, one thread, beside one bare decode of it.

    Rows: what; ms (median of the rounds), lowest, highest; "of a full decode": median of the rounds' ratios
    to the bare decode of the same round. A round's figure is the mean of DRAWS calls in a row, after one
    that is not counted: as in a loader, memory is at hand, and random clips differ. "a decode a view" is a
    whole decode for each view, in which only its frames are converted: once a round.
    """
    one = replace(train, repeats=1)
    number = test.clips * test.transform.crops
    kinds: dict[str, Callable[[], object]] = {
        "full decode": lambda: deque(decode_all(path), maxlen=0),
        "full decode, every frame to RGB": lambda: deque(decode_all(path, lambda place: True), maxlen=0),
        f"{number} views": lambda: load(path, test),
        f"{number} views, a decode a view": lambda: _decode_for_each_view(path, test),
        f"{train.repeats} training clips": lambda: load(path, train),
        "1 training clip": lambda: load(path, one),
        "1 clip, read": lambda: load(
            path, lambda video, _: video.read(sorted(set(one.sampling.train(video))))
        ),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            for turn in progress(range(-1, rounds), desc=Path(path).name, unit="round"):
                for kind, function in kinds.items():
                    draws = 1 if kind.endswith("a decode a view") else DRAWS
                    torch.manual_seed(mixed_seed(turn + 1))  # the same clips for all that draw some
                    if draws > 1:
                        function()
                    start = perf_counter()
                    for _ in range(draws):
                        function()
                    if turn >= 0:  # the first round warms up
                        seconds[kind].append((perf_counter() - start) / draws)
    finally:
        torch.set_num_threads(threads)
    bare = seconds["full decode"]
    return [
        {
            "what": kind,
            "ms": 1000 * median(found),
            "lowest": 1000 * min(found),
            "highest": 1000 * max(found),
            "of a full decode": median(a / b for a, b in zip(found, bare, strict=True)),
        }
        for kind, found in seconds.items()
    ]


def load(path: str | Path, views: Callable[[Video, int], object]) -> object:
    """Open a video as the loaders do, and make its views."""
    with open_video(path, threads=1) as video:
        return views(video, 0)


def decode_all(
    path: str | Path, convert: Callable[[int], bool] = lambda place: False
) -> Iterator[np.ndarray]:
    """Decode every frame by plain PyAV in one thread; yield those to `convert`, RGB (H, W, 3)."""
    rgb = VideoReformatter()
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for place, frame in enumerate(container.decode(stream)):
            if convert(place):
                yield rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()


def _decode_for_each_view(path: str | Path, test: TestViews) -> None:
    with open_video(path, threads=1) as video:
        clips = [test.sampling.test(video, at) for at in np.linspace(0, 1, test.clips).tolist()]
    for clip in clips:
        for crop in range(test.transform.crops):
            frames = np.stack(list(decode_all(path, set(clip).__contains__)))
            test.transform(torch.from_numpy(frames).permute(0, 3, 1, 2))[crop].contiguous()


def render_video(
    path: Path, *, seconds: float = 10, size: tuple[int, int] = (340, 256), rate: int = 30
) -> Path:
    """A video as Kinetics has them: H.264 of about 1 Mbit/s, key frames 1.5 s apart. The same each time.

    Texture under a moving camera, two patches that move across it, and noise, which costs bits as grain.
    """
    rng = np.random.default_rng(0)
    width, height = size
    texture = _smooth(rng, 2 * height, 2 * width)
    patches = [_smooth(rng, height // 3, width // 4) for _ in range(2)]
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "threads": "1", "g": str(int(1.5 * rate))}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.bit_rate = 1_000_000
        for number in range(round(seconds * rate)):
            t = number / rate
            top, left = (int(length * (0.5 + 0.4 * wave)) for length, wave in (
                (height, np.sin(0.5 * t)), (width, np.cos(0.4 * t)),
            ))  # fmt: skip
            image = texture[top : top + height, left : left + width].copy()
            for i, patch_ in enumerate(patches):
                h, w = patch_.shape[:2]
                y, x = (int(room * (0.5 + 0.5 * np.sin(speed * t + i))) for room, speed in (
                    (height - h, 1.7), (width - w, 2.3 - i),
                ))  # fmt: skip
                image[y : y + h, x : x + w] = patch_
            image += rng.normal(0, 2, image.shape)
            frame = av.VideoFrame.from_ndarray(np.clip(image, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A texture with detail of every size: (height, width, 3), levels around 128."""
    image = np.full((height, width, 3), 128, np.float32)
    for cell in (64, 16, 4):
        coarse = rng.normal(0, 22, (height // cell + 1, width // cell + 1, 3))
        fine = torch.from_numpy(coarse).permute(2, 0, 1)[None].float()
        fine = torch.nn.functional.interpolate(fine, (height, width), mode="bilinear")
        image += fine[0].permute(1, 2, 0).numpy()
    return image


@contextmanager
def _sources(config: Config, videos: Sequence[str | Path]) -> Iterator[dict[str, list[Row]]]:
    """The rows to train on and to score: `videos`, the config's lists, or a video rendered for this."""
    if not videos and config.data.train is not None:
        train, names = build.read_split(config, "train")
        held_out = config.data.test or config.data.val
        test = train if held_out is None else build.read_split(config, "test", names)[0]
        yield {"train": train, "test": test}
        return
    with tempfile.TemporaryDirectory() as folder:
        files = videos or [render_video(Path(folder, "rendered.mp4"))]
        rows = [Row(str(file), 0) for file in files]
        yield {"train": rows, "test": rows}


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
    if what == "train":
        return build.build_train_loader(config, rows, [], CPU)
    return build.build_test_loader(config, rows, CPU, clips=config.eval.clips, crops=config.eval.crops)


def _median(found: Sequence[dict[str, float]], key: str) -> float:
    return median(entry[key] for entry in found)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _TimedVideo:
    """A video that tells how long its `read` took."""

    def __init__(self, video: Video):
        self.video, self.num_frames, self.fps = video, video.num_frames, video.fps
        self.seconds = 0.0

    def read(self, indices: Sequence[int]) -> Tensor:
        start = perf_counter()
        frames = self.video.read(indices)
        self.seconds += perf_counter() - start
        return frames


class _TimedReformatter:
    """PyAV's, and how long all of them took together, with the copy out of the converted frame."""

    seconds = 0.0

    def __init__(self):
        self._plain = VideoReformatter()

    def reformat(self, frame: av.VideoFrame, **options) -> "_Converted":
        start = perf_counter()
        pixels = self._plain.reformat(frame, **options).to_ndarray()
        _TimedReformatter.seconds += perf_counter() - start
        return _Converted(pixels)


class _Converted:
    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def to_ndarray(self) -> np.ndarray:
        return self.pixels
