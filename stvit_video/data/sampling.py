"""Which frames, and which rows: integers in, integers out. No file is opened here.

A clip's place in its video is a number `at` from 0 to 1: 0 is the earliest clip, which starts at the first
frame, and 1 the latest, which ends at the last. Training draws it; scoring spreads it: `spread`.
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed of several numbers (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def permuted(length: int, seed: int) -> Iterator[int]:
    """The numbers below `length` in random order, each drawn when it is asked for (Fisher-Yates)."""
    draw, moved = random.Random(seed), {}
    for i in range(length):
        j = draw.randrange(i, length)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)


def spread(clips: int) -> list[float]:
    """Where `clips` test clips lie: the centre for one, else evenly from the first to the last."""
    return [0.5] if clips == 1 else [i / (clips - 1) for i in range(clips)]


def spread_in_segments(clips: int) -> list[float]:
    """Where in its segment the frame of each of `clips` uniform test clips lies.

    Two clips share their frames out evenly, at 0 and 1/2, as in VideoMAE; they do not end at 1, next to
    where the other begins.
    """
    return [0.5] if clips == 1 else [i / clips for i in range(clips)]


def dense(total: int, num_frames: int, stride: float, at: float) -> list[int]:
    """`num_frames` indices, every `stride`-th (e.g. 16x4), of a video of `total` frames.

    The span is round((num_frames - 1) * stride) + 1 frames; its start is one of the total - span + 1
    possible ones, `at` of the way, each equally likely for a uniform `at`. A video shorter than the
    span is read from its start, and its last frame fills up (as in SlowFast and VideoMAE).

    >>> dense(10, 3, 2, at=0.0), dense(10, 3, 2, at=1.0), dense(3, 3, 2, at=0.7)
    ([0, 2, 4], [5, 7, 9], [0, 2, 2])
    """
    offsets = [round(i * stride) for i in range(num_frames)]
    starts = max(total - offsets[-1], 1)
    start = min(int(at * starts), starts - 1)
    return [min(start + offset, total - 1) for offset in offsets]


def around(total: int, num_frames: int, stride: float, centre: int) -> list[int]:
    """`num_frames` indices, every `stride`-th; the one at num_frames // 2 is `centre`.

    What lies outside the video is its first or last frame (SlowFast's rule for key frames).

    >>> around(20, 4, 2, 10), around(20, 4, 2, 1), around(20, 3, 4, 18), around(20, 1, 4, 7)
    ([6, 8, 10, 12], [0, 0, 1, 3], [14, 18, 19], [7])
    """
    offsets = (round((i - num_frames // 2) * stride) for i in range(num_frames))
    return [min(max(centre + offset, 0), total - 1) for offset in offsets]


def uniform(total: int, num_frames: int, at: float) -> list[int]:
    """One frame from each of `num_frames` equal segments of a video, `at` (below 1) of the way into it.

    A video of fewer than `num_frames` frames repeats frames, in order.

    >>> uniform(8, 4, 0.0), uniform(8, 4, 0.5), uniform(2, 4, 0.5)
    ([0, 2, 4, 6], [1, 3, 5, 7], [0, 0, 1, 1])
    """
    return [int((i + at) * total / num_frames + 1e-6) for i in range(num_frames)]  # thirds are rounded


def segments(total: int, num_frames: int, at: Sequence[float]) -> list[int]:
    """One frame from each of `num_frames` equal segments of a video (Something-Something's sampling).

    `at` says where in its segment each frame lies. Segment i is frames floor(i * total / n) to
    floor((i + 1) * total / n) - 1, at least one; each of them is equally likely for uniform `at`.

    >>> segments(8, 4, [0.0, 0.4, 0.6, 0.9])
    [0, 2, 5, 7]
    """
    frames = []
    for i, place in enumerate(at):
        first, end = i * total // num_frames, (i + 1) * total // num_frames
        length = max(end - first, 1)
        frames.append(first + min(int(place * length), length - 1))
    return frames


def every_frame(num_frames: int, length: int, stride: int) -> list[list[int]]:
    """Frame indices of clips that hold every frame; a clip's are `stride` apart, where there are enough.

    The last of a run begins earlier than the one before it ends; a run that is too short ends in its last
    frame, repeated.
    """
    clips = []
    for first in range(min(stride, num_frames) if length > 1 else 1):
        run = list(range(first, num_frames, stride if length > 1 else 1))
        run += [run[-1]] * (length - len(run))
        starts = [*range(0, len(run) - length, length), len(run) - length]
        clips += [run[start : start + length] for start in starts]
    return clips
