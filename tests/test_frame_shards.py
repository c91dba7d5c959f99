"""Shards of frames: frame i is the JPEG of frame i, whatever breaks off or is damaged; recoded shards."""

import contextlib
import csv
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
import torch
from launch import finish, launch
from PIL import Image
from test_decode import FRAMES, KINDS, numbers, picture, render
from test_end_to_end import SMALL, figures, run, settings
from test_shards import report
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resize

from stvit_video import build, cli
from stvit_video.data.annotations import ListError, read_rows
from stvit_video.data.dataset import VideoDataset
from stvit_video.data.decode import open_video
from stvit_video.data.encode import H264, Jpeg
from stvit_video.data.frames import FrameVideo, Index
from stvit_video.data.rows import Row
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.data.views import Sampling
from stvit_video.data.views import TestViews as SpreadViews
from stvit_video.data.write_shards import write_shards
from stvit_video.errors import DecodeError, InputError

UNEVEN = [40 * i + 200 * (i > 9) + 7 * (i % 3) for i in range(FRAMES)]  # ms


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Files and a folder of frames, each frame showing its number."""
    root = tmp_path_factory.mktemp("source")
    for name in ("b_frames.mp4", "vp9_odd.webm", "mpeg4_b.avi"):
        codec, options = KINDS[name]
        render(root / name, codec, **dict(options))
    render(root / "uneven.mkv", times=UNEVEN)
    (root / "folder").mkdir()
    for i in range(11):
        Image.fromarray(picture(i)).save(root / "folder" / f"img_{i}.png")
    return root


NAMES = ("b_frames.mp4", "vp9_odd.webm", "mpeg4_b.avi", "uneven.mkv", "folder")


def rows_of(source, names=NAMES):
    return [Row(str(source / name), label) for label, name in enumerate(names)]


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    """By `every`: one shard of NAMES."""
    root = tmp_path_factory.mktemp("frames")
    for every in (1, 2):
        write_shards(rows_of(source), root / str(every), encode=Jpeg(48, every=every))
    return root


def opened(row):
    return open_video(row.path, contents=row.contents())


def member(row, suffix="mov"):
    """What another tool reads from the tar."""
    shard, _, name = row.path.partition(".tar/")
    with tarfile.open(f"{shard}.tar") as tar:
        return tar.extractfile(f"{os.path.splitext(name)[0]}.{suffix}").read()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("place", "name"), enumerate(NAMES))
def test_frame_i_is_the_jpeg_of_frame_i(source, shards, place, name, every):
    row = read_rows(shards / str(every))[place]
    with open_video(source / name) as original, opened(row) as video:
        assert (video.num_frames, video.fps) == (original.num_frames, original.fps)
        n = original.num_frames
        small = resize(original.read(range(n)), [48], antialias=True).permute(0, 2, 3, 1).contiguous()
        jpegs = [simplejpeg.encode_jpeg(frame.numpy(), 85, "RGB", "420") for frame in small]
        expected = torch.stack(
            [
                decode_jpeg(torch.frombuffer(bytearray(j), dtype=torch.uint8), ImageReadMode.RGB)
                for j in jpegs
            ]
        )
        kept = [i // every * every for i in range(n)]
        clip = video.read(range(n))
        assert torch.equal(clip, expected[kept])
        assert clip.is_contiguous(memory_format=torch.channels_last)
        assert numbers(clip) == kept
        order = [n - 1, 3, 3, 0, 2, n - 1]
        assert torch.equal(video.read(order), clip[order])
        error = (expected.double() - small.permute(0, 3, 1, 2)).square().mean()
        assert 10 * torch.log10(255**2 / error) > 35  # dB, of the JPEGs
        for wrong in ([n], [-1]):
            with pytest.raises(IndexError):
                video.read(wrong)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("place", "name"), enumerate(NAMES))
def test_the_mov_plays_at_the_rate_and_for_the_duration_of_the_source(source, shards, place, name, every):
    row = read_rows(shards / str(every))[place]
    with av.open(io.BytesIO(member(row))) as container:
        stream = container.streams.video[0]
        assert (container.format.name.partition(",")[0], stream.codec_context.name) == ("mov", "mjpeg")
        shown = [
            (frame.pts * stream.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode()
        ]
        duration = stream.duration * stream.time_base
    with opened(row) as video:
        kept = range(0, video.num_frames, every)
        assert len(shown) == len(kept)
        ours = video.read(kept).permute(0, 2, 3, 1).double()
    theirs = torch.from_numpy(np.stack([pixels for _, pixels in shown])).double()
    assert (ours - theirs).abs().mean() < 2  # another decoder's rounding, and way of enlarging colours
    times = [time for time, _ in shown]
    if name == "uneven.mkv":
        assert times == [Fraction(UNEVEN[i], 1000) for i in kept]
        assert abs(duration - Fraction(UNEVEN[-1] + 40, 1000)) < Fraction(3, 1000)
    else:
        assert times == [Fraction(i, 25) for i in kept]
        assert duration == Fraction(video.num_frames, 25)


def test_frames_are_never_enlarged_and_need_not_be_made_smaller(source, tmp_path):
    rows = rows_of(source, ["b_frames.mp4", "folder"])
    for short_side, size in ((None, (64, 96)), (500, (64, 96)), (64, (64, 96)), (31, (31, 46))):
        write_shards(rows, tmp_path / str(short_side), encode=Jpeg(short_side))
        for row in read_rows(tmp_path / str(short_side)):
            with opened(row) as video:
                assert video.read([0]).shape[-2:] == size


def test_frames_may_come_smaller_but_not_below_a_short_side(source, tmp_path):
    write_shards(rows_of(source, ["b_frames.mp4"]), tmp_path / "a", encode=Jpeg(None))
    with opened(read_rows(tmp_path / "a")[0]) as video:
        full = video.read([5, 20, 5])
        for short_side, size in (
            (64, (64, 96)),
            (33, (64, 96)),
            (32, (32, 48)),
            (9, (16, 24)),
            (1, (8, 12)),
        ):
            clip = video.read([5, 20, 5], short_side=short_side)
            assert clip.shape[-2:] == size
            assert numbers(clip) == [5, 20, 5]
            mean = torch.nn.functional.adaptive_avg_pool2d(full.float(), size)
            assert (clip - mean).abs().mean() < 3


def test_kept_or_not_the_pixels_are_the_same(source, tmp_path):
    """JPEGs may be decoded smaller, which the pixels of a resize depend on."""
    write_shards(rows_of(source, ["b_frames.mp4", "folder"]), tmp_path / "a", encode=Jpeg(None))
    views = SpreadViews(Sampling("dense", 4, 2), CropTransform(16), clips=2)
    for rows in (read_rows(tmp_path / "a"), rows_of(source, ["b_frames.mp4", "folder"])):
        plain, keeping = (VideoDataset(rows, views, keep=keep) for keep in (False, True))
        for index in range(2):
            assert torch.equal(keeping[0, index].clips, plain[0, index].clips)
            assert torch.equal(keeping[0, index].clips, plain[0, index].clips)


def test_a_read_takes_the_bytes_of_its_frames_and_no_more(shards, monkeypatch):
    reads = []

    def pread(file, size, offset, pread=os.pread):
        reads.append(size)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    row = read_rows(shards / "1")[0]
    assert reads == []
    with opened(row) as video:
        assert reads == [row.place.head]
        assert row.place.head < 3 * 512 + 16 * FRAMES + 512
        sizes = video.index.frames["size"].tolist()
        del reads[:]
        video.read([30, 4, 3, 3])
        assert reads == [sizes[3] + sizes[4], sizes[30]]
        del reads[:]
        video.read(range(FRAMES))
        assert reads == [sum(sizes)]


def test_other_members_and_orders(source, shards, tmp_path):
    """Copied, a sample stays one of frames; apart or turned round it is refused."""
    rows = read_rows(shards / "2")
    write_shards(rows, tmp_path / "copy")
    copies = read_rows(tmp_path / "copy")
    for a, b in zip(rows, copies, strict=True):
        assert (a.target, member(a), member(a, "frames")) == (b.target, member(b), member(b, "frames"))
        with opened(a) as one, opened(b) as other:
            assert torch.equal(one.read(range(9)), other.read(range(9)))
    with pytest.raises(InputError, match="stored as frames already"):
        write_shards(rows, tmp_path / "again", encode=Jpeg())
    contents = {suffix: member(rows[0], suffix) for suffix in ("mov", "frames", "cls")}
    for order in itertools.permutations(contents):
        path = tmp_path / "turned.tar"
        with tarfile.open(path, "w") as tar:
            for suffix in order:
                info = tarfile.TarInfo(f"a.{suffix}")
                info.size = len(contents[suffix])
                tar.addfile(info, io.BytesIO(contents[suffix]))
        if order[:2] == ("frames", "mov"):
            with opened(read_rows(path)[0]) as video:
                assert numbers(video.read([7])) == [6]
        else:
            with pytest.raises(
                ListError, match=r"turned\.tar/a: found .*expected frames first and mov next"
            ):
                read_rows(path)


def test_a_video_in_a_shard_is_opened_by_its_name(source, shards, tmp_path):
    write_shards(rows_of(source, ["b_frames.mp4"]), tmp_path / "a")
    for rows in (read_rows(shards / "1"), read_rows(tmp_path / "a")):
        with open_video(rows[0].path) as video, opened(rows[0]) as same:
            assert type(video) is type(same)
            assert torch.equal(video.read([3, 30]), same.read([3, 30]))
    with tarfile.open(tmp_path / "dot.tar", "w") as tar:  # as `tar -cf dot.tar .` names them
        tar.add(source / "b_frames.mp4", "./a/b.mp4")
    [row] = read_rows(tmp_path / "dot.tar")
    with open_video(row.path) as video:
        assert numbers(video.read([3])) == [3]
    for path in (f"{shards}/1/00000.tar/none.mov", f"{shards}/1/00001.tar/a.mov", f"{source}/uneven.mkv/a"):
        with pytest.raises(DecodeError, match=f"{path}: no such file"):
            open_video(path)


# ---- damage


def damaged(row, offset, bit, tmp_path):
    """The row, in a copy of its shard in which one bit differs."""
    data = bytearray(Path(row.place.shard).read_bytes())
    data[offset] ^= 1 << bit
    shard = tmp_path / "bad.tar"
    shard.write_bytes(data)
    return Row(
        row.path.replace(row.place.shard, str(shard)),
        row.target,
        None,
        row.place._replace(shard=str(shard)),
    )


@pytest.mark.parametrize("region", ["header of the index", "index", "header of the mov", "frames"])
def test_a_flipped_bit_is_one_clear_error_and_never_other_pixels(shards, tmp_path, region):
    row = read_rows(shards / "1")[1]
    start = row.place.offset
    with opened(row) as video:
        right = video.read(range(video.num_frames))
        first = int(video.index.frames["offset"][0])
        places = {
            "header of the index": range(start, start + 512),
            "index": range(start + 512, start + 512 + len(video.data)),
            "header of the mov": range(start + row.place.head - 512, start + row.place.head),
            "frames": range(
                start + row.place.head + first,
                start + row.place.head + first + int(video.index.frames["size"].sum()),
            ),
        }[region]
    rng, causes = random.Random(0), []
    for _ in range(60):
        bad = damaged(row, rng.choice(places), rng.randrange(8), tmp_path)
        try:
            with opened(bad) as video:
                assert torch.equal(video.read(range(video.num_frames)), right)
        except DecodeError as error:
            causes.append(str(error))
    # every bit counts, but for some of a header
    assert len(causes) == 60 if region in ("index", "frames") else len(causes) > 50
    for cause in causes:
        assert cause.startswith(f"{tmp_path}/bad.tar/00000001_vp9_odd.mov: ")
        assert "\n" not in cause
        assert "damaged there" in cause or "not at its place" in cause


def test_frames_beside_a_damaged_one_are_read(shards, tmp_path):
    row = read_rows(shards / "2")[0]
    with opened(row) as video:
        offset, size, _ = video.index.frames[3].tolist()
        right = video.read([0, 4, 9])
    bad = damaged(row, row.place.offset + row.place.head + offset + size // 2, 5, tmp_path)
    with opened(bad) as video:
        assert torch.equal(video.read([0, 4, 9]), right)
        for index in (6, 7):
            with pytest.raises(
                DecodeError, match=r"frame 6 of 40: the shard is damaged there \(the checksum"
            ):
                video.read([0, index])


@pytest.mark.parametrize(
    ("field", "value"), [("offset", 2**63 + 5), ("offset", 2**40), ("size", 2**32 - 1)]
)
def test_frames_outside_their_video_are_refused(shards, tmp_path, field, value):
    """Before memory is asked for, or a place that no file has."""
    row, path = read_rows(shards / "2")[0], tmp_path / "out.tar"
    with opened(row) as video:
        index, frames = video.index, video.index.frames.copy()
    frames[field][3] = value
    with tarfile.open(path, "w") as tar:
        for suffix, data in (("frames", index._replace(frames=frames).to_bytes()), ("mov", member(row))):
            info = tarfile.TarInfo(f"a.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(
        DecodeError, match=r"out\.tar/a\.mov: the shard is damaged there \(its index makes no"
    ):
        opened(read_rows(path)[0])


@pytest.mark.parametrize("change", [{"every": 0}, {"every": 3}, {"num_frames": 0}, {"num_frames": 42}])
def test_an_index_that_makes_no_sense_is_refused(shards, change):
    """Whoever wrote it, and checksum and all."""
    with opened(read_rows(shards / "2")[0]) as video:
        index = video.index
    assert Index.of(index.to_bytes())._replace(frames=0) == index._replace(frames=0)
    with pytest.raises(ValueError, match="no sense"):
        Index.of(index._replace(**change).to_bytes())
    with pytest.raises(ValueError, match="checksum"):
        Index.of(b"")


def test_a_shard_cut_off_is_refused_when_listed_and_when_read(shards, tmp_path):
    row = read_rows(shards / "1")[2]
    data, shard = Path(row.place.shard).read_bytes(), tmp_path / "cut.tar"
    cut = Row(row.path.replace(row.place.shard, str(shard)), 0, None, row.place._replace(shard=str(shard)))
    for end in (row.place.offset + 100, row.place.offset + 600, row.place.offset + row.place.head + 5000):
        shard.write_bytes(data[:end])
        with pytest.raises(ListError, match=r"cut\.tar"):
            read_rows(shard)
        with pytest.raises(DecodeError, match=r"cut\.tar/00000002_mpeg4_b\.mov: .*damaged there \(it ends"):
            opened(cut).read(range(FRAMES))
    shard.unlink()
    with pytest.raises(DecodeError, match=r"cut\.tar/00000002_mpeg4_b\.mov: .*No such file"):
        opened(cut)
    write_shards(
        [Row(row.path, 0, None, row.place)] * 3, tmp_path / "other"
    )  # other videos at these places
    (tmp_path / "other" / "00000.tar").rename(shard)
    with pytest.raises(DecodeError, match=r"cut\.tar/00000002_mpeg4_b\.mov: "):
        opened(cut)
    third = read_rows(shard)[2]
    with pytest.raises(DecodeError, match=r"^[^ ]*cut\.tar/a\.mov: not at its place[^(]*$"):
        opened(Row(f"{shard}/a.mov", 0, None, third.place))


def check(folder, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        code = run(cli.check, f"--output={folder}", "--data.num_classes=5", *args)
    return code, list(csv.DictReader((folder / "check.csv").read_text().splitlines()))


def test_the_checker_compares_every_checksum(shards, tmp_path):
    row = read_rows(shards / "1")[1]
    with opened(row) as video:
        first, last = video.index.frames["offset"][0], video.index.frames["offset"][-1]
    assert check(tmp_path, "--thorough", f"--data.train={shards}/1") == (0, [])
    for offset in (10, int(first) - 4, int(last) + 40):
        bad = damaged(row, row.place.offset + row.place.head + offset, 2, tmp_path)
        assert check(tmp_path, f"--data.train={bad.place.shard}") == (
            0,
            [],
        )  # it reads the first frame only
        code, found = check(tmp_path, "--thorough", f"--data.train={bad.place.shard}")
        assert (code, [(f["path"], f["kind"]) for f in found]) == (1, [(bad.path, "unreadable")])
        assert "damaged there" in found[0]["cause"]
    code, found = check(tmp_path, f"--data.train={shards}/1", f"--data.val={shards}/1/00000.tar")
    assert {f["kind"] for f in found} == {"duplicate"}


READ = """
import os, sys
import numpy as np, torch
from pathlib import Path
from stvit_video.data.annotations import read_rows
from stvit_video.data.decode import open_video
from stvit_video.data.batch import Sample
from stvit_video.data.dataset import TestSampler, make_loader

class Reads(torch.utils.data.Dataset):
    rows = read_rows(sys.argv[1])
    frames = [open_video(row.path, contents=row.contents()).read(range(11)) for row in rows]

    def __getitem__(self, item):
        rng = np.random.default_rng(item[1])
        place, indices = rng.integers(len(self.rows)), rng.integers(11, size=rng.integers(1, 9)).tolist()
        row = self.rows[place]
        with open_video(row.path, contents=row.contents()) as video:
            same = torch.equal(video.read(indices), self.frames[place][indices])
        pages = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        return Sample(item[1], None, [same, pages], [(str(os.getpid()), str(pages if same else "wrong"))])

number = int(sys.argv[2])
pages = {}
for batch in make_loader(Reads(), TestSampler(number), batch_size=1, workers=2, pin_memory=False):
    for worker, size in batch.failures:
        pages.setdefault(worker, []).append(float(size))
assert sum(map(len, pages.values())) == number
print(max(max(sizes[len(sizes) // 5 :]) - sizes[len(sizes) // 5] for sizes in pages.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_reads_by_two_workers_are_exact_and_need_no_more_memory(shards, number):
    command = [sys.executable, "-c", READ, str(shards / "1"), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(f"{number} reads: the larger of 2 workers grows by {float(done.stdout):.2f} MB")
    assert float(done.stdout) < 10


# ---- writing


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    """A list, the command's flags, and the shards that an unbroken run of it leaves."""
    folder = tmp_path_factory.mktemp("unbroken")
    names = [source / name for name in ("b_frames.mp4", "vp9_odd.webm", "uneven.mkv")] * 4
    names[4] = source / "none.mp4"
    (folder / "list.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))
    args = [f"--data.train={folder}/list.txt", "--data.num_classes=3", "--frames=jpeg", "--videos=3"]
    assert run(cli.shards, *args, f"--to={folder}/one", "--data.workers=1") == 1
    return args, files(folder / "one")


def test_the_command_counts_and_lists(unbroken, tmp_path, capsys):
    args, expected = unbroken
    assert set(expected) == {*(f"0000{i}.tar" for i in range(4)), "shards.jsonl", "unreadable.csv"}
    [(path, cause)] = list(csv.reader(expected["unreadable.csv"].decode().splitlines()))[1:]
    assert path.endswith("none.mp4")
    assert cause == "no such file"
    assert run(cli.shards, *args, f"--to={tmp_path}/out", "--data.workers=3") == 1
    size = sum(len(data) for name, data in expected.items() if name.endswith("tar"))
    printed = capsys.readouterr().out
    assert f"11 videos in 4 shards, 440 frames, {size} bytes, " in printed
    assert f"1 videos could not be read: {tmp_path}/out/unreadable.csv" in printed
    assert files(tmp_path / "out") == expected  # whatever the number of workers
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 11
    for row in rows:
        with opened(row) as video:
            assert isinstance(video, FrameVideo)
            assert numbers(video.read([0, 39])) == [0, 39]
    assert run(cli.shards, *args, f"--to={tmp_path}/out") == 1  # nothing is left to do
    assert files(tmp_path / "out") == expected
    capsys.readouterr()
    for flag, words in (
        ("--quality=70", "quality=85, not 70"),
        ("--videos=4", "videos=3, not 4"),
        ("--seed=5", "list"),
    ):
        assert run(cli.shards, *args, f"--to={tmp_path}/out", flag) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert f"{tmp_path}/out exists" in line
        assert words in line


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_killed_it_goes_on_and_ends_as_if_unbroken(unbroken, tmp_path, finished):
    args, expected = unbroken
    part = tmp_path / "out.part"
    args = [*args, f"--to={tmp_path}/out", "--data.workers=2"]

    def slowly(rank):  # the moment is then known
        encode = Jpeg.__call__

        def encoded(self, row):
            if len(list(part.glob("*.tar"))) > finished:
                time.sleep(0.2)
            return encode(self, row)

        Jpeg.__call__ = encoded

    part.mkdir()  # killed before the first line was written
    [process] = started = launch(cli.shards, *args, before=slowly)
    while len(list(part.glob("*.tar"))) <= finished:
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    finish(started)
    assert not (tmp_path / "out").exists()
    kept = {path: path.stat().st_mtime_ns for path in sorted(part.glob("*.tar"))[:finished]}
    with open(part / "shards.jsonl", "a") as log:
        log.write('{"shards": 1, "vid')  # a line is written in one go, but perhaps not here
    assert run(cli.shards, *args, "--quality=70") == 2
    assert run(cli.shards, *args) == 1
    assert files(tmp_path / "out") == expected
    assert not part.exists()
    for path, written in kept.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == written


def test_what_cannot_be_read_is_listed(source, tmp_path, demo_root):
    (tmp_path / "text.mp4").write_text("no video")
    spoilt = bytearray((source / "b_frames.mp4").read_bytes())
    middle = spoilt.index(b"mdat") + len(spoilt) // 2
    spoilt[middle : middle + 400] = bytes(400)
    (tmp_path / "spoilt.mp4").write_bytes(spoilt)
    (tmp_path / "empty").mkdir()
    good = rows_of(source, ["folder"])[0]
    bad = [Row(str(tmp_path / name), 0) for name in ("text.mp4", "spoilt.mp4", "empty", "none.webm")]
    short = Row(good.path, 0, 12)
    for encode in (Jpeg(), H264()):
        folder = tmp_path / type(encode).__name__
        written, size = write_shards([*bad, good, short], folder, encode=encode, videos=2, workers=2)
        assert (written.videos, written.frames, len(written.unreadable)) == (1, 11, 5)
        assert [path for path, _ in written.unreadable] == [row.path for row in (*bad, short)]
        assert all(cause.startswith(f"{path}: ") for path, cause in written.unreadable)
        assert size == written.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
        assert [len(read_rows(folder)), len(list(folder.glob("*.tar")))] == [1, 3]
    with pytest.raises(InputError, match=r"of 4 videos none can be read, the first: .*text\.mp4: "):
        write_shards(bad, tmp_path / "none", encode=Jpeg())
    assert not list(tmp_path.glob("none*"))


class Hanging(Jpeg):
    def __call__(self, row):
        if row.target == 1:
            time.sleep(100)
        return super().__call__(row)


def test_what_hangs_is_given_up(source, tmp_path):
    rows = rows_of(source, ["folder"] * 3)
    written, _ = write_shards(rows, tmp_path / "a", encode=Hanging(), timeout=1.5, workers=2)
    assert written.unreadable == [(rows[1].path, f"{rows[1].path}: took longer than 1.5 s (data.timeout)")]
    assert [row.target for row in read_rows(tmp_path / "a")] == [0, 2]


def test_what_cannot_be_encoded_is_listed(source, tmp_path):
    """Larger than JPEG and H.264 allow; nothing is said about a picture that is made smaller."""
    (tmp_path / "long").mkdir()
    Image.new("RGB", (66_000, 16)).save(tmp_path / "long" / "0.png")
    rows = [Row(str(tmp_path / "long"), 0), *rows_of(source, ["folder"])]
    for encode in (Jpeg(48), H264(48)):
        written, _ = write_shards(rows, tmp_path / type(encode).__name__, encode=encode)
        [(path, cause)] = written.unreadable
        assert (written.videos, path) == (1, rows[0].path)
        assert cause.startswith(f"{path}: cannot be encoded (")
        assert "\n" not in cause
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Jpeg(48)(rows[1]).frames == 11


def test_two_processes_do_not_write_one_folder(source, tmp_path):
    """The second would cut off what the first has written, which calls its folder complete before."""
    part = tmp_path / "a.part"
    part.mkdir()
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", lock, str(part / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=r"a\.part: another process is writing it"):
            write_shards(rows_of(source), tmp_path / "a", encode=Jpeg(48))
        assert files(part) == {"lock": b""}
        other.communicate(b"\n")
    write_shards(rows_of(source), tmp_path / "a", encode=Jpeg(48))
    assert set(files(tmp_path / "a")) == {"00000.tar", "shards.jsonl"}


def test_a_folder_that_is_no_longer_as_it_was_written_is_not_called_done(source, tmp_path):
    args = (rows_of(source, ["folder"] * 3), tmp_path / "a")
    written, _ = write_shards(*args, encode=Jpeg(48), videos=1)
    assert write_shards(*args, encode=Jpeg(48), videos=1) == (written, 0)
    expected = files(tmp_path / "a")
    (tmp_path / "a" / "00001.tar").write_bytes(expected["00001.tar"][:-512])
    with pytest.raises(InputError, match=r"a/00001\.tar: not there, or not as it was written$"):
        write_shards(*args, encode=Jpeg(48), videos=1)
    (tmp_path / "a").rename(tmp_path / "a.part")  # before the last step, it goes on from there
    written, size = write_shards(*args, encode=Jpeg(48), videos=1)
    assert files(tmp_path / "a") == expected
    assert size == len(expected["00001.tar"]) + len(expected["00002.tar"])
    for text in ("{", "[1]\n", "\0\n", '{"shards": 1}\n{"what": 1}\n'):
        (tmp_path / "a" / "shards.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"a/shards\.jsonl: damaged|a exists, of other shards"):
            write_shards(*args, encode=Jpeg(48), videos=1)
    listed = [row.__class__(row.path, row.target, 11) for row in args[0]]  # the list now says how many
    (tmp_path / "a" / "shards.jsonl").write_bytes(expected["shards.jsonl"])
    with pytest.raises(InputError, match="another list"):
        write_shards(listed, tmp_path / "a", encode=Jpeg(48), videos=1)


def test_images_stay_as_they_are(source, tmp_path):
    rows = [Row(str(source / "folder" / "img_3.png"), 0), *rows_of(source, ["folder"])]
    write_shards(rows, tmp_path / "a", encode=Jpeg())
    image, folder = read_rows(tmp_path / "a")
    assert image.contents() == Path(rows[0].path).read_bytes()
    with opened(folder) as video:
        assert numbers(video.read([10])) == [10]


def test_the_plan_is_by_the_sizes_in_the_list(source, tmp_path):
    rows = rows_of(source, ["b_frames.mp4", "folder", "b_frames.mp4"])
    video = Path(rows[0].path).stat().st_size
    folder = sum(path.stat().st_size for path in Path(rows[1].path).iterdir())
    for size, shards in ((video + folder, 2), (video + folder - 1, 3)):
        written, _ = write_shards(rows, tmp_path / str(size), encode=Jpeg(), size=size)
        assert written.shards == shards


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--frames=jpeg --recode=h264", "only one of them"),
        ("--quality=80", "--quality 80: only with --frames"),
        ("--short-side=80", "--short-side 80: only with --frames or --recode"),
        ("--recode=h264 --every=2", "--every 2: only with --frames"),
        ("--frames=jpeg --gop=8", "--gop 8: only with --recode"),
        ("--frames=jpeg --quality=101", "--quality 101: must be from 1 to 100"),
        ("--frames=jpeg --every=0", "--every 0: must be"),
        ("--recode=h264 --crf=52", "--crf 52: must be"),
        ("--frames=jpeg --short-side=4", "--short-side 4: must be"),
        ("--frames=png", "png"),
    ],
)
def test_flags_that_make_no_sense(unbroken, tmp_path, capsys, flags, words):
    assert run(cli.shards, *unbroken[0][:2], f"--to={tmp_path}/x", *flags.split()) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert words in line
    assert not list(tmp_path.iterdir())


# ---- recoded


@pytest.mark.parametrize("name", NAMES)
def test_recoding_keeps_frames_and_timestamps(source, tmp_path, name):
    write_shards(rows_of(source, [name]), tmp_path / "a", encode=H264(short_side=48, gop=7))
    [row] = read_rows(tmp_path / "a")
    with open_video(source / name) as original, opened(row) as video:
        n = original.num_frames
        assert video.num_frames == n
        assert numbers(video.read(range(n))) == list(range(n))
        assert video.read([0]).shape[-2:] == (48, 72)
        small = resize(original.read(range(n)), [48, 72], antialias=True)
        error = (video.read(range(n)).double() - small).square().mean()
        assert 10 * torch.log10(255**2 / error) > 30
        if name == "folder":
            assert video.fps == 25
        elif name != "uneven.mkv":
            assert video.fps == original.fps
    with av.open(io.BytesIO(row.contents())) as container:
        assert len(container.streams) == 1
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        assert max(b - a for a, b in itertools.pairwise([*keys, n])) <= 7
        times = sorted(packet.pts * stream.time_base for packet in packets)
        times = [time - times[0] for time in times]
        duration = stream.duration * stream.time_base
    if name == "uneven.mkv":
        assert times == [Fraction(time, 1000) for time in UNEVEN]
    else:
        assert times == [Fraction(i, 25) for i in range(n)]
        assert duration == Fraction(n, 25)


# ---- training and scoring


def test_training_and_scoring_from_frames_equal_those_from_the_same_jpegs(demo_root, tmp_path, monkeypatch):
    """A list of folders of the very JPEGs that lie in the shards, which PIL decodes."""
    monkeypatch.setattr(build, "shards_of", lambda rows: [])  # the same order of training
    for split in ("train", "test"):
        rows = read_rows(demo_root / split)
        write_shards(
            rows, tmp_path / split, encode=Jpeg(), class_names=rows.class_names, videos=9, workers=2
        )
        lines = []
        for row in read_rows(tmp_path / split):
            folder = tmp_path / "jpegs" / Path(row.path).stem
            folder.mkdir(parents=True)
            with opened(row) as video:
                for index, jpeg in video._jpegs(list(range(video.num_frames))):
                    (folder / f"{index}.jpg").write_bytes(jpeg)
                lines.append(f"{folder} {video.num_frames} {row.target}\n")
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    (tmp_path / "names.txt").write_text("\n".join(rows.class_names))
    # more than half of a frame's height, which would be decoded at half its size
    text, reports = SMALL.replace("epochs: 2", "epochs: 1").replace("image_size: 24", "image_size: 32"), []
    for kind, suffix in (("shards", ""), ("jpegs", ".txt")):
        args = [*settings(tmp_path, demo_root, text), f"--data.class_names={tmp_path}/names.txt"]
        args += [
            f"--data.train={tmp_path}/train{suffix}",
            f"--data.val={tmp_path}/test{suffix}",
            "--data.workers=2",
        ]
        run_folder = tmp_path / kind
        assert run(cli.train, *args, f"--output={run_folder}") == 0
        found = [*args, f"--checkpoint={run_folder}/best.pt", f"--output={run_folder}/score"]
        assert run(cli.test, *found) == 0
        figures_, predictions = report(run_folder / "score")
        for prediction in predictions:
            prediction.pop("path")
        reports.append((figures(run_folder), figures_ | {"checkpoint": ""}, predictions))
    assert reports[0] == reports[1]
    assert reports[0][1]["num_failed"] == 0
