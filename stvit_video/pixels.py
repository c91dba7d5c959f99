"""What pixels a model expects: how they are normalised, and how frames are resized."""

from typing import NamedTuple


class Pixels(NamedTuple):
    """What weights were trained on: RGB values from 0 to 1, minus `mean`, over `std`; how frames were
    resized: "bilinear" or "bicubic"."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
