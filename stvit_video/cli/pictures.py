"""What the commands curves and compare do: several runs in one picture, or on one page."""

from argparse import Namespace
from pathlib import Path

from ..engine.logs import read_log
from ..errors import InputError
from ..figures import draw_comparison
from ..reports.compare import compare as write_comparison
from ..reports.compare import read_scoring
from .common import make_folder


def curves(options: Namespace) -> None:
    """Logs, as one picture."""
    if Path(options.picture).suffix != ".png":
        raise InputError(f"--picture {options.picture}: must end in .png")
    runs = {}
    for name, folder in map(_named, options.runs):
        log = folder / "log.jsonl"
        if not log.is_file():
            raise InputError(f"{folder}: holds no run (no {log.name})")
        runs[name] = read_log(log)
    make_folder(Path(options.picture).parent)
    draw_comparison(runs, Path(options.picture))
    print(options.picture)


def compare(options: Namespace) -> None:
    """Scorings, as one page."""
    named = [_named(word) for word in options.runs]
    if len(named) < 2:
        raise InputError(f"{options.runs[0]}: one run; to compare takes two or more")
    if options.resamples < 1000:
        raise InputError(f"--resamples {options.resamples}: must be 1000 or more for a 95% interval")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: must be 0 or more")
    for i, (name, folder) in enumerate(named):
        if name in [other for other, _ in named[:i]]:
            raise InputError(f"{folder}: another run is named {name}, too; NAME=FOLDER names it otherwise")
    scorings = [read_scoring(name, folder) for name, folder in named]
    make_folder(Path(options.to).parent)
    lines = write_comparison(scorings, Path(options.to), count=options.resamples, seed=options.seed)
    print("\n".join(lines))


def _named(word: str) -> tuple[str, Path]:
    """NAME=FOLDER, or FOLDER, whose last part is the name; both may have more "=" in them."""
    splits = [("", word), *((word[:i], word[i + 1 :]) for i, letter in enumerate(word) if letter == "=")]
    name, folder = next((split for split in splits if Path(split[1]).is_dir()), splits[-1])
    return name or Path(folder).absolute().name, Path(folder)
