"""The command predict: what happens in videos, or what is in images."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ..errors import DecodeError, InputError
from ..timeline import ENTER, EVERY, LEAVE
from .common import command, make_folder, output_names, videos_of


@command
def predict(args: Sequence[str]) -> None:
    """Print the five best classes of each video, with names and scores; or write what happens when.

    With a checkpoint of another task: a line of json of each image and of each frame of a video.
    """
    parser = argparse.ArgumentParser(description=predict.__doc__, allow_abbrev=False)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files, lists, folders, or shards")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="which model")
    parser.add_argument("--device", help="cpu, cuda, ...; default: CUDA where there is one")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a video (60)")
    parser.add_argument("--workers", type=int, default=4, help="videos decoded at a time (4)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and video")
    parser.add_argument("--features", metavar="FILE.npz", help="also save pooled features here")
    parser.add_argument("--maps", metavar="FOLDER", help="draw superpatches and semantic tokens here")
    timeline = any(word.partition("=")[0] == "--timeline" for word in args)
    parser.add_argument(
        "--draw",
        **({"action": "store_true"} if timeline else {"metavar": "FOLDER"}),
        help="write images and videos here, objects or other predictions drawn in; with --timeline, "
        "without FOLDER: also NAME.mp4, labels drawn into the frames",
    )
    long = parser.add_argument_group("timelines of long videos")
    long.add_argument(
        "--timeline",
        metavar="FOLDER",
        help="write NAME.csv, .json, .npz, .png and .vtt of each video here; killed, it goes on",
    )
    long.add_argument("--every", type=float, default=EVERY, metavar="SECONDS", help="step (2)")
    long.add_argument("--window", type=float, metavar="SECONDS", help="length (the checkpoint's clips')")
    long.add_argument("--enter", type=float, default=ENTER, help="score at which a class begins (0.5)")
    long.add_argument("--leave", type=float, default=LEAVE, help="score below which it ends (0.3)")
    people = parser.add_argument_group("what each person does")
    people.add_argument(
        "--actions", metavar="FOLDER", help="write NAME.csv and NAME.mp4 of each video here"
    )
    people.add_argument(
        "--proposals", metavar="FILE.csv", help="people's boxes at key frames, as AVA's csv"
    )
    people.add_argument(
        "--detector", metavar="FILE", help="weights of torchvision's fasterrcnn_resnet50_fpn: find people"
    )
    options = parser.parse_args(args)
    _check(parser, options)
    # These take seconds to import, which --help and a wrong flag need not wait for.
    from ..predictor import has_head
    from ..recognizer import Recognizer
    from .actions import write_actions
    from .drawing import predict_each
    from .timeline import write_timelines

    if options.actions:
        make_folder(Path(options.actions))
        paths = [path for name in options.videos for path in videos_of(Path(name), VIDEO_SUFFIXES)]
        if write_actions(list(dict.fromkeys(paths)), Path(options.actions), options):
            sys.exit(1)
        return
    if has_head(options.checkpoint):
        for name in ("timeline", "features", "maps"):
            if getattr(options, name):
                parser.error(f"--{name}: {options.checkpoint} names no classes of videos")
        if predict_each(options):
            sys.exit(1)
        return
    if options.draw and not options.timeline:
        parser.error(
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
        if write_timelines(recognize, paths, Path(options.timeline), settings, options.draw):
            sys.exit(1)
        return
    names = output_names(list(dict.fromkeys(paths)))
    maps = [Path(options.maps, f"{name}.png") for name in names] if options.maps else [None] * len(names)
    inputs = {path.resolve() for path in paths}
    if overwritten := [path for path in filter(None, maps) if path.resolve() in inputs]:
        raise InputError(f"{overwritten[0]}: is to be recognised; --maps needs another folder")
    pictures = dict(zip(dict.fromkeys(paths), maps, strict=True))
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
        np.savez(options.features, **features)
    if failed:
        sys.exit(1)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a line for settings that make no sense."""
    for name in ("every", "window", "timeout", "workers"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} {value}: must be more than 0")
    if not 0 <= options.leave <= options.enter <= 1:
        parser.error(f"--enter {options.enter} --leave {options.leave}: must be 0 <= leave <= enter <= 1")
    if options.features and Path(options.features).suffix != ".npz":
        parser.error(f"--features {options.features}: must end in .npz")
    if options.actions and not bool(options.proposals) ^ bool(options.detector):
        parser.error("--actions needs --proposals FILE.csv or --detector FILE, one of them")
    if not options.actions and (options.proposals or options.detector):
        parser.error("--proposals and --detector need --actions FOLDER")
    for name in ("json", "features", "maps", "timeline"):
        if options.actions and getattr(options, name):
            parser.error(f"--{name} is not written with --actions FOLDER: two commands")
    for name in ("json", "features", "maps"):
        if options.timeline and getattr(options, name):
            parser.error(f"--{name} is not written with --timeline FOLDER: two commands")
