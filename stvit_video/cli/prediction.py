"""What the command predict does: what happens in videos, or what is in images."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ..errors import DecodeError, InputError
from ..files import written_whole
from ..predictor import has_head
from ..recognizer import Recognizer
from .actions import write_actions
from .common import make_folder, output_names, videos_of
from .drawing import predict_each
from .timeline import write_timelines


def predict(options: Namespace) -> None:
    """What is in videos and images, printed or written; exits with 1 where some could not be read."""
    if options.actions:
        make_folder(Path(options.actions))
        paths = [path for name in options.videos for path in videos_of(Path(name), VIDEO_SUFFIXES)]
        failed = write_actions(list(dict.fromkeys(paths)), Path(options.actions), options)
    elif has_head(options.checkpoint):
        for name in ("timeline", "features", "maps"):
            if getattr(options, name):
                raise InputError(f"--{name}: {options.checkpoint} names no classes of videos")
        failed = predict_each(options)
    else:
        failed = _recognize(options)
    if failed:
        sys.exit(1)


def _recognize(options: Namespace) -> int:
    """Classes of each video, or its timeline; -> how many could not be read."""
    if options.draw and not options.timeline:
        raise InputError(
            f"--draw FOLDER: {options.checkpoint} names classes; --timeline FOLDER --draw draws them"
        )
    recognize = Recognizer(options.checkpoint, device=options.device, timeout=options.timeout)
    folders = (options.maps, options.features and Path(options.features).parent, options.timeline)
    for folder in filter(None, folders):
        make_folder(Path(folder))
    suffixes = VIDEO_SUFFIXES | (IMAGE_SUFFIXES if recognize.config.data.num_frames == 1 else set())
    paths = [path for name in options.videos for path in videos_of(Path(name), suffixes)]
    if options.timeline:
        settings = {
            key: getattr(options, key) for key in ("checkpoint", "every", "window", "enter", "leave")
        }
        return write_timelines(recognize, paths, Path(options.timeline), settings, options.draw)
    each, inputs = list(dict.fromkeys(paths)), {path.resolve() for path in paths}
    names = zip(each, output_names(each), strict=True)
    pictures = {path: Path(options.maps, f"{name}.png") for path, name in names if options.maps}
    if overwritten := [path for path in pictures.values() if path.resolve() in inputs]:
        raise InputError(f"{overwritten[0]}: is to be recognised; --maps needs another folder")
    features, failed = {}, 0
    results = recognize.many(paths, options.workers)
    for path, guesses in tqdm(results, total=len(paths), unit="video", disable=len(paths) < 10):
        try:
            if isinstance(guesses, DecodeError):
                raise guesses
            if options.features:
                features[str(path)] = recognize.features(path).cpu().numpy()
            if options.maps:
                recognize.draw_maps(path, pictures[path])
        except DecodeError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
            if options.json:
                print(json.dumps({"path": str(path), "error": str(error)}))
            continue
        if options.json:
            predictions = [{"name": g.name, "score": round(g.score, 6)} for g in guesses]
            print(json.dumps({"path": str(path), "predictions": predictions}))
        else:
            print(path)
            for guess in guesses:
                print(f"  {guess.score:7.2%}  {guess.name}")
    if options.features:
        with written_whole(Path(options.features)) as part, open(part, "wb") as file:
            np.savez(file, **features)
    return failed
