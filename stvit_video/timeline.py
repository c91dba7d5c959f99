"""What happens when in a long video: scores of windows -> segments of one class each."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

ENTER, LEAVE = 0.5, 0.3  # scores
EVERY = 2.0  # seconds from window to window; about the length of Kinetics' clips of 16x4


class Moment(NamedTuple):
    """A window of a video, from `start` to `end` (seconds), and its scores by class: float32 (K,).

    Of a stream, latency: seconds from the arrival of the window's last frame to its scores; dropped: frames
    that the sampling took since the moment before, and that were not looked at.
    """

    start: float
    end: float
    scores: np.ndarray
    class_names: Sequence[str]
    latency: float | None = None
    dropped: int = 0

    @property
    def name(self) -> str:
        """The best class."""
        return self.class_names[int(self.scores.argmax())]

    @property
    def score(self) -> float:
        """The best class's score."""
        return float(self.scores.max())


class Segment(NamedTuple):
    """A stretch of a video, from `start` to `end` (seconds), of one class; its mean score there."""

    start: float
    end: float
    name: str
    score: float


def segments(
    moments: Iterable[Moment],
    class_names: Sequence[str],
    *,
    enter: float = ENTER,
    leave: float = LEAVE,
    overlap: bool = False,
) -> list[Segment]:
    """Moments in order -> segments in order of their starts, by hysteresis.

    A class begins at a moment where it is the best and has `enter` or more. It lasts while it has `leave`
    or more and no other class begins. Where no class lasts there is no segment.
    A moment stands for the time up to half way between its middle and its neighbours' middles, the first
    from its start, the last to its end.

    overlap: for several labels a video: every class that has `enter` begins, and ends no other.
    Raises ValueError unless 0 <= leave <= enter <= 1.
    """
    if not 0 <= leave <= enter <= 1:
        raise ValueError(f"enter={enter}, leave={leave}: must be 0 <= leave <= enter <= 1")
    done: list[Segment] = []
    lasting: dict[int, tuple[float, list[float]]] = {}  # class -> start, scores
    before = None

    def end(label: int, time: float) -> None:
        start, scores = lasting.pop(label)
        done.append(Segment(start, time, class_names[label], float(np.mean(scores))))

    for moment in moments:
        middle = (moment.start + moment.end) / 2
        edge = moment.start if before is None else ((before.start + before.end) / 2 + middle) / 2
        candidates = range(len(class_names)) if overlap else [int(moment.scores.argmax())]
        begin = [label for label in candidates if moment.scores[label] >= enter]
        for label in list(lasting):
            replaced = not overlap and begin and label not in begin
            if replaced or moment.scores[label] < leave:
                end(label, edge)
        for label in begin:
            lasting.setdefault(label, (edge, []))
        for label, (_, scores) in lasting.items():
            scores.append(float(moment.scores[label]))
        before = moment
    for label in list(lasting):
        end(label, before.end)
    return sorted(done, key=lambda segment: segment.start)
