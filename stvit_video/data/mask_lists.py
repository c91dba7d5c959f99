"""Lists of images and videos with masks: by layout, as the data sets of the field are unpacked.

`MASK_FORMATS` is the table of them. Each is recognised by the mask of its first image, so that nothing else
is taken for one.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import ListError
from .masks import CITYSCAPES, LOSSLESS, Masks
from .media import IMAGE_SUFFIXES, natural
from .rows import Row, Rows

VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)


class MaskFolders(NamedTuple):
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
    try:
        return file and [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ListError(f"{file}: found {error}, expected class names, one a line") from None


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
        if not source.path.is_file():
            return False
        # a json may be one line of many megabytes, where the pattern would take minutes
        if not all(len(line) < LONGEST_LINE and PAIR.fullmatch(line) for _, line in self._lines(source)):
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


LONGEST_LINE = 2 * 4096  # characters of a line: two paths
MASK_FORMATS = (
    MaskFolders(
        *("cityscapes", ("leftImg8bit", "gtFine"), ("_leftImg8bit", "_gtFine_labelIds"), "cityscapes"),
        class_names=tuple(CITYSCAPES.values()),
    ),
    MaskFolders("ade20k", ("images", "annotations"), values="from_one", splits="training|validation"),
    MaskFolders("coco_stuff", ("images", "annotations"), ("", "_labelTrainIds")),
    MaskFolders("coco_stuff_ids", ("images", "annotations"), values="coco", splits=r"(train|val)20\d\d"),
    MaskFolders("masks", ("images", "masks")),
    MaskFolders("annotations", ("images", "annotations")),
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
