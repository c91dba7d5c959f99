"""Lists of images with the objects in them: COCO's json, and Pascal VOC's xml files."""

import itertools
import math
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from ..errors import ListError, nearest
from .media import IMAGE_SUFFIXES
from .rows import Row, Rows, parse_json

SLACK = 1.0  # pixels that a box may reach beyond its image: rounding, and VOC's counting from 1
Box = tuple[float, float, float, float]


class Objects(NamedTuple):
    """What a list says of an image: its objects, in plain values.

    image: the list's id of the image. size: (height, width) in pixels.
    classes: class ids. boxes: (x, y, width, height) in pixels, as the list has them.
    masks: COCO's compressed run lengths; None: the list has boxes only.
    crowds: whether each is a crowd (VOC: difficult): neither learnt nor missed. areas: in pixels.
    """

    image: int
    size: tuple[int, int]
    classes: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    masks: tuple[str, ...] | None = None
    crowds: tuple[bool, ...] = ()
    areas: tuple[float, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """What is to be learnt, crowds left out: boxes (n, 4) as x1, y1, x2, y2, labels (n,) and, if the
        list has some, masks (n, H, W); torchvision's tv_tensors, which move with the pixels."""
        kept = [i for i, crowd in enumerate(self.crowds) if not crowd]
        boxes = torch.tensor([self.boxes[i] for i in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        values = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=self.size),
            "labels": torch.tensor([self.classes[i] for i in kept], dtype=torch.long),
        }
        if self.masks is not None:
            masks = [decode_mask(self.masks[i], self.size) for i in kept]
            masks = np.stack(masks) if masks else np.zeros((0, *self.size), np.uint8)
            values["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return values


def decode_mask(counts: str, size: tuple[int, int]) -> np.ndarray:
    """COCO's compressed run lengths -> uint8 (height, width) of zeros and ones."""
    return _rle().decode({"size": list(size), "counts": counts.encode()})


def encode_masks(masks: np.ndarray) -> list[str]:
    """bool (n, H, W) -> COCO's compressed run lengths of each."""
    columns = np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)
    return [code["counts"].decode() for code in _rle().encode(columns)]


def _rle():
    from pycocotools import mask  # a machine that only computes may not have it

    return mask


# ---- COCO


def is_coco(source) -> bool:
    """Whether a list is a json object with images in it."""
    return source.text.lstrip().startswith("{") and '"images"' in source.text


def read_coco(source) -> Rows:
    """COCO's json as it is; without annotations (a test set) its images are all empty.

    Images lie in `root`, or beside the json or its folder; there, in `images`, or in a folder named as the
    json's name ends (instances_train2017.json: train2017), whichever has the first of them.
    Class ids are those of the categories by rising category id, which the rows keep as `category_ids`.
    """
    path, values = source.path, parse_json(source.path, source.text)
    if not isinstance(values, dict) or not {"images", "categories"} <= values.keys():
        has = ", ".join(list(values)[:5]) if isinstance(values, dict) else f"a json {type(values).__name__}"
        raise ListError(f"{path}: found {has}, expected COCO's json: images, annotations, categories")
    images = _by_id(values["images"], f"{path}: image", file_name=str, height=int, width=int)
    categories = dict(sorted(_by_id(values["categories"], f"{path}: category", name=str).items()))
    ids = {category["name"]: number for number, category in categories.items()}
    if len(ids) < len(categories):
        raise ListError(f"{path}: found two categories of one name, expected each once: {list(ids)}"[:300])
    names = list(ids) if source.names is None else list(source.names)
    annotations = _by_id(
        values.get("annotations", []), f"{path}: annotation", image_id=int, category_id=int
    )
    masked = any(annotation.get("segmentation") for annotation in annotations.values())
    objects: dict[int, list[tuple]] = {number: [] for number in images}
    for number, annotation in annotations.items():
        one = _object(f"{path}: annotation {number}", annotation, images, categories, names, masked)
        objects[annotation["image_id"]].append(one)
    folder, rows = _folder_of_images(source, [image["file_name"] for image in images.values()][:1]), []
    for number, image in images.items():
        file = source.inside(f"{path}: image {number}", os.path.join(folder, image["file_name"]))
        rows.append(Row(file, _objects(number, (image["height"], image["width"]), objects[number], masked)))
    unused = itertools.count(max(categories, default=0) + 1)  # for classes that this list has not
    return Rows(rows, names, [ids[name] if name in ids else next(unused) for name in names])


def _object(
    where: str, annotation: dict, images: dict, categories: dict, names: Sequence[str], masked: bool
) -> tuple[int, Box, str | None, bool, float]:
    """Class, box, mask, crowd and area of a COCO annotation. Raises ListError."""
    image, category = annotation["image_id"], annotation["category_id"]
    if image not in images:
        raise ListError(f"{where}: found image_id {image}, expected one of the images")
    if category not in categories:
        raise ListError(f"{where}: found category_id {category}, expected one of {list(categories)}"[:300])
    name = categories[category]["name"]
    if name not in names:
        raise ListError(f"{where}: found class {name!r}, expected a known one{nearest(name, names)}")
    size = (images[image]["height"], images[image]["width"])
    box = _checked_box(where, annotation.get("bbox"), size)
    mask = _checked_mask(where, annotation.get("segmentation"), size) if masked else None
    area = annotation.get("area")
    if not (area is None or _is_number(area)):
        raise ListError(f"{where}: found area {str(area)[:60]!r}, expected a number of pixels")
    area = box[2] * box[3] if area is None else float(area)
    return names.index(name), box, mask, bool(annotation.get("iscrowd", 0)), area


def _objects(image: int, size: tuple[int, int], objects: Sequence[tuple], masked: bool) -> Objects:
    columns = tuple(zip(*objects, strict=True)) or ((),) * 5
    classes, boxes, masks, crowds, areas = columns
    return Objects(image, size, classes, boxes, masks if masked else None, crowds, areas)


def _by_id(items: Any, what: str, **fields: type) -> dict[int, dict]:
    """Objects of a json by their `id`, each with these fields. Raises ListError."""
    by_id: dict[int, dict] = {}
    for place, item in enumerate(items if isinstance(items, list) else [None]):
        number = item.get("id") if isinstance(item, dict) else None
        missing = [k for k, kind in fields.items() if number is None or not isinstance(item.get(k), kind)]
        if not isinstance(number, int) or missing:
            raise ListError(
                f"{what} at place {place}: found {str(item)[:120]}, expected id, {', '.join(fields)}"
            )
        if number in by_id:
            raise ListError(f"{what} {number}: found this id twice, expected once")
        by_id[number] = item
    return by_id


def _folder_of_images(source, first: Iterable[str]) -> str:
    """The folder that has the first image, of those where images lie by custom; else the first of them."""
    name = source.path.stem.rpartition("_")[2]
    bases = [source.path.parent, source.path.parent.parent] if source.root is None else [Path(source.root)]
    folders = [str(base / sub) for base in bases for sub in ("", name, "images", f"images/{name}")]
    return next((f for f in folders for file in first if os.path.exists(os.path.join(f, file))), folders[0])


def _checked_box(where: str, box: Any, size: tuple[int, int]) -> Box:
    """(x, y, width, height) within the image, but for rounding. Raises ListError."""
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
        raise ListError(f"{where}: found box {str(box)[:80]}, expected x, y, width, height")
    x, y, width, height = map(float, box)
    inside = min(x, y) >= -SLACK and x + width <= size[1] + SLACK and y + height <= size[0] + SLACK
    if min(width, height) < 0 or not inside:
        raise ListError(
            f"{where}: found box {list(box)}, expected it inside an image of {size[1]}x{size[0]}"
        )
    return (x, y, width, height)


def _checked_mask(where: str, shape: Any, size: tuple[int, int]) -> str:
    """Polygons, or run lengths, compressed or not -> compressed run lengths. Raises ListError."""
    if isinstance(shape, dict):
        counts, of = shape.get("counts"), shape.get("size")
        if of != list(size):
            raise ListError(f"{where}: found a mask of {of}, expected its image's height and width {size}")
        runs = _runs(counts) if isinstance(counts, str) else counts
        # of others pycocotools makes pixels from whatever lies in memory, and counts overlaps for ever
        if (
            not isinstance(runs, list)
            or not all(isinstance(run, int) and run >= 0 for run in runs)
            or sum(runs) != math.prod(size)
        ):
            raise ListError(
                f"{where}: found run lengths {str(counts)[:60]!r}, expected {math.prod(size)} pixels"
            )
        return counts if isinstance(counts, str) else _rle().frPyObjects(shape, *size)["counts"].decode()
    for polygon in shape or [[]] if isinstance(shape, list) else [None]:
        numbers = isinstance(polygon, list) and all(map(_is_number, polygon))
        # of a corner far away pycocotools walks all the way there
        far = numbers and max(map(abs, polygon), default=0) > 10 * max(size)
        if not numbers or far or len(polygon) < 6 or len(polygon) % 2:
            what = "an empty polygon" if polygon == [] else f"segmentation {str(polygon)[:60]}"
            raise ListError(f"{where}: found {what}, expected x, y of 3 points or more, or run lengths")
    return _rle().merge(_rle().frPyObjects(shape, *size))["counts"].decode()


def _runs(counts: str) -> list[int] | None:
    """COCO's compressed run lengths as numbers; None: they are none.

    Five bits a character, the lowest first; from the fourth run on, the difference to the one before the
    last (pycocotools' rleFrString)."""
    runs, run, bits = [], 0, 0
    for character in counts:
        part = ord(character) - ord("0")
        if not 0 <= part < 64:
            return None
        run |= (part & 31) << bits
        bits += 5
        if not part & 32:
            run -= (part & 16) << bits - 4
            runs.append(run + (runs[-2] if len(runs) > 2 else 0))
            run = bits = 0
    return None if bits else runs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- Pascal VOC


def is_voc(source) -> bool:
    """Whether a list is a folder of xml files, or a file of `ImageSets`, which names some of them."""
    if source.path.is_dir():
        return next(_xml_folder(source.path).glob("*.xml"), None) is not None
    return source.path.parent.parent.name == "ImageSets"


def read_voc(source) -> Rows:
    """VOC's layout (Annotations beside JPEGImages; all, or those that a file of ImageSets names), or xml
    files beside their images. Difficult objects count as crowds. There are boxes and no masks.

    Class ids are by name. Raises ListError.
    """
    if not is_voc(source):
        raise ListError(f"{source.path}: found no xml files, expected VOC's: Annotations/*.xml")
    if source.path.is_dir():
        files = sorted(_xml_folder(source.path).glob("*.xml"))
    else:
        folder = source.path.parents[2] / "Annotations"
        files = [folder / f"{line.split()[0]}.xml" for _, line in source.lines()]
    parsed = [(file, *_read_xml(file)) for file in files]
    known = sorted({name for *_, objects in parsed for name, *_ in objects})
    names = known if source.names is None else list(source.names)
    rows = []
    for number, (file, image, size, objects) in enumerate(parsed, 1):
        for name, *_ in objects:
            if name not in names:
                raise ListError(f"{file}: found class {name!r}, expected a known one{nearest(name, names)}")
        entries = [(names.index(n), box, None, hard, box[2] * box[3]) for n, box, hard in objects]
        rows.append(Row(str(image), _objects(number, size, entries, masked=False)))
    return Rows(rows, names, list(range(1, len(names) + 1)))


def _xml_folder(path: Path) -> Path:
    return path / "Annotations" if (path / "Annotations").is_dir() else path


def _read_xml(file: Path) -> tuple[Path, tuple[int, int], list[tuple[str, Box, bool]]]:
    """-> the image, its (height, width), and name, box and difficulty of its objects. Raises ListError."""
    try:
        root = ElementTree.parse(file).getroot()
        size = int(root.findtext("size/height")), int(root.findtext("size/width"))
        objects = []
        for item in root.iter("object"):
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            box = _checked_box(str(file), (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), size)  # pixels from 1
            objects.append((item.findtext("name").strip(), box, item.findtext("difficult") == "1"))
    except OSError as error:
        raise ListError(f"{file}: found {error.strerror}, expected VOC's xml") from None
    except (ElementTree.ParseError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ListError):
            raise
        raise ListError(
            f"{file}: found {error}, expected VOC's xml: size, and name and bndbox of each object"
        ) from None
    folder = file.parent.parent / "JPEGImages" if file.parent.name == "Annotations" else file.parent
    image = folder / (root.findtext("filename") or f"{file.stem}.jpg")
    return (
        image if image.exists() else _same_stem(folder / file.stem, IMAGE_SUFFIXES) or image,
        size,
        objects,
    )


def _same_stem(path: Path, suffixes: Collection[str]) -> Path | None:
    return next((p for s in sorted(suffixes) if (p := path.with_name(path.name + s)).exists()), None)
