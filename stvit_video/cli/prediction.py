"""The command predict: what happens in videos."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeError
from ..recognizer import Recognizer
from .common import command, make_folder, videos_of


@command
def predict(args: Sequence[str]) -> None:
    """Print the five best classes of each video, with names and scores."""
    parser = argparse.ArgumentParser(description=predict.__doc__, allow_abbrev=False)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files, folders of files, or shards")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="which model")
    parser.add_argument("--device", help="cpu, cuda, ...; default: CUDA where there is one")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a video (60)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and video")
    parser.add_argument("--features", metavar="FILE.npz", help="also save pooled features here")
    parser.add_argument("--maps", metavar="FOLDER", help="also draw what the semantic tokens look at")
    options = parser.parse_args(args)
    recognize = Recognizer(options.checkpoint, device=options.device, timeout=options.timeout)
    for folder in filter(None, (options.maps, options.features and Path(options.features).parent)):
        make_folder(Path(folder))
    suffixes = VIDEO_SUFFIXES | (IMAGE_SUFFIXES if recognize.config.data.num_frames == 1 else set())
    paths = [path for name in options.videos for path in videos_of(Path(name), suffixes)]
    features, failed = {}, 0
    for path in tqdm(paths, unit="video", disable=len(paths) < 10):
        try:
            guesses = recognize(path)
            if options.features:
                features[str(path)] = recognize.features(path).cpu().numpy()
            if options.maps:
                name = f"{path.absolute().parent.name}_{path.stem}.png"
                recognize.draw_semantic_maps(path, Path(options.maps, name))
        except DecodeError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
            if options.json:
                print(json.dumps({"path": str(path), "error": str(error)}))
            continue
        if options.json:
            found = [{"name": g.name, "score": round(g.score, 6)} for g in guesses]
            print(json.dumps({"path": str(path), "predictions": found}))
        else:
            print(path)
            for guess in guesses:
                print(f"  {guess.score:7.2%}  {guess.name}")
    if options.features:
        np.savez(options.features, **features)
    if failed:
        sys.exit(1)
