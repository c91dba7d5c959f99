"""Windows that slide over long videos: the right frames at the right times, the same after every kill."""

import csv
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from test_decode import numbers, render, spoil
from test_end_to_end import run
from test_unreadable import PLAIN, checkpoint  # noqa: F401

from stvit_video import Moment, Recognizer, Segment, cli, open_video, recognizer, segments
from stvit_video.cli.common import output_names
from stvit_video.cli.timeline import SUFFIXES, Files, subtitles
from stvit_video.data import demo, stream
from stvit_video.data.stream import WindowReader, open_stream
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.data.views import Sampling
from stvit_video.errors import DecodeError

ROOT = Path(__file__).parents[1]


def places(path, sampling, every=2.0, window=None, skip=0):
    """The windows of a video of 64 x 64 pixels: [(start, end, numbers of its frames)]."""
    transform = CropTransform(64)
    reader = WindowReader(path, sampling, transform, every=every, window=window, skip=skip, batch=3)
    windows = itertools.chain.from_iterable(iter(reader, None))
    return [
        (round(start, 4), round(end, 4), numbers(torch.from_numpy(clips[0]).transpose(0, 1)))
        for start, end, clips in windows
    ]


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """100 frames at 25/s, with B-frames."""
    return render(tmp_path_factory.mktemp("counted") / "counted.mp4", n=100, size=(64, 64))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {}),
        ("a.mkv", "libx264", {"bf": "0"}),
        ("a.ts", "libx264", {}),
        ("a.avi", "mpeg4", {}),
        ("a.webm", "libvpx", {}),
    ],
)
def test_a_stream_has_the_frames_of_the_file(tmp_path, name, codec, options):
    path = render(tmp_path / name, codec, options=options)
    with open_stream(path) as video, open_video(path) as whole:
        frames = [(item.time, torch.from_numpy(video.pixels(item.frame).copy())) for item in video]
        assert torch.equal(torch.stack([f for _, f in frames]).permute(0, 3, 1, 2), whole.read(range(40)))
        assert video.fps == pytest.approx(25)
    steps = np.diff([at for at, _ in frames])
    assert steps == pytest.approx(np.full(39, 0.04), abs=1e-3)


def test_times_are_presentation_times(tmp_path):
    times = [0, 40, 100, 1000, 1040, 3000, 3040, 3080, 5000, 5040]
    path = render(tmp_path / "v.mkv", n=10, times=times)
    with open_stream(path) as video:
        read = [(item.time, item.frame) for item in video]
        assert numbers(torch.stack([
            torch.from_numpy(video.pixels(frame).copy()).permute(2, 0, 1) for _, frame in read
        ])) == list(range(10))  # fmt: skip
    assert [at for at, _ in read] == pytest.approx([at / 1000 for at in times])
    one = Sampling("middle", 1)
    starts = [start for start, *_ in places(path, one, every=1.0)]
    assert starts == pytest.approx([0, 1, 3, 5])


def test_windows_are_cut_like_clips(counted):
    got = places(counted, Sampling("dense", 4, 3), every=1.0)
    assert got == [
        (0.0, 0.48, [0, 3, 6, 9]),
        (1.0, 1.48, [25, 28, 31, 34]),
        (2.0, 2.48, [50, 53, 56, 59]),
        (3.0, 3.48, [75, 78, 81, 84]),
    ]
    assert places(counted, Sampling("dense", 4, 3), every=1.0, skip=2) == got[2:]
    # stride counts frames at 12.5/s: every second one
    assert places(counted, Sampling("dense", 3, 2, 12.5), every=3.0)[1][2] == [75, 79, 83]
    overlapping = places(counted, Sampling("dense", 4, 3), every=0.04)
    assert [w[2] for w in overlapping[:2]] == [[0, 3, 6, 9], [1, 4, 7, 10]]


@pytest.mark.parametrize(("n", "fps"), [(4, 75), (4, 100), (8, 100), (8, 1000)])
def test_a_window_of_a_slow_video_has_all_its_frames(counted, n, fps):
    """Its frames repeat, where the checkpoint counts more frames a second than there are."""
    sampling = Sampling("dense", n, 1, fps)
    with open_video(counted) as video:
        clip = sampling.test(video, 0.0)
    for k, (start, end, frames) in enumerate(places(counted, sampling, every=1.0)):
        assert frames == [25 * k + place for place in clip]
        assert (start, end) == pytest.approx((k, k + 0.04 * (clip[-1] + 1)), abs=0.04)


def test_the_last_window_is_filled_up_or_left_out(counted):
    assert places(counted, Sampling("dense", 4, 10), every=3.0)[-1] == (3.0, 4.0, [75, 85, 95, 99])
    assert len(places(counted, Sampling("dense", 5, 20), every=3.0)) == 1  # 75, 95 of five
    assert places(counted, Sampling("dense", 4, 50), every=2.0)[0] == (0.0, 4.0, [0, 50, 99, 99])


def test_a_window_in_seconds_has_a_frame_of_each_equal_part(counted):
    assert places(counted, Sampling("dense", 4, 3), every=2.0, window=1.6) == [
        (0.0, 1.6, [5, 15, 25, 35]),
        (2.0, 3.6, [55, 65, 75, 85]),
    ]
    # a uniform checkpoint's windows last 4 s, or as long as the video
    assert places(counted, Sampling("uniform", 4), every=9.0) == [(0.0, 4.0, [12, 37, 62, 87])]


def test_a_short_video_is_one_window_as_its_clip(tmp_path):
    path = render(tmp_path / "short.mp4", n=9, size=(64, 64))
    assert places(path, Sampling("dense", 4, 4)) == [(0.0, 0.36, [0, 4, 8, 8])]
    assert places(path, Sampling("uniform", 3)) == [(0.0, 0.36, [1, 4, 7])]


@pytest.mark.parametrize("views", [{}, {"clips": 1, "crops": 3}])
def test_a_moment_is_what_the_model_says_of_its_clip(tmp_path, checkpoint, views):  # noqa: F811
    path = tmp_path / "v.mp4"
    demo.write_mp4(path, joined([("grow", 40), ("move_up", 40)]))
    recognize = Recognizer(checkpoint, device="cpu", **views)
    transform = recognize._timeline_views.transform
    moments = list(recognize.timeline(path, every=0.5))
    assert [m.start for m in moments] == [0.5 * k for k in range(10)]
    with open_video(path) as video:
        for k, moment in enumerate(moments):
            clip = video.read([min(8 * k + offset, 79) for offset in (0, 2, 4, 6)])
            crops = torch.stack(transform(clip)).transpose(1, 2)[None]
            scores = recognize.task.view_scores(recognize.model, crops)[0].mean(0)
            assert torch.allclose(torch.from_numpy(moment.scores), scores, atol=1e-6)
            assert moment.name == recognize.class_names[scores.argmax()]
    rest = list(recognize.timeline(path, every=0.5, skip=3))
    assert all(np.array_equal(a.scores, b.scores) for a, b in zip(rest, moments[3:], strict=True))


def joined(parts, seed=0):
    """Demo clips one after the other: [(class, frames)] -> uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([demo.render(name, "star", rng, frames) for name, frames in parts])


def test_a_short_video_has_the_score_that_it_has_alone(demo_root, checkpoint):  # noqa: F811
    path = next(demo_root.glob("test/*/*.mp4"))
    recognize = Recognizer(checkpoint, clips=1, crops=1, device="cpu")
    with open_video(path) as video:
        length = video.num_frames / video.fps
    [moment] = recognize.timeline(path, every=60.0, window=length)
    assert (moment.start, moment.end) == (0, pytest.approx(length))
    for name in ("every", "window"):
        with pytest.raises(ValueError, match=f"{name}=0: must be more than 0"):
            recognize.timeline(path, **{name: 0})


def moments_of(rows, names=("a", "b"), length=2.0, every=2.0):
    return [
        Moment(k * every, k * every + length, np.array(row, np.float32), names)
        for k, row in enumerate(rows)
    ]


def test_segments_enter_and_leave():
    rows = [(0.4, 0.3), (0.6, 0.4), (0.35, 0.45), (0.2, 0.4), (0.1, 0.9), (0.7, 0.3), (0.6, 0.4)]
    got = segments(moments_of(rows), ("a", "b"), enter=0.5, leave=0.3)
    assert [s[:3] for s in got] == [(2.0, 6.0, "a"), (8.0, 10.0, "b"), (10.0, 14.0, "a")]
    assert [s.score for s in got] == pytest.approx([(0.6 + 0.35) / 2, 0.9, 0.65])
    # without hysteresis the dip ends it
    assert segments(moments_of(rows), ("a", "b"), enter=0.5, leave=0.5)[0][:2] == (2.0, 4.0)
    assert segments([], ("a", "b")) == []
    with pytest.raises(ValueError, match="0 <= leave <= enter <= 1"):
        segments([], ("a",), enter=0.2, leave=0.4)


def test_segments_meet_half_way_between_middles():
    rows = [(0.9, 0.1), (0.1, 0.9)]
    overlapping = segments(moments_of(rows, length=4.0), ("a", "b"))
    assert [s[:2] for s in overlapping] == [(0.0, 3.0), (3.0, 6.0)]
    apart = segments(moments_of(rows, length=1.0), ("a", "b"))
    assert [s[:2] for s in apart] == [(0.0, 1.5), (1.5, 3.0)]


def test_segments_of_several_labels_overlap():
    rows = [(0.9, 0.1), (0.9, 0.8), (0.1, 0.8)]
    got = segments(moments_of(rows), ("a", "b"), overlap=True)
    assert [s[:3] for s in got] == [(0.0, 4.0, "a"), (2.0, 6.0, "b")]


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_what_cannot_be_read_ends_the_timeline_and_loses_nothing(tmp_path, checkpoint, batch):  # noqa: F811
    whole = render(tmp_path / "whole.mp4", n=100)
    broken = spoil(whole, tmp_path / "broken.mp4", 60)
    recognize = Recognizer(checkpoint, device="cpu", timeout=30)
    recognize.config.eval.view_batch = batch
    moments, good = [], list(recognize.timeline(whole, every=0.5))
    with pytest.raises(DecodeError, match=r"broken\.mp4: after 2\.\d+ s: ") as caught:
        moments.extend(recognize.timeline(broken, every=0.5))
    at = float(re.search(r"after ([\d.]+) s", str(caught.value))[1])
    assert len(moments) in (4, 5)
    assert moments[-1].end <= at + 1e-6
    for a, b in zip(moments[:4], good, strict=False):
        assert np.array_equal(a.scores, b.scores)
    for path in (tmp_path / "gone.mp4", tmp_path):
        with pytest.raises(DecodeError, match=f"{path}: "):
            list(recognize.timeline(path))


def test_a_hang_midway_is_given_up(tmp_path, checkpoint, monkeypatch):  # noqa: F811
    path = render(tmp_path / "v.mp4", n=100)
    real = stream.VideoStream.pixels

    def hang(self, frame):
        return time.sleep(1000) if frame.pts * frame.time_base > 2.4 else real(self, frame)

    monkeypatch.setattr(stream.VideoStream, "pixels", hang)
    monkeypatch.setattr(stream, "ANSWER", 0.0)
    recognize, moments = Recognizer(checkpoint, device="cpu", timeout=2), []
    with pytest.raises(DecodeError, match=r"v.mp4: after 2.32 s: took longer than 2 s"):
        moments.extend(recognize.timeline(path, every=0.5))
    assert [m.start for m in moments] == pytest.approx([0, 0.52, 1.0, 1.52, 2.0])


def test_many_gives_the_same_in_order_with_errors_as_values(tmp_path, demo_root, checkpoint):  # noqa: F811
    videos = sorted(demo_root.glob("test/*/*.mp4"))[:7]
    paths = [*videos[:3], tmp_path / "gone.mp4", *videos[3:]]
    recognize = Recognizer(checkpoint, device="cpu", timeout=30)
    results = list(recognize.many(iter(paths), workers=3))
    assert [path for path, _ in results] == paths
    assert str(results[3][1]) == f"{paths[3]}: no such file"
    assert isinstance(results[3][1], DecodeError)
    for path, guesses in results:
        if path in videos:
            assert guesses == recognize(path)
    assert [g for _, g in recognize.many(paths[:2], top=1)] == [recognize(p, top=1) for p in paths[:2]]


def test_many_needs_a_worker_and_views_a_crop(checkpoint):  # noqa: F811
    with pytest.raises(ValueError, match="crops=0: must be 1 or more"):
        Recognizer(checkpoint, device="cpu", crops=0)
    with pytest.raises(ValueError, match="workers=0: must be 1 or more"):
        Recognizer(checkpoint, device="cpu").many(["a.mp4"], workers=0)


def test_many_ends_its_workers_and_reads_no_further_than_they_do(demo_root, checkpoint):  # noqa: F811
    asked = []

    def paths():
        for path in itertools.cycle(sorted(demo_root.glob("test/*/*.mp4"))):
            asked.append(path)
            yield path

    results = Recognizer(checkpoint, device="cpu").many(paths(), workers=2)
    before = children()
    next(results)
    next(results)
    assert len(asked) == 4
    started = children() - before
    assert len(started) == 2
    results.close()
    assert not children() & started


def children():
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_names_never_collide():
    paths = [Path(p) for p in ("a/x.mov", "a/x.mp4", "b/a/x.mp4", "b/X.mp4", "c/y.mp4", "a_x.mp4")]
    names = output_names(paths)
    assert len({name.casefold() for name in names}) == len(paths)
    assert names[3:5] == ["b_X", "y"]
    assert output_names([Path("a/x.mp4"), Path("b/x.mov")]) == ["a_x", "b_x"]
    assert output_names(paths) == names


def test_maps_of_videos_with_one_name(tmp_path, demo_root, checkpoint):  # noqa: F811
    source = next(demo_root.glob("test/*/*.mp4")).read_bytes()
    names = [tmp_path / name for name in ("a/x.mov", "a/x.mp4", "b/a/x.mp4")]
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source)
    assert run(cli.predict, f"--checkpoint={checkpoint}", f"--maps={tmp_path}/maps", *names) == 0
    assert len(list((tmp_path / "maps").glob("*.png"))) == 3


def test_maps_never_take_the_place_of_a_picture(tmp_path, demo_root, capsys):
    from test_page import make_checkpoint

    images = make_checkpoint(
        tmp_path / "a.pt", demo_root, "--data.num_frames=1", "--model.patch_size=[1,8,8]",
        "--model.semantic_tokens=[1,2,2]",
    )  # fmt: skip
    picture = tmp_path / "x.png"
    Image.new("RGB", (32, 24)).save(picture)
    before = picture.read_bytes()
    assert run(cli.predict, f"--checkpoint={images}", f"--maps={tmp_path}", picture) == 2
    assert (
        capsys.readouterr().err == f"error: {picture}: is to be recognised; --maps needs another folder\n"
    )
    assert picture.read_bytes() == before
    assert run(cli.predict, f"--checkpoint={images}", f"--maps={tmp_path}/maps", picture) == 0
    assert (tmp_path / "maps/x.png").is_file()


def test_subtitles():
    text = subtitles([Segment(0.0, 61.5, "a <b> & c\n--> d", 0.987), Segment(3600.0, 3601.25, "e", 0.5)])
    assert text == (
        "WEBVTT\n\n00:00:00.000 --> 00:01:01.500\na &lt;b&gt; &amp; c --&gt; d (99%)\n\n"
        "01:00:00.000 --> 01:00:01.250\ne (50%)\n"
    )


COLOURS = ((230, 30, 30), (30, 230, 30), (30, 30, 230))


@pytest.fixture
def by_colour(monkeypatch):
    """A model that knows its class by the colour: what is left to test is everything else."""

    def scores(self, clips):
        means = clips.float().mean((3, 4, 5))  # (B, V, 3)
        return torch.nn.functional.pad((means / 20).softmax(-1), (0, 5)).double()

    monkeypatch.setattr(recognizer.Recognizer, "_scores", scores)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Two videos of one name, red, green and blue by turns, and when (seconds)."""
    folder = tmp_path_factory.mktemp("coloured")
    truth, frames = [], []
    for colour, seconds in ((0, 5.5), (1, 3.25), (0, 2.5), (2, 7.0), (1, 1.75)):
        start = len(frames) / 16
        frames += [np.full((48, 64, 3), COLOURS[colour], np.uint8)] * int(16 * seconds)
        truth.append((start, len(frames) / 16, colour))
    for name in ("a/x.mp4", "b/x.mov"):
        (folder / name).parent.mkdir()
        demo.write_mp4(folder / name, np.stack(frames))
    return [folder / "a/x.mp4", folder / "b/x.mov"], truth


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def predict(checkpoint, folder, *args):  # noqa: F811
    return run(cli.predict, f"--checkpoint={checkpoint}", "--device=cpu", f"--timeline={folder}", *args)


def test_files_of_a_timeline(tmp_path, checkpoint, coloured, by_colour, capsys):  # noqa: F811
    videos, truth = coloured
    assert predict(checkpoint, tmp_path / "out", "--every=0.5", "--draw", *videos) == 0
    files = contents(tmp_path / "out")
    suffixes = ("csv", "json", "mp4", "npz", "png", "vtt")
    assert sorted(files) == [f"{name}.{suffix}" for name in ("a_x", "b_x") for suffix in suffixes]
    names = Recognizer(checkpoint, device="cpu").class_names
    with open(tmp_path / "out/a_x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [names[colour] for _, _, colour in truth]
    report = json.loads(files["a_x.json"])
    assert [s["class"] for s in report["segments"]] == [row["class"] for row in rows]
    assert report["settings"]["every"] == 0.5
    for row, segment, (start, end, _) in zip(rows, report["segments"], truth, strict=True):
        assert (float(row["from"]), float(row["to"])) == (segment["from"], segment["to"])
        assert abs(segment["from"] - start) <= 0.5
        assert abs(segment["to"] - end) <= 0.5
    assert files["a_x.vtt"].startswith(b"WEBVTT\n\n00:00:00.000 --> ")
    with np.load(tmp_path / "out/a_x.npz") as saved:
        assert saved["scores"].shape == (len(saved["start"]), 8) == (40, 8)
        assert saved["class_names"].tolist() == names
    with open_stream(videos[0]) as old, open_stream(tmp_path / "out/a_x.mp4") as new:
        before, after = list(old), list(new)
        sign = new.pixels(after[100].frame).astype(int)
        plain = old.pixels(before[100].frame).astype(int)
    assert [x.time for x in after] == pytest.approx([x.time for x in before], abs=1e-3)
    assert after[-1].lasts == pytest.approx(before[-1].lasts, abs=1e-3)
    assert abs(sign - plain)[:20].max() < 16  # the picture is as it was
    assert sign[-9:, :24].max() > 150  # white on black below
    assert sign[-3:, :4].max() < 60
    # again: finished videos are left alone, another step starts anew
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert predict(checkpoint, tmp_path / "out", "--every=0.5", "--draw", *videos) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps
    assert predict(checkpoint, tmp_path / "out", "--every=1", *videos) == 0
    assert json.loads((tmp_path / "out/a_x.json").read_text())["moments"] == 20
    assert not (tmp_path / "out/a_x.mp4").exists()
    # another video does not take its place
    (tmp_path / "a_x.mp4").write_bytes(videos[0].read_bytes())
    assert predict(checkpoint, tmp_path / "out", tmp_path / "a_x.mp4") == 2
    assert "needs another folder" in capsys.readouterr().err


def test_broken_off_at_any_moment_it_ends_with_the_same_files(
    tmp_path, checkpoint, coloured, by_colour, monkeypatch  # noqa: F811
):  # fmt: skip
    [video, _], _ = coloured
    args = ("--every=0.25", video)
    assert predict(checkpoint, tmp_path / "whole", *args) == 0
    real, calls = Recognizer._score_windows, itertools.count()

    def dies(self, batch):
        if next(calls) % 2:
            raise RuntimeError("killed")
        return real(self, batch)

    monkeypatch.setattr(Recognizer, "_score_windows", dies)
    runs = 0
    while not (tmp_path / "parts/x.json").exists():
        runs += 1
        try:
            predict(checkpoint, tmp_path / "parts", *args)
        except RuntimeError:
            with open(tmp_path / "parts/x.moments", "ab") as file:
                file.write(b"half a moment"[: random.Random(runs).randrange(13)])
    assert runs > 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("suffix", [".mp4", ".json", ".csv", ".moments"])
def test_files_that_no_timeline_wrote_stay_as_they_are(tmp_path, checkpoint, capsys, suffix):  # noqa: F811
    """First of all the video itself, where its folder is named."""
    video = render(tmp_path / "x.mp4") if suffix == ".mp4" else render(tmp_path / "x.mkv")
    if suffix != ".mp4":
        video.with_suffix(suffix).write_text('{"label": 3}\n')
    before = contents(tmp_path)
    assert predict(checkpoint, tmp_path, video) == 2
    assert f"error: {tmp_path / 'x'}{suffix}: not of a timeline" in capsys.readouterr().err
    assert contents(tmp_path) == before
    if suffix == ".mp4":  # also where something that a timeline left says otherwise
        (tmp_path / "x.moments").touch()
        assert predict(checkpoint, tmp_path, video) == 2
        assert video.read_bytes() == before["x.mp4"]


def test_an_empty_json_is_not_a_whole_timeline(tmp_path):
    """What a machine that went down may leave; nor does it stop the next attempt."""
    (tmp_path / "video.mp4").write_bytes(b"video")
    files = Files(SimpleNamespace(class_names=("a",)), tmp_path / "video.mp4", tmp_path / "a", {})
    (tmp_path / "a.json").touch()
    files._check_place()
    assert not files._complete()
    (tmp_path / "a.json").write_text(json.dumps(files.source | {"error": None}))
    for suffix in SUFFIXES[:-1]:
        (tmp_path / f"a{suffix}").touch()
    assert files._complete()


def test_two_commands_at_once_do_not_share_files(tmp_path, checkpoint, monkeypatch, capsys):  # noqa: F811
    video, codes, score = render(tmp_path / "x.mp4"), [], Recognizer._score_windows

    def meanwhile(self, windows):
        codes.append(predict(checkpoint, tmp_path / "out", video) if not codes else None)
        return score(self, windows)

    monkeypatch.setattr(Recognizer, "_score_windows", meanwhile)
    assert predict(checkpoint, tmp_path / "out", video) == 0
    assert codes == [2]
    assert "x.moments: another process is writing this timeline" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/x.json").read_text())["moments"] == 1


def test_what_is_no_video_leaves_nothing(tmp_path, checkpoint, capsys):  # noqa: F811
    (tmp_path / "x.mp4").write_text("text")
    assert predict(checkpoint, tmp_path / "out", tmp_path / "x.mp4") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'x.mp4'}: ")
    assert contents(tmp_path / "out") == {}
    (tmp_path / "out/x.moments").mkdir()  # as good as a full disk
    assert predict(checkpoint, tmp_path / "out", tmp_path / "x.mp4") == 2
    assert "x.moments: cannot be written (Is a directory)" in capsys.readouterr().err


def test_a_recording_that_begins_midway_begins_at_its_first_key_frame(tmp_path):
    recording = render(tmp_path / "a.ts", size=(64, 64))
    midway = tmp_path / "b.ts"
    midway.write_bytes(recording.read_bytes()[len(recording.read_bytes()) // 3 :])
    with open_stream(midway) as video:
        clip = [torch.from_numpy(video.pixels(shown.frame).copy()) for shown in video]
    shown = numbers(torch.stack(clip).permute(0, 3, 1, 2))
    assert shown == list(range(shown[0], 40))
    assert 0 < shown[0] <= 20


def test_a_damaged_video_keeps_its_timeline_and_is_tried_again(tmp_path, checkpoint, capsys):  # noqa: F811
    whole = render(tmp_path / "whole.mp4", n=100)
    broken = spoil(whole, tmp_path / "broken.mp4", 60)
    for _ in range(2):
        assert predict(checkpoint, tmp_path / "out", "--every=0.5", broken) == 1
        assert "broken.mp4: after 2." in capsys.readouterr().err
        report = json.loads((tmp_path / "out/broken.json").read_text())
        assert "after 2." in report["error"]
        assert report["moments"] in (4, 5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--every=0"],
        ["--window=-1"],
        ["--enter=0.2"],
        ["--workers=0"],
        ["--timeline=t", "--json"],
        ["--timeline=t", "--maps=m"],
        ["--timeline=t", "--features=f.npz"],
    ],
)
def test_settings_that_make_no_sense_are_one_line(flags, capsys):
    assert run(cli.predict, "--checkpoint=a.pt", *flags, "a.mp4") == 2
    assert "error: --" in capsys.readouterr().err


TOOL = str(ROOT / "tools" / "predict.py")
STEP = 2.0


def long_video(path, minutes, repeats):
    """So many minutes of demo clips of 6 to 14 s, 320 x 240 pixels, repeated; -> [(from, to, class)]."""
    rng, truth, part, name = np.random.default_rng(7), [], path.with_name("part.mp4"), None
    with av.open(str(part), "w") as container:
        video = container.add_stream("libx264", rate=demo.FPS, options=demo.ENCODER)
        video.width, video.height, video.pix_fmt, end = 320, 240, "yuv420p", 0
        while end < 60 * minutes * demo.FPS:
            name = rng.choice([other for other in demo.CLASSES if other != name])
            frames = demo.render(name, rng.choice(demo.SHAPES), rng, int(rng.integers(6, 15)) * demo.FPS)
            truth.append((end / demo.FPS, (end + len(frames)) / demo.FPS, str(name)))
            end += len(frames)
            for pixels in frames:
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(video.encode(frame.reformat(320, 240, "yuv420p", interpolation="BICUBIC")))
        container.mux(video.encode(None))
    with av.open(str(path), "w") as container:
        video = None
        for k in range(repeats):
            with av.open(str(part)) as old:
                source = old.streams.video[0]
                video = video or container.add_stream_from_template(source)
                shift = round(k * end / demo.FPS / source.time_base)
                for packet in filter(lambda packet: packet.size, old.demux(source)):
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, video
                    container.mux(packet)
    seconds = end / demo.FPS
    return [(a + k * seconds, b + k * seconds, name) for k in range(repeats) for a, b, name in truth]


def family(pid):
    """A process and those it started."""
    try:
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *itertools.chain.from_iterable(family(int(child)) for child in started)]


def megabytes(pid):
    """Memory of a process and those it started, what they share counted once."""
    total = 0
    for member in family(pid):
        try:
            text = Path(f"/proc/{member}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(map(int, re.findall(r"^Pss:\s+(\d+) kB", text, re.M)))
    return total / 1024


def trained(folder):
    """The demo's checkpoint: the one that `make demo` left, or a new one."""
    left = ROOT / "runs" / "demo" / "best.pt"
    if not left.exists():
        cfg = f"--cfg={ROOT}/configs/demo_stvit.yaml"
        data = [f"--data.train={folder}/demo/train", f"--data.val={folder}/demo/test"]
        assert run(cli.train, cfg, *data, f"--output={folder}/run") == 0
        left = folder / "run" / "best.pt"
    return left


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("minutes", "repeats"), [(20, 6)])
def test_two_hours(tmp_path, minutes, repeats):
    best, video = trained(tmp_path), tmp_path / "long.mp4"
    truth = long_video(video, minutes, repeats)
    bare = """if True:
        import sys, time
        from stvit_video.bench.data import decode_all
        start = time.perf_counter()
        frames = decode_all(sys.argv[1])
        print(frames, time.perf_counter() - start, time.process_time())"""

    def decode():
        done = subprocess.run(
            [sys.executable, "-c", bare, str(video)], capture_output=True, text=True, cwd=ROOT
        )
        return float(done.stdout.split()[1])

    def begin(folder):
        log = open(tmp_path / "log.txt", "ab")  # noqa: SIM115
        return subprocess.Popen(
            [sys.executable, TOOL, f"--checkpoint={best}", f"--timeline={tmp_path}/{folder}", str(video)],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    before = decode()
    start, most, process = time.perf_counter(), 0.0, begin("whole")
    state, span = tmp_path / "whole" / "long.moments", [0.0, 0.0]
    while process.poll() is None:
        most = max(most, megabytes(process.pid))
        if state.exists():
            span[0] = span[0] or time.perf_counter()
            span[1] = time.perf_counter()
        time.sleep(0.1)
    seconds, after = time.perf_counter() - start, decode()
    assert process.returncode == 0, (tmp_path / "log.txt").read_text()
    report = json.loads((tmp_path / "whole/long.json").read_text())
    edges = [(s["from"], s["class"]) for s in report["segments"]]
    right = sum(
        max(0.0, min(end, s["to"]) - max(start, s["from"]))
        for start, end, name in truth
        for s in report["segments"]
        if s["class"] == name
    )
    near = [any(abs(at - start) <= STEP and c == name for at, c in edges) for start, _, name in truth]
    print(
        f"\n{truth[-1][1] / 3600:.2f} h, {len(truth)} segments, {len(edges)} found; right "
        f"{right / truth[-1][1]:.2%} of the time, {np.mean(near):.2%} of the boundaries within {STEP:g} s; "
        f"{most:.0f} MB at most; {seconds:.1f} s in all, {span[1] - span[0]:.1f} s of them reading, "
        f"decoding alone {before:.1f} and {after:.1f} s"
    )
    assert most < 1000
    assert right / truth[-1][1] >= 0.9
    assert np.mean(near) >= 0.95
    for after_moments in (0.2, 0.5, 0.8):
        process = begin("killed")
        state, size = tmp_path / "killed" / "long.moments", after_moments * report["moments"] * 48
        while process.poll() is None and not (state.exists() and state.stat().st_size > size):
            time.sleep(0.02)
        time.sleep(random.random())
        for pid in reversed(family(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert state.exists()
    assert begin("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
