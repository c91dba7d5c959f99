import doctest
from itertools import pairwise

import pytest

from stvit_video.data import sampling


def test_docstrings():
    assert doctest.testmod(sampling).failed == 0


@pytest.mark.parametrize(("total", "frames", "stride"), [(300, 16, 4), (61, 16, 4), (40, 8, 5)])
@pytest.mark.parametrize("clips", [2, 5, 10])
def test_test_clips_reach_from_the_first_frame_to_the_last(total, frames, stride, clips):
    places = sampling.spread(clips)
    found = [sampling.dense(total, frames, stride, at) for at in places]
    assert found[0][0] == 0
    assert found[-1][-1] == total - 1
    gaps = [b[0] - a[0] for a, b in pairwise(found)]
    assert max(gaps) - min(gaps) <= 1
    assert all(b - a == stride for clip in found for a, b in pairwise(clip))


@pytest.mark.parametrize(("total", "frames"), [(37, 8), (40, 16), (5, 16), (300, 16)])
def test_two_uniform_clips_are_those_of_videomae(total, frames):
    """Its formula: of int(tick x) and int(tick / 2 + tick x), sorted, each second one, from 0 and 1."""
    tick = total / frames
    both = sorted(
        [int(tick * x) for x in range(frames)] + [int(tick / 2 + tick * x) for x in range(frames)]
    )
    clips = [sampling.uniform(total, frames, at) for at in sampling.spread_in_segments(2)]
    assert clips == [both[::2], both[1::2]]


def test_uniform_clips_share_the_video_out():
    clips = [sampling.uniform(60, 4, at) for at in sampling.spread_in_segments(3)]
    assert sorted(frame for clip in clips for frame in clip) == list(range(0, 60, 5))


def test_one_clip_is_the_centre():
    assert sampling.spread(1) == [0.5]
    assert sampling.dense(101, 1, 1, 0.5) == [50]
    assert sampling.dense(301, 16, 4, 0.5) == list(range(120, 184, 4))
    assert sampling.spread_in_segments(1) == [0.5]
    assert sampling.uniform(64, 4, 0.5) == [8, 24, 40, 56]


def test_every_start_is_equally_likely():
    starts = [sampling.dense(20, 4, 3, i / 1100)[0] for i in range(1100)]
    assert [starts.count(start) for start in range(11)] == [100] * 11


def test_short_videos():
    assert sampling.dense(5, 4, 4, 0.9) == [0, 4, 4, 4]
    assert sampling.dense(1, 4, 4, 0.0) == [0, 0, 0, 0]
    assert sampling.segments(3, 8, [0.99] * 8) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_fractional_stride_keeps_the_rate():
    """A video of 25 frames/s, read as 16x4 at 30 frames/s: every 3.33rd frame."""
    assert sampling.dense(250, 4, 4 * 25 / 30, 0.0) == [0, 3, 7, 10]
