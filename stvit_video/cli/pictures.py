"""The commands curves and compare: several runs in one picture, or on one page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine.logs import read_log
from ..errors import InputError
from ..figures import draw_comparison
from ..reports.compare import compare as write_comparison
from ..reports.compare import read_scoring
from .common import command, make_folder


@command
def curves(args: Sequence[str]) -> None:
    """Draw the learning curves of several runs into one picture."""
    parser = argparse.ArgumentParser(description=curves.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output folder; or NAME=FOLDER")
    parser.add_argument("--picture", required=True, metavar="FILE.png", help="where to")
    options = parser.parse_args(args)
    runs = {}
    for name, folder in map(_named, options.runs):
        log = folder / "log.jsonl"
        if not log.is_file():
            raise InputError(f"{folder}: holds no run (no {log.name})")
        runs[name] = read_log(log)
    make_folder(Path(options.picture).parent)
    draw_comparison(runs, Path(options.picture))
    print(options.picture)


@command
def compare(args: Sequence[str]) -> None:
    """Compare scorings of the same videos on one page: figures with intervals, tests, where they differ."""
    parser = argparse.ArgumentParser(description=compare.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a scoring's output folder; or NAME=FOLDER")
    parser.add_argument("--to", required=True, metavar="FILE.html", help="where to")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    options = parser.parse_args(args)
    named = [_named(word) for word in options.runs]
    if len(named) < 2:
        raise InputError(f"{options.runs[0]}: one run; to compare takes two or more")
    if options.resamples < 1000:
        raise InputError(f"--resamples {options.resamples}: must be 1000 or more for a 95% interval")
    for i, (name, folder) in enumerate(named):
        if name in [other for other, _ in named[:i]]:
            raise InputError(f"{folder}: another run is named {name}, too; NAME=FOLDER names it otherwise")
    scorings = [read_scoring(name, folder) for name, folder in named]
    make_folder(Path(options.to).parent)
    lines = write_comparison(scorings, Path(options.to), count=options.resamples, seed=options.seed)
    print("\n".join(lines))


def _named(word: str) -> tuple[str, Path]:
    """NAME=FOLDER, or FOLDER, whose last part is the name."""
    name, _, folder = word.rpartition("=")
    return name or Path(folder).absolute().name, Path(folder)
