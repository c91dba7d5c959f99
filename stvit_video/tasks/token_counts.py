"""Where tokens go: how many a model's windows have, and how many leave after which layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..figures import BORDER


class TokenCounts:
    """Of one row of a list: what a model says of the tokens of its windows.

    keep_map: also of the first pass, where in the frame tokens lie and leave; other passes are of other
        scales, or mirrored.
    """

    def __init__(self, keep_map: bool = False):
        self.keep_map, self.windows = keep_map, []
        self.map: np.ndarray | None = None

    def add(
        self, outputs: Any, places: Sequence[tuple[int, int]], window: Sequence[int], size: Sequence[int]
    ):
        """outputs: of a `Segmenter`; those of models whose tokens are the patches have nothing to count.

        places: top left corners of the windows (h, w) in a frame of `size` (H, W).
        """
        if not hasattr(outputs, "exits"):
            return
        for i, (y, x) in enumerate(places):
            counts = [(exit.layer, int(exit.tokens[i]), exit.leaving[i].cpu()) for exit in outputs.exits]
            self.windows.append((outputs.place.shape[1], int(outputs.tokens[i]), counts))
            if self.keep_map:
                if self.map is None:
                    self.map = np.zeros(size, np.uint8)
                part = window_map(outputs, i, window)
                target = self.map[y : y + window[0], x : x + window[1]]
                target[:] = part[: target.shape[0], : target.shape[1]]

    def record(self) -> dict[str, Any]:
        """ "tokens": of each window, int64; "patches": of one; "exits": by layer how many tokens were there
        before it, and how many of each class left, over all windows; "map". Empty without counts."""
        if not self.windows:
            return {}
        patches, tokens, counts = zip(*self.windows, strict=True)
        exits = {
            passed[0][0]: (
                sum(n for _, n, _ in passed),
                torch.stack([by_class for *_, by_class in passed]).sum(0),
            )
            for passed in zip(*counts, strict=True)
        }
        record = {"patches": patches[0], "tokens": torch.tensor(tokens), "exits": exits}
        return record if self.map is None else record | {"map": self.map}


def window_map(outputs: Any, i: int, size: Sequence[int]) -> np.ndarray:
    """Of window i, of `size` (h, w) in pixels: uint8, 0 where a token stays to the end, 1, 2, ... at which
    exit it left, `BORDER` between tokens. Of a clip, its middle tubelet."""
    frame = outputs.grid[0] // 2

    def pixels(values: Tensor) -> np.ndarray:
        grid = values[i].unflatten(0, outputs.grid)[frame].cpu().numpy()
        return grid.repeat(size[0] // len(grid), 0).repeat(size[1] // grid.shape[1], 1)

    place = pixels(outputs.place)
    out = np.zeros(place.shape, np.uint8)
    for number, exit in enumerate(outputs.exits, 1):
        out[pixels(exit.left)] = number
    for axis in (0, 1):
        out[np.diff(place, axis=axis, prepend=-1) != 0] = BORDER
    return out


def summary(records: Sequence[Mapping | None], class_names: Sequence[str]) -> dict[str, Any]:
    """-> "tokens": patches of a window, and the mean, least and most tokens; "exits": by layer the tokens
    that were there before it, that left there, and these by class, over all windows.

    Empty without counts.
    """
    counted = [record["tokens_of"] for record in records if record is not None and record.get("tokens_of")]
    if not counted:
        return {}
    tokens = torch.cat([record["tokens"] for record in counted])
    found = {
        "patches": counted[0]["patches"],
        "windows": len(tokens),
        "mean": int(tokens.sum()) / len(tokens),
        "least": int(tokens.min()),
        "most": int(tokens.max()),
    }
    exits = {}
    for layer in counted[0]["exits"]:
        by_class = sum(record["exits"][layer][1] for record in counted)
        exits[str(layer)] = {
            "tokens": sum(record["exits"][layer][0] for record in counted),
            "left": int(by_class.sum()),
            "classes": dict(zip(class_names, by_class.tolist(), strict=True)),
        }
    return {"tokens": found} | ({"exits": exits} if exits else {})


def line(figures: Mapping[str, Any]) -> str:
    """What `summary` gave, in words."""
    tokens, exits = figures["tokens"], figures.get("exits", {})
    parts = [
        f"{tokens['mean']:.1f} of {tokens['patches']} patches ({tokens['least']} to {tokens['most']})",
        *(f"{e['left'] / max(e['tokens'], 1):.1%} leave after layer {layer}" for layer, e in exits.items()),
    ]
    return f"  {'tokens':<24} {', '.join(parts)}"
