"""What `stvit-predict` makes of a checkpoint with a head: lines of json, and drawn images and videos."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..data.guard import guarded_in_order
from ..data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ..data.stream import DrawnCopy, VideoWriter, open_stream
from ..errors import DecodeError, InputError
from ..files import written_whole
from ..predictor import Predictor
from .common import make_folder, output_names, videos_of


def predict_each(options: argparse.Namespace) -> int:
    """Of each image and of each frame of a video a line of json, drawn into NAME.png and NAME.mp4.

    -> how many files could not be read.
    """
    predict = Predictor(options.checkpoint, device=options.device, timeout=options.timeout)
    suffixes, failed = VIDEO_SUFFIXES | IMAGE_SUFFIXES, 0
    paths = list(dict.fromkeys(path for name in options.videos for path in videos_of(Path(name), suffixes)))
    folder = options.draw and Path(options.draw)
    if folder:
        make_folder(folder)
    inputs = {path.resolve() for path in paths}
    for path, name in tqdm(list(zip(paths, output_names(paths), strict=True)), disable=len(paths) < 10):
        is_video = path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()
        picture = folder and folder / f"{name}{'.mp4' if is_video else '.png'}"
        if picture and picture.resolve() in inputs:
            raise InputError(f"{picture}: is to be looked at; --draw needs another folder")
        try:
            for line in (_of_video if is_video else _of_image)(predict, path, picture):
                if options.json or not folder:
                    print(json.dumps({"path": str(path)} | line))
        except DecodeError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
            if options.json:
                print(json.dumps({"path": str(path), "error": str(error)}))
    return failed


def _of_image(predict: Predictor, path: Path, picture: Path | None) -> Iterator[dict[str, Any]]:
    pixels = predict.pixels(path)
    record = predict(pixels)
    if picture:
        Image.fromarray(predict.task.draw(pixels, record)).save(picture)
        if hasattr(predict.task, "write"):
            predict.task.write(picture.with_suffix(""), record)
    yield predict.task.plain(record)


def _of_video(predict: Predictor, path: Path, picture: Path | None) -> Iterator[dict[str, Any]]:
    """Frame by frame; of a damaged video the frames before are drawn."""
    if picture is None:
        yield from (
            {"time": round(time, 4)} | predict.task.plain(r) for time, _, _, r in predict.frames(path)
        )
        return
    with open_stream(path) as stream:
        fps = stream.fps
    frames = predict.frames(path)
    first = next(frames, None)  # a video without any is an error before a file is begun
    if first is None:
        raise DecodeError(f"{path}: no frame in it")
    damage = None
    with written_whole(picture) as part, VideoWriter(part, fps) as out:
        try:
            for time, lasts, pixels, record in itertools.chain([first], frames):
                out.add(predict.task.draw(pixels, record), time, lasts)
                yield {"time": round(time, 4)} | predict.task.plain(record)
        except DecodeError as error:
            damage = error
    if damage is not None:
        raise damage


def write_copy(copy: DrawnCopy, title: str, timeout: float | None) -> None:
    """All of a copy, by a process that can be given up. Raises DecodeError."""
    steps = guarded_in_order(copy, itertools.repeat(None), workers=1, timeout=timeout)
    with closing(steps), tqdm(desc=title, unit="s", disable=None) as bar:
        for _, time in steps:
            if time is None:
                break
            if isinstance(time, Exception):
                raise DecodeError(f"{copy.source}: not drawn: {time}")
            bar.update(time - bar.n)
