"""Scorings of the same videos on one page: figures with intervals, which is better, where they differ."""

import csv
import json
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from . import statistics
from .page import below, read_previews, write_page

Key = tuple[str, int]  # path, and the how many-th time that it stands in the list
SURE = 0.05
NEEDED = ("path", "top1_name", "top1_score", "failure")  # of predictions.csv
ONE, SEVERAL = ("label", "label_name", "prediction"), ("labels", "label_names")


@dataclass
class Scoring:
    """What a scoring left in `folder`: videos by key, in the order of the list.

    rows: lines of `predictions.csv`.
    scores, labels: (N, K), where a video may have several labels: 1, 0, or -1 where they are not known.
    """

    name: str
    folder: Path
    report: dict[str, Any]
    rows: dict[Key, dict[str, str]]
    scores: np.ndarray | None = None
    labels: np.ndarray | None = None

    @cached_property
    def places(self) -> dict[Key, int]:
        return {key: place for place, key in enumerate(self.rows)}

    @property
    def several(self) -> bool:
        """Whether a video may have several labels."""
        return self.scores is not None


class Verdict(NamedTuple):
    """Of two runs: the difference of their first figure, its 95% interval, and p."""

    better: str
    worse: str
    difference: float
    low: float
    high: float
    p: float

    def sentence(self, figure: str) -> str:
        return f"{self.claim}: {self.certainty(figure)}"

    @property
    def claim(self) -> str:
        if self.p < SURE:
            return f"{self.better} is better than {self.worse}"
        return f"no difference shown between {self.better} and {self.worse}"

    def certainty(self, figure: str) -> str:
        difference, low, high = (100 * value for value in (self.difference, self.low, self.high))
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        return f"{difference:+.1f} points of {figure}, 95% interval {low:.1f} to {high:.1f}, {p}"


def read_scoring(name: str, folder: Path) -> Scoring:
    """Raises InputError where `folder` holds no scoring, or a damaged one."""
    report, table = folder / "report.json", folder / "predictions.csv"
    for path in (report, table):
        if not path.is_file():
            raise InputError(f"{folder}: holds no scoring (no {path.name})")
    try:
        with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines, seen = list(csv.DictReader(file)), Counter()
        of_labels = SEVERAL if lines and "labels" in lines[0] else ONE
        if missing := [name for line in lines for name in (*NEEDED, *of_labels) if line.get(name) is None]:
            raise InputError(f"{table}: not a scoring that can be read (no {missing[0]}): score it again")
        rows = {}
        for line in lines:
            rows[line["path"], seen[line["path"]]] = line
            seen[line["path"]] += 1
        values = json.loads(report.read_text())
        if not isinstance(values, dict):
            raise InputError(f"{report}: holds no report")
        scoring = Scoring(name, folder, values, rows)
        if lines and "labels" in lines[0]:
            if not (folder / "scores.npz").is_file():
                raise InputError(f"{folder}: has no scores.npz, by which mAP is compared: score it again")
            with np.load(folder / "scores.npz") as arrays:
                scoring.scores, scoring.labels = arrays["scores"], arrays["labels"]
            if len(scoring.scores) != len(lines):
                raise InputError(
                    f"{folder}: {len(lines)} videos in {table.name}, {len(scoring.scores)} in scores.npz"
                )
    except (
        OSError,
        EOFError,
        TypeError,
        ValueError,
        KeyError,
        csv.Error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: not a scoring that can be read ({error})") from None
    return scoring


def compare(scorings: Sequence[Scoring], page: Path, *, count: int = 10_000, seed: int = 0) -> list[str]:
    """Write the page; -> lines to print. Raises InputError where the runs cannot be compared.

    count, seed: of the bootstrap's resamples.
    """
    keys = _common(scorings)
    first = _figures(scorings, keys)
    title = next(iter(first))
    ones = np.ones((1, len(keys)), int)
    table, differences = [], []
    for name, figures in first.items():
        values = statistics.bootstrap(figures, len(keys), count=count, seed=seed)
        points = [float(figure(ones)[0]) for figure in figures]
        table.append((name, [(p, *statistics.interval(v)) for p, v in zip(points, values, strict=True)]))
        if name == title:
            differences = _verdicts(scorings, keys, points, values)
    said = [verdict.sentence(title) for verdict in differences]
    notes = _notes(scorings, keys, len(said), count)
    differing = [key for key in keys if len({_guess(s, key) for s in scorings}) > 1]
    root, paths = below([path for path, _ in differing])
    write_page(
        page,
        "compare",
        data=_data(scorings, differing) | {"paths": paths},
        previews=_previews(scorings, differing),
        names=[s.name for s in scorings],
        folders=[(s.name, str(s.report.get("checkpoint", s.folder))) for s in scorings],
        verdicts=[(verdict.claim, verdict.certainty(title)) for verdict in differences],
        table=table,
        axis=_axis(table[0][1]),
        notes=[*notes, *([f"Paths are below {root}"] if root else [])],
    )
    lines = [
        f"{name}: " + ", ".join(_cell(s, *c) for s, c in zip(scorings, cells, strict=True))
        for name, cells in table
    ]
    return [*lines, *said, *notes, f"{len(differing)} videos on which they differ: {page}"]


def _axis(cells: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """From and to which value the intervals are drawn: whole tenths."""
    low, high = min(cell[1] for cell in cells), max(cell[2] for cell in cells)
    low, high = math.floor(10 * low) / 10, math.ceil(10 * high) / 10
    return (low, high) if high > low else (max(low - 0.1, 0), min(high + 0.1, 1))


def _cell(scoring: Scoring, value: float, low: float, high: float) -> str:
    return f"{scoring.name} {value:.2%} ({low:.1%} to {high:.1%})"


def _common(scorings: Sequence[Scoring]) -> list[Key]:
    """The labelled videos that all have, in the first one's order. Raises InputError."""
    first, *others = scorings
    for other in others:
        if other.several != first.several:
            raise InputError(
                f"{first.folder} and {other.folder}: one label a video, and several: not alike"
            )
    keys = [key for key in first.rows if all(key in other.rows for other in others)]
    if not keys:
        paths = " and ".join(next(iter(s.rows), ("nothing", 0))[0] for s in scorings)
        raise InputError(f"the runs have no video in common (they begin with {paths})")
    for key in keys:
        labels = {_label(scoring, key) for scoring in scorings}
        if (
            len({tuple(sorted(label.split(","))) for label in labels}) > 1
        ):  # classes may be in another order
            raise InputError(f"{key[0]}: its label is {' in one run, '.join(sorted(labels))} in another")
    if "exclude" in {scoring.report.get("on_failure") for scoring in scorings}:
        keys = [key for key in keys if not any(scoring.rows[key]["failure"] for scoring in scorings)]
    keys = [key for key in keys if _labelled(first, key)]
    if not keys:
        raise InputError("the videos that the runs have in common have no labels, or could not be read")
    return keys


def _figures(scorings: Sequence[Scoring], keys: Sequence[Key]) -> dict[str, list[statistics.Figure]]:
    """Each figure by its title, the first one first: one a run."""
    if scorings[0].several:
        return {"mAP": [_mean_average_precision(s, keys) for s in scorings]}
    ids = np.unique([_label(scorings[0], key) for key in keys], return_inverse=True)[1]
    right = [_right(scoring, keys) for scoring in scorings]
    five = [np.array([_in_five(scoring.rows[key]) for key in keys]) for scoring in scorings]
    return {
        "top-1": [statistics.accuracy(values) for values in right],
        "top-5": [statistics.accuracy(values) for values in five],
        "mean class accuracy": [statistics.mean_class_accuracy(values, ids) for values in right],
    }


def _mean_average_precision(scoring: Scoring, keys: Sequence[Key]) -> statistics.Figure:
    scores, labels = _matrices(scoring, keys)
    return statistics.mean_average_precision(scores, labels == 1)


def _verdicts(
    scorings: Sequence[Scoring], keys: Sequence[Key], points: Sequence[float], values: np.ndarray
) -> list[Verdict]:
    """Of each two runs; the one with the higher value is named first."""
    pairs = [(a, b) if points[a] >= points[b] else (b, a) for a, b in combinations(range(len(scorings)), 2)]
    differences = [values[a] - values[b] for a, b in pairs]
    if scorings[0].several:
        raw = [statistics.two_sided(difference) for difference in differences]
    else:
        right = [_right(scoring, keys) for scoring in scorings]
        raw = [statistics.mcnemar(right[a], right[b]) for a, b in pairs]
    return [
        Verdict(
            scorings[a].name,
            scorings[b].name,
            points[a] - points[b],
            *statistics.interval(difference),
            p,
        )
        for (a, b), difference, p in zip(pairs, differences, statistics.holm(raw), strict=True)
    ]


def _notes(scorings: Sequence[Scoring], keys: Sequence[Key], verdicts: int, count: int) -> list[str]:
    """What the figures rest on."""
    test = "the same resamples" if scorings[0].several else "McNemar's exact test"
    notes = [f"{len(keys)} videos; intervals by {count} bootstrap resamples of them, p by {test}."]
    if any(len(scoring.rows) != len(keys) for scoring in scorings):
        sizes = ", ".join(f"{scoring.name} has {len(scoring.rows)}" for scoring in scorings)
        notes.append(f"Compared are the {len(keys)} labelled videos that all runs have and count: {sizes}.")
    if verdicts > 1:
        notes.append(f"p is corrected for {verdicts} comparisons (Holm); the intervals are not.")
    notes.append("They say how far the choice of videos goes, not how far another training seed would.")
    return notes


def _labelled(scoring: Scoring, key: Key) -> bool:
    if scoring.several:
        return bool((_matrices(scoring, [key])[1] >= 0).all())
    return bool(_label(scoring, key))


def _label(scoring: Scoring, key: Key) -> str:
    return scoring.rows[key]["label_names" if scoring.several else "label_name"]


def _guess(scoring: Scoring, key: Key) -> str:
    return scoring.rows[key]["top1_name"]


def _score(row: dict[str, str]) -> float:
    score = float(row["top1_score"] or 0)
    return score if math.isfinite(score) else 0.0  # a page's JSON has no others


def _in_five(row: dict[str, str]) -> bool:
    names = [row[f"top{i}_name"] for i in range(1, 6) if f"top{i}_name" in row]
    return not row["failure"] and row["label_name"] in names


def _right(scoring: Scoring, keys: Sequence[Key]) -> np.ndarray:
    """(N,) whether the best class is the video's, or one of its."""
    rows = [scoring.rows[key] for key in keys]
    if scoring.several:
        scores, labels = _matrices(scoring, keys)
        hits = labels[np.arange(len(keys)), scores.argmax(1)] == 1
        return hits & np.array([not row["failure"] for row in rows], bool)
    return np.array([not row["failure"] and row["prediction"] == row["label"] for row in rows], bool)


def _matrices(scoring: Scoring, keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
    """scores and labels (N, K) of these videos."""
    order = [scoring.places[key] for key in keys]
    return scoring.scores[order], scoring.labels[order]


def _data(scorings: Sequence[Scoring], keys: Sequence[Key]) -> dict[str, Any]:
    """What the page's script lists: by run and video the best class, its score, whether right."""
    right = [_right(scoring, keys).tolist() for scoring in scorings]
    said = [
        [[row["top1_name"], _score(row), hit, row["failure"]] for row, hit in pairs]
        for pairs in (
            zip([scoring.rows[key] for key in keys], hits, strict=True)
            for scoring, hits in zip(scorings, right, strict=True)
        )
    ]
    return {
        "runs": [scoring.name for scoring in scorings],
        "labels": [_label(scorings[0], key) for key in keys],
        "said": said,
    }


def _previews(scorings: Sequence[Scoring], keys: Sequence[Key]) -> list[bytes | None]:
    """From the first run's report that has some; a run's own are in the order of its rows."""
    for scoring in scorings:
        pictures = read_previews(scoring.folder / "report.html")
        if len(pictures) == len(scoring.rows):
            of = dict(zip(scoring.rows, pictures, strict=True))
            return [of[key] for key in keys]
    return []
