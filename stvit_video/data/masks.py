"""Masks: a class id for every pixel of an image or of a video's frames, and what files hold of them."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import DecodeError

IGNORED = 255  # of a pixel that counts nowhere; so there are 255 classes at most
LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".gif")
GREYS = {"L;2": 85, "L;4": 17}  # grey levels of 2 and 4 bits, and by what PIL multiplies them
BROKEN = 256  # in a table: a value that no class has
CITYSCAPES = {
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider"},
    **{26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # of COCO-Stuff's ids from 0 to 181


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
            from .decode import natural

            every = (p for p in path.iterdir() if not p.name.startswith("."))  # macOS's ._0.png
            files = sorted((p for p in every if p.suffix.lower() in LOSSLESS), key=natural)
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
            image.verify()  # else a PNG's checksum of the last pixels is not looked at
        with Image.open(file) as image:
            step = next((n for grey, n in GREYS.items() if f"'{grey}'" in str(image.tile)), 1)
            values = np.asarray(image) // step if step > 1 else np.asarray(image)
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
