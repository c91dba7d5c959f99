"""The checker names every fault of a list, whatever the file does, and nothing else."""

import csv
import faulthandler
import os
import shutil
import time

import av
import pytest
import torch
from test_decode import KINDS, SHARED, render
from test_end_to_end import run

from stvit_video import cli
from stvit_video.cli import lists
from stvit_video.config import ConfigError
from stvit_video.data import check as checks
from stvit_video.data.annotations import read_rows
from stvit_video.data.decode import open_video
from stvit_video.data.masks import Masks
from stvit_video.data.objects import Objects
from stvit_video.data.rows import Row


@pytest.fixture
def clips(demo_root):
    return [*sorted(demo_root.glob("train/*/*.mp4")), *sorted(demo_root.glob("test/*/*.mp4"))]


def check(folder, *args, **lists):
    """Write lists {split: [(path, label)]}, check them; -> (exit code, findings [(split, name, kind)])."""
    for split, rows in lists.items():
        (folder / f"{split}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    flags = [f"--data.{split}={folder}/{split}.txt" for split in lists]
    code = run(cli.check, *flags, f"--output={folder}/out", "--data.timeout=2", *args)
    if code == 2:
        return code, []
    with open(folder / "out" / "check.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all("\n" not in row["cause"] for row in rows)
    assert not any(row["path"] and row["cause"].startswith(row["path"]) for row in rows)
    return code, [(row["split"], row["path"].rpartition("/")[2], row["kind"]) for row in rows]


@pytest.mark.parametrize("mode", [(), ("--thorough",)])
@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_good_lists_are_well(tmp_path, clips, capsys, mode, decoder):
    lists = {"train": [(c, i % 4) for i, c in enumerate(clips[:24])], "val": zip(clips[24:], range(4))}  # noqa: B905
    assert check(tmp_path, *mode, f"--data.decoder={decoder}", **lists) == (0, [])
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["train", "24", "0", "0", "0", "0", "0"]


def test_every_fault_is_told(tmp_path, clips, capsys):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    shutil.copy(clips[1], tmp_path / "copy.mp4")
    rows = [(clip, i) for i, clip in enumerate(clips[:4])]
    bad = [(tmp_path / name, 1) for name in ("pipe.mp4", "text.mp4", "gone.mp4")]
    val = [(clips[0], 0), (tmp_path / "copy.mp4", 1), (clips[9], 2), (clips[8], 7)]
    code, found = check(tmp_path, train=[*rows, *bad], val=val)
    assert code == 1
    assert sorted(found) == sorted([
        ("train", "pipe.mp4", "unreadable"),
        ("train", "text.mp4", "unreadable"),
        ("train", "gone.mp4", "missing"),
        ("val", clips[0].name, "duplicate"),
        ("val", "copy.mp4", "duplicate"),
        ("val", clips[8].name, "mislabelled"),
        ("val", "", "mislabelled"),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert "class 3, '3', has no videos in val" in printed
    assert "label 7 is not below 4" in printed
    assert printed.splitlines()[1].split() == ["train", "7", "1", "2", "0", "0", "0"]
    assert printed.splitlines()[2].split() == ["val", "4", "0", "0", "0", "2", "2"]


@pytest.mark.parametrize("name", ["b_frames.mp4", "vp9.webm", "gray.mp4"])
def test_a_file_cut_off_at_its_end_is_short(tmp_path, name):
    codec, rest = KINDS[name]
    options = dict(rest)
    if name.endswith("mp4"):
        render(tmp_path / "plain.mp4", codec, **options)
        path = fast_start(tmp_path / "plain.mp4", tmp_path / name)
    else:
        path = render(tmp_path / name, codec, **options)
    assert check(tmp_path, "--thorough", train=[(path, 0)]) == (0, [])
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[25]])
    with open_video(path) as video:
        assert video.num_frames < 40  # silently
    code, found = check(tmp_path, "--thorough", train=[(path, 0)])
    assert (code, found) == (1, [("train", name, "short")])


@pytest.mark.parametrize("name", ["b_frames.mp4", "gray.mp4"])
def test_of_a_file_cut_within_a_frame_the_sound_part_is_read(tmp_path, name):
    """Its first frames, and none after a hole: B-frames are stored behind those that they refer to."""
    codec, rest = KINDS[name]
    render(tmp_path / "plain.mp4", codec, **dict(rest))
    path = fast_start(tmp_path / "plain.mp4", tmp_path / name)
    contents = path.read_bytes()
    with open_video(path) as video:
        every = video.read(range(40))
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for place, size in packets[12:36:3]:
        path.write_bytes(contents[: place + size // 2])
        with open_video(path) as video:
            n = video.num_frames
            assert 5 < n < 40
            assert torch.equal(video.read([n - 1, 2]), every[[n - 1, 2]])
            assert torch.equal(video.read(range(n)), every[:n])
    code, found = check(tmp_path, "--thorough", train=[(path, 0)])
    assert (code, found) == (1, [("train", name, "short")])
    assert f'{path},short,"cut off at ' in (tmp_path / "out" / "check.csv").read_text()


def fast_start(source, target):
    options = {"movflags": "faststart"}
    with av.open(str(source)) as old, av.open(str(target), "w", container_options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return target


def test_only_the_thorough_mode_sees_damage_inside(tmp_path):
    path = render(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + len(content) // 2
    content[middle : middle + 60] = bytes(60)
    path.write_bytes(content)
    assert check(tmp_path, train=[(path, 0)]) == (0, [])
    assert check(tmp_path, "--thorough", train=[(path, 0)]) == (1, [("train", "a.mp4", "unreadable")])


def test_frame_folders_shorter_than_the_list_says(tmp_path):
    from PIL import Image

    (tmp_path / "frames").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"{i}.png")
    (tmp_path / "frames.txt").write_text(f"{tmp_path}/frames 5 0\n")
    args = [f"--data.train={tmp_path}/frames.txt", f"--output={tmp_path}/out"]
    assert run(cli.check, *args) == 1
    assert ",short," in (tmp_path / "out" / "check.csv").read_text()


def test_what_hangs_or_crashes_is_unreadable(tmp_path, clips, monkeypatch):
    def unkind(path, *rest, **options):
        if path.endswith("hang.mp4"):
            time.sleep(1000)
        if path.endswith("crash.mp4"):
            faulthandler.disable()  # pytest's traceback
            os.abort()
        return open_video(path, *rest, **options)

    monkeypatch.setattr(checks, "open_video", unkind)
    for name in ("hang.mp4", "crash.mp4"):
        (tmp_path / name).write_text(name)
    rows = [(tmp_path / "hang.mp4", 0), (tmp_path / "crash.mp4", 0), *((clip, 0) for clip in clips[:6])]
    code, found = check(tmp_path, "--data.timeout=1", train=rows)
    assert code == 1
    assert sorted(found) == [("train", "crash.mp4", "unreadable"), ("train", "hang.mp4", "unreadable")]


def test_unknown_classes_and_senseless_settings(tmp_path, demo_root, capsys):
    (tmp_path / "names.txt").write_text("grow\nshrink\n")
    args = [f"--data.train={demo_root}/train", f"--output={tmp_path}/out"]
    assert run(cli.check, *args, f"--data.class_names={tmp_path}/names.txt") == 1
    assert "found class 'move_down'" in capsys.readouterr().out
    assert run(cli.check, f"--output={tmp_path}/out") == 2
    assert run(cli.check, f"--data.train={tmp_path}/none.txt") == 2
    assert run(cli.check, *args, "--data.decoder=gstreamer") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not at hand")
def test_real_files(tmp_path):
    paths = [path for path in sorted(SHARED.iterdir()) if path.suffix != ".md"]
    code, found = check(tmp_path, "--thorough", "--data.timeout=60", train=[(path, 0) for path in paths])
    assert code == 1
    assert sorted(name for _, name, _ in found) == ["corrupted.mp4", "vp9_invalid_bitstream.webm"]


def test_a_clean_list_has_what_nothing_is_wrong_with(tmp_path, clips, capsys):
    """And trains like any list; what stands there with two labels is left out twice."""
    (tmp_path / "text.mp4").write_text("no video")
    rows = [(clip, i % 4) for i, clip in enumerate(clips[:8])]
    extra = [(tmp_path / "text.mp4", 1), (tmp_path / "gone.mp4", 2), rows[0], (clips[1], 3)]
    code, _ = check(tmp_path, f"--write-clean={tmp_path}/the clean.txt", train=[*rows, *extra])
    assert code == 1
    shutil.move(tmp_path / "the clean.txt", tmp_path / "clean.txt")
    shutil.move(tmp_path / "the clean.txt.classes", tmp_path / "clean.txt.classes")
    printed = capsys.readouterr().out
    assert f"{clips[1]}: stands in train already, with label 1, here 3" in printed
    assert f"7 of 12 videos: --data.train '{tmp_path}/the clean.txt'" in printed
    expected = [(str(clip), label) for clip, label in rows if clip != clips[1]]
    assert [(row.path, row.target) for row in read_rows(tmp_path / "clean.txt")] == expected
    flags = [f"--data.train={tmp_path}/clean.txt", f"--data.class_names={tmp_path}/clean.txt.classes"]
    assert run(cli.check, *flags, f"--output={tmp_path}/again", "--thorough") == 0
    for given, line in (
        ({"train": rows}, "clean.txt: is there already"),
        ({"train": rows, "val": rows}, "one list at a time, not train, val"),
    ):
        assert check(tmp_path, f"--write-clean={tmp_path}/clean.txt", **given)[0] == 2
        assert line in capsys.readouterr().err


def test_key_frames_of_one_video_are_no_duplicates(tmp_path, clips, capsys):
    """One moment of it that stands there twice is."""
    from stvit_video.data.key_frames import KeyFrame

    rows = [
        Row(str(clips[0]), KeyFrame("a", float(second), ((0, 0, 1, 1),), ((0,),))) for second in range(9)
    ]
    assert list(checks.check_labels({"train": rows}, ["stand"])) == []
    (finding,) = checks.check_labels({"train": rows, "val": rows[3:4]}, ["stand"])
    assert (finding.split, finding.kind) == ("val", "duplicate")
    assert len(checks.clean(rows, [])) == 9
    assert len(checks.clean([*rows, rows[0]], [])) == 9


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (Row("a.jpg", Masks("a.png", "ids")), "cannot hold the Masks of 'a.jpg'"),
        (Row("a.jpg", Objects(1, (8, 8), (0, 1))), "cannot hold the Objects of 'a.jpg'"),
        (Row("a\nb.mp4", 0), r"'a\\nb.mp4' has a line break in it"),
        (Row("a\rb.mp4", 0), r"'a\\rb.mp4' has a line break in it"),
        (Row("\udcff.mp4", (0, 2)), r"'\\udcff.mp4' .* is not UTF-8"),
    ],
)
def test_what_no_clean_list_can_hold_is_refused_first(tmp_path, row, line):
    file = str(tmp_path / "clean.txt")
    with pytest.raises(ConfigError, match=line) as raised:
        lists._check_clean(file, {"train": [Row("b.mp4", (0, 2)), Row("c.mp4", None), row]})
    raised.value.args[0].encode()
    assert "\n" not in raised.value.args[0]
