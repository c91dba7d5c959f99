"""Rows of WebDataset shards: labels, pixels and figures as from files; bad tars refused by name."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import finish, launch
from PIL import Image
from test_end_to_end import SMALL, figures, run, settings

from stvit_video import cli
from stvit_video.data.annotations import ListError, Row, read_rows
from stvit_video.data.dataset import TrainSampler, shards_of
from stvit_video.data.decode import open_video
from stvit_video.data.shards import find_shards
from stvit_video.data.write_shards import write_shards
from stvit_video.errors import DecodeError, InputError


@pytest.fixture(scope="module")
def root(tmp_path_factory, demo_root):
    """{train,test}/0000?.tar of the demo set, in the order of its folders."""
    root = tmp_path_factory.mktemp("shards")
    for split, videos in (("train", 5), ("test", 3)):
        rows = read_rows(demo_root / split)
        write_shards(rows, root / split, class_names=rows.class_names, videos=videos)
    return root


def make_tar(path, members):
    """A tar of {name: bytes, or a TarInfo as it is}."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if info is content else len(content)
            tar.addfile(info, None if info is content else io.BytesIO(content))
    return path


def link(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def opened(row, decoder="av"):
    return open_video(row.path, decoder, contents=row.contents())


def test_rows_equal_those_of_the_folder(root, demo_root):
    files, rows = read_rows(demo_root / "train"), read_rows(root / "train")
    assert rows.class_names == files.class_names
    assert [row.label for row in rows] == [row.label for row in files]
    for i, (row, file) in enumerate(zip(rows, files, strict=True)):
        assert row.path == f"{root}/train/{i // 5:05d}.tar/{i:08d}_{Path(file.path).name}"
        assert row.contents() == Path(file.path).read_bytes()
        assert file.contents() is None
    assert shards_of(rows) == [range(0, 5), range(5, 10), range(10, 15), range(15, 20), range(20, 24)]
    assert shards_of(files) == []


@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_clips_are_bit_equal_to_those_of_files(root, demo_root, decoder):
    files, rows = read_rows(demo_root / "test"), read_rows(root / "test")
    for row, file in zip(rows, files, strict=True):
        with opened(row, decoder) as video, open_video(file.path, decoder) as same:
            assert (video.num_frames, video.fps) == (same.num_frames, same.fps)
            order = [5, 0, same.num_frames - 1, 5, 3]
            assert torch.equal(video.read(order), same.read(order))


def test_the_ways_to_name_shards(root, tmp_path):
    whole = read_rows(root / "train")
    names = [f"{root}/train/0000{i}.tar" for i in range(5)]
    assert find_shards(root / "train") == names
    for pattern in ("{00000..00004}.tar", "0000?.tar", "0000{0,1,2,[34]}.tar"):
        assert find_shards(f"{root}/train/{pattern}") == names
        assert read_rows(f"{root}/train/{pattern}") == whole
    one = read_rows(f"{root}/train/00002.tar")
    assert (one, one.class_names) == (whole[10:15], whole.class_names)
    both = read_rows(f"{root}/{{train,test}}/00000.tar")
    assert both == whole[:5] + read_rows(root / "test")[:3]
    assert find_shards(root) == []  # class folders
    assert find_shards(tmp_path / "list.txt") == []
    for pattern, words in (
        ("{0000..00001.tar", "unbalanced"),
        ("x*.tar", "no such file"),
        ("0000{0,0}.tar", "twice"),
        ("00009.tar", "No such file"),
        ("a.tar.gz", "compressed"),
    ):
        with pytest.raises(ListError, match=words):
            read_rows(f"{root}/train/{pattern}")


def test_given_class_names_decide_by_name(root):
    rows = read_rows(root / "test")
    names = ["other", *reversed(rows.class_names)]
    turned = read_rows(root / "test", class_names=names)
    assert turned.class_names == names
    assert [names[row.label] for row in turned] == [rows.class_names[row.label] for row in rows]
    with pytest.raises(ListError, match="found class 'grow'"):
        read_rows(root / "test", class_names=["a", "b"])


@pytest.mark.parametrize(
    ("members", "labels", "names"),
    [
        ({"a.cls": b"3\n", "a.mp4": b"x", "b.MP4": b"x", "b.cls": b"0"}, [3, 0], None),
        ({"a.mp4": b"x", "a.json": b'{"label": 2, "fps": 25}', "b.json": b'{"label": "1"}', "b.avi": b"x"},
         [2, 1], None),
        ({"a.mp4": b"x", "a.cls": b"run", "b.mp4": b"x", "b.json": b'{"label": "jump up"}'},
         [1, 0], ["jump up", "run"]),
        ({"a.mp4": b"x", "b.webm": b"x", "b.json": b'{"id": 7}'}, [None, None], None),
        ({"a.mp4": b"x", "a.cls": b"1", "a.json": b"not json"}, [1], None),
        ({"x.y/a.v1.mp4": b"x", "x.y/a.jpg": b"", "x.y/a.cls": b"1", "x.y/b.jpg": b"x", "x.y/b.cls": b"2"},
         [1, 2], None),
        ({"d": link("d", tarfile.DIRTYPE), "__m__/a.mp4": b"", "README": b"", "d/._a.cls": b"",
          "d/a.cls": b"4", "d/._a.mp4": b"", "d/a.mp4": b"x"}, [4], None),
    ],
)  # fmt: skip
def test_labels(tmp_path, members, labels, names):
    rows = read_rows(make_tar(tmp_path / "a.tar", members))
    assert [row.label for row in rows] == labels
    assert rows.class_names == names
    assert all(row.contents() == b"x" for row in rows)


def test_ids_are_bounded_and_names_beside_the_shards_checked(tmp_path):
    path = make_tar(tmp_path / "a.tar", {"a.mp4": b"x", "a.cls": b"2"})
    assert read_rows(path, class_names=["a", "b", "c"])[0].label == 2
    with pytest.raises(ListError, match=r"a\.mp4: found label 2, expected one below 2"):
        read_rows(path, class_names=["a", "b"])
    (tmp_path / "class_names.txt").write_text("c\nb\na\n")
    assert read_rows(path, class_names=["a", "b", "c"])[0].label == 0
    (tmp_path / "class_names.txt").write_text("c\nb\nb\n")
    with pytest.raises(ListError, match="twice"):
        read_rows(path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.mp4": link("a.mp4", tarfile.SYMTYPE, "/etc/passwd")}, "a.tar/a.mp4: found a link"),
        ({"b.mp4": b"", "a.mp4": link("a.mp4", tarfile.LNKTYPE, "b.mp4")}, "a.tar/a.mp4: found a link"),
        ({"a.mp4": link("a.mp4", tarfile.FIFOTYPE)}, "a.tar/a.mp4: found a special"),
        ({"a.mp4": link("a.mp4", tarfile.CHRTYPE)}, "a.tar/a.mp4: found a special"),
        ({"/etc/a.mp4": b""}, "a.tar//etc/a.mp4: found a name that leads out"),
        ({"x/../../a.mp4": b""}, "x/../../a.mp4: found a name that leads out"),
        ({"..": link("..", tarfile.DIRTYPE)}, "a.tar/..: found a name that leads out"),
        ({"a.mp4": b"", "a.avi": b""}, "a.tar/a: found 2 videos (in mp4, avi)"),
        ({"a.cls": b"1"}, "a.tar/a: found 0 videos (in cls)"),
        ({"a.mp4": b"", "a.MP4": b""}, "a.tar/a: found a.mp4, a.MP4"),
        ({"a.mp4": b"", "b.mp4": b"", "a.cls": b"1"}, "a.tar/a: found members apart"),
        ({"a.mp4": b"", "a.cls": b"-1"}, "a.tar/a.cls: found label '-1'"),
        ({"a.mp4": b"", "a.cls": b"1.0"}, "a.tar/a.cls: found label '1.0'"),
        ({"a.mp4": b"", "a.cls": b" "}, "a.tar/a.cls: found label ''"),
        ({"a.mp4": b"", "a.cls": b"\xff"}, "a.tar/a.cls: found UnicodeDecodeError"),
        ({"a.mp4": b"", "a.json": b'{"label": 1.5}'}, "a.tar/a.json: found label '1.5'"),
        ({"a.mp4": b"", "a.json": b'{"label": true}'}, "a.tar/a.json: found label 'True'"),
        ({"a.mp4": b"", "a.json": b"[1]"}, "a.tar/a.json: found a json list"),
        ({"a.mp4": b"", "a.json": b"[" * 100_000}, "a.tar/a.json: found RecursionError"),
        ({"a.mp4": b"", "a.cls": bytes(2_000_000)}, "a.tar/a.cls: found more than"),
        ({"a.mp4": b"", "a.cls": b"1", "b.mp4": b""}, "a.tar/b.mp4: found label None and label 1 of"),
        ({"a.mp4": b"", "a.cls": b"1", "b.mp4": b"", "b.cls": b"x"}, "a.tar/b.mp4: found label 'x' and"),
    ],
)  # fmt: skip
def test_bad_members_are_refused_by_name(tmp_path, members, words):
    with pytest.raises(ListError) as caught:
        read_rows(make_tar(tmp_path / "a.tar", members))
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/a.tar")
    assert "\n" not in str(caught.value)


def test_damaged_tars_are_refused_or_read_right(tmp_path):
    """Cut anywhere, or with bytes changed in a header: never a sample less without an error."""
    members = {
        f"clip{i}.{s}": bytes([65 + i]) * n for i in range(4) for s, n in (("mp4", 1500), ("cls", 1))
    }
    members |= {f"clip{i}.cls": str(i).encode() for i in range(4)}
    data = make_tar(tmp_path / "a.tar", members).read_bytes()
    rows = read_rows(tmp_path / "a.tar")
    assert len(rows) == 4
    end = rows[-1].place.offset + rows[-1].place.size
    bad = tmp_path / "bad.tar"
    for cut in (0, 1, 511, 512, 700, *(row.place.offset for row in rows[1:]), end - 512, end, end + 511):
        bad.write_bytes(data[:cut])
        with pytest.raises(ListError, match=r"bad\.tar"):
            read_rows(bad)
    bad.write_bytes(data + data)
    with pytest.raises(ListError, match="joined"):
        read_rows(bad)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        header = int(rng.choice([row.place.offset for row in rows]))
        changed = bytearray(data)
        changed[header + int(rng.integers(512))] ^= int(rng.integers(1, 256))
        bad.write_bytes(changed)
        try:
            assert len(read_rows(bad)) == 4
        except ListError:
            refused += 1
    assert refused > 150


def test_a_negative_size_ends(tmp_path):
    data = bytearray(make_tar(tmp_path / "a.tar", {"a.mp4": b"x"}).read_bytes())
    data[124:136] = (2**96 - 512).to_bytes(12, "big")  # base 256: -512 bytes
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ListError, match=r"a\.tar"):
        read_rows(tmp_path / "a.tar")


def test_no_tar_at_all(tmp_path):
    import os

    (tmp_path / "text.tar").write_text("not a tar\n" * 100)
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("text.tar", "pipe.tar"):
        with pytest.raises(ListError, match=name):
            read_rows(tmp_path / name)


def test_a_shard_that_changed_is_a_decode_error(tmp_path):
    path = make_tar(tmp_path / "a.tar", {f"{key}.mp4": key.encode() * 600 for key in "abc"})
    rows = read_rows(path)
    whole = path.read_bytes()
    make_tar(path, {f"{key}.mp4": key.encode() * 600 for key in "xbc"})
    with pytest.raises(DecodeError, match=r"a\.tar/a\.mp4: not at its place"):
        rows[0].contents()
    assert rows[1].contents() == b"b" * 600
    path.write_bytes(whole[: rows[2].place.offset + 700])
    with pytest.raises(DecodeError, match=r"a\.tar/c\.mp4: the shard is damaged"):
        rows[2].contents()
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(DecodeError, match=r"a\.tar/b\.mp4: "):
        rows[1].contents()
    path.unlink()
    with pytest.raises(DecodeError, match=r"a\.tar/b\.mp4: .*No such file"):
        rows[1].contents()


@pytest.mark.parametrize("decoder", ["av", "decord"])
@pytest.mark.parametrize("text", ["", "no video", "ffconcat version 1.0\nfile clip.mp4\n", "#EXTM3U\n"])
def test_what_is_no_video(tmp_path, demo_root, decoder, text):
    """In a shard or a file; a playlist would have the decoder show other files."""
    (tmp_path / "clip.mp4").write_bytes(next(demo_root.glob("test/*/*.mp4")).read_bytes())
    row = read_rows(make_tar(tmp_path / "a.tar", {"a.mp4": text.encode()}))[0]
    with pytest.raises(DecodeError, match=r"a\.tar/a\.mp4: "):
        opened(row, decoder)
    (tmp_path / "a.mp4").write_text(text)
    with pytest.raises(DecodeError, match=r"a\.mp4: "):
        open_video(tmp_path / "a.mp4", decoder)


def test_images(tmp_path):
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    row = read_rows(make_tar(tmp_path / "a.tar", {"a.png": png.getvalue(), "b.png": png.getvalue()[:40]}))
    with opened(row[0]) as image:
        assert np.array_equal(image.read([0])[0].permute(1, 2, 0).numpy(), pixels)
    with pytest.raises(DecodeError, match=r"a\.tar/b\.png: "), opened(row[1]) as image:
        image.read([0])


def test_writing(tmp_path, demo_root):
    rows = read_rows(demo_root / "test")
    sizes = [Path(row.path).stat().st_size for row in rows]
    write_shards(rows, tmp_path / "a", size=3 * max(sizes))
    again = read_rows(tmp_path / "a")
    assert again.class_names is None
    assert [row.label for row in again] == [row.label for row in rows]
    assert all(len(shard) >= 3 for shard in shards_of(again)[:-1])
    write_shards(again, tmp_path / "b", size=1)  # from shards, each video larger than a shard
    assert [row.contents() for row in read_rows(tmp_path / "b")] == [row.contents() for row in again]
    assert len(find_shards(tmp_path / "b")) == len(rows)
    with pytest.raises(InputError, match="exists"):
        write_shards(rows, tmp_path / "a")
    for path in ("gone.mp4", str(demo_root / "test"), str(demo_root / "shapes.txt")):
        with pytest.raises(InputError, match=f"1 of 12 .* {path}: "):
            write_shards([*rows, Row(path, 0)], tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_training_order_of_shards():
    """Each rank passes through its share of the shards once; (seed, epoch) alone say in which order."""
    shards = [range(i * 10, i * 10 + 10) for i in range(12)]
    options = {"batch_size": 5, "seed": 3, "shards": shards, "buffer": 20}

    def epoch(number, rank=0, world=1, **more):
        sampler = TrainSampler(120, rank=rank, world=world, **options | more)
        sampler.epoch = number
        return [index for _, index in sampler]

    assert epoch(0) == epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=4)
    for world in (1, 2, 3):
        parts = [epoch(2, rank, world) for rank in range(world)]
        assert sorted(sum(parts, [])) == list(range(120))
        for part in parts:
            buffers = [part[i : i + 20] for i in range(0, len(part), 20)]
            assert all(len({index // 10 for index in buffer}) == 2 for buffer in buffers)
            assert part != sorted(part)
    assert len(epoch(0, 0, 7)) == 120 // 35 * 5
    resumed = TrainSampler(120, **options)
    resumed.batches_done = 4
    assert [index for _, index in resumed] == epoch(0)[20:]
    single = TrainSampler(120, batch_size=50, seed=3, shards=[range(120)])
    seen = set()
    for single.epoch in range(9):
        seen |= {index for _, index in single}
    assert seen == set(range(120)), "nothing is left out of every epoch"
    tiny = TrainSampler(3, batch_size=2, seed=0, rank=1, world=2, shards=[range(3)])
    assert len(list(tiny)) == 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory, root):
    """One epoch on shards, without worker processes."""
    folder = tmp_path_factory.mktemp("trained")
    args = [*settings(folder, root, SMALL.replace("epochs: 2", "epochs: 1"))]
    assert run(cli.train, *args, f"--output={folder}/run") == 0
    return folder / "run", args


def score(folder, output, *args):
    assert run(cli.test, *args, f"--checkpoint={folder}/best.pt", f"--output={output}") == 0
    return report(output)


def report(output):
    with open(output / "predictions.csv", newline="") as file:
        rows = [{**row, "path": row["path"][-15:].split("_")[-1]} for row in csv.DictReader(file)]
    return json.loads((output / "report.json").read_text()) | {"seconds": 0}, rows


def test_training_and_scoring_equal_those_from_files(trained, root, demo_root, tmp_path):
    folder, args = trained
    # Workers change nothing; nor do files, in the order of the shards.
    assert run(cli.train, *args, f"--output={tmp_path}/two", "--data.workers=2") == 0
    assert figures(tmp_path / "two") == figures(folder)
    one = score(folder, tmp_path / "shards", *args)
    assert one[0]["num_videos"] == 11
    assert one[0]["num_failed"] == 0
    assert score(folder, tmp_path / "workers", *args, "--data.workers=2") == one
    files = [*args, f"--data.test={demo_root}/test"]
    assert score(folder, tmp_path / "files", *files) == one


def test_files_in_the_order_of_shards_train_alike(trained, root, demo_root, tmp_path, monkeypatch):
    folder, args = trained
    from stvit_video import build

    shards = shards_of(read_rows(root / "train"))
    monkeypatch.setattr(build, "shards_of", lambda rows: shards)
    files = [*args, f"--data.train={demo_root}/train", f"--data.val={demo_root}/test"]
    assert run(cli.train, *files, f"--output={tmp_path}/files") == 0
    assert figures(tmp_path / "files") == figures(folder)


@pytest.mark.parametrize("ranks", [2, 3])
def test_more_processes_score_shards_exactly_like_one(trained, tmp_path, ranks):
    folder, args = trained
    one = score(folder, tmp_path / "one", *args)
    given = [*args, f"--checkpoint={folder}/best.pt", f"--output={tmp_path}/more"]
    assert finish(launch(cli.test, *given, ranks=ranks)) == [0] * ranks
    more = report(tmp_path / "more")
    assert one[0] == more[0]
    assert len(more[1]) == 11
    for a, b in zip(one[1], more[1], strict=True):
        assert (a["path"], a["prediction"]) == (b["path"], b["prediction"])
        assert float(a["top1_score"]) == pytest.approx(float(b["top1_score"]), abs=1e-5)


def test_two_processes_train_from_shards(root, tmp_path):
    args = settings(tmp_path, root, SMALL.replace("epochs: 2", "epochs: 1"))
    given = [*args, f"--output={tmp_path}/run", "--train.batch_size=2", "--data.shuffle_buffer=4"]
    log = tmp_path / "log.txt"
    assert finish(launch(cli.train, *given, ranks=2, log=log)) == [0, 0], log.read_text()
    assert figures(tmp_path / "run")[-1]["unreadable"] == 0


def test_a_damaged_sample_costs_one_line(trained, root, tmp_path):
    """The video of one sample overwritten after its header: unreadable, the others scored."""
    folder, args = trained
    shard = tmp_path / "00000.tar"
    shard.write_bytes((root / "test" / "00000.tar").read_bytes())
    (tmp_path / "class_names.txt").write_bytes((root / "test" / "class_names.txt").read_bytes())
    place = read_rows(shard)[1].place
    with open(shard, "r+b") as file:
        file.seek(place.offset + 1536)
        file.write(bytes(place.size - 2048))
    found, rows = score(folder, tmp_path / "out", *args, f"--data.test={shard}")
    assert (found["num_videos"], found["num_failed"]) == (3, 1)
    assert rows[1]["path"] == "flower.mp4"
    assert rows[1]["failure"].startswith("Invalid data found")


def test_the_command(tmp_path, demo_root, capsys):
    args = [f"--data.train={demo_root}/train", f"--data.val={demo_root}/test"]
    assert run(cli.shards, *args, f"--to={tmp_path}/train", "--videos=7") == 0
    assert "24 videos in 4 shards" in capsys.readouterr().out
    files, rows = read_rows(demo_root / "train"), read_rows(tmp_path / "train")
    assert rows.class_names == files.class_names
    pairs = {(Path(row.path).name, row.label) for row in files}
    assert {(Path(row.path).name.split("_", 1)[1], row.label) for row in rows} == pairs
    assert [row.label for row in rows] != sorted(row.label for row in rows)
    assert run(cli.shards, *args, f"--to={tmp_path}/val", "--split=val") == 0
    rows = read_rows(tmp_path / "val")
    assert [row.label for row in rows] == [row.label for row in read_rows(demo_root / "test")]
    assert run(cli.shards, *args, f"--to={tmp_path}/val") == 2
    assert run(cli.shards, *args, f"--to={tmp_path}/x", "--videos=0") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 2


def test_a_pattern_that_the_shell_expanded(root, capsys):
    shards = [f"--data.train={root}/train/0000{i}.tar" for i in range(2)]
    assert run(cli.train, *shards, f"--output={root}/never") == 2
    assert "quote" in capsys.readouterr().err


def test_checking(tmp_path, root, demo_root, capsys):
    args = [f"--data.train={root}/train", f"--data.val={root}/test", f"--output={tmp_path}"]
    assert run(cli.check, *args) == 0, capsys.readouterr()
    test = read_rows(root / "test")
    write_shards([*test, read_rows(root / "train")[0]], tmp_path / "both", class_names=test.class_names)
    assert run(cli.check, *args, f"--data.test={tmp_path}/both") == 1
    found = [row["kind"] for row in csv.DictReader((tmp_path / "check.csv").read_text().splitlines())]
    assert found == ["duplicate"] * 12
