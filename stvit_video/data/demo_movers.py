"""The embedded set for action detection: shapes that act side by side, as mp4 files and AVA's csv.

Each of two to four shapes has a quarter of the frame for itself. It moves left, right, up or down, grows,
shrinks, turns left or right, or does two of these at once; around every key frame it does something else.
As in the demo set, position, size and angle are spread alike whatever it does: no frame says what it is.
"""

import csv
from pathlib import Path

import numpy as np

from .demo import CLASSES, SHAPES, contrasting, made_once, noise, outline, render_all, write_mp4

SIDE, FPS, SECONDS = 64, 8, 6  # pixels, frames a second, length: key frames are at seconds 1 to 5
ROOM = 10  # pixels: the middle of a shape stays within this square of its quarter
RADII = (7.0, 13.0)  # the smallest and the largest in pixels: where growing starts anew
MOTION_KINDS = (
    ("move_down", "move_left", "move_right", "move_up"),
    ("grow", "shrink"),
    ("turn_left", "turn_right"),
)
SPEEDS = {  # a frame: what changes, and by how much
    "move_left": ("x", -1.5), "move_right": ("x", 1.5), "move_up": ("y", -1.5), "move_down": ("y", 1.5),
    "shrink": ("size", -0.08), "grow": ("size", 0.08),
    "turn_left": ("angle", -0.22), "turn_right": ("angle", 0.22),
}  # fmt: skip
SETTINGS = {"movers": 1, "train": 600, "test": 80, "seed": 0}


def prepare_movers(root: str | Path, *, workers: int = 2) -> Path:
    """Render the set to `root`: videos/*.mp4, train.csv, test.csv and labels.pbtxt, once; returns `root`.

    Raises InputError where another folder is.
    """

    def fill(part: Path) -> None:
        (part / "videos").mkdir()
        for split in ("train", "test"):
            jobs = [(part, split, i) for i in range(SETTINGS[split])]
            lines = render_all(_render_job, jobs, workers)
            with open(part / f"{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows(line for of_video in lines for line in of_video)
        labels = [f'item {{\n  name: "{name}"\n  id: {i}\n}}\n' for i, name in enumerate(CLASSES, 1)]
        (part / "labels.pbtxt").write_text("".join(labels))

    return made_once(Path(root), SETTINGS, fill)


def _render_job(job: tuple[Path, str, int]) -> list[list]:
    """-> the video's lines of AVA's csv."""
    folder, split, index = job
    rng = np.random.default_rng((SETTINGS["seed"], ("train", "test").index(split), index, 1))
    name = f"{split}_{index:04d}"
    frames, boxes, actions = render(rng)
    write_mp4(folder / "videos" / f"{name}.mp4", frames, FPS)
    lines = []
    for second in range(1, SECONDS):
        for person, doing in enumerate(actions):
            box = [f"{value:.4f}" for value in boxes[person, second * FPS]]
            lines += [[name, f"{second:04d}", *box, CLASSES.index(a) + 1, person] for a in doing[second]]
    return lines


def render(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[list[tuple[str, ...]]]]:
    """-> frames uint8 (T, SIDE, SIDE, 3); boxes (n, T, 4) of n shapes, as shares of the frame; what each
    does around each second: from half a second before it to half a second after."""
    back = rng.uniform(0, 255, 3)
    frames = back + rng.uniform(10, 40) * noise(rng, SIDE, SIDE)[..., None] * rng.uniform(0.3, 1, 3)
    frames = np.repeat(frames[None].astype(np.float32), SECONDS * FPS, 0)
    boxes, actions = [], []
    for quarter in rng.permutation(4)[: rng.integers(2, 5)]:
        doing = [_draw_actions(rng) for _ in range(SECONDS + 1)]
        cover, head = _shape(rng, quarter, doing)
        ink, second = (np.float32(contrasting(back, rng)) for _ in range(2))
        frames += cover[..., None] * (second + head[..., None] * (ink - second) - frames)
        boxes.append([_box(mask) for mask in cover > 0.5])
        actions.append(doing)
    return np.clip(frames, 0, 255).astype(np.uint8), np.array(boxes) / SIDE, actions


def _draw_actions(rng: np.random.Generator) -> tuple[str, ...]:
    """One, or in a quarter of the cases two of different kinds."""
    first = CLASSES[rng.integers(len(CLASSES))]
    others = [name for kind in MOTION_KINDS if first not in kind for name in kind]
    return tuple(sorted({first, *([others[rng.integers(len(others))]] if rng.random() < 0.25 else [])}))


def _shape(rng: np.random.Generator, quarter: int, doing: list) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel a shape covers, and where its head is: (T, SIDE, SIDE) both, from 0 to 1."""
    name, pace = SHAPES[rng.integers(len(SHAPES))], rng.uniform(0.8, 1.25)
    of_frame = [doing[(t + FPS // 2) // FPS] for t in range(SECONDS * FPS)]
    state = {}
    for key, end in (("x", ROOM), ("y", ROOM), ("angle", 2 * np.pi), ("size", 1)):
        steps = [sum(by for what, by in map(SPEEDS.get, names) if what == key) for names in of_frame]
        state[key] = (rng.uniform(0, end) + pace * np.cumsum(steps)).astype(np.float32)[:, None, None]
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    half = SIDE / 2
    dx = columns - half * (quarter % 2) - (half - ROOM) / 2 - state["x"] % ROOM  # (T, H, W)
    dy = rows - half * (quarter // 2) - (half - ROOM) / 2 - state["y"] % ROOM
    cos, sin = np.cos(state["angle"]), np.sin(state["angle"])
    along, across = (cos * dx + sin * dy) / 1.2, (cos * dy - sin * dx) / 0.8
    radius = RADII[0] * (RADII[1] / RADII[0]) ** (state["size"] % 1)
    cover = np.clip(radius * outline(name, np.arctan2(across, along)) - np.hypot(along, across) + 0.5, 0, 1)
    return cover, np.clip(along - 0.1 * radius + 0.5, 0, 1)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 in pixels around what is True."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
