"""What the command export does: a checkpoint as one file to deploy."""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import build
from ..config import Config
from ..data.media import VIDEO_SUFFIXES
from ..data.rows import Row
from ..errors import InputError
from ..export import EXPORT_SUFFIXES, Classifier, compare, read, write
from ..files import written_whole
from ..tasks import TASKS
from . import TOLERANCE
from .common import make_folder, videos_of

CPU = torch.device("cpu")


def export(flags: Namespace) -> None:
    """A checkpoint as one file, if that scores alike; exits with 1 where it does not."""
    path = Path(flags.to)
    if path.suffix not in EXPORT_SUFFIXES:
        raise InputError(f"--to {path}: must end in {' or '.join(EXPORT_SUFFIXES)}")
    for name, least in (("clips", 1), ("time", 0)):
        if getattr(flags, name) < least:
            raise InputError(f"--{name} {getattr(flags, name)}: must be {least} or more")
    config, class_names, model = build.load_model(flags.checkpoint)
    task = build.build_task(config, class_names)
    if TASKS[config.task].has_head:
        raise InputError(
            f"{flags.checkpoint}: task={config.task}; only models that name classes are exported"
        )
    clips = _clips(config, class_names, flags.videos, flags.clips)
    tolerance = TOLERANCE[flags.precision] if flags.tolerance is None else flags.tolerance

    def scores(part: Tensor) -> Tensor:
        return task.view_scores(model, part[None])[0]

    make_folder(path.parent)
    with written_whole(path) as part:
        write(part, model, task, config, precision=flags.precision, kind=path.suffix)
        exported = read(part, CPU)[2]
        difference = compare(scores, exported, clips)
        print(
            f"largest difference of a probability: {difference.largest:.2g} ({flags.precision}, at most "
            f"{tolerance:g}); best class the same in {difference.agreeing} of {difference.clips} clips"
        )
        if not difference.largest <= tolerance:
            print(f"error: they differ by more: {path} is not written", file=sys.stderr)
            sys.exit(1)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if flags.time:
        print(_latency(scores, exported, clips, flags.time))


def _clips(config: Config, class_names: Sequence[str], videos: Sequence[str] | None, most: int) -> Tensor:
    """The central view of each video, uint8 (N, 3, T, S, S).

    Of `videos`, else of the checkpoint's list, else noise.
    """
    if videos is not None:
        rows = [Row(str(path), None) for name in videos for path in videos_of(Path(name), VIDEO_SUFFIXES)]
        clips = _read(config, class_names, rows[:most])
        if not len(clips):
            raise InputError(f"--videos {' '.join(videos)}: none of them can be read")
        print(f"comparing on {len(clips)} of the {len(rows)} videos")
        return clips
    cause = "the checkpoint names no list"
    for split in ("test", "val", "train"):
        source = getattr(config.data, split)
        if source is None:
            continue
        try:  # as custom data: the demo set is not rendered for this
            custom = replace(config, data=replace(config.data, preset="custom"))
            rows, _ = build.read_split(custom, split, class_names)
        except InputError as error:
            cause = str(error)
            continue
        step = max(len(rows) // most, 1)
        clips = _read(config, class_names, [rows[i] for i in range(0, len(rows), step)][:most])
        if len(clips):
            print(f"comparing on {len(clips)} videos of {source}")
            return clips
        cause = f"no video of {source} can be read"
    print(f"comparing on {most} clips of noise (seed 0), no real ones: {cause}")
    shape = (most, 3, config.data.num_frames, config.data.image_size, config.data.image_size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _read(config: Config, class_names: Sequence[str], rows: Sequence[Row]) -> Tensor:
    """Clips of the rows that can be read, the others warned of."""
    data = replace(config.data, workers=0, keep=False)
    task = build.build_task(config, class_names)
    loader = build.build_test_loader(replace(config, data=data), task, rows, CPU, clips=1, crops=1)
    clips = []
    for batch in loader:
        clips += [] if batch.clips is None else [batch.clips.flatten(0, 1)]
        for _, cause in batch.failures:
            print(f"warning: {cause}", file=sys.stderr)
    return torch.cat(clips) if clips else torch.empty(0)


def _latency(expected: Classifier, actual: Classifier, clips: Tensor, calls: int) -> str:
    """Both on one clip, in turns; the ratio is of CPU seconds, which other programs disturb least."""
    wall, cpu = ([[], []] for _ in range(2))
    for i in range(calls + 1):
        clip = clips[i % len(clips)][None]
        for j, scores in enumerate((expected, actual)):
            started = time.perf_counter(), time.process_time()
            scores(clip)
            wall[j].append(time.perf_counter() - started[0])
            cpu[j].append(time.process_time() - started[1])
    median = statistics.median  # of all but the first call, which allocates
    own, exported = (median(seconds[1:]) * 1000 for seconds in wall)
    ratio = median(b / a for a, b in zip(cpu[0][1:], cpu[1][1:], strict=True))
    return (
        f"one clip, median of {calls}: torch {own:.1f} ms, exported {exported:.1f} ms; CPU seconds: "
        f"{ratio:.2f} times as many ({torch.get_num_threads()} threads)"
    )
