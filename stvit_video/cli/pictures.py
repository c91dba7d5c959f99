"""The command curves: several runs in one picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine.logs import read_log
from ..errors import InputError
from ..figures import draw_comparison
from .common import command, make_folder


@command
def curves(args: Sequence[str]) -> None:
    """Draw the learning curves of several runs into one picture."""
    parser = argparse.ArgumentParser(description=curves.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output folder; or NAME=FOLDER")
    parser.add_argument("--picture", required=True, metavar="FILE.png", help="where to")
    options = parser.parse_args(args)
    runs = {}
    for word in options.runs:
        name, _, folder = word.rpartition("=")
        log = Path(folder, "log.jsonl")
        if not log.is_file():
            raise InputError(f"{folder}: holds no run (no {log.name})")
        runs[name or Path(folder).name] = read_log(log)
    make_folder(Path(options.picture).parent)
    draw_comparison(runs, Path(options.picture))
    print(options.picture)
