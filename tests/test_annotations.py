"""Each list format gives the rows it means; each fault is one line: where, found, expected."""

import json
import os
import pickle

import pytest

from stvit_video.data import annotations, mask_lists
from stvit_video.data.annotations import (
    FORMATS,
    Format,
    ListError,
    Row,
    Rows,
    mirrored_classes,
    read_rows,
)
from stvit_video.data.mask_lists import MASK_FORMATS, MaskFolders
from stvit_video.data.shards import Place

HEADER = "label,youtube_id,time_start,time_end,split\n"
TEMPLATES = {"Closing [something]": "Closing something", "Holding [a] of [b]": "Holding a of b"}


@pytest.fixture
def write(tmp_path):
    """write(text or json, name) -> path of that file; write.touch(*names) makes empty files."""

    def write(content, name="list.txt"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    write.touch = touch
    return write


def tails(rows, root):
    """(path below root, label) of each row."""
    return [(os.path.relpath(row.path, root), row.label) for row in rows]


def check_error(parts, path, **kwargs):
    """Reading fails with one line that holds every part."""
    with pytest.raises(ListError) as caught:
        read_rows(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Lines that number their classes


@pytest.mark.parametrize(
    "line",
    [
        "{} 7",
        "{}  7",
        "{}\t7",
        "{},7",
        "{}, 7",
        "{} , 7",
        "  {} 7 \t",
        '"{}",7',
        '"{}" 7',
        '"{}","7"',
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a dir/b c.mp4", "x, y,z.mp4", "7 8.mp4", "12 3", "[a] 1.avi"])
def test_the_label_is_split_off_from_the_right(write, line, name):
    rows = read_rows(write(line.format(name) + "\nother.mp4 0\n"), root="/videos")
    assert rows == [Row(f"/videos/{name}", 7), Row("/videos/other.mp4", 0)]
    assert rows.class_names is None


def test_byte_order_mark_line_ends_and_blank_lines(write):
    path = write(b"\xef\xbb\xbf/v/a.mp4 3\r\n\r\n  \r\n/v/\xc3\xa9\xe2\x80\xa8.mp4 4")
    assert read_rows(path) == [Row("/v/a.mp4", 3), Row("/v/\xe9\u2028.mp4", 4)]


def test_doubled_quotes_in_a_quoted_path(write):
    assert read_rows(write('"/v/the ""best"", a.mp4",3\n')) == [Row('/v/the "best", a.mp4', 3)]


def test_relative_paths_lie_in_root_else_here_else_beside_the_list(write, tmp_path, monkeypatch):
    path = write("a.mp4 0\n/abs/b.mp4 1\nc.mp4 2\n")
    inside = write("a.mp4 0\n/videos/b.mp4 1\nc.mp4 2\n", "inside.txt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def paths(**kwargs):
        return [row.path for row in read_rows(path, **kwargs)]

    found = [row.path for row in read_rows(inside, root="/videos")]
    assert found == ["/videos/a.mp4", "/videos/b.mp4", "/videos/c.mp4"]
    assert paths() == [f"{tmp_path}/a.mp4", "/abs/b.mp4", f"{tmp_path}/c.mp4"]
    write.touch("here/c.mp4")  # not the first: no vote
    assert paths() == [f"{tmp_path}/a.mp4", "/abs/b.mp4", f"{tmp_path}/c.mp4"]
    write.touch("here/a.mp4")
    assert paths() == ["a.mp4", "/abs/b.mp4", "c.mp4"]


def test_the_place_of_the_videos_is_looked_up_once(write, monkeypatch):
    path = write("".join(f"clip{i}.mp4 {i}\n" for i in range(50)))
    asked = []
    monkeypatch.setattr(os.path, "exists", lambda name: asked.append(name))
    assert len(read_rows(path)) == 50
    assert len(asked) == 2


@pytest.mark.parametrize("separator", [" ", ",", "\t", "  ", ", "])
def test_frame_folders(write, separator):
    lines = [("a", "30", "4"), ("my dir/b", "7", "0"), ("v1.5", "12", "3")]
    rows = read_rows(write("\n".join(map(separator.join, lines))), root="/f")
    assert rows == [Row("/f/a", 4, 30), Row("/f/my dir/b", 0, 7), Row("/f/v1.5", 3, 12)]


def test_frame_folders_in_quotes(write):
    assert read_rows(write('"/a, b",30,4\n"/c","7","0"')) == [Row("/a, b", 4, 30), Row("/c", 0, 7)]


@pytest.mark.parametrize("text", ["my dir 12 3\nb 1\n", "my dir 12 3\na.mp4 5 6\n", "my dir 12 3\n5 6\n"])
def test_one_line_that_is_no_frame_folder_makes_a_list_of_paths(write, text):
    assert read_rows(write(text), root="/f")[0] == Row("/f/my dir 12", 3)


def test_what_is_on_disk_tells_a_folder_from_its_number_of_frames(write, tmp_path):
    path = write("my dir 12 3\nb 1 2\n")
    frames = [Row(f"{tmp_path}/my dir", 3, 12), Row(f"{tmp_path}/b", 2, 1)]
    assert read_rows(path) == frames
    (tmp_path / "my dir 12").mkdir()
    assert read_rows(path) == [Row(f"{tmp_path}/my dir 12", 3), Row(f"{tmp_path}/b 1", 2)]
    (tmp_path / "my dir").mkdir()
    assert read_rows(path) == frames


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("a.mp4 0\nb.mp4\n", 2, "b.mp4"),
        ("a.mp4 0\n\nmy dir/b.mp4\n", 3, "my dir/b.mp4"),
        ("a.mp4 -1\n", 1, "a.mp4 -1"),
        ("a.mp4 1.0\n", 1, "a.mp4 1.0"),
        ("a.mp4 0\nb.mp4,\n", 2, "b.mp4,"),
        ("path,label\na.mp4,0\n", 1, "path,label"),
        ("5\n", 1, "5"),
        ("a.mp4 \u0663\n", 1, "a.mp4"),
        ("a.mp4 " + "9" * 5000, 1, "a.mp4 999"),
        ("a 0 -1\n", 1, "a 0 -1"),
    ],
)
def test_lines_without_a_label(write, text, line, found):
    check_error([f"list.txt:{line}: found", found, "expected `path label`"], write(text))


def test_labels_stay_below_the_number_of_class_names(write):
    path = write("a.mp4 0\n\nb.mp4 2\n")
    assert read_rows(path, class_names=("x", "y", "z")).class_names == ["x", "y", "z"]
    parts = ["list.txt:3: found label 2", "expected one below 2", "start at 0"]
    check_error(parts, path, class_names=["x", "y"])


@pytest.mark.parametrize("content", ["", " \n\r\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["list.txt", "list.json"])
def test_empty_file(write, content, name):
    check_error([f"{name}: found an empty file, expected"], write(content, name))


def test_unreadable_files(write, tmp_path):
    check_error(["none.txt: found no such file or folder", "expected a list"], tmp_path / "none.txt")
    parts = ["list.txt:3: found byte 0xe9, expected UTF-8"]
    check_error(parts, write(b"a.mp4 0\nb.mp4 1\ncaf\xe9.mp4 2\n"))
    check_error(["list.txt:2: found byte 0x00, expected UTF-8"], write(b"a.mp4 0\nb\0.mp4 1\n"))


# Paths stay inside root


@pytest.mark.parametrize(
    "name",
    [
        "../b.mp4",
        "/abs/b.mp4",
        "x/../b.mp4",
        "x/../../b.mp4",
        "/videos/../b.mp4",
        "/videosother/b.mp4",
        "..",
    ],
)
@pytest.mark.parametrize("root", ["/videos", "videos", "/videos/"])
def test_a_path_that_leaves_root_is_refused_by_name(write, name, root):
    if root == "videos" and name == "/videos/../b.mp4":
        name = f"{os.getcwd()}/videos/../b.mp4"
    path = write(f"a.mp4 0\n\n{name} 1\n")
    check_error(["list.txt:3: found path", "b.mp4" if "b" in name else "..", f"data.root={root}"],
                path, root=root)  # fmt: skip
    read_rows(path)  # without a root lists are free


def test_frame_folders_csv_and_json_stay_inside_root_too(write):
    check_error(["list.txt:2: found path"], write("a 3 0\n../b 3 1\n"), root="/f")
    kinetics = write(HEADER + "x,a,1,11,val\n../../etc,b,1,11,val\n", "k.csv")
    check_error(["k.csv:3: found path '/k/../../etc/b_"], kinetics, root="/k")
    items = [{"id": "1", "template": "x"}, {"id": "../1", "template": "x"}]
    path = write(items, "s.json")
    check_error(["s.json: item 1: found path '/v/../1.webm'"], path, root="/v", class_names=["x"])


def test_roots_may_climb_and_links_in_them_may_lead_elsewhere(write, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "videos").symlink_to(tmp_path / "disk")
    write.touch("disk/a.mp4")
    monkeypatch.chdir(tmp_path / "here")
    path = write("a.mp4 0\n./b..c.mp4 1\n")
    assert [row.path for row in read_rows(path, root="../videos")] == [
        "../videos/a.mp4",
        "../videos/./b..c.mp4",
    ]
    check_error(["list2.txt:1: found path"], write("../c.mp4 0\n", "list2.txt"), root="../videos")


# Kinetics csv


def test_kinetics_files_are_found_in_every_spelling(write, tmp_path):
    found = {
        "a1": "air drumming/a1_000012_000022.mp4",
        "b2": "air_drumming/b2_000012_000022.mkv",
        "c3": "c3_000012_000022.webm",
        "d4": "air drumming/d4.mp4",
        "e5": "e5.mp4",
    }
    write.touch(*found.values(), "air drumming/a1_000012_000022.mkv", "a1_000012_000022.mp4")
    names = [*found, "-gone"]
    path = write(HEADER + "".join(f'"air drumming",{name},12,22,train\n' for name in names), "k.csv")
    rows = read_rows(path, root=tmp_path)
    wanted = [*found.values(), "air drumming/-gone_000012_000022.mp4"]
    assert tails(rows, tmp_path) == [(name, 0) for name in wanted]


def test_kinetics_underscores_in_the_csv_and_spaces_on_disk(write, tmp_path):
    write.touch("air drumming/a_000001_000011.mp4")
    path = write(HEADER + "air_drumming,a,1,11,val\n", "k.csv")
    assert tails(read_rows(path, root=tmp_path), tmp_path) == [("air drumming/a_000001_000011.mp4", 0)]


def test_kinetics_folders_are_listed_once(write, tmp_path, monkeypatch):
    write.touch("x/a_000001_000011.mp4")
    path = write(HEADER + "x,a,1,11,val\n" * 50 + "y,b,1,11,val\n" * 50, "k.csv")
    listdir, listed = os.listdir, []
    monkeypatch.setattr(os, "listdir", lambda name: listed.append(name) or listdir(name))
    assert len(read_rows(path, root=tmp_path)) == 100
    assert len(listed) == len(set(listed)) == 2  # x and the root


def test_kinetics_columns_in_any_order(write):
    path = write(
        "\ufeffis_cc,split,time_end,youtube_id,label,time_start\n"
        '0,train,22.0,a,"tying knot (not on a tie), fast",12\n\n'
        "0,train,9,b,abseiling,0.00\n",
        "k.csv",
    )
    rows = read_rows(path, root="/k")
    assert rows == [
        Row("/k/tying knot (not on a tie), fast/a_000012_000022.mp4", 1),
        Row("/k/abseiling/b_000000_000009.mp4", 0),
    ]
    assert rows.class_names == ["abseiling", "tying knot (not on a tie), fast"]


@pytest.mark.parametrize(
    "text", ["youtube_id,time_start,time_end,split\na,1,11,test\n", HEADER + ",a,1,11,test\n"]
)
def test_kinetics_without_labels(write, text):
    path = write(text, "test.csv")
    rows = read_rows(path, root="/k")
    assert rows == [Row("/k/a_000001_000011.mp4", None)]
    assert rows.class_names is None
    assert read_rows(path, root="/k", class_names=["x"]).class_names == ["x"]


def test_class_names_decide_the_ids_by_name(write):
    path = write(HEADER + "zumba,a,1,11,val\nair drumming,b,1,11,val\n", "k.csv")
    names = ["zumba", "other", "air_drumming"]
    rows = read_rows(path, root="/k", class_names=names)
    assert [row.label for row in rows] == [0, 2]
    assert rows.class_names == names
    parts = ["k.csv:3: found class 'air drumming'", "one of 2 class names", "nearest ['hair drum']"]
    check_error(parts, path, root="/k", class_names=["zumba", "hair drum"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (HEADER, ["k.csv:1: found columns", "0 rows", "expected columns youtube_id"]),
        ("label,youtube_id\nx,a\n", ["k.csv:1: found columns ['label', 'youtube_id']", "time_end"]),
        (HEADER + "x,a,1,11,val\n\nx,b,1\n", ["k.csv:4: found 3 fields, expected 5"]),
        (HEADER + "x, y,a,1,11,val\n", ["k.csv:2: found 6 fields, expected 5"]),
        (HEADER + "x,a,1,soon,val\n", ["k.csv:2: found youtube_id 'a'", "'soon'", "whole seconds"]),
        (HEADER + "x,a,-1,11,val\n", ["k.csv:2:", "'-1'", "whole seconds"]),
        (HEADER + "x,a,1.5,11,val\n", ["k.csv:2:", "'1.5'", "whole seconds"]),
        (HEADER + "x,,1,11,val\n", ["k.csv:2: found youtube_id ''", "expected an id"]),
        (HEADER + "x,a,1,11,val\n,b,1,11,val\n", ["k.csv:3: found class ''", "one of 1 class"]),
        (HEADER + '"x,a,1,11,val\n', ["k.csv:2: found", "expected valid csv"]),
    ],
)
def test_kinetics_errors(write, text, parts):
    check_error(parts, write(text, "k.csv"), root="/k")


# Something-Something V2


@pytest.mark.parametrize("labels", ["labels.json", "something-something-v2-labels.json", "my.json"])
def test_something(write, tmp_path, labels):
    write({"Holding a of b": "1", "Closing something": "0", "Opening something": 2}, labels)
    write.touch("v/1.webm", "v/1.mp4", "v/2.mp4", "v/2/img.jpg", "v/3/img.jpg")
    templates = list(TEMPLATES) * 2
    items = [{"id": str(i), "label": "x", "template": t} for i, t in enumerate(templates, 1)]
    path = write(items, "train.txt")  # told by its content
    given = {"labels": tmp_path / labels} if labels == "my.json" else {}
    rows = read_rows(path, root=tmp_path / "v", **given)
    assert tails(rows, tmp_path / "v") == [("1.webm", 0), ("2.mp4", 1), ("3", 0), ("4.webm", 1)]
    assert rows.class_names == ["Closing something", "Holding a of b", "Opening something"]


def test_something_for_testing_has_no_labels(write):
    path = write([{"id": "1420"}, {"id": 7}], "test.json")
    rows = read_rows(path, root="/v")
    assert rows == [Row("/v/1420.webm", None), Row("/v/7.webm", None)]
    assert rows.class_names is None
    write({"Closing something": "0"}, "labels.json")
    assert read_rows(path, root="/v").class_names == ["Closing something"]


def test_class_names_stand_in_for_the_labels_of_something(write):
    items = [{"id": str(i), "template": template} for i, template in enumerate(TEMPLATES)]
    rows = read_rows(write(items, "train.json"), root="/v", class_names=[*TEMPLATES.values()][::-1])
    assert [row.label for row in rows] == [1, 0]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('[{"id": "1"},\n {"id": ]', ["s.json:2: found Expecting value, expected valid json"]),
        ("a.mp4 3\n", ["s.json:1: found", "expected valid json"]),
        ("[" * 100_000, ["s.json: found brackets too deep", "expected valid json"]),
        ({"Closing something": "0"}, ["s.json: found a json dict", "expected a list of Something"]),
        ([], ["s.json: found a json list of '[]'", "expected a list of Something"]),
        (7, ["s.json: found a json int of '7'", "expected a list of Something"]),
        ([{"id": "1"}, "2"], ["s.json: item 1: found '2'", "an object with an id"]),
        ([{"template": "Closing [x]"}], ["s.json: item 0: found", "Closing [x]", "an id"]),
        ([{"id": "1", "template": 3}], ["s.json: item 0: found", "a template"]),
        ([{"id": "1", "label": "closing it"}], ["s.json: item 0: found", "a template"]),
        (
            [{"id": "1", "template": "Closing [it]"}],
            ["item 0: found class 'Closing it'", "one of 2 class names", "['Closing something']"],
        ),
        (
            [{"id": "1", "template": "Closing [something]"}, {"id": "2"}],
            ["s.json: item 1: found class ''", "expected one of 2 class names"],
        ),
    ],
)
def test_something_errors(write, content, parts):
    write({"Closing something": "0", "Opening something": "1"}, "labels.json")
    check_error(parts, write(content, "s.json"), root="/v")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"x": "1", "y": "2"}, ["found 2 class names and none for ids [0]", "from 0 up once"]),
        ({"x": "0", "y": "0"}, ["found 2 class names and none for ids [1]"]),
        ({"x": "0", "y": "one"}, ["found 2 class names and none for ids [1]"]),
        (["x", "y"], ["found 0 class names", "expected an object of names and ids"]),
        ("{", ["l.json:1: found Expecting property name", "expected valid json"]),
        (b"\xff", ["l.json:1: found byte 0xff, expected UTF-8"]),
    ],
)
def test_errors_in_the_labels_of_something(write, content, parts):
    path = write([{"id": "1", "template": "x"}], "s.json")
    check_error(["l.json", *parts], path, root="/v", labels=write(content, "l.json"))


def test_what_named_formats_need(write, tmp_path):
    items = write([{"id": "1", "template": "x"}], "s.json")
    kinetics = write(HEADER + "x,a,1,11,val\n", "k.csv")
    for path in (items, kinetics):
        check_error([f"{path.name}: found", "expected a video root", "data.root"], path)
    check_error(["s.json: found templates", "expected labels=", "labels.json"], items, root="/v")
    missing = tmp_path / "none.json"
    check_error(["none.json: found No such file"], items, root="/v", labels=missing)
    for path in (kinetics, write("a.mp4 1\n"), tmp_path):
        parts = [f"{path.name}: found labels=x.json", "only with Something-Something"]
        check_error(parts, path, root="/v", labels="x.json")


# Folders


def test_class_folders(write, tmp_path):
    write.touch("d/b_b/2.MP4", "d/b_b/1.jpg", "d/b_b/.hidden.mp4", "d/b_b/notes.txt", "d/top.mp4")
    write.touch("d/a/clip/img_1.jpg", "d/a/deep/er/img.jpg", "d/a/text/a.txt", "d/.git/x.mp4")
    rows = read_rows(tmp_path / "d")
    assert tails(rows, tmp_path / "d") == [("a/clip", 0), ("a/deep/er", 0), ("b_b/2.MP4", 1)]
    assert rows.class_names == ["a", "b_b"]
    rows = read_rows(tmp_path / "d", class_names=["b b", "c", "a"])
    assert [row.label for row in rows] == [2, 2, 0]
    assert rows.class_names == ["b b", "c", "a"]
    parts = ["a/clip: found class 'a'", "expected one of 1 class names", "nearest ['b b']"]
    check_error(parts, tmp_path / "d", class_names=["b b"])


def test_class_folders_may_hold_folders_of_videos(write, tmp_path):
    write.touch("d/a/day_1/x.mp4", "d/a/day_1/x.jpg", "d/a/day_2/cam/y.webm", "d/a/z.mp4", "d/b/only.mp4")
    os.symlink(tmp_path / "d", tmp_path / "d" / "b" / "upwards")
    names = [path for path, _ in tails(read_rows(tmp_path / "d"), tmp_path / "d")]
    assert names == ["a/day_1/x.mp4", "a/day_2/cam/y.webm", "a/z.mp4", "b/only.mp4"]
    write.touch("d/a/day_10/v.mp4")
    os.symlink(tmp_path / "d" / "a" / "day_1", tmp_path / "d" / "a" / "day_10" / "more")  # not upwards
    names = [path for path, _ in tails(read_rows(tmp_path / "d"), tmp_path / "d")]
    assert names[1:3] == ["a/day_10/more/x.mp4", "a/day_10/v.mp4"]


def test_images_of_class_folders_are_samples_only_where_nothing_moves(write, tmp_path):
    write.touch("d/a/1.jpg", "d/b/2.png")
    assert tails(read_rows(tmp_path / "d"), tmp_path / "d") == [("a/1.jpg", 0), ("b/2.png", 1)]
    write.touch("d/b/clip.mp4")
    check_error([f"{tmp_path}/d/a: found no video"], tmp_path / "d")
    write.touch("d/a/clip/1.jpg")
    assert tails(read_rows(tmp_path / "d"), tmp_path / "d") == [("a/clip", 0), ("b/clip.mp4", 1)]


def test_a_list_may_hold_class_names_where_they_are_known(write):
    path = write('a b.mp4,move left\n"c.mp4",grow\nd.mp4 1\n')
    rows = read_rows(path, root="/v", class_names=["grow", "move_left"])
    assert tails(rows, "/v") == [("a b.mp4", 1), ("c.mp4", 0), ("d.mp4", 1)]
    check_error(["found class 'grew'", "'grow'"], write("c.mp4,grew"), class_names=["grow", "move"])
    check_error(["expected `path label`", "data.class_names"], path)


def test_a_list_without_labels(write):
    rows = read_rows(write("a b.mp4\n'c'.webm\n"), root="/v")
    assert tails(rows, "/v") == [("a b.mp4", None), ("'c'.webm", None)]


def test_class_folder_errors(write, tmp_path):
    write.touch("flat/a.mp4", "d/full/a.mp4", "d/hollow/a.txt", "d/hollow/.b.mp4")
    check_error(["flat: found no sub-folders, expected one for each class"], tmp_path / "flat")
    check_error(["d/hollow: found no video, image or frame folder"], tmp_path / "d")


# Several classes a video


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ("a.mp4 5,2,9", ("a.mp4", (2, 5, 9))),
        ("my dir/b c.mp4  3, 1", ("my dir/b c.mp4", (1, 3))),
        ('"x, 1 2.mp4" 4,4', ("x, 1 2.mp4", (4,))),
        ('"x y.mp4","7,0"', ("x y.mp4", (0, 7))),
        ("7 8.mp4\t12,3", ("7 8.mp4", (3, 12))),
        ("c.webm 6", ("c.webm", (6,))),
    ],
)
def test_multilabel_lines(write, line, row):
    path = write(f"first.mp4 1,0\n\n{line}\n")
    rows = read_rows(path, root="/v")
    assert rows == [Row("/v/first.mp4", (0, 1)), Row(f"/v/{row[0]}", row[1])]
    assert rows == read_rows(path, root="/v", format="multilabel")
    assert rows[1].label == row[1]


@pytest.mark.parametrize("text", ["12 3,7\n", "a,30,4\nb,7,0\n", "my 12,30,4\n", "a.mp4,7\n", "b, 3, 4\n"])
def test_commas_alone_make_no_multilabel_list(write, text):
    path = write(text)
    assert all(type(row.target) is int for row in read_rows(path))
    assert read_rows(path) == read_rows(path, format="lines")


def test_multilabel_that_is_named_takes_single_ids_none_and_frame_folders(write):
    path = write('clips/one 3\n"a b.mp4" ""\nclips/two 4,1\n')
    rows = read_rows(path, root="/f", format="multilabel")
    assert rows == [Row("/f/clips/one", (3,)), Row("/f/a b.mp4", ()), Row("/f/clips/two", (1, 4))]


def test_multilabel_class_names(write):
    path = write('a b.mp4 air_drumming,zumba\nb.mp4 "zumba, air drumming"\nc.mp4 0\n')
    names = ["air drumming", "other", "zumba"]
    rows = read_rows(path, root="/v", class_names=names, format="multilabel")
    assert [row.target for row in rows] == [(0, 2), (0, 2), (0,)]
    assert rows.class_names == names
    parts = ["list.txt:1: found class 'air_drumming'", "one of 2 class names"]
    check_error(parts, path, class_names=["hair drumming", "zumba"], format="multilabel")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.mp4 1,2\nb.mp4\n", ["list.txt:2: found 'b.mp4'", "expected `path a,b,c`"]),
        ("a.mp4 1,2\n\nb.mp4 x\n", ["list.txt:3: found label 'x'", "expected a class id"]),
        ("a.mp4 1,2\nb.mp4 1,-2\n", ["list.txt:2: found label '-2'"]),
        ("a.mp4 1,2\nb.mp4 1,,2\n", ["list.txt:2: found label ''"]),
        ("a.mp4 1,2\n../b.mp4 1,2\n", ["list.txt:2: found path '/v/../b.mp4'", "data.root=/v"]),
    ],
)
def test_multilabel_errors(write, text, parts):
    check_error(parts, write(text), root="/v")


def test_multilabel_ids_stay_below_the_number_of_class_names(write):
    parts = ["list.txt:1: found label 2, expected one below 2"]
    check_error(parts, write("a.mp4 0,2\n"), class_names=["x", "y"])


CHARADES = "id,subject,actions,length\n"


def test_charades(write, tmp_path):
    write.touch("v/AB1.mp4", "v/CD2.mkv")
    text = CHARADES + "AB1,S1,c092 11.90 21.20;c007 0.00 12.60;c092 1 2,33\nCD2,S2,,3\nEF3,S,c000 0 1,3\n"
    rows = read_rows(write(text, "c.csv"), root=tmp_path / "v")
    assert tails(rows, tmp_path / "v") == [("AB1.mp4", (7, 92)), ("CD2.mkv", ()), ("EF3.mp4", (0,))]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("A,S,92 0 1,3", ["c.csv:2: found id 'A', actions '92 0 1'", "expected an id and actions"]),
        (",S,c092 0 1,3", ["c.csv:2: found id ''"]),
        ("A,S,3", ["c.csv:2: found 3 fields, expected 4"]),
        ("../A,S,c001 0 1,3", ["c.csv:2: found path"]),
    ],
)
def test_charades_errors(write, line, parts):
    check_error(parts, write(CHARADES + line + "\n", "c.csv"), root="/v")


# The table of formats


def test_a_format_that_is_named(write, tmp_path):
    path = write("clip 30 4\n")
    assert read_rows(path, root="/f", format="lines") == [Row("/f/clip", 4, 30)]
    check_error(["list.txt: found data.format=kinetic", "did you mean 'kinetics'"], path, format="kinetic")
    faults = {
        "shards": "found no tar files",
        "folders": "found no folder",
        "something": "list.txt:1: found Expecting value, expected valid json",
        "kinetics": "list.txt:1: found columns ['clip 30 4']",
        "charades": "list.txt:1: found columns ['clip 30 4']",
        "multilabel": "list.txt:1: found label 'x'",
        "ava": "found an AVA csv, expected its label map",
        "coco": "list.txt:1: found Expecting value, expected valid json",
        "voc": "list.txt: found no xml files",
    }
    for entry in MASK_FORMATS:
        fault = "found no folder" if isinstance(entry, MaskFolders) else "found 'clip 30 4', expected"
        faults[entry.name] = fault
    assert set(faults) | {"lines"} == {entry.name for entry in FORMATS}
    for name, fault in faults.items():
        text = "clip x\n" if name == "multilabel" else "clip 30 4\n"
        check_error([fault], write(text), root="/f", format=name)
    (tmp_path / "folder").mkdir()
    check_error(["folder: found Is a directory"], tmp_path / "folder", root="/f", format="kinetics")


def test_a_new_format_is_a_reader_and_a_line(write, monkeypatch):
    def read(source):
        return Rows(Row(line.partition("=")[0], line.partition("=")[2]) for _, line in source.lines())

    entry = Format("pairs", lambda source: "=" in source.text, read)
    monkeypatch.setattr(annotations, "FORMATS", (entry, *FORMATS))
    assert read_rows(write("a.mp4=caption of a\n")) == [Row("a.mp4", "caption of a")]


# Rows


def test_rows_are_a_sequence_of_rows():
    rows = [Row(f"{i}.mp4", i, None, Place("a.tar", i, 512)) for i in range(5)]
    packed = Rows(rows)
    assert packed == rows == list(packed) == packed[:]
    assert packed != rows[:4]
    assert packed != [*rows[:4], Row("other", 4)]
    assert (packed[-1], packed[1:4:2], len(packed)) == (rows[-1], rows[1:4:2], 5)
    assert packed.index(rows[3]) == 3
    assert len(Rows()) == 0
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]


def test_rows_are_a_list_that_survives_pickling():
    rows = Rows([Row("a", 1), Row("b", None, 5)], ["x", "y"])
    again = pickle.loads(pickle.dumps(rows))
    assert again == rows == [Row("a", 1), Row("b", None, 5)]
    assert type(again) is Rows
    assert again.class_names == ["x", "y"]
    assert type(rows[:1]) is list


# Left and right


def something_names():
    """174 names with those of Something-Something V2 that hold left or right in their places."""
    names = [f"Class {i} upright" for i in range(174)]
    names[50] = "Plugging something into something but pulling it right out as you remove your hand"
    for i, verb in ((86, "Pulling"), (93, "Pushing")):
        names[i] = f"{verb} something from left to right"
        names[i + 1] = f"{verb} something from right to left"
    names[166] = "Turning the camera left while filming something"
    names[167] = "Turning the camera right while filming something"
    return names


def test_mirrored_classes_of_something():
    twins = mirrored_classes(something_names())
    moved = {i: twin for i, twin in enumerate(twins) if i != twin}
    assert moved == {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
    assert [twins[twin] for twin in twins] == list(range(174))


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("move_left", "move_right"),
        ("Left_turn", "Right_turn"),
        ("LEFT", "RIGHT"),
        ("left-handed (left)", "right-handed (right)"),
        ("Swiping Left, then right", "Swiping Right, then left"),
    ],
)
def test_mirrored_words(name, twin):
    assert mirrored_classes([name, "still", twin]) == [2, 1, 0]
    assert mirrored_classes([twin, name]) == [1, 0]


@pytest.mark.parametrize("name", ["copyright", "leftover", "bright_light", "left2", "pull_right_out"])
def test_names_without_a_side_are_their_own_mirror(name):
    assert mirrored_classes([name]) == [0]


@pytest.mark.parametrize(
    "names", [["x", "turn left"], ["x", "turn left", "turn Right"], ["x", "turn left", "turn left"]]
)
def test_a_side_without_one_twin(names):
    with pytest.raises(ListError, match=r"class 1: found 'turn left', expected .*'turn right'"):
        mirrored_classes(names)


def test_twice_the_same_side():
    with pytest.raises(ListError, match="class 1: found 'right', expected one mirror twin 'left'"):
        mirrored_classes(["left", "right", "left"])


def test_a_json_of_one_long_line_is_told_apart_at_once(tmp_path):
    """As it comes from a machine; no pattern for lines of text may search it."""
    path = tmp_path / "list.json"
    path.write_text('[{"id": "1", "label": "a, b c"' + ", " * 20_000 + "}]")
    assert not [
        entry.name for entry in MASK_FORMATS if entry.recognises(annotations.Source(path, None, None, None))
    ]
    assert max(len(line) for line in path.read_text().splitlines()) > 5 * mask_lists.LONGEST_LINE // 2
