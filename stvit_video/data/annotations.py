"""Lists of videos: the formats of the field, told apart by their content, read into rows.

`FORMATS` is the table of them: a new one is its reader and a line there. Whatever is wrong with a list
becomes a `ListError`: one line that says where, what was found and what was expected.
"""

import csv
import difflib
import functools
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import ListError, nearest
from . import ava
from .mask_lists import MASK_FORMATS
from .media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .objects import is_coco, is_voc, read_coco, read_voc
from .rows import Row, Rows, parse_json
from .shards import Place, find_shards, index_shards, visible

IMAGES, VIDEOS = tuple(IMAGE_SUFFIXES), tuple(VIDEO_SUFFIXES)
MEDIA = (*VIDEO_SUFFIXES, *IMAGES)
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
CHARADES_COLUMNS = ("id", "actions")
PREFERRED = (".mp4", ".mkv", ".webm")  # in order of preference
SHARDS_NAMES = "class_names.txt"  # beside shards: the class names of their ids, one a line
SOMETHING_LABELS = ("labels.json", "something-something-v2-labels.json")

# A path, and class ids with commas between; of several readings the one with the shortest path.
MULTILABEL = re.compile(r"(.*?\S)[ \t]+([0-9]{1,9}(?:[ \t]*,[ \t]*[0-9]{1,9})*)")

OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
OTHER_SIDE |= {right: left for left, right in OTHER_SIDE.items()}
# Whole words, also between underscores. "Left out" and "right out" are no sides: one class of
# Something-Something V2 ends in "but pulling it right out as you remove your hand".
SIDE_WORD = re.compile(rf"(?<![^\W_])({'|'.join(OTHER_SIDE)})(?![^\W_]|[ _]out(?![^\W_]))")

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """What `read_rows` was asked to read."""

    path: Path
    root: StrPath | None
    labels: StrPath | None
    names: list[str] | None

    @functools.cached_property
    def shards(self) -> list[str]:
        return find_shards(self.path)

    @functools.cached_property
    def text(self) -> str:
        if not self.path.exists():
            raise ListError(
                f"{self.path}: found no such file or folder, expected a list, class folders or shards"
            )
        if self.path.suffix.lower() in MEDIA:
            raise ListError(f"{self.path}: found a video or image, expected a list or a folder of them")
        text = _read_text(self.path)
        if not text.strip():
            raise ListError(f"{self.path}: found an empty file, expected a list of videos")
        return text

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return _ids(self.names or ())

    def lines(self) -> Iterator[tuple[str, str]]:
        """(where it stands, text) of each line that is not blank."""
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.strip():
                yield f"{self.path}:{number}", line

    def columns(self) -> set[str]:
        """The fields of the first line."""
        return {field.strip(' "') for field in next(self.lines())[1].split(",")}

    @functools.cached_property
    def _names_in(self) -> Callable[[str], frozenset[str]]:
        """Folder -> what is in it, nothing if there is none; one listing serves all rows."""
        return functools.cache(lambda name: frozenset(os.listdir(name) if os.path.isdir(name) else ()))

    def video(self, where: str, files: Sequence[str], folders: Iterable[str] = ("",)) -> str:
        """The first folder/file of root that is on disk, else the very first spelling."""
        folders = [os.path.join(self.root, folder) for folder in folders]
        there = ((folder, file) for folder in folders for file in files if file in self._names_in(folder))
        return self.inside(where, os.path.join(*next(there, (folders[0], files[0]))))

    def inside(self, where: str, file: str) -> str:
        """The path, which may not leave root by its letter; links are not followed."""
        if self.root is not None:
            base = os.path.abspath(self.root)
            outside = os.path.commonpath([base, os.path.abspath(file)]) != base
            # root itself may hold "..", but not what the list adds: a/../b is not b where a is a link
            if outside or Path(file).parts.count("..") > Path(self.root).parts.count(".."):
                raise ListError(f"{where}: found path {file!r}, expected one inside data.root={self.root}")
        return file

    def located(self, places: Sequence[str], files: Sequence[str]) -> list[str]:
        """The paths of a list's lines in the folder that the first relative one decides on."""
        relative = next((file for file in files if not os.path.isabs(file)), "")
        base = (self.on_disk(relative) or self.bases[-1:])[0]
        lines = zip(places, files, strict=True)
        return [self.inside(where, os.path.join(base, file)) for where, file in lines]

    def on_disk(self, name: str) -> list[StrPath]:
        """The folders, of those where a relative path of a list without names may lie, that have it."""
        return [base for base in self.bases if os.path.exists(os.path.join(base, name))]

    @property
    def bases(self) -> list[StrPath]:
        return ["", self.path.parent] if self.root is None else [self.root]


def read_rows(
    path: StrPath,
    *,
    root: StrPath | None = None,
    labels: StrPath | None = None,
    class_names: Sequence[str] | None = None,
    format: str | None = None,
) -> Rows:
    """Rows of a list file, a folder of class folders, or WebDataset shards (`find_shards`), in order.

    root: folder of the videos, needed for csv and json lists.
        Relative paths lie in root, absolute ones must, and none may hold "..": a list reaches nothing
        outside it but through links that lie there. Without root absolute paths are free, and relative
        ones lie in the current directory if the first of them exists there, else in the list's folder:
        decided once for all lines. Class folders and shards need no root and ignore it.
    labels: labels json of a Something-Something list, by default the one beside the list; AVA's label map.
    class_names: names by class id. They decide the ids where classes are named (instead of sorted
        order or the labels json; a space equals an underscore), and bound them where numbered.
    format: a name in `FORMATS`; None: the first of them that recognises the list.

    Raises ListError. Only the decoder looks whether a video is there.
    """
    source = Source(Path(path), root, labels, None if class_names is None else list(class_names))
    formats = {entry.name: entry for entry in FORMATS}
    if format not in (None, *formats):
        raise ListError(f"{path}: found data.format={format}, unknown{nearest(format, formats)}")
    chosen = formats[format] if format else next(entry for entry in FORMATS if entry.recognises(source))
    if labels is not None and chosen.name not in ("something", "ava"):
        raise ListError(f"{path}: found labels={labels}, expected only with Something-Something and AVA")
    return chosen.read(source)


def mirrored_classes(class_names: Sequence[str]) -> list[int]:
    """Class id of each class's left/right twin, itself where the name holds neither word.

    A permutation, its own inverse. Raises ListError for a class that has a side but no twin: a
    mirrored clip of it would carry a wrong label.
    """
    names = list(class_names)
    twins = [SIDE_WORD.sub(lambda side: OTHER_SIDE[side[0]], name) for name in names]
    for i, (name, twin) in enumerate(zip(names, twins, strict=True)):
        if twin != name and names.count(twin) != 1:
            raise ListError(f"class {i}: found {name!r}, expected one mirror twin {twin!r} for it")
    return [i if twins[i] == name else names.index(twins[i]) for i, name in enumerate(names)]


def _read_lines(source: Source) -> Rows:
    """Lines `path label` or, all of them, `folder num_frames label` or `path`; at spaces, tabs or commas.

    A label is a class id or, after a comma or tab and where class names are given, a name. Where every line
    ends in two integers and no path in a media suffix these are frame folders, unless of a first line
    "dir 12 3" there is a "dir 12" on disk and no "dir".
    """
    if all(_is_media(line.strip()) for _, line in source.lines()):
        places, files = zip(*source.lines(), strict=True)
        paths = source.located(places, [_unquote(file.strip()) for file in files])
        return Rows((Row(path, None) for path in paths), source.names)
    lines = []
    for where, line in source.lines():
        file, label = _split_right(line)
        if not _is_count(label) and source.names is not None:
            file, label = _split_name(where, line, source)
        folder, count = _split_right(file)
        if not file or not _is_count(label):
            raise ListError(
                f"{where}: found {line.strip()[:200]!r}, expected `path label` or "
                "`folder num_frames label` with integers of 0 or more, and no header "
                "(or `path,name`, and data.class_names)"
            )
        _check_id(where, int(label), source.names)
        lines.append((where, int(label), _unquote(file), _unquote(folder), count))
    framed = all(f and _is_count(n) and not f.lower().endswith(MEDIA) for *_, f, n in lines)
    places, labels, files, folders, counts = zip(*lines, strict=True)
    if framed and (source.on_disk(folders[0]) or not source.on_disk(files[0])):
        files, counts = folders, map(int, counts)
    else:
        counts = itertools.repeat(None, len(files))
    rows = zip(source.located(places, files), labels, counts, strict=True)
    return Rows((Row(*row) for row in rows), source.names)


def _is_multilabel(source: Source) -> bool:
    """Whether some line is a path with a media suffix and two or more ids.

    Only with that suffix: `dir 12,3` may also be the folder "dir" or the path "dir 12" and its label.
    """
    matches = (MULTILABEL.fullmatch(line.strip()) for _, line in source.lines() if "," in line)
    return any(m and "," in m[2] and _is_media(m[1]) for m in matches)


def _read_multilabel(source: Source) -> Rows:
    """Lines `path a,b,c`: class ids or, where class names are given, names; the last field may be quoted.

    The empty set is `path ""`. Targets are rising tuples of ids.
    """
    places, files, targets = [], [], []
    for where, line in source.lines():
        file, labels = _split_labels(line.strip())
        if not file:
            raise ListError(
                f"{where}: found {line.strip()[:200]!r}, expected `path a,b,c` with class ids of 0 or more"
                f' or, with class names, names (`path ""`: none), and no header'
            )
        ids = {_class_id(where, label.strip(), source) for label in labels.split(",") if labels}
        places.append(where)
        files.append(file)
        targets.append(tuple(sorted(ids)))
    rows = zip(source.located(places, files), targets, strict=True)
    return Rows((Row(*row) for row in rows), source.names)


def _split_labels(line: str) -> tuple[str, str]:
    """'a b.mp4 1, 2' -> 'a b.mp4', '1, 2'; '' for a path that is not there."""
    match = MULTILABEL.fullmatch(line) or re.fullmatch(r'(.*\S)[ \t,]+"([^"]*)"', line)
    match = match or re.fullmatch(r"(.*\S)[ \t]+(\S+)", line)
    return (_unquote(match[1].removesuffix(",").rstrip()), match[2]) if match else ("", "")


def _class_id(where: str, label: str, source: Source) -> int:
    if _is_count(label):
        _check_id(where, int(label), source.names)
        return int(label)
    if source.names is None:
        raise ListError(f"{where}: found label {label!r}, expected a class id (no class names are given)")
    return _find_class(where, label, source.names, source.ids)


def _check_id(where: str, label: int, names: Sequence[str] | None) -> None:
    if names is not None and label >= len(names):
        raise ListError(
            f"{where}: found label {label}, expected one below {len(names)}, "
            "the number of class names (labels start at 0)"
        )


def _by_name(
    entries: Sequence[tuple[str, str, str]],
    names: list[str] | None,
    places: Iterable[Place | None] = itertools.repeat(None),
) -> Rows:
    """Rows with ids by class name, or without labels where no entry has a name.

    entries: where each stands (for errors), its path, its class name or "".
    """
    named = sorted({name for _, _, name in entries if name})
    names = named if names is None else names
    ids = _ids(names)
    targets = (_find_class(where, name, names, ids) if named else None for where, _, name in entries)
    rows = zip(entries, targets, places)  # noqa: B905 (places may have no end)
    return Rows((Row(file, target, None, place) for (_, file, _), target, place in rows), names or None)


def _ids(names: Sequence[str]) -> dict[str, int]:
    """Ids by class name; a space equals an underscore."""
    ids = {name.replace("_", " "): i for i, name in enumerate(names)}
    return ids | {name: i for i, name in enumerate(names)}


def _find_class(where: str, name: str, names: Sequence[str], ids: dict[str, int]) -> int:
    label = ids.get(name, ids.get(name.replace("_", " ")))
    if label is None:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise ListError(
            f"{where}: found class {name!r}, expected one of {len(names)} class names, nearest {near}"
        )
    return label


def _read_csv(source: Source, kind: str, required: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, {column: text}) of each line below the header."""
    path = source.path
    if source.root is None:
        raise ListError(f"{path}: found a {kind} csv, expected a video root for it (data.root)")
    reader = csv.reader(io.StringIO(source.text), strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader if any(map(str.strip, fields))]
    except csv.Error as error:
        raise ListError(f"{path}:{reader.line_num}: found {error}, expected valid csv") from error
    (number, header), *lines = lines
    columns = [name.strip() for name in header]
    if not lines or not set(columns) >= set(required):
        raise ListError(
            f"{path}:{number}: found columns {header} and {len(lines)} rows, "
            f"expected columns {', '.join(required)} and some rows"
        )
    for number, fields in lines:
        if len(fields) != len(header):
            raise ListError(f"{path}:{number}: found {len(fields)} fields, expected {len(header)}")
        yield f"{path}:{number}", dict(zip(columns, map(str.strip, fields), strict=True))


def _read_kinetics(source: Source) -> Rows:
    """Official Kinetics csv; a file is root/class/id_start_end.mp4 or in a near spelling of it."""
    entries = []
    for where, fields in _read_csv(source, "Kinetics", KINETICS_COLUMNS):
        video, *times = (fields[name] for name in KINETICS_COLUMNS)
        start, end = (re.fullmatch(r"([0-9]{1,9})(\.0*)?", time) for time in times)
        if not (video and start and end):
            raise ListError(
                f"{where}: found youtube_id {video!r}, times {' and '.join(map(repr, times))}, "
                "expected an id and whole seconds"
            )
        name = fields.get("label", "")
        stems = (f"{video}_{int(start[1]):06d}_{int(end[1]):06d}", video)
        files = [stem + suffix for stem in stems for suffix in PREFERRED]
        folders = dict.fromkeys((name, name.replace(" ", "_"), name.replace("_", " "), ""))
        entries.append((where, source.video(where, files, folders), name))
    return _by_name(entries, source.names)


def _read_charades(source: Source) -> Rows:
    """Official Charades csv, several classes a video; a file is root/id.mp4.

    `actions` is e.g. "c092 11.90 21.20;c147 0.00 12.60", of which the classes are taken and not the times.
    """
    rows = []
    for where, fields in _read_csv(source, "Charades", CHARADES_COLUMNS):
        actions = [action.split()[0] for action in fields["actions"].split(";") if action.strip()]
        if not fields["id"] or not all(re.fullmatch("c[0-9]{3}", action) for action in actions):
            raise ListError(
                f"{where}: found id {fields['id']!r}, actions {fields['actions'][:200]!r}, "
                "expected an id and actions such as c092 11.90 21.20;c147 0.00 12.60"
            )
        file = source.video(where, [fields["id"] + suffix for suffix in PREFERRED])
        ids = {_class_id(where, action[1:], source) for action in actions}
        rows.append(Row(file, tuple(sorted(ids))))
    return Rows(rows, source.names)


def _read_ava(source: Source) -> Rows:
    """AVA's csv, a row for each key frame; a file is root/id.mp4, or has another video's suffix."""
    if source.root is None:
        raise ListError(f"{source.path}: found an AVA csv, expected a video root for it (data.root)")
    if source.labels is None and source.names is None:
        raise ListError(
            f"{source.path}: found an AVA csv, expected its label map (data.labels) or data.class_names"
        )
    labels = {} if source.labels is None else ava.read_label_map(source.labels)
    names = ava.class_names(labels) if source.names is None else source.names
    suffixes = (*PREFERRED, *sorted(VIDEO_SUFFIXES - set(PREFERRED)), "")  # "": a folder of frames
    files: dict[str, str] = {}
    rows = []
    for where, key in ava.key_frames(source.lines(), set(labels or range(1, len(names) + 1))):
        if key.video not in files:
            files[key.video] = source.video(where, [key.video + suffix for suffix in suffixes])
        rows.append(Row(files[key.video], key))
    return Rows(rows, names)


def _is_json(source: Source) -> bool:
    starts = re.match(r'\s*(\[\s*[{\]]|\{\s*["}])', source.text)
    return source.path.suffix.lower() == ".json" or starts is not None


def _read_something(source: Source) -> Rows:
    """Official Something-Something V2 json; a class is a template without its brackets."""
    path, text = source.path, source.text
    items = parse_json(path, text)
    if not isinstance(items, list) or not items:
        raise ListError(
            f"{path}: found a json {type(items).__name__} of {text.strip()[:60]!r}, "
            "expected a list of Something-Something items"
        )
    if source.root is None:
        raise ListError(f"{path}: found a json list, expected a video root for it (data.root)")
    entries = []
    for i, item in enumerate(items):
        where = f"{path}: item {i}"
        fields = item if isinstance(item, dict) else {}
        video = fields.get("id")
        template = fields.get("template", None if "label" in fields else "")
        if not isinstance(video, str | int) or not isinstance(template, str):
            raise ListError(
                f"{where}: found {str(item)[:200]!r}, expected an object with an id "
                "and, unless for testing, a template"
            )
        file = source.video(where, [f"{video}.webm", f"{video}.mp4", f"{video}"])
        entries.append((where, file, re.sub(r"[\[\]]", "", template)))
    names = source.names
    if names is None:
        names = _something_names(path, source.labels, needed=any(name for _, _, name in entries))
    return _by_name(entries, names)


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
    table = parse_json(labels, _read_text(labels))
    ids = [str(i) for i in table.values()] if isinstance(table, dict) else []
    missing = [i for i in range(len(ids)) if str(i) not in ids]
    if not ids or missing:
        raise ListError(
            f"{labels}: found {len(ids)} class names and none for ids {missing[:3]}, "
            "expected an object of names and ids, each id from 0 up once"
        )
    return sorted(table, key=lambda name: int(table[name]))


def _read_folders(source: Source) -> Rows:
    """Videos, images and frame folders below each sub-folder, whose name is their class.

    Where there are videos or frame folders, in whichever class, single images are thumbnails: left out.
    """
    path, entries = source.path, []
    if not path.is_dir():
        raise ListError(f"{path}: found no folder, expected one of class folders")
    classes = {folder: list(_samples(folder)) for folder in filter(os.DirEntry.is_dir, visible(path))}
    if any(not _is_image(file) for files in classes.values() for file in files):
        classes = {folder: [f for f in files if not _is_image(f)] for folder, files in classes.items()}
    for folder, files in classes.items():
        if not files:
            raise ListError(f"{folder.path}: found no video, image or frame folder, expected some")
        entries += [(file.path, file.path, folder.name) for file in files]
    if not entries:
        raise ListError(f"{path}: found no sub-folders, expected one for each class")
    return _by_name(entries, source.names)


def _samples(folder: os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    """Video and image files below a folder, and sub-folders that hold only images: a video's frames."""
    for entry in visible(folder):
        if not entry.is_dir():
            yield from [entry] if entry.name.lower().endswith(MEDIA) else []
            continue
        names = [file.name.lower() for file in visible(entry) if file.is_file()]
        framed = any(name.endswith(IMAGES) for name in names)
        if framed and not any(name.endswith(VIDEOS) for name in names):
            yield entry
        elif not _within(folder.path, entry.path):  # else a link upwards
            yield from _samples(entry)


def _within(path: str, folder: str) -> bool:
    path, folder = (os.path.join(os.path.realpath(name), "") for name in (path, folder))
    return path.startswith(folder)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMAGES) and entry.is_file()


def _read_shards(source: Source) -> Rows:
    """Rows of shards; ids are those of the class names beside the shards, where there are some."""
    if not source.shards:
        raise ListError(f"{source.path}: found no tar files, expected WebDataset shards")
    beside, samples = _shards_names(source.shards), index_shards(source.shards)
    for path, label, _ in samples:
        if type(label) is not type(samples[0].label):
            first = f"label {samples[0].label!r} of {samples[0].path}"
            raise ListError(f"{path}: found label {label!r} and {first}, expected all of a kind, or none")
        if isinstance(label, int):
            _check_id(path, label, beside or source.names)
    if beside is None and not any(isinstance(sample.label, str) for sample in samples):
        return Rows((Row(path, label, None, place) for path, label, place in samples), source.names)
    entries = [(p, p, beside[label] if isinstance(label, int) else label or "") for p, label, _ in samples]
    names = beside if source.names is None else source.names
    return _by_name(entries, names, (sample.place for sample in samples))


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


def _split_right(line: str) -> tuple[str, str]:
    """'a b.mp4, 3' -> 'a b.mp4', '3', with '' for what is not there; quotes stay on the left."""
    line = line.strip(" \t")
    cut = max(line.rfind(" "), line.rfind(","), line.rfind("\t")) + 1
    return line[:cut].rstrip(" \t").removesuffix(",").rstrip(" \t"), _unquote(line[cut:])


def _split_name(where: str, line: str, source: Source) -> tuple[str, str]:
    """'a b.mp4,move left' -> 'a b.mp4', '3': the id of that class."""
    cut = max(line.rfind(","), line.rfind("\t"))
    if cut < 1:
        return "", ""
    name = _unquote(line[cut + 1 :].strip())
    return line[:cut].strip(), str(_find_class(where, name, source.names, source.ids))


def _unquote(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1].replace('""', '"') if quoted else text


def _is_media(path: str) -> bool:
    return path.removesuffix(",").rstrip().strip('"').lower().endswith(MEDIA)


def _is_count(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _read_text(path: StrPath) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:  # of UTF-16 without its mark, or after the machine went down; no path has it
            number = text.count("\n", 0, text.index("\0")) + 1
            raise ListError(f"{path}:{number}: found byte 0x00, expected UTF-8 text")
        return text
    except OSError as error:
        raise ListError(f"{path}: found {error.strerror}, expected a readable file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ListError(f"{path}:{line}: found byte {byte:#04x}, expected UTF-8 text") from error


class Format(NamedTuple):
    """A kind of list: its name (data.format), whether a source is one, its rows."""

    name: str
    recognises: Callable[[Source], object]
    read: Callable[[Source], Rows]


# Asked in this order.
FORMATS = (
    Format("shards", lambda source: source.shards, _read_shards),
    *MASK_FORMATS,
    Format("voc", is_voc, read_voc),
    Format("folders", lambda source: source.path.is_dir(), _read_folders),
    Format("coco", is_coco, read_coco),
    Format("something", _is_json, _read_something),
    Format("kinetics", lambda source: {"youtube_id", "time_start"} & source.columns(), _read_kinetics),
    Format("charades", lambda source: set(CHARADES_COLUMNS) <= source.columns(), _read_charades),
    Format("ava", lambda source: ava.is_ava(next(source.lines())[1]), _read_ava),
    Format("multilabel", _is_multilabel, _read_multilabel),
    Format("lines", lambda source: True, _read_lines),
)
