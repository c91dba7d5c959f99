"""Lists of videos: six formats of the field, told apart by their content, read into rows.

Two formats number their classes: `path label` and `folder num_frames label` lines. Three name them:
the Kinetics csv, the Something-Something V2 json and a folder of class folders. WebDataset shards
do either. Whatever is wrong
with a list becomes a `ListError`: one line that says where, what was found and what was expected.
"""

import csv
import difflib
import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ListError
from .decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .shards import Place, find_shards, index_shards

IMAGES = tuple(IMAGE_SUFFIXES)
MEDIA = (*VIDEO_SUFFIXES, *IMAGES)
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
KINETICS_SUFFIXES = (".mp4", ".mkv", ".webm")  # in order of preference
SHARDS_NAMES = "class_names.txt"  # beside shards: the class names of their ids, one a line
SOMETHING_LABELS = ("labels.json", "something-something-v2-labels.json")

OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
OTHER_SIDE |= {right: left for left, right in OTHER_SIDE.items()}
# Whole words, also between underscores. "Left out" and "right out" are no sides: one class of
# Something-Something V2 ends in "but pulling it right out as you remove your hand".
SIDE = re.compile(rf"(?<![^\W_])({'|'.join(OTHER_SIDE)})(?![^\W_]|[ _]out(?![^\W_]))")

StrPath = str | os.PathLike[str]
Entry = tuple[str, str, str]  # where it stands (for errors), the path, the class name or ""
Listing = Callable[[str], frozenset[str]]  # folder -> names in it


@dataclass(frozen=True, slots=True)
class Row:
    """A video, an image or a folder of frames; label and num_frames None where not given.

    place: where it lies in a shard; `path` is then its name, shard/member.
    """

    path: str
    label: int | None
    num_frames: int | None = None
    place: Place | None = None

    def contents(self) -> bytes | None:
        """The file's bytes where it lies in a shard; None: it lies at `path`. Raises DecodeError."""
        return None if self.place is None else self.place.read(self.path)


class Rows(list[Row]):
    """A list of rows that knows its class names by id, None where the format carries none."""

    def __init__(self, rows: Iterable[Row] = (), class_names: list[str] | None = None):
        super().__init__(rows)
        self.class_names = class_names


def read_rows(
    path: StrPath,
    *,
    root: StrPath | None = None,
    labels: StrPath | None = None,
    class_names: Sequence[str] | None = None,
) -> Rows:
    """Rows of a list file, a folder of class folders, or WebDataset shards (`find_shards`), in order.

    root: folder of the videos, needed for the Kinetics csv and the Something-Something json.
        Relative paths lie in root, absolute ones must, and none may hold "..": a list reaches nothing
        outside it but through links that lie there. Without root absolute paths are free, and relative
        ones lie in the current directory if the first of them exists there, else in the list's folder:
        decided once for all lines. Class folders and shards need no root and ignore it.
    labels: labels json of a Something-Something list, by default the one beside the list.
    class_names: names by class id. They decide the ids where classes are named (instead of sorted
        order or the labels json; a space equals an underscore), and bound them where numbered.

    Raises ListError. Only the decoder looks whether a video is there.
    """
    path, names = Path(path), None if class_names is None else list(class_names)
    shards = find_shards(path)
    text = "" if shards or path.is_dir() else _read_text(path)
    first = next(filter(str.strip, text.split("\n")), "")
    is_json = path.suffix.lower() == ".json" or re.match(r'\s*(\[\s*[{\]]|\{\s*["}])', text)
    if labels is not None and not (first and is_json):
        raise ListError(f"{path}: found labels={labels}, expected only with Something-Something")
    if shards:
        return _sharded(shards, names)
    if path.is_dir():
        return _by_name(_class_folders(path), names)
    if not first:
        raise ListError(f"{path}: found an empty file, expected a list of videos")
    if is_json:
        entries = _inside(root, _something(path, text, root))
        if names is None:
            names = _something_names(path, labels, needed=any(name for _, _, name in entries))
        return _by_name(entries, names)
    if {"youtube_id", "time_start"} & {field.strip(' "') for field in first.split(",")}:
        return _by_name(_inside(root, _kinetics(path, text, root)), names)
    return _numbered(path, text, root, names)


def mirrored_classes(class_names: Sequence[str]) -> list[int]:
    """Class id of each class's left/right twin, itself where the name holds neither word.

    A permutation, its own inverse. Raises ListError for a class that has a side but no twin: a
    mirrored clip of it would carry a wrong label.
    """
    names = list(class_names)
    twins = [SIDE.sub(lambda side: OTHER_SIDE[side[0]], name) for name in names]
    for i, (name, twin) in enumerate(zip(names, twins, strict=True)):
        if twin != name and names.count(twin) != 1:
            raise ListError(f"class {i}: found {name!r}, expected one mirror twin {twin!r} for it")
    return [i if twins[i] == name else names.index(twins[i]) for i, name in enumerate(names)]


def _numbered(path: Path, text: str, root: StrPath | None, names: list[str] | None) -> Rows:
    """Lines `path label` or, all of them, `folder num_frames label`; at spaces, tabs or commas.

    Where every line ends in two integers and no path in a media suffix these are frame folders,
    unless of a first line "dir 12 3" there is a "dir 12" on disk and no "dir".
    """
    lines, places = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        file, label = _split_right(line)
        folder, count = _split_right(file)
        if not file or not _is_count(label):
            raise ListError(
                f"{path}:{number}: found {line.strip()[:200]!r}, expected `path label` or "
                "`folder num_frames label` with integers of 0 or more, and no header"
            )
        if names is not None and int(label) >= len(names):
            raise ListError(
                f"{path}:{number}: found label {label}, expected one below {len(names)}, "
                "the number of class names (labels start at 0)"
            )
        lines.append((_unquote(file), int(label), _unquote(folder), count))
        places.append(f"{path}:{number}")

    bases = ["", path.parent] if root is None else [root]

    def on_disk(name: str) -> list[StrPath]:
        return [base for base in bases if os.path.exists(os.path.join(base, name))]

    framed = all(f and _is_count(n) and not f.lower().endswith(MEDIA) for *_, f, n in lines)
    first, _, folder, _ = lines[0]
    if framed and (on_disk(folder) or not on_disk(first)):
        rows = [(folder, label, int(count)) for _, label, folder, count in lines]
    else:
        rows = [(file, label, None) for file, label, *_ in lines]
    relative = next((file for file, *_ in rows if not os.path.isabs(file)), "")
    base = (on_disk(relative) or bases[-1:])[0]
    files = [os.path.join(base, file) for file, *_ in rows]
    _inside(root, [(place, file, "") for place, file in zip(places, files, strict=True)])
    return Rows((Row(file, *rest) for file, (_, *rest) in zip(files, rows, strict=True)), names)


def _inside(root: StrPath | None, entries: list[Entry]) -> list[Entry]:
    """The entries, none of which may leave root, by the letter of its path; links are not followed."""
    if root is not None:
        base = os.path.abspath(root)
        for where, file, _ in entries:
            outside = os.path.commonpath([base, os.path.abspath(file)]) != base
            # root itself may hold "..", but not what the list adds: a/../b is not b where a is a link
            if outside or Path(file).parts.count("..") > Path(root).parts.count(".."):
                raise ListError(f"{where}: found path {file!r}, expected one inside data.root={root}")
    return entries


def _by_name(entries: Sequence[Entry], names: list[str] | None) -> Rows:
    """Rows with ids by class name, or without labels where no entry has a name."""
    given = sorted({name for _, _, name in entries if name})
    names = given if names is None else names
    ids = {name.replace("_", " "): i for i, name in enumerate(names)}
    ids |= {name: i for i, name in enumerate(names)}
    rows = Rows(class_names=names or None)
    for where, file, name in entries:
        label = ids.get(name, ids.get(name.replace("_", " ")))
        if given and label is None:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ListError(
                f"{where}: found class {name!r}, expected one of {len(names)} class names, nearest {near}"
            )
        rows.append(Row(file, label))
    return rows


def _kinetics(path: Path, text: str, root: StrPath | None) -> list[Entry]:
    """Official Kinetics csv; a file is root/class/id_start_end.mp4 or in a near spelling of it."""
    if root is None:
        raise ListError(f"{path}: found a Kinetics csv, expected a video root for it (data.root)")
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader if any(map(str.strip, fields))]
    except csv.Error as error:
        raise ListError(f"{path}:{reader.line_num}: found {error}, expected valid csv") from error
    (number, header), *lines = lines
    columns = {name.strip(): i for i, name in enumerate(header)}
    if not lines or not columns.keys() >= set(KINETICS_COLUMNS):
        raise ListError(
            f"{path}:{number}: found columns {header} and {len(lines)} rows, "
            f"expected columns {', '.join(KINETICS_COLUMNS)} and some rows"
        )

    @functools.cache
    def folders(name: str) -> list[str]:
        spellings = dict.fromkeys((name, name.replace(" ", "_"), name.replace("_", " "), ""))
        return [os.path.join(root, spelling) for spelling in spellings]

    listing = functools.cache(_names_in)
    entries = []
    for number, fields in lines:
        where = f"{path}:{number}"
        if len(fields) != len(header):
            raise ListError(f"{where}: found {len(fields)} fields, expected {len(header)}")
        video, *times = (fields[columns[name]].strip() for name in KINETICS_COLUMNS)
        start, end = (re.fullmatch(r"([0-9]{1,9})(\.0*)?", time) for time in times)
        if not (video and start and end):
            raise ListError(
                f"{where}: found youtube_id {video!r}, times {' and '.join(map(repr, times))}, "
                "expected an id and whole seconds"
            )
        name = fields[columns["label"]].strip() if "label" in columns else ""
        stems = (f"{video}_{int(start[1]):06d}_{int(end[1]):06d}", video)
        files = [stem + suffix for stem in stems for suffix in KINETICS_SUFFIXES]
        entries.append((where, _first(folders(name), files, listing), name))
    return entries


def _something(path: Path, text: str, root: StrPath | None) -> list[Entry]:
    """Official Something-Something V2 json; a class is a template without its brackets."""
    items = _parse_json(path, text)
    if not isinstance(items, list) or not items:
        raise ListError(
            f"{path}: found a json {type(items).__name__} of {text.strip()[:60]!r}, "
            "expected a list of Something-Something items"
        )
    if root is None:
        raise ListError(f"{path}: found a json list, expected a video root for it (data.root)")
    listing = functools.cache(_names_in)
    entries = []
    for i, item in enumerate(items):
        fields = item if isinstance(item, dict) else {}
        video = fields.get("id")
        template = fields.get("template", None if "label" in fields else "")
        if not isinstance(video, str | int) or not isinstance(template, str):
            raise ListError(
                f"{path}: item {i}: found {str(item)[:200]!r}, expected an object with an id "
                "and, unless for testing, a template"
            )
        file = _first([os.fspath(root)], [f"{video}.webm", f"{video}.mp4", f"{video}"], listing)
        entries.append((f"{path}: item {i}", file, re.sub(r"[\[\]]", "", template)))
    return entries


def _something_names(path: Path, labels: StrPath | None, needed: bool) -> list[str] | None:
    """Names in id order, from the {"Closing something": "5", ...} of labels or beside the list."""
    beside = (path.parent / name for name in SOMETHING_LABELS)
    labels = labels or next(filter(Path.is_file, beside), None)
    if labels is None:
        if not needed:
            return None
        raise ListError(
            f"{path}: found templates without class ids, expected labels= or, beside the list, "
            f"{' or '.join(SOMETHING_LABELS)}"
        )
    table = _parse_json(labels, _read_text(labels))
    ids = [str(i) for i in table.values()] if isinstance(table, dict) else []
    missing = [i for i in range(len(ids)) if str(i) not in ids]
    if not ids or missing:
        raise ListError(
            f"{labels}: found {len(ids)} class names and none for ids {missing[:3]}, "
            "expected an object of names and ids, each id from 0 up once"
        )
    return sorted(table, key=lambda name: int(table[name]))


def _class_folders(path: Path) -> list[Entry]:
    """Videos, images and frame folders of each sub-folder, whose name is their class."""
    entries = []
    for folder in filter(os.DirEntry.is_dir, _visible(path)):
        files = [file.path for file in _visible(folder) if _is_readable(file)]
        if not files:
            raise ListError(f"{folder.path}: found no video, image or frame folder, expected some")
        entries += [(file, file, folder.name) for file in files]
    if not entries:
        raise ListError(f"{path}: found no sub-folders, expected one for each class")
    return entries


def _is_readable(entry: os.DirEntry[str]) -> bool:
    if entry.is_dir():
        return any(file.name.lower().endswith(IMAGES) for file in _visible(entry))
    return entry.name.lower().endswith(MEDIA)


def _sharded(shards: Sequence[str], names: list[str] | None) -> Rows:
    """Rows of shards; ids are those of the class names beside the shards, where there are some."""
    own, found = _shards_names(shards), index_shards(shards)
    limit = own or names
    for path, label, _ in found:
        if type(label) is not type(found[0].label):
            first = f"label {found[0].label!r} of {found[0].path}"
            raise ListError(f"{path}: found label {label!r} and {first}, expected all of a kind, or none")
        if isinstance(label, int) and limit is not None and label >= len(limit):
            raise ListError(
                f"{path}: found label {label}, expected one below {len(limit)}, "
                "the number of class names (labels start at 0)"
            )
    named = own is not None or any(isinstance(sample.label, str) for sample in found)
    rows = Rows((Row(path, label, None, place) for path, label, place in found), names)
    if not named:
        return rows
    labels = (own[label] if isinstance(label, int) else label or "" for _, label, _ in found)
    entries = [(row.path, row.path, label) for row, label in zip(rows, labels, strict=True)]
    ids = _by_name(entries, own if names is None else names)
    both = zip(rows, ids, strict=True)
    return Rows((replace(row, label=by_name.label) for row, by_name in both), ids.class_names)


def _shards_names(shards: Sequence[str]) -> list[str] | None:
    """The class names beside the shards. In several folders they must agree."""
    files = dict.fromkeys(os.path.join(os.path.dirname(shard), SHARDS_NAMES) for shard in shards)
    texts = [_read_text(file) if os.path.exists(file) else "" for file in files]
    if len(set(texts)) > 1:
        raise ListError(f"{', '.join(files)}: found different class names, expected the same")
    names = [line.strip() for line in texts[0].splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise ListError(f"{next(iter(files))}: found a class name twice, expected each once")
    return names or None


def _visible(folder: StrPath) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, by name."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)


def _first(folders: Sequence[str], files: Sequence[str], listing: Listing) -> str:
    """The first folder/file on disk, else the very first spelling."""
    there = ((folder, file) for folder in folders for file in files if file in listing(folder))
    return os.path.join(*next(there, (folders[0], files[0])))


def _names_in(folder: str) -> frozenset[str]:
    """What is in a folder, nothing if there is none; cached, a listing serves all rows."""
    return frozenset(os.listdir(folder) if os.path.isdir(folder) else ())


def _split_right(line: str) -> tuple[str, str]:
    """'a b.mp4, 3' -> 'a b.mp4', '3', with '' for what is not there; quotes stay on the left."""
    line = line.strip(" \t")
    cut = max(line.rfind(" "), line.rfind(","), line.rfind("\t")) + 1
    return line[:cut].rstrip(" \t").removesuffix(",").rstrip(" \t"), _unquote(line[cut:])


def _unquote(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if quoted else text


def _is_count(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _parse_json(path: StrPath, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ListError(f"{path}:{error.lineno}: found {error.msg}, expected valid json") from error


def _read_text(path: StrPath) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ListError(f"{path}: found {error.strerror}, expected a readable file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ListError(f"{path}:{line}: found byte {byte:#04x}, expected UTF-8 text") from error
