"""Masks: a class id for every pixel of an image or of a video's frames. Their files, and the lists of them.

`MASK_FORMATS` are lists by layout, as the data sets of the field are unpacked; each is recognised by the
mask of its first image, so that nothing else is taken for one.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import DecodeError, ListError
from .media import IMAGE_SUFFIXES, natural
from .rows import Row, Rows

IGNORED = 255  # of a pixel that counts nowhere; so there are 255 classes at most
LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".gif")
BROKEN = 256  # in a table: a value that no class has
CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider"},
    **{26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # of COCO-Stuff's ids from 0 to 181
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)


class Masks(NamedTuple):
    """A row's target: the mask of its image, or a folder with one for each frame of its video.

    values: what the files hold, a name in `RULES`.
    """

    path: str
    values: str = "ids"
    classes = ()  # not known until the files are read

    def __str__(self) -> str:
        """Without the folders above, by which a list is the same wherever it lies."""
        return f"{'/'.join(Path(self.path).parts[-2:])} ({self.values})"

    def read(
        self, frames: Sequence[int], num_frames: int, size: Sequence[int], *, classes: int, ignore: int
    ) -> np.ndarray:
        """Masks of these frames of a video: uint8 (T, height, width), ids below `classes` or `IGNORED`.

        size: (height, width) of the frames. ignore: what the files call a pixel that is not counted.
        Raises DecodeError, naming file, value and rule.
        """
        path = Path(self.path)
        files = [path]
        if path.is_dir():
            files = sorted((p for p in path.iterdir() if p.suffix.lower() in LOSSLESS), key=natural)
            if len(files) != num_frames:
                raise DecodeError(f"{path}: {len(files)} masks for a video of {num_frames} frames")
        table = _table(self.values, classes, ignore)
        return np.stack([_read_mask(files[i], size, table, self.values, classes) for i in frames])


def _read_mask(file: Path, size: Sequence[int], table: np.ndarray, rule: str, classes: int) -> np.ndarray:
    values = _read_values(file)
    if values.shape != tuple(size):
        (h, w), (height, width) = values.shape, size
        raise DecodeError(f"{file}: a mask of {w}x{h} pixels for an image of {width}x{height}")
    ids = table[np.minimum(values, len(table) - 1)]
    if (ids == BROKEN).any():
        value = values[ids == BROKEN].flat[0]
        raise DecodeError(f"{file}: value {value} is none of {classes} classes ({RULES[rule].__doc__})")
    return ids.astype(np.uint8)


def _read_values(file: Path) -> np.ndarray:
    """What a mask's pixels hold (H, W): palette indices and 16-bit numbers as they are."""
    if file.suffix.lower() not in LOSSLESS:
        raise DecodeError(f"{file}: a mask in a format that may change values: must be one of {LOSSLESS}")
    try:
        with Image.open(file) as image:
            values = np.asarray(image)
    except FileNotFoundError:
        raise DecodeError(f"{file}: no such mask") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{file}: damaged, or no mask ({error})") from None
    if values.ndim == 3:
        colours = values[..., : 3 if values.shape[2] > 2 else 1]  # without what says how opaque it is
        coloured = (colours != colours[..., :1]).any(-1)
        if coloured.any():
            raise DecodeError(
                f"{file}: colour {tuple(colours[coloured][0].tolist())} in a mask: must hold a number a "
                "pixel (a palette or grey levels)"
            )
        values = colours[..., 0]
    if values.dtype.kind not in "bui" or values.min(initial=0) < 0:
        raise DecodeError(
            f"{file}: values of {values.dtype} from {values.min()}: must be numbers from 0 on"
        )
    return values.astype(np.int64)


# ---- what values mean


def _ids(table: np.ndarray, classes: int) -> None:
    """a value is a class id"""
    table[:classes] = np.arange(classes)


def _from_one(table: np.ndarray, classes: int) -> None:
    """a value is a class id + 1, 0 is not counted"""
    table[0] = IGNORED
    table[1 : classes + 1] = np.arange(classes)


def _cityscapes(table: np.ndarray, classes: int) -> None:
    """a value is one of Cityscapes' 34 label ids, of which 19 count"""
    table[:34] = IGNORED
    table[list(CITYSCAPES)] = np.arange(len(CITYSCAPES))


def _coco(table: np.ndarray, classes: int) -> None:
    """a value is one of COCO-Stuff's 182 ids, of which 171 are used"""
    table[:182] = IGNORED
    used = [i for i in range(182) if i not in COCO_UNUSED]
    table[used] = np.arange(len(used))


def _context(table: np.ndarray, classes: int) -> None:
    """60 classes: a value is a class id; 59: the same + 1, and 0, the background, is not counted"""
    (_from_one if classes == 59 else _ids)(table, classes)


def _object(table: np.ndarray, classes: int) -> None:
    """0 is background, anything else an object"""
    table[:-1], table[0] = 1, 0


RULES: dict[str, Callable[[np.ndarray, int], None]] = {
    "ids": _ids,
    "from_one": _from_one,
    "cityscapes": _cityscapes,
    "coco": _coco,
    "context": _context,
    "object": _object,
}


@functools.cache
def _table(values: str, classes: int, ignore: int) -> np.ndarray:
    """Class ids by value; the last stands for all that are higher."""
    table = np.full(2**16 + 1, BROKEN, np.int16)
    RULES[values](table, classes)
    table[(table >= classes) & (table < IGNORED)] = BROKEN
    if values != "object":
        table[ignore] = IGNORED
    return table


# ---- lists


class Layout(NamedTuple):
    """Folders of images and of their masks, side by side, of one structure.

    folders: the part of the path that is an image's, and what a mask's has for it; endings: what the names
    end in before the suffix. splits: names that the list's folder has; "": any.
    """

    name: str
    folders: tuple[str, str]
    endings: tuple[str, str] = ("", "")
    values: str = "ids"
    splits: str = ""
    class_names: Sequence[str] | None = None

    def mask(self, image: Path, folder: Path) -> Path:
        """The mask of an image below `folder`."""
        parts, (images, masks) = list(folder.parts), self.folders
        parts[len(parts) - 1 - parts[::-1].index(images)] = masks
        stem = image.stem.removesuffix(self.endings[0]) + self.endings[1]
        return Path(*parts, image.relative_to(folder)).with_name(f"{stem}.png")

    def recognises(self, source) -> bool:
        folder = source.path
        if self.folders[0] not in folder.parts or not re.fullmatch(self.splits or ".*", folder.name):
            return False
        image = next(_images(folder), None)
        return image is not None and self.mask(image, folder).is_file()

    def read(self, source) -> Rows:
        folder = source.path
        if self.folders[0] not in folder.parts:
            raise ListError(f"{folder}: found no folder {self.folders[0]!r} in this path, expected one")
        rows = [Row(str(p), Masks(str(self.mask(p, folder)), self.values)) for p in _images(folder)]
        return Rows(rows, source.names or self.class_names or _names_near(folder))


def _images(folder: Path) -> Iterator[Path]:
    """Those below a folder, in natural order, one by one."""
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(map(Path(where).joinpath, files), key=natural):
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                yield file


def _names_near(folder: Path) -> list[str] | None:
    """The class names of a file classes.txt, one a line, in the folder or up to two above it."""
    files = (above / "classes.txt" for above in (folder, *folder.parents[:2]))
    file = next(filter(Path.is_file, files), None)
    return file and [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


NAME = re.compile(r"[^\s,/]+")  # of an image or a video


class Split(NamedTuple):
    """A file with a name a line, of an image or a video, beside folders that hold them and their masks.

    folders: of the list, as a pattern of its last ones; images, masks: where they lie for a name, from
    `above` folders above the list's own.
    """

    name: str
    folders: str
    above: int
    images: str
    masks: str
    values: str = "ids"
    class_names: Sequence[str] | None = None

    def places(self, source, name: str) -> tuple[Path, Path]:
        base = source.path.absolute().parents[self.above]
        return base / self.images.format(name), base / self.masks.format(name)

    def recognises(self, source) -> bool:
        if not source.path.is_file() or not re.search(
            self.folders, source.path.absolute().parent.as_posix()
        ):
            return False
        name = next(source.lines())[1].strip()
        if not NAME.fullmatch(name):
            return False
        image, mask = self.places(source, name)
        return os.path.exists(image) and os.path.exists(mask)  # False, too, of what can be no name

    def read(self, source) -> Rows:
        rows = []
        for where, line in source.lines():
            if not NAME.fullmatch(line.strip()):
                raise ListError(f"{where}: found {line.strip()[:200]!r}, expected a name alone")
            image, mask = self.places(source, line.strip())
            rows.append(Row(str(image), Masks(str(mask), self.values)))
        return Rows(rows, source.names or self.class_names or _names_near(source.path.absolute().parent))


PAIR = re.compile(
    r"\s*\"?(.+?\.(?:{}))\"?\s*[ \t,]\s*\"?(.+?\.(?:{}))\"?\s*".format(
        *("|".join(suffix[1:] for suffix in sorted(some)) for some in (IMAGE_SUFFIXES, LOSSLESS))
    ),
    re.IGNORECASE,
)


class Pairs:
    """Lines `image mask`, at spaces, tabs or commas; the first may be a header `image,mask`."""

    name = "pairs"

    def recognises(self, source) -> bool:
        if not source.path.is_file() or not all(PAIR.fullmatch(line) for _, line in self._lines(source)):
            return False
        return not source.on_disk(next(self._lines(source))[1].strip())  # one file with such a name

    def read(self, source) -> Rows:
        places, images, masks = [], [], []
        for where, line in self._lines(source):
            pair = PAIR.fullmatch(line)
            if pair is None:
                raise ListError(f"{where}: found {line.strip()[:200]!r}, expected `image mask`")
            places.append(where)
            images.append(pair[1])
            masks.append(pair[2])
        located = zip(source.located(places, images), source.located(places, masks), strict=True)
        rows = [Row(image, Masks(mask)) for image, mask in located]
        return Rows(rows, source.names or _names_near(source.path.absolute().parent))

    def _lines(self, source) -> Iterator[tuple[str, str]]:
        lines = source.lines()
        first = next(lines)
        if re.split(r"[ \t,]+", first[1].strip().lower()) != ["image", "mask"]:
            yield first
        yield from lines


MASK_FORMATS = (
    Layout(
        *("cityscapes", ("leftImg8bit", "gtFine"), ("_leftImg8bit", "_gtFine_labelIds"), "cityscapes"),
        class_names=tuple(CITYSCAPES.values()),
    ),
    Layout("ade20k", ("images", "annotations"), values="from_one", splits="training|validation"),
    Layout("coco_stuff", ("images", "annotations"), ("", "_labelTrainIds")),
    Layout("coco_stuff_ids", ("images", "annotations"), values="coco", splits=r"(train|val)20\d\d"),
    Layout("masks", ("images", "masks")),
    Layout("annotations", ("images", "annotations")),
    Split(
        *("voc_masks", r"/ImageSets/Segmentation$", 2, "JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
        class_names=VOC,
    ),
    Split(
        *("pascal_context", r"/ImageSets/SegmentationContext$", 2),
        *("JPEGImages/{}.jpg", "SegmentationClassContext/{}.png", "context"),
    ),
    Split(
        *("davis", r"/ImageSets/\w+$", 2, "JPEGImages/480p/{}", "Annotations/480p/{}", "object"),
        class_names=("background", "object"),
    ),
    Split("vspw", "", 0, "data/{}/origin", "data/{}/mask", "from_one"),
    Pairs(),
)
