"""What the command ensemble does: several scorings of the same videos as one."""

import zlib
from argparse import Namespace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from .. import build
from ..config import Config
from ..data.rows import Row
from ..engine.evaluate import write_report
from ..engine.job import Outcome
from ..errors import InputError
from .common import make_folder

KEYS = ("scores", "labels", "paths", "class_names")


def ensemble(options: Namespace) -> None:
    """Dumps of views, as one report."""
    paths = [Path(name, "views.npz") if Path(name).is_dir() else Path(name) for name in options.dumps]
    output = Path(options.output)
    if output.resolve() in {path.resolve().parent for path in paths}:
        raise InputError(f"--output {output}: holds a scoring; its report would be replaced")
    dumps = [_read(path) for path in paths]
    for path, dump in zip(paths, dumps, strict=True):
        for key in ("class_names", "paths", "labels"):
            if not np.array_equal(dump[key], dumps[0][key]):
                raise InputError(f"{path}: has other {key.replace('_', ' ')} than {paths[0]}")
    views = torch.cat([torch.from_numpy(dump["scores"]) for dump in dumps], 1)  # (N, V, K)
    outcome = _outcome(views, dumps[0]["paths"], dumps[0]["labels"])
    task = "classification" if dumps[0]["labels"].ndim == 1 else "multilabel"
    make_folder(output)
    lines = write_report(
        output,
        build.build_task(Config(task=task), dumps[0]["class_names"].tolist()),
        outcome,
        views={"clips": views.shape[1], "crops": 1},
        details={"on_failure": "wrong", "checkpoint": " + ".join(map(str, paths))},
    )
    print(f"{len(views)} videos x {views.shape[1]} views of {len(paths)} scorings")
    print("\n".join(lines))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            dump = {key: file[key] for key in KEYS}
    except (OSError, EOFError, TypeError, ValueError, KeyError, BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: no scores of views (stvit-test --eval.dump_views true writes them): {error}"
        ) from None
    scores, labels, paths, names = (dump[key] for key in KEYS)
    videos, views, classes = scores.shape if scores.ndim == 3 else (0, 0, 0)
    if (
        not (videos and views and scores.dtype.kind == "f" and labels.dtype.kind == "i")
        or (paths.shape, names.shape) != ((videos,), (classes,))
        or labels.shape not in ((videos,), (videos, classes))
        or not -1 <= labels.min() <= labels.max() < classes
    ):
        raise InputError(
            f"{path}: scores of shape {scores.shape}, labels of {labels.shape}, {paths.size} paths and "
            f"{names.size} class names, expected (videos, views, classes), and the others to fit them"
        )
    return dump


def _outcome(views: torch.Tensor, paths: np.ndarray, labels: np.ndarray) -> Outcome:
    """views: (N, V, K), zeros where a video could not be read; labels: (N,), -1: none, or (N, K)."""
    rows, records, failures = [], [], {}
    for i, (path, label) in enumerate(zip(paths.tolist(), labels, strict=True)):
        several = tuple(np.flatnonzero(label > 0).tolist()) if label.ndim else int(label)
        rows.append(Row(path, None if (label < 0).any() else several))
        read = views[i][views[i].any(-1)]
        if not len(read):
            failures[i] = f"{path}: could not be read in any of the scorings"
        record = {"scores": read.double().mean(0).float(), "classes": read.argmax(-1)}
        records.append(record if len(read) else None)
    return Outcome(rows, records, failures)
