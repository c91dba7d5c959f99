"""The embedded data set: short clips in which only motion tells the class, as real mp4 files.

A two-coloured shape over a textured background moves left, right, up or down, grows, shrinks, turns left or
turns right. In every class position, size and angle are spread alike in every single frame: each starts
anew at the other end of its range (a central square, the radii, the circle). So one frame alone says
nothing of the class, and a class played backwards is its opposite.
"""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from ..errors import InputError
from ..files import written_whole

CLASSES = (
    *("grow", "move_down", "move_left", "move_right", "move_up"),
    *("shrink", "turn_left", "turn_right"),
)
SHAPES = ("cross", "disc", "flower", "square", "star", "triangle")
WIDTH, HEIGHT, FPS = 64, 48, 16
ROOM = 16  # pixels: the middle of a shape stays within this central square
RADII = (12.0, 23.0)  # the smallest and the largest in pixels: where growing starts anew
# x264's AVX-512 code reads memory that was never written: B-frames would differ from call to call
ENCODER = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "asm=SSE4.2"}
MARKER = "demo.json"  # in a folder that this made
SETTINGS = {"version": 9, "train": 2400, "test": 320, "seed": 0}


RenderJob = tuple[Path, str, int]  # where to, "train" or "test", the number of the sample


def prepare_demo(root: str | Path, *, workers: int = 2) -> Path:
    """Render the demo set to `root`/{train,test}/<class>/<number>_<shape>.mp4, once; returns `root`.

    `root`/{train,test}_by_shape.txt list the same clips by shape, a label that single frames do tell, and
    shapes.txt names those labels.
    """

    def fill(part: Path) -> None:
        for split in ("train", "test"):
            for name in CLASSES:
                (part / split / name).mkdir(parents=True)
        jobs = [(part, split, i) for split in ("train", "test") for i in range(SETTINGS[split])]
        render_all(_render_job, jobs, workers)
        for split in ("train", "test"):
            files = sorted(part.glob(f"{split}/*/*.mp4"))
            lines = [f"{p.relative_to(part)} {SHAPES.index(p.stem.partition('_')[2])}\n" for p in files]
            (part / f"{split}_by_shape.txt").write_text("".join(lines))
        (part / "shapes.txt").write_text("".join(f"{shape}\n" for shape in SHAPES))

    return made_once(Path(root), SETTINGS, fill)


def made_once(root: Path, settings: dict, fill: Callable[[Path], None]) -> Path:
    """The folder `root` with what `fill` puts into it, unless a rendering with these settings is there.

    Made beside `root` and moved there, so that a broken-off rendering leaves nothing half-done. An older
    rendering is replaced. Raises InputError where another folder is.
    """
    if is_demo(root) and (root / MARKER).read_text() == json.dumps(settings):
        return root
    if root.exists() and not is_demo(root):
        raise InputError(f"{root} exists and was not made by the demo renderer: not replaced")
    with written_whole(root) as part:
        part.mkdir(parents=True)
        fill(part)
        (part / MARKER).write_text(json.dumps(settings))
    return root


def render_all(render_job: Callable[[tuple], Any], jobs: Sequence[tuple], workers: int) -> list:
    """What `render_job` gives of each job, in order."""
    with multiprocessing.Pool(workers) as pool:
        done = pool.imap(render_job, jobs, chunksize=16)
        return list(tqdm(done, total=len(jobs), desc="rendering the demo set", unit="clip"))


def is_demo(root: Path) -> bool:
    """Whether `root` was made by `made_once`."""
    return (root / MARKER).exists()


def _render_job(job: RenderJob) -> None:
    folder, split, index = job
    rng = np.random.default_rng((SETTINGS["seed"], ("train", "test").index(split), index))
    name, shape = CLASSES[index % len(CLASSES)], SHAPES[rng.integers(len(SHAPES))]
    write_mp4(folder / split / name / f"{index:05d}_{shape}.mp4", render(name, shape, rng))


def write_mp4(path: str | Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Encode uint8 frames (T, H, W, 3) as H.264; the same frames give the same bytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=ENCODER)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def render(name: str, shape: str, rng: np.random.Generator, frames: int | None = None) -> np.ndarray:
    """One clip of a class: uint8 (T, HEIGHT, WIDTH, 3), 20 to 28 frames, or `frames`."""
    frames = frames or int(rng.integers(20, 29))
    t = np.arange(frames, dtype=np.float32)[:, None, None] * float(rng.uniform(0.8, 1.25))
    # a state at t = 0 that is spread alike in every class, and the one thing that changes
    x, y, angle, size = (float(rng.uniform(0, end)) for end in (ROOM, ROOM, 2 * np.pi, 1))
    x = x + t * {"move_left": -1.2, "move_right": 1.2}.get(name, 0)
    y = y + t * {"move_up": -1.2, "move_down": 1.2}.get(name, 0)
    angle = angle + t * {"turn_left": -0.11, "turn_right": 0.11}.get(name, 0)
    size = size + t * {"shrink": -0.035, "grow": 0.035}.get(name, 0)

    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    dx = columns - (WIDTH - ROOM) / 2 - x % ROOM  # (T, H, W)
    dy = rows - (HEIGHT - ROOM) / 2 - y % ROOM
    cos, sin = np.cos(angle), np.sin(angle)  # rows grow downwards: a growing angle turns right
    along, across = (cos * dx + sin * dy) / 1.2, (cos * dy - sin * dx) / 0.8
    distance = np.hypot(along, across) + 0.01
    radius = RADII[0] * (RADII[1] / RADII[0]) ** (size % 1)
    cover = np.clip((radius * outline(shape, np.arctan2(across, along)) - distance) + 0.5, 0, 1)
    head = np.clip(along - 0.1 * radius + 0.5, 0, 1)  # one end in ink, the other in the second colour

    back = rng.uniform(0, 255, 3)
    ink, second = (contrasting(back, rng) for _ in range(2))
    back = back + rng.uniform(10, 40) * noise(rng, HEIGHT, WIDTH)[..., None] * rng.uniform(0.3, 1, 3)
    back, ink, second = (np.float32(colour) for colour in (back, ink, second))
    image = back + cover[..., None] * (second + head[..., None] * (ink - second) - back)
    return np.clip(image, 0, 255).astype(np.uint8)


def contrasting(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    while True:
        other = rng.uniform(0, 255, 3)
        if np.abs(other - colour).sum() > 220:
            return other


def noise(rng: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth random field (height, width) within about -1..1: a few waves."""
    rows, columns = np.mgrid[:height, :width]
    waves = rng.uniform(-0.4, 0.4, (5, 2))
    return sum(np.sin(a * rows + b * columns + rng.uniform(0, 6)) for a, b in waves) / 3


def outline(shape: str, angle: np.ndarray) -> np.ndarray:
    """How far the shape of radius 1 reaches in each direction."""
    match shape:
        case "disc":
            return np.full_like(angle, 0.9)
        case "square":
            return 0.75 / np.maximum(np.abs(np.cos(angle)), np.abs(np.sin(angle)))
        case "triangle":
            third = 2 * np.pi / 3
            return 0.5 / np.cos((angle + third / 2) % third - third / 2)
        case "cross":
            quarter = np.abs((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4)
            return np.minimum(0.95 / np.cos(quarter), 0.35 / np.sin(np.maximum(quarter, 0.01)))
        case "star":
            fifth = np.abs((angle / (0.4 * np.pi)) % 1 - 0.5) * 2
            return 0.45 + 0.55 * fifth**1.5
        case "flower":
            return 0.72 + 0.28 * np.cos(3 * angle)
