"""A video at a glance: a few of its frames as a small animated WebP, for pages that show many videos."""

import io

import torch
from PIL import Image
from torch import Tensor

PREVIEW_FRAMES, BOX, BYTES = 8, (112, 84), 6000
MILLISECONDS = 160  # of a frame: not the video's own pace, as its frames are far apart


def make_preview(frames: Tensor) -> bytes:
    """uint8 (N, 3, H, W) -> WebP of up to `PREVIEW_FRAMES` frames and `BYTES` bytes, no larger than `BOX`.

    The frames are spread over the N from the first to the last. What takes more bytes is made smaller.
    """
    places = torch.linspace(0, len(frames) - 1, min(PREVIEW_FRAMES, len(frames))).round().long()
    pictures = [Image.fromarray(frames[i].permute(1, 2, 0).contiguous().numpy()) for i in places.tolist()]
    width, height = pictures[0].size
    scale = min(BOX[0] / width, BOX[1] / height, 1.0)
    while True:
        size = max(round(scale * width), 1), max(round(scale * height), 1)
        data = _encode(
            [picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2) for picture in pictures]
        )
        if len(data) <= BYTES or max(size) <= 16:
            return data
        scale *= min((BYTES / len(data)) ** 0.5, 0.95)  # bytes go with the area


def _encode(pictures: list[Image.Image]) -> bytes:
    file = io.BytesIO()
    first, *rest = pictures
    animation = {"save_all": True, "append_images": rest, "duration": MILLISECONDS, "loop": 0}
    first.save(file, "WEBP", quality=30, method=2, **(animation if rest else {}))
    return file.getvalue()
