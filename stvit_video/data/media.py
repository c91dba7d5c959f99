"""What files hold pictures, by their names; nothing here needs a decoder."""

import re
from pathlib import Path

VIDEO_SUFFIXES = frozenset((
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
    ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
))  # fmt: skip
IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


def natural(path: Path) -> list[str | int]:
    """To sort by: img_2 before img_10."""
    parts: list[str | int] = re.split(r"(\d+)", path.name)
    parts[1::2] = map(int, parts[1::2])
    return parts
