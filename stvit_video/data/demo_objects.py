"""The embedded data set for detection: images of several shapes, with boxes and masks in COCO's json.

Shapes of all sizes stand over a textured background, turned a little, and cover each other. What is seen of
a shape is its mask; one that is mostly covered is not in the list.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from .demo import SHAPES, RenderJob, contrasting, made_once, noise, outline, render_all
from .objects import encode_masks

WIDTH, HEIGHT = 128, 96
RADII = (10.0, 26.0)  # pixels
TURN = 0.5  # radians, to either side
NUMBER = (2, 6)  # shapes of an image, from and to
VISIBLE = 0.6  # share of a shape that is seen, at least, or it is not listed
SETTINGS = {"version": 2, "train": 2000, "test": 200, "seed": 0}


def prepare_objects(root: str | Path, *, workers: int = 2) -> Path:
    """Render `root`/{train,test}/<number>.png and `root`/{train,test}.json, once; returns `root`.

    Raises InputError where another folder is.
    """

    def fill(part: Path) -> None:
        for split in ("train", "test"):
            (part / split).mkdir()
            jobs = [(part, split, i) for i in range(SETTINGS[split])]
            _write_list(part / f"{split}.json", render_all(_render_job, jobs, workers))

    return made_once(Path(root), SETTINGS, fill)


def _render_job(job: RenderJob) -> tuple[str, list[dict]]:
    """-> the file's name, the annotations without ids."""
    folder, split, index = job
    rng = np.random.default_rng((SETTINGS["seed"], ("train", "test").index(split), index))
    image, classes, masks = render(rng)
    Image.fromarray(image).save(folder / split / f"{index:05d}.png")
    annotations = []
    for shape, mask, counts in zip(classes, masks, encode_masks(masks), strict=True):
        (y1, x1), (y2, x2) = (np.argwhere(mask).min(0).tolist(), (np.argwhere(mask).max(0) + 1).tolist())
        annotations.append(
            {
                "category_id": shape + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
            }
        )
    return f"{index:05d}.png", annotations


def _write_list(path: Path, samples: list[tuple[str, list[dict]]]) -> None:
    size = {"height": HEIGHT, "width": WIDTH}
    images = [{"id": i, "file_name": name} | size for i, (name, _) in enumerate(samples, 1)]
    annotations = [a | {"image_id": i} for i, (_, listed) in enumerate(samples, 1) for a in listed]
    annotations = [{"id": i} | annotation for i, annotation in enumerate(annotations, 1)]
    categories = [{"id": i, "name": shape} for i, shape in enumerate(SHAPES, 1)]
    values = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(values))


def render(rng: np.random.Generator) -> tuple[np.ndarray, list[int], np.ndarray]:
    """An image uint8 (HEIGHT, WIDTH, 3), the shapes in it (places in `SHAPES`), their masks (n, H, W)."""
    back = rng.uniform(0, 255, 3)
    texture = noise(rng, HEIGHT, WIDTH)[..., None]
    image = back + rng.uniform(10, 40) * texture * rng.uniform(0.3, 1, 3)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    classes, masks, full = [], [], []
    for _ in range(rng.integers(NUMBER[0], NUMBER[1] + 1)):
        shape = int(rng.integers(len(SHAPES)))
        radius = RADII[0] * (RADII[1] / RADII[0]) ** rng.uniform()
        x, y = (rng.uniform(0.5 * radius, side - 0.5 * radius) for side in (WIDTH, HEIGHT))
        turn, stretch = rng.uniform(-TURN, TURN), rng.uniform(0.9, 1.1)
        dx, dy = columns - x, rows - y
        along = (np.cos(turn) * dx + np.sin(turn) * dy) * stretch
        across = (np.cos(turn) * dy - np.sin(turn) * dx) / stretch
        edge = radius * outline(SHAPES[shape], np.arctan2(across, along))
        cover = np.clip(edge - np.hypot(along, across) + 0.5, 0, 1)
        ink = contrasting(back, rng)
        image = image + cover[..., None] * (ink + 15 * texture[::-1] - image)
        mask = cover > 0.5
        masks = [other & ~mask for other in masks] + [mask]
        classes.append(shape)
        full.append(max(np.pi * (0.5 * radius) ** 2, mask.sum()))
    seen = [i for i, mask in enumerate(masks) if mask.sum() >= VISIBLE * full[i]]
    image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    return image, [classes[i] for i in seen], np.array([masks[i] for i in seen]).reshape(-1, HEIGHT, WIDTH)
