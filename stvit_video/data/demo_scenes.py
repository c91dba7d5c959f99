"""The embedded set for segmentation: streets under a sky, as images and short clips with exact masks.

Sky, grass and road are large and even, leaves and windows are textures, cars and people small. Colours
overlap: water may be as blue as the sky, trees as green as the grass, so that place and texture tell.
In clips the camera pans, and cars and people go their own ways.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .demo import made_once, render_all

CLASSES = ("sky", "grass", "road", "water", "building", "tree", "car", "person")
SKY, GRASS, ROAD, WATER, BUILDING, TREE, CAR, PERSON = range(8)
SKIES = (100, 150, 215), (165, 185, 205), (225, 185, 150), (85, 105, 140)
SIZES, CLIP_FRAMES = (192, 256, 320), 12  # pixels; `render` makes them up to 512
SETTINGS = {"scenes": 1, "train": 480, "test": 120, "clips_train": 24, "clips_test": 8, "seed": 0}


def prepare_scenes(root: str | Path, *, workers: int = 2) -> Path:
    """Render the set to `root`, once; returns `root`.

    images/, masks/ with train.txt, test.txt: lines `image mask`. data/NAME/{origin,mask}/ with
    clips_train.txt, clips_test.txt: clips as in VSPW, whose masks hold id + 1. classes.txt: names.
    Raises InputError where another folder is.
    """

    def fill(part: Path) -> None:
        for folder in ("images", "masks", "data"):
            (part / folder).mkdir()
        for split in ("train", "test", "clips_train", "clips_test"):
            jobs = [(part, split, i) for i in range(SETTINGS[split])]
            lines = render_all(_render_job, jobs, workers)
            (part / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        (part / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))

    return made_once(Path(root), SETTINGS, fill)


def _render_job(job: tuple[Path, str, int]) -> str:
    """-> the line of its list."""
    folder, split, index = job
    splits = ("train", "test", "clips_train", "clips_test")
    rng = np.random.default_rng((SETTINGS["seed"], splits.index(split), index, 2))
    name, size = f"{split}_{index:04d}", int(rng.choice(SIZES))
    frames, masks = render(rng, size, CLIP_FRAMES if split.startswith("clips") else 1)
    if len(frames) == 1:
        _save(frames[0], folder / "images" / f"{name}.jpg")
        _save(masks[0], folder / "masks" / f"{name}.png")
        return f"images/{name}.jpg masks/{name}.png"
    for kind in ("origin", "mask"):
        (folder / "data" / name / kind).mkdir(parents=True)
    for i, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        _save(frame, folder / "data" / name / "origin" / f"{i:04d}.jpg")
        _save(mask + 1, folder / "data" / name / "mask" / f"{i:04d}.png")
    return name


def _save(pixels: np.ndarray, path: Path) -> None:
    Image.fromarray(pixels).save(path, quality=90)


def render(rng: np.random.Generator, size: int, frames: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A scene of size x size pixels -> uint8 (T, size, size, 3), its masks uint8 (T, size, size)."""
    scene = Scene(rng, size)
    pictures = [scene.frame(t) for t in range(frames)]
    return np.stack([p for p, _ in pictures]), np.stack([m for _, m in pictures])


class Scene:
    """What stands where, drawn once at random; `frame` paints it as it is at a time, from far to near."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.size, unit = size, size / 256
        self.rows, self.columns = np.mgrid[:size, :size].astype(np.float32)
        self.grain = rng.normal(0, 1, (size, 2 * size)).astype(np.float32)
        self.horizon = size * rng.uniform(0.35, 0.55)
        self.sky = np.array(SKIES[rng.integers(4)]) + rng.uniform(-15, 15, 3)
        self.grass = np.array((90, 140, 60)) + rng.uniform(-30, 30, 3)
        self.water = (np.array((70, 120, 180)) + rng.uniform(-25, 25, 3)) if rng.random() < 0.6 else None
        self.shore = self.horizon + size * rng.uniform(0.05, 0.2), rng.uniform(0, 6)
        self.road = rng.uniform(0.2, 0.8) * size if rng.random() < 0.75 else None
        self.pan = float(rng.uniform(-3, 3)) * unit
        self.buildings = [
            (rng.uniform(-0.2, 1.1) * size, rng.uniform(25, 60) * unit, rng.uniform(25, 90) * unit,
             rng.uniform(60, 220, 3), rng.integers(5, 9) * unit)
            for _ in range(rng.integers(1, 5))
        ]  # fmt: skip
        self.trees = [
            (rng.uniform(0, 1) * size, rng.uniform(0, 0.25) * size, rng.uniform(10, 24) * unit,
             np.array((50, 110, 45)) + rng.uniform(-25, 25, 3), rng.uniform(0, 6))
            for _ in range(rng.integers(1, 6))
        ]  # fmt: skip
        lanes = rng.uniform(0.15, 0.9, rng.integers(1, 4)) if self.road is not None else ()
        self.cars = [
            (lane, rng.uniform(-6, 6) * unit, rng.uniform(30, 240, 3), rng.choice((-1, 1)))
            for lane in lanes
        ]
        self.people = [
            (
                rng.uniform(0, 1) * size,
                rng.uniform(0.1, 0.4) * size,
                rng.uniform(-2, 2) * unit,
                rng.uniform(40, 250, 3),
            )
            for _ in range(rng.integers(1, 7))
        ]

    def frame(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (size, size, 3) at time t, and its mask (size, size)."""
        self.shift = round(self.pan * t)
        self.x = self.columns + self.shift  # of the world, under every pixel
        self.noise = np.roll(self.grain, -self.shift, 1)[:, : self.size]
        size, horizon = self.size, self.horizon
        self.image = np.empty((size, size, 3), np.float32)
        self.mask = np.full((size, size), SKY, np.uint8)
        self.image[:] = self.sky + (50 * self.rows / size)[..., None]
        below = self.rows >= horizon
        self._paint(below, GRASS, self.grass, 6)
        if self.water is not None:
            shore, phase = self.shore
            wet = below & (self.rows < shore + 4 * np.sin(self.x / size * 20 + phase))
            self._paint(wet, WATER, self.water + (12 * np.sin(self.rows * 1.1))[..., None], 3)
        if self.road is not None:
            depth = (self.rows - horizon) / (size - horizon)
            off = self.x - self.road
            self._paint(below & (np.abs(off) < size * (0.02 + 0.3 * depth)), ROAD, (105, 105, 110), 4)
            dashes = (
                below & (np.abs(off) < size * 0.012 * depth) & (np.sin(18 * np.sqrt(np.abs(depth))) > 0)
            )
            self.image[dashes] = 230
        for left, width, height, colour, pane in self.buildings:
            inside = (self.x >= left) & (self.x < left + width)
            inside &= (self.rows < horizon + 2) & (self.rows >= horizon - height)
            glass = ((self.x - left) % pane < pane / 2) & ((horizon - self.rows) % pane < pane / 2)
            self._paint(inside, BUILDING, np.where(glass[..., None], 0.45 * colour, colour), 4)
        for middle, near, radius, colour, phase in sorted(self.trees, key=lambda tree: tree[1]):
            self._tree(middle, horizon + near, radius * (1 + near / size), colour, phase)
        for lane, speed, colour, side in sorted(self.cars, key=lambda car: car[0]):
            self._car(lane, speed * t, colour, side)
        for middle, near, speed, colour in sorted(self.people, key=lambda person: person[1]):
            self._person(middle + speed * t, horizon + near, 0.06 * size + 0.15 * near, colour)
        return np.clip(self.image, 0, 255).astype(np.uint8), self.mask

    def _paint(
        self, where: np.ndarray, label: int, colour: Sequence[float] | np.ndarray, grain: float
    ) -> None:
        colour = np.broadcast_to(np.asarray(colour, np.float32), self.image.shape)
        self.image[where] = colour[where] + grain * self.noise[where][:, None]
        self.mask[where] = label

    def _tree(self, middle: float, foot: float, radius: float, colour: np.ndarray, phase: float) -> None:
        dx, dy = self.x - middle, self.rows - (foot - 2 * radius)
        trunk = (np.abs(dx) < 0.16 * radius) & (dy >= 0) & (self.rows < foot)
        self._paint(trunk, TREE, (95, 70, 50), 8)
        crown = np.hypot(dx, dy) < radius * (1 + 0.12 * np.sin(7 * np.arctan2(dy, dx) + phase))
        self._paint(crown, TREE, colour, 26)

    def _car(self, lane: float, moved: float, colour: np.ndarray, side: int) -> None:
        foot = self.horizon + lane * (self.size - self.horizon)
        length = self.size * (0.05 + 0.17 * lane)
        dx, up = (self.x - self.road - side * 1.1 * length - moved) / length, (foot - self.rows) / length
        body = (np.abs(dx) < 0.5) & (up > 0.06) & (up < 0.28)
        cabin = (np.abs(dx) < 0.3 - 0.4 * (up - 0.28)) & (up >= 0.28) & (up < 0.46)
        self._paint(body | cabin, CAR, colour, 3)
        self._paint(cabin & (np.abs(dx) < 0.22) & (up < 0.42), CAR, (45, 55, 65), 2)
        self._paint(np.hypot(np.abs(dx) - 0.3, up - 0.08) < 0.09, CAR, (25, 25, 25), 2)

    def _person(self, middle: float, foot: float, height: float, colour: np.ndarray) -> None:
        dx, up = (self.x - middle) / height, (foot - self.rows) / height
        self._paint((np.abs(dx) < 0.13) & (up >= 0) & (up < 0.4), PERSON, (40, 45, 70), 3)
        self._paint((np.abs(dx) < 0.17) & (up >= 0.4) & (up < 0.78), PERSON, colour, 3)
        self._paint(np.hypot(dx, up - 0.88) < 0.12, PERSON, (215, 170, 140), 3)
