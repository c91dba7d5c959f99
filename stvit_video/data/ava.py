"""AVA's files: lists of boxes with actions, people's boxes, excluded seconds, label maps."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import ListError
from .key_frames import KeyFrame

COLUMNS = "video,second,x1,y1,x2,y2,action[,person]"
At = tuple[str, float]  # video, second


def is_ava(line: str) -> bool:
    """Whether this is a line `video,second,x1,y1,x2,y2,action[,person]`."""
    fields = line.split(",")
    numbers = all(re.fullmatch(r"\s*-?[0-9.]+\s*", field) for field in fields[1:6])
    return len(fields) in (7, 8) and numbers and any("." in field for field in fields[2:6])


def key_frames(lines: Iterator[tuple[str, str]], known: set[int]) -> Iterator[tuple[str, KeyFrame]]:
    """(where it stands, text) of each line -> (where it starts, KeyFrame), in the order of the list.

    Lines of one person's box are one box with several actions. A line `video,second` is a key frame without
    boxes; an action that is empty or -1 is none.
    known: the ids there are, from 1 up; a class is its id less one.
    Raises ListError.
    """
    places, people = {}, {}
    for where, fields in _rows(lines, (2, 7, 8), COLUMNS):
        at = fields[0], _second(where, fields[1])
        places.setdefault(at, where)
        boxes = people.setdefault(at, {})
        if len(fields) > 2:
            actions = boxes.setdefault((_box(where, fields[2:6]), *fields[7:]), set())
            actions |= _action(where, fields[6], known)
    for at, boxes in people.items():
        actions = tuple(tuple(sorted(actions)) for actions in boxes.values())
        yield places[at], KeyFrame(*at, tuple(box for box, *_ in boxes), actions)


def read_people(path: str, least: float) -> dict[At, tuple[np.ndarray, np.ndarray]]:
    """People's boxes with a score of at least this, by key frame: (n, 4), shares of the frame; scores.

    Lines `video,second,x1,y1,x2,y2,score`, or with an action before the score, which does not count: a box
    that comes several times is one. Raises ListError.
    """
    people: dict[At, dict] = {}
    for where, fields in _rows(_lines(path), (7, 8), "video,second,x1,y1,x2,y2[,action],score"):
        score = _number(fields[-1])
        if score is None:
            raise ListError(f"{where}: found score {fields[-1]!r}, expected a number")
        if score >= least:
            boxes = people.setdefault((fields[0], _second(where, fields[1])), {})
            box = _box(where, fields[2:6])
            boxes[box] = max(score, boxes.get(box, score))
    return {at: (np.array(list(boxes)), np.array(list(boxes.values()))) for at, boxes in people.items()}


def read_excluded(path: str) -> set[At]:
    """Lines `video,second`. Raises ListError."""
    return {
        (fields[0], _second(where, fields[1]))
        for where, fields in _rows(_lines(path), (2,), "video,second")
    }


def read_label_map(path: str | os.PathLike[str]) -> dict[int, str]:
    """Names by id, from 1 up, of a label map (`name: "stand"` and then `id: 12`). Raises ListError."""
    names, name = {}, None
    for where, line in _lines(path):
        if match := re.match(r'\s*name:\s*"(.*)"', line):
            name = match[1]
        elif match := re.match(r"\s*(?:label_)?id:\s*([0-9]{1,9})\s*$", line):
            if name is None or int(match[1]) < 1 or int(match[1]) in names:
                raise ListError(
                    f"{where}: found {line.strip()!r}, expected a name before it and a new id from 1 up"
                )
            names[int(match[1])], name = name, None
    if not names:
        raise ListError(
            f'{path}: found no classes, expected a label map with lines `name: "..."` and `id: 1`'
        )
    return names


def class_names(labels: dict[int, str]) -> list[str]:
    """Names by class id, which is AVA's less one; an id without a name is its name."""
    return [labels.get(i, str(i)) for i in range(1, max(labels) + 1)]


def line_of(key: KeyFrame, box, action: int, score: float) -> list:
    """Cells `video,second,x1,y1,x2,y2,action,score`; numbers keep all their digits."""
    second = f"{key.second:04.0f}" if key.second == int(key.second) else repr(key.second)
    return [key.video, second, *(repr(float(value)) for value in box), action + 1, f"{score:.9g}"]


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"{path}: found {error}, expected a readable file") from None
    return ((f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _rows(
    lines: Iterator[tuple[str, str]], counts: tuple[int, ...], columns: str
) -> Iterator[tuple[str, list[str]]]:
    for where, line in lines:
        (fields,) = csv.reader([line])
        if len(fields) not in counts:
            raise ListError(f"{where}: found {len(fields)} columns, expected {columns}")
        yield where, [field.strip() for field in fields]


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text) else None


def _second(where: str, text: str) -> float:
    second = _number(text)
    if second is None or second < 0:
        raise ListError(f"{where}: found second {text!r}, expected a number of 0 or more")
    return second


def _box(where: str, fields: list[str]) -> tuple[float, ...]:
    box = [_number(field) for field in fields]
    if None in box or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
        raise ListError(
            f"{where}: found box {','.join(fields)}, expected x1,y1,x2,y2 from 0 to 1, "
            "as shares of the frame, x1 <= x2 and y1 <= y2"
        )
    return tuple(box)


def _action(where: str, text: str, known: set[int]) -> set[int]:
    if text in ("", "-1"):
        return set()
    if not text.isdecimal() or int(text) not in known:
        raise ListError(
            f"{where}: found action {text!r}, expected an id of the {len(known)} in the label map"
        )
    return {int(text) - 1}
